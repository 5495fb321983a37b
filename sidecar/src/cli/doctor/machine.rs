//! The machine: driver, PCIe links, memory, huge pages. Files only, below a root that tests replace.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::config::{Config, ConfigError, Machine, Pages, Settings, Size};

/// Where the driver's library is usually found.
const LIBCUDA: [&str; 5] = [
    "usr/lib/x86_64-linux-gnu/libcuda.so.1",
    "usr/lib/aarch64-linux-gnu/libcuda.so.1",
    "usr/lib64/libcuda.so.1",
    "usr/lib/libcuda.so.1",
    "usr/lib/wsl/lib/libcuda.so.1",
];

/// PCI vendor number of NVIDIA.
const NVIDIA: &str = "0x10de";

/// An arena above this share of what is free leaves little for the engine itself.
const SHARE_TIGHT: f64 = 0.8;

/// Is there a driver that an engine could use?
pub(super) fn driver(root: &Path) -> Finding {
    let area = "driver";
    let version = fs::read_to_string(root.join("proc/driver/nvidia/version")).ok();
    let version = version.as_deref().and_then(driver_version);
    let library = LIBCUDA.iter().any(|path| root.join(path).exists());
    let devices = root.join("dev/nvidiactl").exists() || root.join("dev/dxg").exists();
    match (version, library, devices) {
        (Some(version), true, true) => Finding::ok(area, format!("NVIDIA driver {version}")),
        (None, true, true) => Finding::ok(area, "NVIDIA driver (WSL or unknown version)"),
        (None, _, false) => Finding::note(area, "no NVIDIA driver: only CPU builds of vLLM can run here"),
        (_, false, _) => Finding::warning(area, "the NVIDIA driver runs, but libcuda.so.1 is not in the usual folders")
            .do_this("in a container, start it with --gpus all (the NVIDIA container toolkit brings the library in)"),
        (Some(_), _, false) => Finding::warning(area, "the NVIDIA driver is loaded, but /dev/nvidiactl is not here")
            .do_this("in a container, start it with --gpus all; on a host, run nvidia-modprobe or nvidia-smi once as root"),
    }
}

/// `NVRM version: NVIDIA UNIX ... Kernel Module  580.65.06  Release Build` → `580.65.06`.
fn driver_version(text: &str) -> Option<String> {
    let line = text.lines().find(|l| l.starts_with("NVRM version:"))?;
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(is_version).map(str::to_owned)
}

/// The PCIe link of every NVIDIA GPU: its width bounds how fast KV comes back.
pub(super) fn pcie(root: &Path) -> Vec<Finding> {
    let Ok(entries) = fs::read_dir(root.join("sys/bus/pci/devices")) else {
        return Vec::new();
    };
    let mut folders: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    folders.sort();
    folders.iter().filter_map(|folder| link(folder)).collect()
}

fn link(folder: &Path) -> Option<Finding> {
    let area = "pcie";
    let read = |name: &str| {
        fs::read_to_string(folder.join(name))
            .ok()
            .map(|t| t.trim().to_owned())
    };
    let display = read("class")?.starts_with("0x03");
    if read("vendor")? != NVIDIA || !display {
        return None;
    }
    let address = folder.file_name()?.to_string_lossy().into_owned();
    let (Some(width), Some(most)) = (read("current_link_width"), read("max_link_width")) else {
        return Some(Finding::note(
            area,
            format!("GPU {address}: the system does not tell its link width"),
        ));
    };
    let speed = read("max_link_speed").unwrap_or_else(|| "unknown speed".to_owned());
    let (Ok(now), Ok(could)) = (width.parse::<u32>(), most.parse::<u32>()) else {
        return Some(Finding::note(
            area,
            format!("GPU {address}: link x{width} of x{most}"),
        ));
    };
    let found = format!("GPU {address}: link x{now} of x{could} ({speed} at most)");
    Some(if now < could {
        Finding::warning(area, found)
            .do_this("KV comes back that much slower: put the card into a full-width slot, reseat it, or free lanes that other devices share")
    } else {
        Finding::ok(area, found)
    })
}

/// What `greenroom serve` would take, and whether it fits.
pub(super) fn memory(settings: &Settings) -> Vec<Finding> {
    match Machine::probe() {
        Ok(machine) => vec![arena(settings, &machine), huge_pages(settings, &machine)],
        Err(error) => vec![Finding::problem("memory", error.to_string())],
    }
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
    use super::*;
    use crate::config::memory::Memory;

    struct Root(tempfile::TempDir);

    impl Root {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, path: &str, text: &str) -> &Self {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        fn gpu(&self, address: &str, width: &str) -> &Self {
            let folder = format!("sys/bus/pci/devices/{address}");
            for (name, text) in [
                ("vendor", "0x10de"),
                ("class", "0x030000"),
                ("current_link_width", width),
                ("max_link_width", "16"),
                ("max_link_speed", "16.0 GT/s PCIe"),
            ] {
                self.file(&format!("{folder}/{name}"), &format!("{text}\n"));
            }
            self
        }

        fn driver(&self) -> Finding {
            driver(self.0.path())
        }
    }

    const VERSION: &str = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.2.0\n";

    #[test]
    fn the_driver_is_found_by_its_files() {
        let root = Root::new();
        assert_eq!(root.driver().severity, Severity::Note);
        root.file("proc/driver/nvidia/version", VERSION);
        assert_eq!(root.driver().severity, Severity::Warning, "no library yet");
        root.file("usr/lib64/libcuda.so.1", "");
        assert!(root.driver().found.contains("/dev/nvidiactl"));
        root.file("dev/nvidiactl", "");
        assert_eq!(
            root.driver(),
            Finding::ok("driver", "NVIDIA driver 580.65.06")
        );
    }

    #[test]
    fn a_narrow_link_is_a_warning_and_other_devices_are_passed_over() {
        let root = Root::new();
        root.gpu("0000:01:00.0", "16").gpu("0000:02:00.0", "8");
        root.file("sys/bus/pci/devices/0000:03:00.0/vendor", "0x8086\n");
        root.gpu("0000:04:00.0", "16")
            .file("sys/bus/pci/devices/0000:04:00.0/class", "0x040300\n");
        let found = pcie(root.0.path());
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0].severity, Severity::Ok);
        assert_eq!(found[1].severity, Severity::Warning);
        assert!(
            found[1].found.contains("0000:02:00.0: link x8 of x16"),
            "{found:?}"
        );
    }

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
}
