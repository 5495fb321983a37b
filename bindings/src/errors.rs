//! Rust's errors as the exceptions of `greenroom.errors`, with a code and the whole reason.

use std::error::Error as _;
use std::fmt::Write as _;

use cuda::{CopyError, NoCuda};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use sidecar::engine::frames::FrameError;
use sidecar::hooks::HooksError;

/// What can go wrong in this module, by what the caller does next.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NativeError {
    /// Correct the configuration.
    #[error("the hooks cannot be set up")]
    Hooks(#[from] HooksError),
    /// Correct the description of the KV memory, or do without the cache.
    #[error("KV blocks cannot be copied")]
    Copy(#[from] CopyError),
    /// Do what the message says.
    #[error("CUDA cannot be used")]
    Cuda(#[from] NoCuda),
    /// Install one release of Greenroom everywhere.
    #[error("the scheduler and the worker do not understand each other")]
    Frame(#[from] FrameError),
    /// The system refused a thread.
    #[error("a thread cannot be started")]
    Thread(#[from] std::io::Error),
    /// The KV memory is not what the engine's geometry says.
    #[error("the KV cache has {found} bytes in a block and the engine's geometry says {expected}")]
    Geometry {
        /// Bytes of a block over all regions.
        found: u64,
        /// Bytes that the scheduler side counts with.
        expected: u64,
    },
    /// `close` has been called.
    #[error("it has been closed")]
    Closed,
}

impl NativeError {
    /// Name of the class in `greenroom.errors`, and the code.
    fn class(&self) -> (ExceptionClass, &'static str) {
        match self {
            Self::Hooks(HooksError::BadConfig { .. }) | Self::Copy(CopyError::BadConfig(_)) => {
                (ExceptionClass::Config, "config")
            }
            Self::Geometry { .. } => (ExceptionClass::Config, "geometry"),
            Self::Cuda(_) => (ExceptionClass::Config, "cuda"),
            Self::Hooks(HooksError::Thread(_))
            | Self::Thread(_)
            | Self::Copy(CopyError::NoThread(_)) => (ExceptionClass::Unavailable, "no_thread"),
            Self::Copy(_) => (ExceptionClass::Unavailable, "copy"),
            Self::Frame(_) => (ExceptionClass::Protocol, "protocol"),
            Self::Closed => (ExceptionClass::Unavailable, "closed"),
        }
    }

    /// The sentence and its causes.
    fn message(&self) -> String {
        let mut message = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            // Writing to a string cannot fail.
            write!(message, ": {cause}").unwrap_or_default();
            source = cause.source();
        }
        message
    }
}

/// The exception classes this module raises.
#[derive(Clone, Copy)]
enum ExceptionClass {
    Config,
    Unavailable,
    Protocol,
}

impl ExceptionClass {
    fn get(self, py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
        static CONFIG: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        static UNAVAILABLE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        static PROTOCOL: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        let (cell, name) = match self {
            Self::Config => (&CONFIG, "ConfigError"),
            Self::Unavailable => (&UNAVAILABLE, "Unavailable"),
            Self::Protocol => (&PROTOCOL, "ProtocolError"),
        };
        cell.import(py, "greenroom.errors", name)
    }
}

impl From<NativeError> for PyErr {
    fn from(error: NativeError) -> Self {
        let (class, code) = error.class();
        let message = error.message();
        Python::attach(|py| match class.get(py) {
            Ok(class) => PyErr::from_type(class.clone(), (code, message)),
            // The package is broken; the reason must not be lost with it.
            Err(import) => {
                let error = PyRuntimeError::new_err(message);
                error.set_cause(py, Some(import));
                error
            }
        })
    }
}
