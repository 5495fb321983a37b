//! The scheduler hooks for Python, over a pool that Python implements.
//!
//! No method waits for anything but the interpreter's lock: connecting and talking to the sidecar happen on threads of
//! the sidecar crate, which run no Python but the `wake` callable.

use std::cell::RefCell;
use std::time::Instant;

use kvstore::{BlockHash, GpuBlock};
use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};
use sidecar::hooks::{
    BlockUse, GpuPool, Holders, Match, Published, SchedulerHooks as Hooks, Step, StepMode, Waker,
};

use crate::config::EngineConfig;
use crate::errors::NativeError;

/// What the scheduler side of the connector calls; see `greenroom._native.pyi`.
#[pyclass(frozen, module = "greenroom._native")]
pub(crate) struct SchedulerHooks {
    /// `None` once closed. Never contended: vLLM's scheduler is one thread.
    hooks: Mutex<Option<Hooks>>,
}

impl SchedulerHooks {
    fn with<T>(&self, call: impl FnOnce(&mut Hooks) -> T) -> Result<T, NativeError> {
        self.hooks
            .lock()
            .as_mut()
            .map(call)
            .ok_or(NativeError::Closed)
    }

    /// Ends the link's threads without the interpreter's lock, which one of them may be waiting for to wake the engine.
    fn shut(&self, py: Python<'_>) {
        let hooks = self.hooks.lock().take();
        py.detach(|| {
            if let Some(mut hooks) = hooks {
                hooks.close();
            }
        });
    }
}

#[pymethods]
impl SchedulerHooks {
    #[new]
    #[pyo3(signature = (config, wake=None))]
    fn new(py: Python<'_>, config: EngineConfig, wake: Option<Py<PyAny>>) -> PyResult<Self> {
        let waker = waker(wake);
        let hooks = py
            .detach(|| Hooks::connect(config.into_hooks(), waker))
            .map_err(NativeError::from)?;
        Ok(Self {
            hooks: Mutex::new(Some(hooks)),
        })
    }

    fn open_namespace(&self, material: &[u8]) -> PyResult<()> {
        Ok(self.with(|hooks| hooks.open_namespace(material))?)
    }

    fn has_namespace(&self) -> PyResult<bool> {
        Ok(self.with(|hooks| hooks.has_namespace())?)
    }

    fn turn_started(&self, request: &str, identity: Option<&str>, hashes: &[u8]) -> PyResult<()> {
        let hashes = block_hashes(hashes)?;
        Ok(self.with(|hooks| hooks.turn_started(request, identity, hashes, Instant::now()))?)
    }

    fn hints(&self, json: &str) -> PyResult<()> {
        Ok(self.with(|hooks| hooks.hints(json))?)
    }

    fn match_prefix(
        &self,
        request: &str,
        local_blocks: usize,
        blocks_max: usize,
        holders: (usize, usize, usize, usize, usize),
    ) -> PyResult<Option<usize>> {
        let (count, seats, missing, growth, free) = holders;
        let holders = Holders {
            count,
            seats,
            missing,
            growth,
            free,
        };
        let blocks = (local_blocks, blocks_max);
        let found =
            self.with(|hooks| hooks.match_prefix(request, blocks, holders, Instant::now()))?;
        Ok(match found {
            Match::Hit(blocks) => Some(blocks),
            Match::Pending => None,
            Match::Miss => Some(0),
        })
    }

    fn swap_in(&self, request: &str, gpu_blocks: Vec<u32>) -> PyResult<()> {
        let blocks: Vec<GpuBlock> = gpu_blocks.into_iter().map(GpuBlock).collect();
        Ok(self.with(|hooks| hooks.swap_in(request, &blocks))?)
    }

    fn blocks_filled(&self, request: &str, full: usize, new: &[u8]) -> PyResult<()> {
        let new = block_hashes(new)?;
        Ok(self.with(|hooks| hooks.blocks_filled(request, full, new))?)
    }

    fn turn_ended(&self, request: &str, hashes: &[u8]) -> PyResult<()> {
        let hashes = block_hashes(hashes)?;
        Ok(self.with(|hooks| hooks.turn_ended(request, hashes, Instant::now()))?)
    }

    fn plan<'py>(
        &self,
        pool: &Bound<'py, PyAny>,
        reserve: usize,
        handed_out: usize,
        activity: &str,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let mode = match activity {
            "busy" => StepMode::Busy,
            "idle" => StepMode::Idle,
            "paused" => StepMode::Paused,
            _ => return Err(PyValueError::new_err("activity is busy, idle or paused")),
        };
        let mut view = PoolView::new(pool);
        let plan = self.with(|hooks| {
            hooks.plan(
                Step {
                    reserve,
                    handed_out,
                    mode,
                },
                &mut view,
                Instant::now(),
            )
        })?;
        view.finish()?;
        Ok(plan.map(|plan| PyBytes::new(pool.py(), &plan)))
    }

    fn copies_done(&self, pool: &Bound<'_, PyAny>, report: &[u8]) -> PyResult<Vec<String>> {
        let mut view = PoolView::new(pool);
        let requests = self.with(|hooks| hooks.copies_done(report, &mut view, Instant::now()))?;
        view.finish()?;
        Ok(requests.map_err(NativeError::from)?)
    }

    fn reset(&self) -> PyResult<()> {
        Ok(self.with(Hooks::reset)?)
    }

    fn pending(&self, paused: bool) -> bool {
        self.with(|hooks| hooks.pending(paused)).unwrap_or(false)
    }

    fn copies_in_flight(&self) -> bool {
        self.with(|hooks| hooks.copies_in_flight()).unwrap_or(false)
    }

    fn holds_references(&self) -> bool {
        self.with(|hooks| hooks.holds_references()).unwrap_or(false)
    }

    fn figures<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let figures = self.with(|hooks| hooks.figures())?;
        let dict = PyDict::new(py);
        for (name, value) in [
            (intern!(py, "demand_blocks"), figures.demand_blocks),
            (intern!(py, "prefetch_blocks"), figures.prefetch_blocks),
            (intern!(py, "saved_blocks"), figures.saved_blocks),
            (intern!(py, "prefetch_used"), figures.prefetch_used),
            (intern!(py, "fenced"), figures.fenced),
            (intern!(py, "timeouts"), figures.timeouts),
            (intern!(py, "failed"), figures.failed),
            (intern!(py, "waiting"), figures.waiting),
            (intern!(py, "ready"), u64::from(figures.ready)),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn close(&self, py: Python<'_>) {
        self.shut(py);
    }
}

impl Drop for SchedulerHooks {
    fn drop(&mut self) {
        if self.hooks.get_mut().is_some() {
            Python::attach(|py| self.shut(py));
        }
    }
}

/// Calls `wake` on the link's thread, unless the interpreter is going away.
fn waker(wake: Option<Py<PyAny>>) -> Waker {
    Box::new(move || {
        let Some(wake) = &wake else { return };
        Python::try_attach(|py| {
            if let Err(error) = wake.call0(py) {
                error.write_unraisable(py, None);
            }
        });
    })
}

/// Hashes as Python passes them: one after the other, 32 bytes each.
fn block_hashes(bytes: &[u8]) -> PyResult<&[BlockHash]> {
    bytemuck::try_cast_slice(bytes)
        .map_err(|_| PyValueError::new_err("block hashes have 32 bytes each"))
}

/// One block hash out of Python's `bytes`.
#[derive(Clone)]
struct HashBytes(BlockHash);

impl<'a, 'py> FromPyObject<'a, 'py> for HashBytes {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match block_hashes(object.extract()?)? {
            [one] => Ok(Self(*one)),
            _ => Err(PyValueError::new_err("one block hash has 32 bytes")),
        }
    }
}

/// vLLM's pool behind the Python object that knows it. An exception on the Python side ends the hook's use of the pool
/// (it sees one without free or cached blocks) and is raised when the hook returns.
struct PoolView<'a, 'py> {
    pool: &'a Bound<'py, PyAny>,
    raised: RefCell<Option<PyErr>>,
}

impl<'a, 'py> PoolView<'a, 'py> {
    fn new(pool: &'a Bound<'py, PyAny>) -> Self {
        Self {
            pool,
            raised: RefCell::new(None),
        }
    }

    fn finish(self) -> PyResult<()> {
        self.raised.into_inner().map_or(Ok(()), Err)
    }

    fn ask<T>(&self, call: impl FnOnce(&'a Bound<'py, PyAny>) -> PyResult<T>) -> Option<T> {
        if self.raised.borrow().is_some() {
            return None;
        }
        call(self.pool)
            .map_err(|error| *self.raised.borrow_mut() = Some(error))
            .ok()
    }

    fn call<T>(
        &self,
        method: &Bound<'py, PyString>,
        list: PyResult<Bound<'py, PyList>>,
    ) -> Option<T>
    where
        T: for<'x> FromPyObject<'x, 'py>,
    {
        self.ask(|pool| {
            pool.call_method1(method, (list?,))?
                .extract::<T>()
                .map_err(Into::into)
        })
    }

    fn tell(&self, method: &Bound<'py, PyString>, list: PyResult<Bound<'py, PyList>>) {
        self.ask(|pool| pool.call_method1(method, (list?,)));
    }

    fn numbers(&self, blocks: &[GpuBlock]) -> PyResult<Bound<'py, PyList>> {
        PyList::new(self.pool.py(), blocks.iter().map(|block| block.0))
    }
}

impl GpuPool for PoolView<'_, '_> {
    fn total(&self) -> usize {
        self.ask(|pool| pool.call_method0(intern!(pool.py(), "total"))?.extract())
            .unwrap_or(0)
    }

    fn free(&self) -> usize {
        self.ask(|pool| pool.call_method0(intern!(pool.py(), "free"))?.extract())
            .unwrap_or(0)
    }

    fn lookup(&self, hashes: &[BlockHash]) -> Vec<Option<GpuBlock>> {
        let py = self.pool.py();
        let list = PyList::new(py, hashes.iter().map(|hash| PyBytes::new(py, &hash.0)));
        let found: Option<Vec<Option<u32>>> = self.call(intern!(py, "lookup"), list);
        sized(found, hashes.len(), None)
            .into_iter()
            .map(|block| block.map(GpuBlock))
            .collect()
    }

    fn uses(&self, blocks: &[GpuBlock]) -> Vec<BlockUse> {
        let found: Option<Vec<(Option<HashBytes>, bool)>> =
            self.call(intern!(self.pool.py(), "uses"), self.numbers(blocks));
        let unknown = (None, false);
        sized(found, blocks.len(), unknown)
            .into_iter()
            .map(|(hash, referenced)| BlockUse {
                hash: hash.map(|hash| hash.0),
                referenced,
            })
            .collect()
    }

    fn free_list(&self, n: usize) -> Vec<Option<BlockHash>> {
        let found: Option<Vec<Option<HashBytes>>> = self.ask(|pool| {
            pool.call_method1(intern!(pool.py(), "free_list"), (n,))?
                .extract()
        });
        found
            .unwrap_or_default()
            .into_iter()
            .map(|hash| hash.map(|hash| hash.0))
            .collect()
    }

    fn take(&mut self, n: usize) -> Option<Vec<GpuBlock>> {
        let taken: Option<Vec<u32>> = self
            .ask(|pool| {
                pool.call_method1(intern!(pool.py(), "take"), (n,))?
                    .extract()
            })
            .flatten();
        taken.map(|blocks| blocks.into_iter().map(GpuBlock).collect())
    }

    fn reference(&mut self, blocks: &[GpuBlock]) {
        self.tell(intern!(self.pool.py(), "reference"), self.numbers(blocks));
    }

    fn release(&mut self, blocks: &[GpuBlock]) {
        self.tell(intern!(self.pool.py(), "release"), self.numbers(blocks));
    }

    fn evict(&mut self, blocks: &[GpuBlock]) {
        self.tell(intern!(self.pool.py(), "evict"), self.numbers(blocks));
    }

    fn publish(&mut self, entries: &[Published]) {
        let py = self.pool.py();
        let entries = entries
            .iter()
            .map(|one| (one.block.0, PyBytes::new(py, &one.hash.0), one.position));
        self.tell(intern!(py, "publish"), PyList::new(py, entries));
    }
}

/// An answer of the expected length; one value for each place if there is none.
fn sized<T: Clone>(found: Option<Vec<T>>, length: usize, missing: T) -> Vec<T> {
    let found = found.unwrap_or_else(|| vec![missing; length]);
    assert_eq!(found.len(), length, "the pool answers for every block");
    found
}
