//! Copies for measuring: a copy thread between an arena and a KV pool, and beside it plain copies of the same bytes.
//!
//! Feature `workbench`. Takes times and nothing else; what is copied, how often and what comes of it is the caller's.

#![allow(
    unsafe_code,
    reason = "the pool is memory of this file's own, and so is the loop of memcpy"
)]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use kvstore::{
    ArenaError, ArenaFile, ArenaMap, GpuBlock, PageSize, SlotId, u64_from, usize_from_u64,
};

use crate::cuda::{CopyMethod, CudaDevice, CudaEngine, GpuMemory, NoCuda, PlainCopy, Workbench};
use crate::device::{DevicePool, DeviceRegion};
use crate::engine::{
    ArenaId, ComputeMark, CopyBatch, CopyEngine, CopyError, CopyKind, Direction, JobId, Poll,
};
use crate::host::HostEngine;
use crate::jobs::Outcome;
use crate::ranges::{ArenaShard, ranges};
use crate::schedule::CopyLimits;
use crate::thread::{CopyThread, Job};

const ARENA: ArenaId = ArenaId(1);

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// There is no GPU that could be used.
    #[error("CUDA cannot be used: {0}")]
    NoCuda(#[from] NoCuda),
    /// There is no memory for the arena.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The arena's descriptor could not be shared.
    #[error("cannot share the arena: {0}")]
    Descriptor(#[from] std::io::Error),
    /// A copy was refused or failed.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// Figures of memory that is not registered would be another's.
    #[error("the driver registers only a part of the arena: give a smaller --memory")]
    Unregistered,
    /// A job did not end as done.
    #[error("a copy did not end well: {0:?}")]
    Ended(Outcome),
}

/// How blocks lie, and how their copies are put to the driver.
#[derive(Clone, Copy, Debug)]
pub struct CopyShape {
    /// Bytes of one range: what a block has in one region.
    pub range_bytes: u64,
    /// Regions of the pool, and so ranges of a block: one layer each, or 1 where a block holds all layers.
    pub layers: u32,
    /// Of GPUs only.
    pub method: CopyMethod,
}

impl CopyShape {
    /// Bytes of a block, and of a slot.
    pub fn block_bytes(&self) -> u64 {
        self.range_bytes * u64::from(self.layers)
    }
}

/// Which blocks are copied, and why: the slot and the block of each.
pub type CopyJob = (CopyKind, Vec<(SlotId, GpuBlock)>);

/// Both sides of the copies: an arena, and as much memory of a pool.
pub struct BenchMemory {
    sides: Arc<Sides>,
    /// Seconds it took to have every page of the arena backed.
    pub touch_seconds: f64,
}

/// Shared with everything that copies: it is there for as long as they are.
struct Sides {
    map: Arc<ArenaMap>,
    /// The same pages mapped once more, for an engine beside the copy thread's: what one has registered the other cannot.
    second_map: Arc<ArenaMap>,
    pool: PoolMemory,
}

enum PoolMemory {
    /// Cells, for they are written behind Rust's back.
    Host(Vec<AtomicU64>),
    Gpu(Box<Gpu>),
}

struct Gpu {
    device: CudaDevice,
    bench: Workbench,
    memory: GpuMemory,
}

/// What registering an arena costs.
#[derive(Clone, Copy, Debug)]
pub struct Registering {
    /// Of the call or calls, for pages that are backed.
    pub seconds: f64,
    /// Device memory that is gone while the arena is registered, the engine's streams included.
    pub device_bytes: u64,
}

impl BenchMemory {
    /// For copies within this process.
    pub fn host(bytes: u64, page: PageSize) -> Result<Self, BenchError> {
        // Written, so that every page is there.
        let pool = PoolMemory::Host((0..bytes / 8).map(AtomicU64::new).collect());
        Self::with(pool, bytes, page)
    }

    /// For copies from and to a GPU.
    pub fn gpu(device: CudaDevice, bytes: u64, page: PageSize) -> Result<Self, BenchError> {
        let bench = Workbench::new(&device)?;
        let memory = bench.memory(bytes)?;
        let gpu = Gpu {
            device,
            bench,
            memory,
        };
        Self::with(PoolMemory::Gpu(Box::new(gpu)), bytes, page)
    }

    fn with(pool: PoolMemory, bytes: u64, page: PageSize) -> Result<Self, BenchError> {
        let file = ArenaFile::create(bytes, page)?;
        let map = || -> Result<_, BenchError> {
            let fd = file.fd().try_clone_to_owned()?;
            Ok(Arc::new(ArenaMap::map(fd, bytes)?))
        };
        let (map, second_map) = (map()?, map()?);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let start = Instant::now();
        map.populate(threads.min(16))?;
        let touch_seconds = start.elapsed().as_secs_f64();
        if matches!(pool, PoolMemory::Gpu(_)) {
            second_map.populate(threads.min(16))?;
        }
        let sides = Sides {
            map,
            second_map,
            pool,
        };
        Ok(Self {
            sides: Arc::new(sides),
            touch_seconds,
        })
    }

    /// Bytes of either side.
    pub fn bytes(&self) -> u64 {
        self.sides.map.bytes()
    }

    /// The GPU and its name, if it is one.
    pub fn device(&self) -> Option<(&str, &CudaDevice)> {
        match &self.sides.pool {
            PoolMemory::Host(_) => None,
            PoolMemory::Gpu(gpu) => Some((gpu.bench.name(), &gpu.device)),
        }
    }

    /// The limits that a worker would have here.
    pub fn limits(&self) -> CopyLimits {
        match &self.sides.pool {
            PoolMemory::Host(_) => CopyLimits::default(),
            PoolMemory::Gpu(gpu) => gpu.device.limits(),
        }
    }

    /// Registers the arena, to see what that costs. None where nothing is registered.
    pub fn registering(&self) -> Result<Option<Registering>, BenchError> {
        let PoolMemory::Gpu(gpu) = &self.sides.pool else {
            return Ok(None);
        };
        let bench = &gpu.bench;
        let free = bench.free_bytes()?;
        let (pool, _) = self.pool_of(&CopyShape {
            range_bytes: self.bytes(),
            layers: 1,
            method: CopyMethod::Auto,
        })?;
        let start = Instant::now();
        let engine = self.second_engine(&pool, CopyMethod::Auto)?;
        let seconds = start.elapsed().as_secs_f64();
        let device_bytes = free.saturating_sub(bench.free_bytes()?);
        drop(engine);
        Ok(Some(Registering {
            seconds,
            device_bytes,
        }))
    }

    /// A copy thread for this shape, and on a GPU an engine beside it.
    ///
    /// Errors: [`CopyError::BadConfig`] if there are too many blocks, or none.
    pub fn copies(&self, shape: CopyShape, limits: CopyLimits) -> Result<BenchCopies, BenchError> {
        let (pool, blocks) = self.pool_of(&shape)?;
        let engine: Box<dyn CopyEngine> = match &self.sides.pool {
            PoolMemory::Host(_) => Box::new(HostEngine::new(Arc::clone(&pool))),
            PoolMemory::Gpu(gpu) => Box::new(CudaEngine::new(
                &gpu.device,
                Arc::clone(&pool),
                shape.method,
            )?),
        };
        let shard = ArenaShard {
            map: Arc::clone(&self.sides.map),
            slot_bytes: shape.block_bytes(),
            rank_offset: 0,
        };
        let thread = CopyThread::spawn(engine, Arc::clone(&pool), limits)?;
        thread.attach(ARENA, shard.clone())?;
        let second = self.second_engine(&pool, shape.method)?;
        Ok(BenchCopies {
            thread,
            engine: second,
            sides: Arc::clone(&self.sides),
            shape,
            shard,
            pool,
            blocks,
        })
    }

    fn pool_of(&self, shape: &CopyShape) -> Result<(Arc<DevicePool>, u32), BenchError> {
        let base = match &self.sides.pool {
            PoolMemory::Host(memory) => u64_from(memory.as_ptr().expose_provenance()),
            PoolMemory::Gpu(gpu) => gpu.memory.base(),
        };
        let blocks = u32::try_from(self.bytes() / shape.block_bytes())
            .map_err(|_| CopyError::BadConfig("ranges too small for the memory"))?;
        let layer = shape.range_bytes * u64::from(blocks);
        let regions = (0..u64::from(shape.layers)).map(|number| DeviceRegion {
            base: base + number * layer,
            block_stride: shape.range_bytes,
            block_bytes: shape.range_bytes,
        });
        // SAFETY: the regions lie in memory of `sides`, which everything that copies has a share in, and which nothing else
        // touches but `BenchCopies::plain`, while no job runs.
        let pool = unsafe { DevicePool::new(regions.collect(), blocks) }?;
        Ok((Arc::new(pool), blocks))
    }

    fn second_engine(
        &self,
        pool: &Arc<DevicePool>,
        method: CopyMethod,
    ) -> Result<Option<CudaEngine>, BenchError> {
        let PoolMemory::Gpu(gpu) = &self.sides.pool else {
            return Ok(None);
        };
        let mut engine = CudaEngine::new(&gpu.device, Arc::clone(pool), method)?;
        engine.start()?;
        engine.attach(ARENA, &self.sides.second_map)?;
        if !engine.is_registered(ARENA) {
            return Err(BenchError::Unregistered);
        }
        Ok(Some(engine))
    }
}

/// Copies of one shape.
pub struct BenchCopies {
    // Fields drop in this order: what copies before the memory that it copies to.
    thread: CopyThread,
    /// Of this thread's own, beside the copy thread's.
    engine: Option<CudaEngine>,
    sides: Arc<Sides>,
    shape: CopyShape,
    shard: ArenaShard,
    pool: Arc<DevicePool>,
    blocks: u32,
}

impl BenchCopies {
    /// Blocks of the pool, and slots of the arena.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Seconds from handing the jobs to the copy thread until their caller knows that all have ended.
    pub fn ours(&self, jobs: &[CopyJob]) -> Result<f64, BenchError> {
        let start = self.begin(jobs)?;
        self.thread.wait_idle();
        let seconds = start.elapsed().as_secs_f64();
        self.end()?;
        Ok(seconds)
    }

    fn begin(&self, jobs: &[CopyJob]) -> Result<Instant, BenchError> {
        let jobs = jobs
            .iter()
            .cloned()
            .zip(1..)
            .map(|((kind, pairs), id)| Job {
                id: JobId(id),
                kind,
                arena: ARENA,
                pairs,
            });
        let jobs: Vec<_> = jobs.collect();
        let start = Instant::now();
        for job in jobs {
            if let Err(error) = self.thread.submit(job, ComputeMark::NONE) {
                self.thread.wait_idle();
                return Err(error.into());
            }
        }
        Ok(start)
    }

    fn end(&self) -> Result<(), BenchError> {
        for end in self.thread.take_finished() {
            if end.outcome != Outcome::Done {
                return Err(BenchError::Ended(end.outcome));
            }
        }
        Ok(())
    }

    /// Seconds of plain copies of as many bytes: on a GPU one copy for each job, from and to page-locked memory, over the
    /// stretch that the job's blocks begin at; on the host a loop of `memcpy` over the ranges as they are listed.
    ///
    /// Errors: [`CopyError::BadConfig`] if a job has no blocks or its stretch ends outside.
    pub fn plain(&mut self, jobs: &[CopyJob]) -> Result<f64, BenchError> {
        match &self.sides.pool {
            PoolMemory::Host(_) => {
                let mut listed = Vec::new();
                for (kind, pairs) in jobs {
                    listed.push((kind.direction(), self.unmerged(pairs)?));
                }
                let start = Instant::now();
                for (direction, ranges) in &listed {
                    // SAFETY: the ranges are those. No job runs: every method that begins some waits for them before it returns,
                    // and `self` is this one's alone.
                    unsafe { self.memcpy(*direction, ranges) };
                }
                Ok(start.elapsed().as_secs_f64())
            }
            PoolMemory::Gpu(gpu) => {
                let copies: Result<Vec<_>, _> = jobs.iter().map(|job| self.stretch(job)).collect();
                Ok(gpu.bench.copy(&self.sides.map, &gpu.memory, &copies?)?)
            }
        }
    }

    fn stretch(&self, (kind, pairs): &CopyJob) -> Result<PlainCopy, CopyError> {
        let slot = pairs.iter().map(|(slot, _)| slot.0).min();
        let block = pairs.iter().map(|(_, block)| block.0).min();
        let (Some(slot), Some(block)) = (slot, block) else {
            return Err(CopyError::BadConfig("a job of no blocks"));
        };
        Ok(PlainCopy {
            direction: kind.direction(),
            arena_offset: u64::from(slot) * self.shape.block_bytes(),
            device_offset: u64::from(block) * self.shape.range_bytes,
            bytes: u64_from(pairs.len()) * self.shape.block_bytes(),
        })
    }

    /// (Offset in the arena, address in the pool) of each range, none merged.
    ///
    /// Errors: as the copy thread says it of a slot or block that there is not.
    fn unmerged(&self, pairs: &[(SlotId, GpuBlock)]) -> Result<Vec<(usize, usize)>, CopyError> {
        let bytes = usize_from_u64(self.shape.range_bytes);
        let layers = usize_from_u64(u64::from(self.shape.layers));
        let mut all = Vec::with_capacity(pairs.len() * layers);
        for &(slot, block) in pairs {
            if slot.0 >= self.blocks {
                let slots = u64::from(self.blocks);
                return Err(CopyError::SlotOutOfRange { slot, slots });
            }
            if block.0 >= self.blocks {
                let blocks = self.blocks;
                return Err(CopyError::BlockOutOfRange { block, blocks });
            }
            for (layer, region) in self.pool.regions().iter().enumerate() {
                let offset = (slot.index() * layers + layer) * bytes;
                all.push((offset, usize_from_u64(region.base) + block.index() * bytes));
            }
        }
        Ok(all)
    }

    /// # Safety
    /// `ranges` are of [`unmerged`](Self::unmerged), and no job runs.
    unsafe fn memcpy(&self, direction: Direction, ranges: &[(usize, usize)]) {
        let bytes = usize_from_u64(self.shape.range_bytes);
        for &(offset, address) in ranges {
            let device = std::ptr::with_exposed_provenance_mut::<u8>(address);
            // SAFETY: by the contract of this function both ranges lie in memory of `sides`, and nobody else touches it.
            unsafe {
                let host = self.shard.map.base().add(offset).as_ptr();
                match direction {
                    Direction::HostToDevice => device.copy_from_nonoverlapping(host, bytes),
                    Direction::DeviceToHost => device.copy_to_nonoverlapping(host, bytes),
                }
            }
        }
    }

    /// Seconds that an engine takes for jobs that it is given whole, each as one batch, by a caller that does nothing but ask
    /// for their end: what is left without the hand-over to another thread, pacing and its timer. None without a GPU.
    pub fn unpaced(&mut self, jobs: &[CopyJob]) -> Result<Option<f64>, BenchError> {
        let Some(engine) = &mut self.engine else {
            return Ok(None);
        };
        let mut batches = Vec::new();
        for (kind, pairs) in jobs {
            batches.push(CopyBatch {
                direction: kind.direction(),
                arena: ARENA,
                ranges: ranges(&self.pool, &self.shard, pairs)?,
                after: ComputeMark::NONE,
            });
        }
        let start = Instant::now();
        let tickets: Result<Vec<_>, _> = batches.iter().map(|batch| engine.submit(batch)).collect();
        for ticket in tickets? {
            loop {
                match engine.poll(ticket) {
                    Poll::Pending => std::hint::spin_loop(),
                    Poll::Done => break,
                    Poll::Failed(error) => return Err(error.into()),
                }
            }
        }
        Ok(Some(start.elapsed().as_secs_f64()))
    }

    /// Seconds that each of `count` plain copies of `bytes` takes, at the end of both sides and while nothing else runs: as
    /// small as those with which an engine feeds and reads its model. None without a GPU.
    pub fn small(
        &self,
        direction: Direction,
        bytes: u64,
        count: usize,
    ) -> Result<Option<Vec<f64>>, BenchError> {
        let PoolMemory::Gpu(gpu) = &self.sides.pool else {
            return Ok(None);
        };
        let offset = self.sides.map.bytes().saturating_sub(bytes);
        let copy = PlainCopy {
            direction,
            arena_offset: offset,
            device_offset: offset,
            bytes,
        };
        let times = (0..count).map(|_| gpu.bench.copy(&self.sides.map, &gpu.memory, &[copy]));
        Ok(Some(times.collect::<Result<_, _>>()?))
    }

    /// The same, one after the other in the direction of `job` and as long as that runs.
    pub fn small_beside(&self, job: CopyJob, bytes: u64) -> Result<Option<Vec<f64>>, BenchError> {
        let direction = job.0.direction();
        self.begin(&[job])?;
        let mut all = Vec::new();
        let mut failed = None;
        while failed.is_none() && self.thread.in_flight() > 0 {
            match self.small(direction, bytes, 1) {
                Ok(Some(times)) => all.extend(times),
                Ok(None) => break,
                Err(error) => failed = Some(error),
            }
        }
        self.thread.wait_idle();
        self.end()?;
        if let Some(error) = failed {
            return Err(error);
        }
        Ok(matches!(self.sides.pool, PoolMemory::Gpu(_)).then_some(all))
    }
}
