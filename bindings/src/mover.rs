//! A worker's copies for Python: plans in, copies on a thread of the cuda crate, reports out.
//!
//! Three threads meet here, none of which but the caller runs Python: vLLM's worker calls the methods, the link's thread
//! attaches arenas as sidecars come, the copy thread copies.

#![allow(
    unsafe_code,
    reason = "the raw addresses of vLLM's KV tensors enter here, in one place"
)]

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use cuda::{
    ArenaId, ArenaShard, ComputeMark, ComputeMarker, CopyEngine, CopyError, CopyKind, CopyLimits,
    CopyThread, CudaDevice, CudaEngine, DevicePool, DeviceRegion, HostEngine, HostMarker, Job,
    JobEnd, JobId, Outcome,
};
use kvstore::{GpuBlock, SlotId};
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use sidecar::engine::client::{MappedArena, OnArena, WorkerLink};
use sidecar::engine::frames::CopyClass;
use sidecar::engine::plan::{JobReport, PlannedJob, Report, StepPlan};

use crate::affinity::unpinned;
use crate::config::{EngineConfig, KvMemory};
use crate::errors::NativeError;

/// How long a worker on a GPU waits for its sidecar's arena, and then for the registering, before it goes on without it.
/// vLLM captures its graphs next, and registering holds up other calls of the process.
const ARENA_WAIT: Duration = Duration::from_secs(5);
const REGISTER_WAIT: Duration = Duration::from_secs(120);

/// What the worker side of the connector calls; see `greenroom._native.pyi`.
#[pyclass(frozen, module = "greenroom._native")]
pub(crate) struct Mover {
    rank: u32,
    /// `None` once closed.
    parts: Mutex<Option<Parts>>,
    /// What the regions' memory belongs to. Declared last: let go when no copy can run any more.
    _memory: Py<PyAny>,
}

/// Dropped in this order: the link's thread uses the copy thread.
struct Parts {
    _link: WorkerLink,
    copies: Arc<CopyThread>,
    marker: Box<dyn ComputeMarker>,
    /// Saves of the last plan: the step that it came with has computed their blocks, and they run beside the next one.
    /// Started at once they would compete with the scheduler, which has its turn between two steps.
    saves: Vec<PlannedJob>,
    /// Where running demand loads write.
    demand: HashMap<u64, Vec<u32>>,
    /// Jobs that ended without a copy, not yet reported.
    refused: Vec<JobReport>,
    /// Blocks of demand loads that failed, not yet told to vLLM.
    invalid: HashSet<u32>,
}

#[pymethods]
impl Mover {
    #[new]
    fn new(py: Python<'_>, config: EngineConfig, rank: u32, memory: KvMemory) -> PyResult<Self> {
        let KvMemory {
            cuda_device,
            regions,
            owner,
        } = memory;
        let parts = py.detach(|| unpinned(|| Parts::start(&config, rank, cuda_device, regions)))?;
        Ok(Self {
            rank,
            parts: Mutex::new(Some(parts)),
            _memory: owner,
        })
    }

    /// Once per step, before it computes: makes fenced jobs end, gives up cancelled ones, starts the loads of this plan
    /// and the saves of the one before.
    fn step(&self, py: Python<'_>, plan: &[u8], stream: u64) -> PyResult<()> {
        let plan = if plan.is_empty() {
            StepPlan::default()
        } else {
            StepPlan::decode(plan).map_err(NativeError::from)?
        };
        py.detach(|| self.with(|parts| parts.step(plan, stream)))?;
        Ok(())
    }

    /// The jobs that have ended since the last call, for the scheduler side; `None` if there are none.
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let ended = self.with(Parts::ended)?;
        if ended.is_empty() {
            return Ok(None);
        }
        let report = Report {
            rank: self.rank,
            ended,
        }
        .encode()
        .map_err(NativeError::from)?;
        Ok(Some(PyBytes::new(py, &report)))
    }

    /// GPU blocks whose demand load failed, of the jobs reported since the last call.
    fn invalid_blocks(&self) -> PyResult<HashSet<u32>> {
        Ok(self.with(|parts| std::mem::take(&mut parts.invalid))?)
    }

    /// Jobs that have been submitted and have not ended.
    fn in_flight(&self) -> usize {
        self.with(|parts| parts.copies.in_flight()).unwrap_or(0)
    }

    /// Ends the connection, waits for running copies, ends the threads.
    fn close(&self, py: Python<'_>) {
        let parts = self.parts.lock().take();
        py.detach(|| drop(parts));
    }
}

impl Mover {
    fn with<T>(&self, call: impl FnOnce(&mut Parts) -> T) -> Result<T, NativeError> {
        self.parts
            .lock()
            .as_mut()
            .map(call)
            .ok_or(NativeError::Closed)
    }
}

impl Parts {
    fn start(
        config: &EngineConfig,
        rank: u32,
        cuda_device: Option<u32>,
        regions: Vec<(u64, u64, u64)>,
    ) -> Result<Self, NativeError> {
        let regions = regions
            .into_iter()
            .map(|(base, block_stride, block_bytes)| DeviceRegion {
                base,
                block_stride,
                block_bytes,
            })
            .collect();
        // SAFETY: the regions are what `greenroom.vllm.compat.kv_regions` read off vLLM's KV tensors: each lies inside one
        // tensor's storage, which the regions' caller checked against its size. `Mover` owns a reference to those tensors
        // and drops it last, after the copy thread has ended. The storage is torch's, allocated through FFI; no Rust
        // reference to it exists, and torch's own accesses are ordered by vLLM's use of the connector (loads into blocks
        // that no request reads yet, saves from blocks that are full).
        let pool = Arc::new(unsafe { DevicePool::new(regions, config.gpu_blocks)? });
        if pool.rank_bytes() != config.rank_bytes {
            return Err(NativeError::Geometry {
                found: pool.rank_bytes(),
                expected: config.rank_bytes,
            });
        }
        let Copier {
            engine,
            marker,
            limits,
        } = Copier::find(config, cuda_device, &pool)?;
        let copies = Arc::new(CopyThread::spawn(engine, pool, limits)?);
        let (socket, hello) = config.worker_hello(rank);
        let rank_offset = u64::from(rank) * config.rank_bytes;
        // Room for both things that happen to the first arena.
        let (progress, first_arena) = sync_channel(2);
        let on_arena = attach(Arc::clone(&copies), rank_offset, progress);
        let link = WorkerLink::open(socket, hello, on_arena)?;
        if cuda_device.is_some() {
            wait_for(&first_arena);
        }
        Ok(Self {
            _link: link,
            copies,
            marker,
            saves: Vec::new(),
            demand: HashMap::new(),
            refused: Vec::new(),
            invalid: HashSet::new(),
        })
    }

    fn step(&mut self, plan: StepPlan, stream: u64) {
        let unwanted: HashSet<u64> = plan.fence.iter().chain(&plan.cancel).copied().collect();
        for job in self.saves.extract_if(.., |job| unwanted.contains(&job.id)) {
            self.refused.push(not_copied(job.id));
        }
        if !plan.fence.is_empty() {
            self.copies
                .fence(&plan.fence.into_iter().map(JobId).collect::<Vec<_>>());
        }
        if !plan.cancel.is_empty() {
            self.copies
                .cancel(&plan.cancel.into_iter().map(JobId).collect::<Vec<_>>());
        }
        let saves = std::mem::replace(&mut self.saves, plan.saves);
        if plan.loads.is_empty() && saves.is_empty() {
            return;
        }
        // What was launched before may still read what loads overwrite, and write what saves read.
        let after = self.marker.mark(stream);
        for job in plan.loads.into_iter().chain(saves) {
            self.submit(job, &after);
        }
    }

    /// A job that cannot be copied is reported as failed: the scheduler side drops it, or has its blocks recomputed.
    fn submit(&mut self, planned: PlannedJob, after: &Result<ComputeMark, CopyError>) {
        let kind = match planned.kind {
            CopyClass::Demand => CopyKind::Demand,
            CopyClass::Prefetch => CopyKind::Prefetch,
            CopyClass::Save => CopyKind::Save,
        };
        if kind == CopyKind::Demand {
            self.demand.insert(
                planned.id,
                planned.pairs.iter().map(|(_, block)| *block).collect(),
            );
        }
        let pairs = planned
            .pairs
            .into_iter()
            .map(|(slot, block)| (SlotId(slot), GpuBlock(block)))
            .collect();
        let job = Job {
            id: JobId(planned.id),
            kind,
            arena: ArenaId(planned.boot),
            pairs,
        };
        let submitted = after
            .clone()
            .and_then(|after| self.copies.submit(job, after));
        if let Err(error) = submitted {
            tracing::warn!(job = planned.id, %error, "not copied");
            self.refused.push(not_copied(planned.id));
        }
        if kind == CopyKind::Prefetch && kvstore::fault!("mover::submit::report_early") {
            self.refused.push(JobReport {
                ok: true,
                ..not_copied(planned.id)
            });
        }
    }

    fn ended(&mut self) -> Vec<JobReport> {
        let mut ended = std::mem::take(&mut self.refused);
        ended.extend(self.copies.take_finished().iter().map(report));
        for job in &ended {
            if let Some(blocks) = self.demand.remove(&job.id)
                && !job.ok
            {
                self.invalid.extend(blocks);
            }
        }
        ended
    }
}

/// What copies, what marks the compute work that it waits for, and how it is paced.
struct Copier {
    engine: Box<dyn CopyEngine>,
    marker: Box<dyn ComputeMarker>,
    limits: CopyLimits,
}

impl Copier {
    /// The engine for memory on a CUDA device, or in this process's own memory.
    fn find(
        config: &EngineConfig,
        cuda_device: Option<u32>,
        pool: &Arc<DevicePool>,
    ) -> Result<Self, NativeError> {
        let method = config
            .copy_method()
            .ok_or(CopyError::BadConfig("copy_method"))?;
        let limits = |usual: CopyLimits| CopyLimits {
            sub_batch_bytes: config.copy_sub_batch().unwrap_or(usual.sub_batch_bytes),
            ..usual
        };
        let Some(ordinal) = cuda_device else {
            return Ok(Self {
                engine: Box::new(HostEngine::new(Arc::clone(pool))),
                marker: Box::new(HostMarker),
                limits: limits(CopyLimits::default()),
            });
        };
        let device = CudaDevice::probe(ordinal)?;
        let engine = CudaEngine::new(&device, Arc::clone(pool), method)?;
        // SAFETY: `Mover`'s callers pass what `greenroom.vllm.compat.compute_stream` reads off torch at that moment: the
        // current stream of the KV cache's device, which torch never destroys.
        let marker = unsafe { engine.marker() };
        Ok(Self {
            marker: Box::new(marker),
            engine: Box::new(engine),
            limits: limits(device.limits()),
        })
    }
}

/// Waits until the first arena is there and registered, or has not come in time.
fn wait_for(first_arena: &Receiver<()>) {
    if first_arena.recv_timeout(ARENA_WAIT).is_err() {
        tracing::warn!(
            seconds = ARENA_WAIT.as_secs(),
            "no sidecar yet: its arena will be registered while vLLM runs"
        );
    } else if first_arena.recv_timeout(REGISTER_WAIT).is_err() {
        tracing::warn!(
            seconds = REGISTER_WAIT.as_secs(),
            "the arena is still being registered"
        );
    }
}

/// Makes each arena that the link finds usable, and lets go of the one before it. Tells when the first one comes, and when
/// it has been attached or not.
fn attach(copies: Arc<CopyThread>, rank_offset: u64, progress: SyncSender<()>) -> OnArena {
    let mut current: Option<ArenaId> = None;
    // Nobody listens after the first arena: the channel is full or closed then.
    let tell = move || progress.try_send(()).unwrap_or_default();
    Box::new(move |arena: MappedArena| {
        tell();
        let id = ArenaId(arena.boot);
        let shard = ArenaShard {
            map: arena.map,
            slot_bytes: arena.slot_bytes,
            rank_offset,
        };
        let attached = copies.attach(id, shard);
        tell();
        attached.map_err(io::Error::other)?;
        if let Some(old) = current.replace(id) {
            copies.detach(old);
        }
        Ok(())
    })
}

fn not_copied(id: u64) -> JobReport {
    JobReport {
        id,
        ok: false,
        bytes: 0,
        micros: 0,
    }
}

fn report(end: &JobEnd) -> JobReport {
    JobReport {
        id: end.id.0,
        ok: end.outcome == Outcome::Done,
        bytes: end.bytes,
        micros: micros(end.seconds),
    }
}

/// Seconds as whole microseconds; what does not fit is as long as can be said.
fn micros(seconds: f64) -> u64 {
    std::time::Duration::try_from_secs_f64(seconds)
        .ok()
        .and_then(|duration| u64::try_from(duration.as_micros()).ok())
        .unwrap_or(u64::MAX)
}
