//! The machine's memory: what the arena takes, huge pages, limits on them and on page-locking.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::config::{Config, ConfigError, Machine, Pages, Settings, Size};

/// An arena above this share of what is free leaves little for the engine itself.
const SHARE_TIGHT: f64 = 0.8;

/// What `greenroom serve` would take, and whether it fits.
pub(super) fn memory(root: &Path, settings: &Settings) -> Vec<Finding> {
    let machine = match Machine::probe() {
        Ok(machine) => machine,
        Err(error) => {
            return vec![
                Finding::problem("memory", error.to_string())
                    .do_this("mount /proc; `greenroom serve` needs it too"),
            ];
        }
    };
    let mut findings = vec![arena(settings, &machine), huge_pages(settings, &machine)];
    findings.extend(huge_limit(root, settings, &machine));
    findings
}

fn arena(settings: &Settings, machine: &Machine) -> Finding {
    let area = "memory";
    let free = machine.memory.free();
    let limit = machine
        .memory
        .cgroup
        .as_ref()
        .map_or(String::new(), |group| {
            format!(
                "; the control group allows {}",
                super::out::size(group.limit)
            )
        });
    match Config::resolve(settings.clone(), machine) {
        Ok(config) => {
            let (takes, by) = (super::out::size(config.memory), machine.memory.limited_by());
            let found = format!(
                "serve takes {takes}; {by} leaves {} free{limit}",
                super::out::size(free)
            );
            // Rounding does not matter for a rule of thumb.
            #[expect(clippy::cast_precision_loss, reason = "a share for a rule of thumb")]
            let share = config.memory as f64 / free.max(1) as f64;
            if settings.page_size != Some(Pages::Huge) && share > SHARE_TIGHT {
                Finding::warning(area, found)
                    .do_this("leave room for the engine: give a smaller --memory")
            } else {
                Finding::ok(area, found)
            }
        }
        Err(error @ ConfigError::NoMemory { .. }) => Finding::problem(area, error.to_string())
            .do_this("give a smaller --memory, or raise the container's limit"),
        Err(error) => Finding::problem("config", error.to_string())
            .do_this("correct the setting; `greenroom serve` refuses it too"),
    }
}

fn huge_pages(settings: &Settings, machine: &Machine) -> Finding {
    let area = "huge pages";
    let (total, free) = (machine.memory.huge_total, machine.memory.huge_free);
    let found = format!("{} of {} in 2MiB pages free", Size(free), Size(total));
    match (settings.page_size, total) {
        (Some(Pages::Huge), 0) => {
            Finding::problem(area, "none are reserved, but --page-size 2MiB wants them").do_this(
                "sysctl vm.nr_hugepages=N (N = arena size / 2MiB), or leave --page-size out",
            )
        }
        (_, 0) => Finding::ok(area, "none are reserved; the arena uses 4KiB pages"),
        (Some(Pages::Huge), _) => Finding::ok(area, found),
        (_, _) => Finding::note(area, format!("{found}, but serve uses 4KiB pages")).do_this(
            "give --page-size 2MiB to use them; reserved pages are lost to everything else",
        ),
    }
}

/// A control group may allow fewer huge pages than the machine has free; an arena beyond that dies of SIGBUS, so it is said before.
fn huge_limit(root: &Path, settings: &Settings, machine: &Machine) -> Option<Finding> {
    if settings.page_size != Some(Pages::Huge) {
        return None;
    }
    let takes = Config::resolve(settings.clone(), machine).ok()?.memory;
    let room = huge_room(root)?;
    (room < takes).then(|| {
        let (takes, room) = (super::out::size(takes), super::out::size(room));
        let found = format!("the control group leaves {room} in 2MiB pages, serve takes {takes}");
        Finding::problem("huge pages", found)
            .do_this("raise its hugetlb.2MB.max (Kubernetes: the limit hugepages-2Mi), or give a smaller --memory")
    })
}

/// What the tightest control group around this process leaves in 2 MiB pages, in bytes; none if no group sets a limit.
fn huge_room(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let number = |folder: &Path, name: &str| -> Option<u64> {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        text.trim().parse().ok()
    };
    let levels = Path::new(own).ancestors();
    levels
        .flat_map(|level| ["hugetlb.2MB", "hugetlb.2MB.rsvd"].map(|kind| (level, kind)))
        .filter_map(|(level, kind)| {
            let folder = root.join("sys/fs/cgroup").join(level);
            let limit = number(&folder, &format!("{kind}.max"))?;
            let used = number(&folder, &format!("{kind}.current")).unwrap_or(0);
            Some(limit.saturating_sub(used))
        })
        .min()
}

/// Said because people look for it: the limit does not matter here.
pub(super) fn memlock() -> Finding {
    let limit = getrlimit(Resource::Memlock).current;
    let limit = limit.map_or_else(|| "unlimited".to_owned(), super::out::size);
    Finding::ok(
        "memlock",
        format!(
            "RLIMIT_MEMLOCK is {limit}; the NVIDIA driver's page-locking is not counted against it"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::super::tests::Root;
    use super::*;
    use crate::config::memory::Memory;

    fn with_memory(free: u64, huge_total: u64) -> Machine {
        Machine {
            memory: Memory {
                machine_free: free,
                cgroup: None,
                huge_total,
                huge_free: huge_total,
            },
            socket: "/run/greenroom.sock".into(),
        }
    }

    #[test]
    fn an_arena_that_does_not_fit_is_a_problem_and_a_tight_one_a_warning() {
        let asked = |size: u64| Settings {
            memory: Some(Size(size << 30)),
            ..Settings::default()
        };
        let machine = with_memory(10 << 30, 0);
        assert_eq!(arena(&asked(5), &machine).severity, Severity::Ok);
        assert_eq!(arena(&asked(9), &machine).severity, Severity::Warning);
        let too_much = arena(&asked(11), &machine);
        assert_eq!(too_much.severity, Severity::Problem);
        assert!(too_much.action.is_some());
    }

    #[test]
    fn huge_pages_are_missed_only_where_they_are_wanted() {
        let wanted = Settings {
            page_size: Some(Pages::Huge),
            ..Settings::default()
        };
        let plain = Settings::default();
        assert_eq!(
            huge_pages(&plain, &with_memory(1 << 30, 0)).severity,
            Severity::Ok
        );
        assert_eq!(
            huge_pages(&wanted, &with_memory(1 << 30, 0)).severity,
            Severity::Problem
        );
        assert_eq!(
            huge_pages(&wanted, &with_memory(1 << 30, 8 << 20)).severity,
            Severity::Ok
        );
        assert_eq!(
            huge_pages(&plain, &with_memory(1 << 30, 8 << 20)).severity,
            Severity::Note
        );
    }

    #[test]
    fn a_control_group_that_allows_fewer_huge_pages_is_a_problem() {
        let asked = |page_size| Settings {
            memory: Some(Size(8 << 20)),
            page_size: Some(page_size),
            ..Settings::default()
        };
        let machine = with_memory(1 << 30, 64 << 20);
        let root = Root::new();
        let limit = |pages| huge_limit(root.path(), &asked(pages), &machine);
        assert_eq!(limit(Pages::Huge), None, "no control group is known");
        root.file("proc/self/cgroup", "0::/pod/box");
        let pod = "sys/fs/cgroup/pod";
        root.file(&format!("{pod}/box/hugetlb.2MB.max"), "max");
        assert_eq!(limit(Pages::Huge), None);
        root.file(&format!("{pod}/hugetlb.2MB.max"), "10485760");
        assert_eq!(limit(Pages::Huge), None, "10 MiB are enough");
        root.file(&format!("{pod}/hugetlb.2MB.current"), "4194304");
        let found = limit(Pages::Huge).unwrap();
        assert_eq!(found.severity, Severity::Problem);
        assert!(found.found.contains("leaves 6.0 MiB"), "{found:?}");
        assert_eq!(limit(Pages::Base), None);
        root.file(&format!("{pod}/hugetlb.2MB.current"), "0");
        root.file(&format!("{pod}/box/hugetlb.2MB.rsvd.max"), "0");
        assert!(limit(Pages::Huge).is_some(), "nothing may be reserved");
    }
}
