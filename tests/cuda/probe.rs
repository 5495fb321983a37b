//! What is said where CUDA cannot be used.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use cuda::conformance::{PoolShape, RegionShape};
use cuda::{CopyMethod, CudaDevice, CudaEngine, DevicePool, DeviceRegion, NoCuda};

use crate::rig::{Factory, library, take};

/// Tells the child of `the_driver_is_found_by_its_name` what it is.
const CHILD: &str = "GREENROOM_TEST_CHILD";

fn probe(ordinal: u32) -> Result<i32, NoCuda> {
    CudaDevice::probe_at(&library(), ordinal).map(|device| device.driver_version())
}

#[test]
fn each_cause_has_its_name() {
    let (_turn, driver) = take();
    assert_eq!(probe(0), Ok(12_080));
    let init = |code| {
        driver.fail("cuInit", 1, code);
        probe(0).unwrap_err()
    };
    assert_eq!(init(34), NoCuda::Stub);
    assert_eq!(init(100), NoCuda::NoDevice);
    assert_eq!(init(803), NoCuda::Mismatch { code: 803 });
    assert_eq!(init(804), NoCuda::Mismatch { code: 804 });
    assert_eq!(
        init(999).to_string(),
        "cuInit failed with code 999: look at `nvidia-smi` and the kernel's log (dmesg, \"NVRM\")"
    );
    assert_eq!(
        probe(3),
        Err(NoCuda::WrongDevice {
            ordinal: 3,
            count: 1
        })
    );
    driver.set("devices", 0);
    assert_eq!(probe(0), Err(NoCuda::NoDevice));
    driver.set("devices", 1);
    driver.set("version", 11_040);
    let old = probe(0).unwrap_err();
    assert_eq!(old, NoCuda::TooOld { version: 11_040 });
    assert!(old.to_string().contains("CUDA 11.4"), "{old}");
    assert_eq!(driver.get("retained"), 0, "asking makes no context");
}

#[test]
fn no_library_and_no_driver() {
    let missing = CudaDevice::probe_at(Path::new("/nowhere/libcuda.so.1"), 0).err();
    let text = missing.map(|why| why.to_string()).unwrap_or_default();
    for part in ["no CUDA driver (", "/nowhere/libcuda.so.1", "--gpus all"] {
        assert!(text.contains(part), "{part:?} is missing in {text:?}");
    }
    let other = CudaDevice::probe_at(Path::new("libc.so.6"), 0).err();
    assert_eq!(other, Some(NoCuda::MissingSymbol("cuInit")));
}

/// A stub has the driver's name without its version, and cudarc would have taken it first.
#[test]
fn the_driver_is_found_by_its_name() {
    if std::env::var_os(CHILD).is_some() {
        let found = CudaDevice::probe(0).map(|device| device.driver_version());
        println!("found {found:?}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(library(), folder.path().join("libcuda.so.1")).unwrap();
    std::fs::write(folder.path().join("libcuda.so"), "a stub").unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "probe::the_driver_is_found_by_its_name",
            "--exact",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .env("LD_LIBRARY_PATH", folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(said.contains("found Ok(12080)"), "{said}");
}

#[test]
fn memory_of_another_device_is_refused() {
    let (_turn, driver) = take();
    let shape = PoolShape {
        bytes: 4096,
        regions: vec![RegionShape {
            offset: 0,
            block_stride: 4096,
            block_bytes: 4096,
        }],
        blocks: 1,
    };
    driver.set("memory_device", 1);
    let refused = Factory::new(&driver, CopyMethod::Auto).engine(&shape).err();
    let text = refused.map(|why| why.to_string()).unwrap_or_default();
    assert!(
        text.contains("is not on CUDA device 0: it is on device 1"),
        "{text}"
    );
    let device = CudaDevice::probe_at(&library(), 0).unwrap();
    let refused = CudaEngine::new(&device, host_pool(), CopyMethod::Auto).err();
    let text = refused.map(|why| why.to_string()).unwrap_or_default();
    assert!(text.contains("no memory of CUDA's"), "{text}");
    assert_eq!(driver.get("retained"), 0);
}

/// A pool that is no device's.
#[allow(unsafe_code, reason = "the constructor wants an address vouched for")]
fn host_pool() -> Arc<DevicePool> {
    let region = DeviceRegion {
        base: 4096,
        block_stride: 16,
        block_bytes: 16,
    };
    // SAFETY: the engine that it is given to refuses it.
    Arc::new(unsafe { DevicePool::new(vec![region], 1) }.unwrap())
}
