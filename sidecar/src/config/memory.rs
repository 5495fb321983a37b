//! How much memory the machine and the control group leave free: the ground for the default arena size and for refusing one that
//! cannot fit, before a page of it is touched. Reads files only.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Bytes in one huge page of the kind that the arena can use.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Cgroup v1 says "no limit" with a number near the top of the signed range.
const V1_NO_LIMIT: u64 = 1 << 62;

/// The control group whose limit leaves the least room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Folder of the group that sets the limit.
    pub folder: PathBuf,
    /// Its limit in bytes.
    pub limit: u64,
    /// Bytes that may still be taken; reclaimable file cache counts as free.
    pub free: u64,
}

/// What there is, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The kernel's own estimate of what can be had without swapping (`MemAvailable`).
    pub machine_free: u64,
    /// The tightest control group above this process, if any has a limit.
    pub cgroup: Option<Cgroup>,
    /// Reserved 2 MiB huge pages, in bytes.
    pub huge_total: u64,
    /// Of those, free ones.
    pub huge_free: u64,
}

impl Memory {
    /// Reads the figures of this machine.
    ///
    /// # Errors
    /// If `/proc/meminfo` cannot be read or has no `MemAvailable`.
    pub fn probe() -> io::Result<Self> {
        Self::read(Path::new("/"))
    }

    /// Reads the figures below `root`, so that tests can bring their own machine.
    ///
    /// # Errors
    /// As [`Self::probe`].
    pub fn read(root: &Path) -> io::Result<Self> {
        let meminfo = fs::read_to_string(root.join("proc/meminfo"))?;
        let machine_free = kib_line(&meminfo, "MemAvailable:").ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "/proc/meminfo has no MemAvailable",
            )
        })?;
        let huge = if kib_line(&meminfo, "Hugepagesize:") == Some(HUGE_PAGE_BYTES) {
            let pages = |name| plain_line(&meminfo, name).unwrap_or(0);
            let taken_soon = pages("HugePages_Rsvd:");
            let free = pages("HugePages_Free:").saturating_sub(taken_soon);
            (pages("HugePages_Total:"), free)
        } else {
            (0, 0)
        };
        Ok(Self {
            machine_free,
            cgroup: tightest_cgroup(root),
            huge_total: huge.0.saturating_mul(HUGE_PAGE_BYTES),
            huge_free: huge.1.saturating_mul(HUGE_PAGE_BYTES),
        })
    }

    /// Bytes of ordinary pages that can be had: the lesser of what the machine and the control group leave.
    pub fn free(&self) -> u64 {
        let in_cgroup = self.cgroup.as_ref().map_or(u64::MAX, |group| group.free);
        self.machine_free.min(in_cgroup)
    }

    /// Which of the two sets the limit, for error texts.
    pub fn limited_by(&self) -> &'static str {
        match &self.cgroup {
            Some(group) if group.free < self.machine_free => "the control group (container)",
            _ => "the machine",
        }
    }
}

fn line<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|l| l.strip_prefix(name))
        .map(str::trim)
}

fn plain_line(text: &str, name: &str) -> Option<u64> {
    line(text, name)?.parse().ok()
}

fn kib_line(text: &str, name: &str) -> Option<u64> {
    let kib: u64 = line(text, name)?.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A hierarchy of control groups and the names of its files.
struct Hierarchy {
    mount: &'static str,
    limit: &'static str,
    used: &'static str,
    reclaimable: &'static str,
}

const V2: Hierarchy = Hierarchy {
    mount: "sys/fs/cgroup",
    limit: "memory.max",
    used: "memory.current",
    reclaimable: "inactive_file ",
};
const V1: Hierarchy = Hierarchy {
    mount: "sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file ",
};

/// A limit anywhere above this process binds it, so every level is looked at. In a container the path of `/proc/self/cgroup` may not
/// exist below the mount; the levels that do exist (at least the root) are the container's own.
fn tightest_cgroup(root: &Path) -> Option<Cgroup> {
    let memberships = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let groups = memberships.lines().filter_map(|l| {
        let (_, rest) = l.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let hierarchy = if controllers.is_empty() {
            V2
        } else if controllers.split(',').any(|c| c == "memory") {
            V1
        } else {
            return None;
        };
        Some(
            levels(root, &hierarchy, path)
                .filter_map(|folder| cgroup_at(&hierarchy, folder))
                .collect::<Vec<_>>(),
        )
    });
    groups.flatten().min_by_key(|group| group.free)
}

fn levels(root: &Path, hierarchy: &Hierarchy, path: &str) -> impl Iterator<Item = PathBuf> {
    let mount = root.join(hierarchy.mount);
    let inner = PathBuf::from(path.trim_start_matches('/'));
    let up: Vec<PathBuf> = inner.ancestors().map(|level| mount.join(level)).collect();
    up.into_iter()
}

fn cgroup_at(hierarchy: &Hierarchy, folder: PathBuf) -> Option<Cgroup> {
    let number = |file: &str| -> Option<u64> {
        let text = fs::read_to_string(folder.join(file)).ok()?;
        text.trim().parse().ok()
    };
    let limit = number(hierarchy.limit).filter(|l| *l < V1_NO_LIMIT)?;
    let used = number(hierarchy.used).unwrap_or(0);
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let reclaimable = plain_line(&stat, hierarchy.reclaimable).unwrap_or(0);
    let free = limit.saturating_sub(used.saturating_sub(reclaimable));
    Some(Cgroup {
        folder,
        limit,
        free,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            let meminfo = format!(
                "MemTotal: {} kB\nMemAvailable:   {} kB\nHugePages_Total:       8\nHugePages_Free:        6\n\
                 HugePages_Rsvd:        1\nHugepagesize:       2048 kB\n",
                64 * GIB / 1024,
                40 * GIB / 1024
            );
            machine.file("proc/meminfo", &meminfo);
            machine
        }

        fn file(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn read(&self) -> Memory {
            Memory::read(self.0.path()).unwrap()
        }
    }

    #[test]
    fn without_a_control_group_the_machine_decides() {
        let memory = Machine::new().read();
        assert_eq!(memory.free(), 40 * GIB);
        assert_eq!(memory.limited_by(), "the machine");
        assert_eq!(memory.huge_total, 16 << 20);
        assert_eq!(
            memory.huge_free,
            10 << 20,
            "reserved ones are promised to others"
        );
    }

    #[test]
    fn a_limit_of_an_outer_group_binds_and_file_cache_counts_as_free() {
        let machine = Machine::new();
        machine.file("proc/self/cgroup", "0::/pod/box\n");
        machine.file("sys/fs/cgroup/pod/box/memory.max", "max\n");
        machine.file("sys/fs/cgroup/pod/memory.max", &format!("{}\n", 10 * GIB));
        machine.file(
            "sys/fs/cgroup/pod/memory.current",
            &format!("{}\n", 7 * GIB),
        );
        machine.file(
            "sys/fs/cgroup/pod/memory.stat",
            &format!("anon 5\ninactive_file {}\n", 3 * GIB),
        );
        let memory = machine.read();
        assert_eq!(memory.free(), 6 * GIB);
        assert!(memory.limited_by().contains("control group"));
        assert_eq!(memory.cgroup.unwrap().limit, 10 * GIB);
    }

    #[test]
    fn a_container_sees_its_limit_at_the_mount_although_its_path_is_not_there() {
        let machine = Machine::new();
        machine.file("proc/self/cgroup", "0::/../../unseen\n");
        machine.file("sys/fs/cgroup/memory.max", &format!("{}\n", 2 * GIB));
        machine.file("sys/fs/cgroup/memory.current", &format!("{GIB}\n"));
        assert_eq!(machine.read().free(), GIB);
    }

    #[test]
    fn version_1_groups_are_understood_and_its_no_limit_is_none() {
        let machine = Machine::new();
        machine.file("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/x\n");
        machine.file(
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        assert_eq!(machine.read().cgroup, None);
        machine.file(
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes",
            &format!("{}\n", 4 * GIB),
        );
        machine.file(
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes",
            &format!("{}\n", 5 * GIB),
        );
        assert_eq!(
            machine.read().free(),
            0,
            "over the limit is no free memory, not a wrap"
        );
    }

    #[test]
    fn a_machine_without_the_figure_is_an_error() {
        let machine = Machine::new();
        machine.file("proc/meminfo", "MemTotal: 1 kB\n");
        assert!(Memory::read(machine.0.path()).is_err());
    }
}
