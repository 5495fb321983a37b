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

    /// Steers a point of `kvstore::faults::POINTS`. ValueError if there is no such point, or such actions.
    #[cfg(feature = "faults")]
    #[pyfunction]
    fn fault(name: &str, actions: &str) -> PyResult<()> {
        kvstore::faults::arm(name, actions)
            .map_err(|error| pyo3::exceptions::PyValueError::new_err(error.to_string()))
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::log::start();
        module.add("GROWTH_BLOCKS", sidecar::planner::budget::GROWTH_BLOCKS)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
