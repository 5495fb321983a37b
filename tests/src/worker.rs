//! The workers' side of an engine in a test, one [`Worker`] per rank: memory for KV blocks, a copy thread, the connection
//! that fetches the arena. What computes the bytes is the engine's business.
//!
//! Stands in for the connector's worker half and `Mover`. The memory is reached by address only, as a GPU's would be:
//! copies write it behind Rust's back.

#![allow(
    unsafe_code,
    reason = "memory that copies reach by address, as a GPU's"
)]

use std::alloc::Layout;
use std::collections::HashMap;
use std::io;
use std::ops::Index;
use std::sync::Arc;
use std::time::Instant;

use cuda::{
    ArenaId, ArenaShard, ComputeMark, CopyKind, CopyLimits, CopyThread, DevicePool, DeviceRegion,
    Fault, HostEngine, HostSwitch, Job, JobId, Outcome,
};
use kvstore::{GpuBlock, SlotId, usize_from_u64};
use sidecar::engine::client::{MappedArena, OnArena, WorkerLink};
use sidecar::engine::frames::{CopyClass, Hello, Role};
use sidecar::engine::plan::{JobReport, PlannedJob, Report, StepPlan};
use sidecar::hooks::{HooksConfig, SchedulerHooks};

use crate::pool::SimPool;
use crate::sidecar::until;

/// Blocks that are copied at once: few, so that a job has a middle at which it can be held or die.
const PART_BLOCKS: u64 = 4;

/// One rank's bytes of every block, in equal regions (layers, or halves of layers).
pub struct Memory {
    base: *mut u8,
    layout: Layout,
    blocks: usize,
    regions: usize,
    region_bytes: usize,
}

impl Memory {
    fn new(config: &HooksConfig, regions: usize) -> Self {
        let (rank_bytes, blocks) = (
            usize_from_u64(config.rank_bytes),
            config.gpu_blocks as usize,
        );
        assert_eq!(rank_bytes % regions, 0, "regions are of equal size");
        let layout = Layout::array::<u8>(rank_bytes * blocks).unwrap();
        assert!(layout.size() > 0);
        // SAFETY: the size is not zero.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!base.is_null());
        Self {
            base,
            layout,
            blocks,
            regions,
            region_bytes: rank_bytes / regions,
        }
    }

    fn regions(&self) -> Vec<DeviceRegion> {
        let stride = self.region_bytes as u64;
        let region = |region| DeviceRegion {
            base: self.at(GpuBlock(0), region, 0..0).expose_provenance() as u64,
            block_stride: stride,
            block_bytes: stride,
        };
        (0..self.regions).map(region).collect()
    }

    fn at(&self, block: GpuBlock, region: usize, bytes: std::ops::Range<usize>) -> *mut u8 {
        assert!(block.index() < self.blocks && region < self.regions);
        assert!(bytes.start <= bytes.end && bytes.end <= self.region_bytes);
        let offset = (region * self.blocks + block.index()) * self.region_bytes + bytes.start;
        // SAFETY: inside the allocation by the assertions.
        unsafe { self.base.add(offset) }
    }

    /// Bytes of a block in a region, from `offset` on. No copy into the block may be in flight.
    pub fn read(&self, block: GpuBlock, region: usize, offset: usize, into: &mut [u8]) {
        let from = self.at(block, region, offset..offset + into.len());
        // SAFETY: `at` gives as many bytes as were asked for; the engine reads only blocks that no copy writes.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Computed bytes of a block in a region, from `offset` on. No copy of the block may be in flight.
    pub fn write(&self, block: GpuBlock, region: usize, offset: usize, bytes: &[u8]) {
        let to = self.at(block, region, offset..offset + bytes.len());
        // SAFETY: `at` gives as many bytes as were asked for; the engine computes only blocks that no copy touches.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; the copy thread has ended (a worker drops it first).
        unsafe { std::alloc::dealloc(self.base, self.layout) };
    }
}

/// One rank.
pub struct Worker {
    /// Stops, resumes and fails the copies.
    pub switch: HostSwitch,
    // Dropped in this order: the link's thread uses the copies, the copies use the memory.
    link: Option<WorkerLink>,
    copies: Arc<CopyThread>,
    /// Its KV blocks.
    pub memory: Memory,
    rank: u32,
    saves: Vec<PlannedJob>,
    demand: HashMap<u64, Vec<u32>>,
    refused: Vec<JobReport>,
    invalid: Vec<GpuBlock>,
}

impl Worker {
    fn start(config: &HooksConfig, rank: u32, regions: usize) -> Self {
        let memory = Memory::new(config, regions);
        // SAFETY: the regions lie in `memory`, which outlives the copy thread and is reached by raw pointers only.
        let pool = unsafe { DevicePool::new(memory.regions(), config.gpu_blocks) };
        let pool = Arc::new(pool.unwrap());
        let switch = HostSwitch::default();
        let engine = HostEngine::with_switch(pool.clone(), switch.clone());
        let limits = CopyLimits {
            sub_batch_bytes: PART_BLOCKS * config.rank_bytes,
            ..CopyLimits::default()
        };
        let copies = Arc::new(CopyThread::spawn(Box::new(engine), pool, limits).unwrap());
        let hello = Hello {
            role: Role::Worker { rank },
            engine: config.engine.clone(),
            rank_bytes: config.rank_bytes,
            ranks: config.ranks,
            block_tokens: config.block_tokens,
            gpu_blocks: config.gpu_blocks,
        };
        let on_arena = attach(copies.clone(), u64::from(rank) * config.rank_bytes);
        let link = WorkerLink::open(config.socket.clone(), hello, on_arena).unwrap();
        Self {
            switch,
            link: Some(link),
            copies,
            memory,
            rank,
            saves: Vec::new(),
            demand: HashMap::new(),
            refused: Vec::new(),
            invalid: Vec::new(),
        }
    }

    fn begin(&mut self, plan: &StepPlan) {
        if self.is_gone() {
            return;
        }
        let ids = |ids: &[u64]| ids.iter().copied().map(JobId).collect::<Vec<_>>();
        if !plan.fence.is_empty() {
            // A fence waits for what is at the copy engine, however late that is.
            self.switch.release();
            self.copies.fence(&ids(&plan.fence));
        }
        self.copies.cancel(&ids(&plan.cancel));
        for job in &plan.loads {
            self.submit(job);
        }
        self.saves.extend_from_slice(&plan.saves);
    }

    fn end(&mut self) {
        for job in std::mem::take(&mut self.saves) {
            self.submit(&job);
        }
    }

    fn submit(&mut self, planned: &PlannedJob) {
        let kind = match planned.kind {
            CopyClass::Demand => CopyKind::Demand,
            CopyClass::Prefetch => CopyKind::Prefetch,
            CopyClass::Save => CopyKind::Save,
        };
        if kind == CopyKind::Demand {
            let blocks = planned.pairs.iter().map(|(_, block)| *block);
            self.demand.insert(planned.id, blocks.collect());
        }
        let pairs = planned.pairs.iter();
        let job = Job {
            id: JobId(planned.id),
            kind,
            arena: ArenaId(planned.boot),
            pairs: pairs
                .map(|(slot, block)| (SlotId(*slot), GpuBlock(*block)))
                .collect(),
        };
        if self.copies.submit(job, ComputeMark::NONE).is_err() {
            self.refused.push(JobReport {
                id: planned.id,
                ok: false,
                bytes: 0,
                micros: 0,
            });
        }
    }

    /// What has ended since the last call, encoded.
    fn report(&mut self) -> Option<Vec<u8>> {
        if self.is_gone() {
            return None;
        }
        let mut ended = std::mem::take(&mut self.refused);
        let finished = self.copies.take_finished();
        ended.extend(finished.into_iter().map(|end| JobReport {
            id: end.id.0,
            ok: end.outcome == Outcome::Done,
            bytes: end.bytes,
            micros: (end.seconds * 1e6) as u64,
        }));
        for report in &ended {
            let blocks = self.demand.remove(&report.id).unwrap_or_default();
            if !report.ok {
                self.invalid.extend(blocks.into_iter().map(GpuBlock));
            }
        }
        let rank = self.rank;
        (!ended.is_empty()).then(|| Report { rank, ended }.encode().unwrap())
    }

    /// The process dies in the middle of a copy: a part of it arrives half, nothing after it, and nobody reports an end.
    pub fn kill(&mut self) {
        self.link = None;
        if self.copies.in_flight() > 0 {
            self.switch.inject(Fault::CopyKills, 1);
            self.switch.release();
            let over = || self.copies.is_dead() || self.copies.in_flight() == 0;
            until("the copies have died or ended", over);
        }
    }

    /// Copies that have not ended.
    pub fn in_flight(&self) -> usize {
        self.copies.in_flight()
    }

    fn is_gone(&self) -> bool {
        self.link.is_none()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.link = None;
        self.switch.release();
        self.copies.wait_idle();
    }
}

/// Makes each arena that the link finds usable, and lets go of the one before it.
fn attach(copies: Arc<CopyThread>, rank_offset: u64) -> OnArena {
    let mut current = None;
    Box::new(move |arena: MappedArena| {
        let id = ArenaId(arena.boot);
        let shard = ArenaShard {
            map: arena.map,
            slot_bytes: arena.slot_bytes,
            rank_offset,
        };
        copies.attach(id, shard).map_err(io::Error::other)?;
        if let Some(old) = current.replace(id) {
            copies.detach(old);
        }
        Ok(())
    })
}

/// All ranks of one engine.
pub struct Workers(Vec<Worker>);

/// What the ranks' reports said of demand loads.
#[derive(Debug, Default)]
pub struct Loads {
    /// Requests whose load has ended, well or not.
    pub ended: Vec<String>,
    /// Blocks of loads that failed on some rank.
    pub invalid: Vec<GpuBlock>,
}

impl Workers {
    /// One worker per rank, each with memory of its own, cut into `regions`.
    pub fn start(config: &HooksConfig, regions: usize) -> Self {
        let ranks = 0..config.ranks;
        Self(
            ranks
                .map(|rank| Worker::start(config, rank, regions))
                .collect(),
        )
    }

    /// Before the step computes.
    pub fn begin(&mut self, plan: &StepPlan) {
        self.0.iter_mut().for_each(|worker| worker.begin(plan));
    }

    /// After the step has computed.
    pub fn end(&mut self) {
        self.0.iter_mut().for_each(Worker::end);
    }

    /// Takes every rank's report to the hooks.
    pub fn collect(&mut self, hooks: &mut SchedulerHooks, pool: &mut SimPool) -> Loads {
        let mut loads = Loads::default();
        for worker in &mut self.0 {
            if let Some(report) = worker.report() {
                let ended = hooks.copies_done(&report, pool, Instant::now());
                loads.ended.extend(ended.unwrap());
            }
            loads.invalid.append(&mut worker.invalid);
        }
        loads
    }

    /// By rank.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.0.iter()
    }

    /// See [`Worker::kill`].
    pub fn kill(&mut self, rank: usize) {
        self.0[rank].kill();
    }
}

impl Index<usize> for Workers {
    type Output = Worker;

    fn index(&self, rank: usize) -> &Worker {
        &self.0[rank]
    }
}
