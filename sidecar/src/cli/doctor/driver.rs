//! The NVIDIA driver: whether it is there, and what its version number says. Files only, below a root that tests replace.

use std::fs;
use std::path::Path;

use super::Finding;

/// Where the driver's library is usually found.
const LIBCUDA: [&str; 5] = [
    "usr/lib/x86_64-linux-gnu/libcuda.so.1",
    "usr/lib/aarch64-linux-gnu/libcuda.so.1",
    "usr/lib64/libcuda.so.1",
    "usr/lib/libcuda.so.1",
    "usr/lib/wsl/lib/libcuda.so.1",
];

/// The first release for CUDA 12.0, which the copy engine needs.
const RELEASE_MIN: u32 = 525;

/// The first release for CUDA 12.8, which copies many ranges in one call.
const RELEASE_BATCH: u32 = 570;

/// Is there a driver that an engine could use?
pub(super) fn release(root: &Path) -> Finding {
    let area = "driver";
    let version = fs::read_to_string(root.join("proc/driver/nvidia/version")).ok();
    let version = version.as_deref().and_then(version_in);
    let library = LIBCUDA.iter().any(|path| root.join(path).exists());
    let devices = root.join("dev/nvidiactl").exists() || root.join("dev/dxg").exists();
    match (version, library, devices) {
        (Some(version), true, true) => judged(&version),
        (None, true, true) => Finding::note(area, "an NVIDIA driver of unknown version")
            .do_this(format!("nvidia-smi tells it: R{RELEASE_MIN} or newer is needed, R{RELEASE_BATCH} copies small blocks faster")),
        (None, _, false) => Finding::note(area, "no NVIDIA driver: only CPU builds of vLLM can run here")
            .do_this(format!("for a GPU, install driver R{RELEASE_BATCH} or newer; in a container, start it with --gpus all")),
        (_, false, _) => Finding::warning(area, "the NVIDIA driver runs, but libcuda.so.1 is not in the usual folders")
            .do_this("in a container, start it with --gpus all (the NVIDIA container toolkit brings the library in)"),
        (Some(_), _, false) => Finding::warning(area, "the NVIDIA driver is loaded, but /dev/nvidiactl is not here")
            .do_this("in a container, start it with --gpus all; on a host, run nvidia-modprobe or nvidia-smi once as root"),
    }
}

/// CUDA itself is never asked: that would initialise it.
fn judged(version: &str) -> Finding {
    let area = "driver";
    let release = version.split('.').next().and_then(|text| text.parse().ok());
    match release.unwrap_or(0) {
        0..RELEASE_MIN => Finding::problem(
            area,
            format!("NVIDIA driver {version} is older than CUDA 12.0, which copies need"),
        )
        .do_this(format!("install R{RELEASE_BATCH} or newer (R{RELEASE_MIN} at least)")),
        RELEASE_MIN..RELEASE_BATCH => Finding::warning(
            area,
            format!("NVIDIA driver {version} is older than CUDA 12.8: many small ranges are not copied in one call"),
        )
        .do_this(format!("install R{RELEASE_BATCH} or newer")),
        RELEASE_BATCH.. => Finding::ok(area, format!("NVIDIA driver {version}: copies many ranges in one call")),
    }
}

/// `NVRM version: NVIDIA UNIX ... Kernel Module  580.65.06  Release Build` → `580.65.06`.
fn version_in(text: &str) -> Option<String> {
    let line = text.lines().find(|l| l.starts_with("NVRM version:"))?;
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(is_version).map(str::to_owned)
}

/// Windows lends a GPU to its Linux, and counts what is page-locked there as the GPU's own memory.
pub(super) fn wsl(root: &Path) -> Option<Finding> {
    let kernel = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let inside = root.join("dev/dxg").exists() || kernel.to_lowercase().contains("microsoft");
    inside.then(|| {
        Finding::warning(
            "wsl",
            "Windows Subsystem for Linux: page-locked host memory is charged to the GPU's memory",
        )
        .do_this("give a smaller --memory, so that the arena fits beside model and KV")
    })
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::super::tests::Root;
    use super::*;

    const VERSION: &str = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.2.0";

    #[test]
    fn the_driver_is_found_by_its_files() {
        let root = Root::new();
        let driver = || release(root.path());
        assert_eq!(driver().severity, Severity::Note);
        root.file("proc/driver/nvidia/version", VERSION);
        assert_eq!(driver().severity, Severity::Warning, "no library yet");
        root.file("usr/lib64/libcuda.so.1", "");
        assert!(driver().found.contains("/dev/nvidiactl"));
        root.file("dev/nvidiactl", "");
        assert_eq!(driver().severity, Severity::Ok);
        assert!(driver().found.contains("580.65.06"));
        root.file("proc/driver/nvidia/version", "something else");
        assert_eq!(driver().severity, Severity::Note);
        assert!(driver().found.contains("unknown version"));
    }

    #[test]
    fn releases_are_told_apart_by_what_they_can_do() {
        for (version, severity) in [
            ("470.256.02", Severity::Problem),
            ("524.9", Severity::Problem),
            ("525.60.13", Severity::Warning),
            ("569.99", Severity::Warning),
            ("570.26", Severity::Ok),
            ("1000.1", Severity::Ok),
        ] {
            assert_eq!(judged(version).severity, severity, "{version}");
        }
    }

    #[test]
    fn wsl_is_known_by_its_device_or_its_kernel() {
        let root = Root::new();
        assert_eq!(wsl(root.path()), None, "unknown kernel");
        root.file("proc/sys/kernel/osrelease", "6.8.0-45-generic");
        assert_eq!(wsl(root.path()), None);
        root.file(
            "proc/sys/kernel/osrelease",
            "5.15.153.1-microsoft-standard-WSL2",
        );
        assert_eq!(wsl(root.path()).unwrap().severity, Severity::Warning);
        let root = Root::new();
        root.file("dev/dxg", "");
        assert!(wsl(root.path()).is_some());
    }
}
