//! The driver's error numbers, and what each of them means for the engine.

use cudarc::driver::sys::CUresult;

use crate::engine::CopyError;

const SUCCESS: i32 = CUresult::CUDA_SUCCESS as i32;
const NOT_READY: i32 = CUresult::CUDA_ERROR_NOT_READY as i32;
const INVALID_VALUE: i32 = CUresult::CUDA_ERROR_INVALID_VALUE as i32;
pub(super) const NOT_SUPPORTED: i32 = CUresult::CUDA_ERROR_NOT_SUPPORTED as i32;
pub(super) const CAPTURE_UNSUPPORTED: i32 = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED as i32;

/// Numbers that speak of one call only. Any other one, unknown ones included, may mean that the context is lost.
const ONE_CALL: [i32; 8] = [
    INVALID_VALUE,
    CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32,
    NOT_SUPPORTED,
    CUresult::CUDA_ERROR_NOT_PERMITTED as i32,
    CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED as i32,
    CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED as i32,
    CAPTURE_UNSUPPORTED,
    CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT as i32,
];

/// A driver call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operation} failed with code {code}")]
pub(super) struct DriverError {
    pub(super) operation: &'static str,
    pub(super) code: i32,
}

impl DriverError {
    /// How a call ended, of whose result the driver has made this number.
    pub(super) fn check(operation: &'static str, code: i32) -> Result<(), Self> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(Self { operation, code })
    }

    /// Whether something has ended, by the answer to that question. An error is neither yes nor no.
    pub(super) fn ended(answer: Result<(), Self>) -> Result<bool, Self> {
        match answer {
            Err(error) if error.code == NOT_READY => Ok(false),
            answer => answer.map(|()| true),
        }
    }

    /// Whether a method that the driver lacks is what failed, and another one may do.
    pub(super) fn is_unsupported(self) -> bool {
        self.code == NOT_SUPPORTED
    }

    /// Whether the arguments were refused.
    pub(super) fn is_invalid(self) -> bool {
        self.code == INVALID_VALUE
    }

    /// The same failure where it leaves unknown which copies run: the engine cannot go on.
    pub(super) fn fatal(self) -> CopyError {
        CopyError::DeviceLost {
            operation: self.operation,
            code: self.code,
        }
    }
}

impl From<DriverError> for CopyError {
    fn from(error: DriverError) -> Self {
        if ONE_CALL.contains(&error.code) {
            return Self::Driver {
                operation: error.operation,
                code: error.code,
            };
        }
        error.fatal()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_one_call_and_all_others() {
        let error = |code| {
            CopyError::from(DriverError {
                operation: "cuCall",
                code,
            })
        };
        for code in [1, 2, 712, 801, 900] {
            assert!(!error(code).is_fatal(), "{code}");
        }
        // Unknown ones may be of a newer driver: nothing says that its context lives.
        for code in [4, 201, 400, 700, 719, 999, 12_345] {
            assert!(error(code).is_fatal(), "{code}");
        }
        assert_eq!(
            error(719).to_string(),
            "cuCall failed with code 719, and CUDA copies cannot go on in this process"
        );
    }
}
