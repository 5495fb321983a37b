//! `greenroom._native`: what the vLLM connector needs from Rust. Exports only.
//!
//! [`hooks::SchedulerHooks`] runs in the process of the engine's scheduler, [`mover::Mover`] in each of its workers;
//! with one GPU both live in one process, so nothing here is a global. No thread of this module runs Python code, but
//! for the one call that wakes the engine.

mod affinity;
mod config;
mod errors;
mod hooks;
mod log;
mod mover;

/// The native part of Greenroom's vLLM connector.
#[pyo3::pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::hooks::SchedulerHooks;
    #[pymodule_export]
    use super::mover::Mover;

    /// Steers a fault point: `actions` as the `fail` crate reads them. ValueError if they are not.
    #[cfg(feature = "faults")]
    #[pyfunction]
    fn fault(name: &str, actions: &str) -> PyResult<()> {
        fail::cfg(name, actions).map_err(pyo3::exceptions::PyValueError::new_err)
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::log::start();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
