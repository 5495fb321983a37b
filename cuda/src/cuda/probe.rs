//! Whether CUDA can be used here, and if not, why not and what to do.
//!
//! Asking costs no memory on the GPU: no context is made.

use std::ffi::OsStr;
use std::path::Path;

use super::codes::DriverError;
use super::driver::{Device, Driver, LIBRARY, VERSION_MIN};
use super::place::Place;
use crate::schedule::CopyLimits;

/// Why CUDA cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoCuda {
    /// There is no driver library.
    #[error(
        "no CUDA driver ({0}): install NVIDIA's driver, or give the container its GPUs (docker run --gpus all)"
    )]
    NoLibrary(String),
    /// The library lacks an entry point.
    #[error("the CUDA driver has no {0}: install a driver for CUDA 12.0 or newer (R525)")]
    MissingSymbol(&'static str),
    /// A toolkit's library for linking was loaded.
    #[error(
        "libcuda.so.1 is a CUDA toolkit's stub for linking (code 34): take the toolkit's `stubs` folder out of \
         LD_LIBRARY_PATH"
    )]
    Stub,
    /// There is a driver and no GPU.
    #[error(
        "the CUDA driver sees no device: look at `nvidia-smi`, at CUDA_VISIBLE_DEVICES, and whether the container was given \
         GPUs"
    )]
    NoDevice,
    /// The library and the kernel's module are of different releases.
    #[error(
        "the driver's library and its kernel module are of different releases (code {code}): restart the machine after the \
         driver's update; in a container remove CUDA's compatibility package"
    )]
    Mismatch {
        /// The driver's own error number.
        code: i32,
    },
    /// The driver serves an old release of CUDA only.
    #[error(
        "the driver is for CUDA {}.{} and Greenroom needs 12.0: install a newer driver (R525)",
        version / 1000,
        version % 1000 / 10
    )]
    TooOld {
        /// As the driver says it: 11040 is 11.4.
        version: i32,
    },
    /// There is no device of this number.
    #[error(
        "there is no CUDA device {ordinal}: this process sees {count}, counted from 0 (CUDA_VISIBLE_DEVICES)"
    )]
    WrongDevice {
        /// The device asked for.
        ordinal: u32,
        /// Devices that this process sees.
        count: u32,
    },
    /// The KV memory is not on the device that copies were to be made on.
    #[error("the KV memory at {address:#x} is not on CUDA device {ordinal}: {found}")]
    WrongMemory {
        /// The address of a region.
        address: u64,
        /// The device asked for.
        ordinal: u32,
        /// What the driver says of the address.
        found: String,
    },
    /// The driver failed a call.
    #[error(
        "{operation} failed with code {code}: look at `nvidia-smi` and the kernel's log (dmesg, \"NVRM\")"
    )]
    Driver {
        /// The driver call.
        operation: &'static str,
        /// The driver's own error number.
        code: i32,
    },
}

impl NoCuda {
    /// What a failure of `cuInit` means.
    pub(super) fn of_init(error: DriverError) -> Self {
        match error.code {
            34 => Self::Stub,
            100 => Self::NoDevice,
            code @ (803 | 804) => Self::Mismatch { code },
            _ => Self::from(error),
        }
    }
}

impl From<DriverError> for NoCuda {
    fn from(DriverError { operation, code }: DriverError) -> Self {
        Self::Driver { operation, code }
    }
}

/// A GPU that can be used.
pub struct CudaDevice {
    pub(super) device: Device,
    ordinal: u32,
    version: i32,
    place: Place,
}

impl CudaDevice {
    /// Looks for the device of this number, counted as CUDA and torch do. Never panics.
    ///
    /// Errors: [`NoCuda`] names the cause and what to do.
    pub fn probe(ordinal: u32) -> Result<Self, NoCuda> {
        Self::probe_with(OsStr::new(LIBRARY), ordinal)
    }

    /// The same with a driver library at a place of its own.
    pub fn probe_at(library: &Path, ordinal: u32) -> Result<Self, NoCuda> {
        Self::probe_with(library.as_os_str(), ordinal)
    }

    fn probe_with(library: &OsStr, ordinal: u32) -> Result<Self, NoCuda> {
        let driver = Driver::load(library)?;
        let version = driver.version()?;
        if version < VERSION_MIN {
            return Err(NoCuda::TooOld { version });
        }
        let count = driver.devices()?;
        if count == 0 {
            return Err(NoCuda::NoDevice);
        }
        if ordinal >= count {
            return Err(NoCuda::WrongDevice { ordinal, count });
        }
        let device = driver.device(ordinal)?;
        let address = device.pci_address().unwrap_or_else(|error| {
            tracing::info!(%error, "the GPU's place in the machine is unknown");
            String::new()
        });
        let place = Place::find(Path::new("/sys"), &address);
        Ok(Self {
            device,
            ordinal,
            version,
            place,
        })
    }

    /// Its number.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The newest release of CUDA that its driver serves: 12080 is 12.8.
    pub fn driver_version(&self) -> i32 {
        self.version
    }

    /// Whether the driver copies many ranges in one call (12.8 and later).
    pub fn has_batch_copies(&self) -> bool {
        self.device.driver().has_batch()
    }

    /// Where in the machine it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The limits that suit its link: a sub-batch takes some 0.16 ms on PCIe 4 and on PCIe 5, and that is how long vLLM's own
    /// small copies may have to wait for each one that is outstanding.
    pub fn limits(&self) -> CopyLimits {
        let usual = CopyLimits::default();
        let fast = self
            .place
            .link_max_gt
            .is_some_and(|speed| speed >= PCIE_5_GT);
        CopyLimits {
            sub_batch_bytes: usual.sub_batch_bytes * if fast { 2 } else { 1 },
            ..usual
        }
    }
}

/// Transfers per second and lane of PCIe 5, in 10⁹.
const PCIE_5_GT: f64 = 32.0;
