//! One pool and one arena of random shape, with a model of what both should hold.

#![allow(
    unsafe_code,
    reason = "tests look at the arena's bytes, which no safe slice may cover"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvstore::{ArenaFile, ArenaMap, GpuBlock, PageSize, SlotId, u64_from, usize_from_u64};

use super::rng::Rng;
use super::{ARENA, Compute, DeviceMemory, EngineFactory, PoolShape, RegionShape, Rig};
use crate::device::DevicePool;
use crate::engine::{ComputeMark, CopyBatch, CopyEngine, CopyRange, Direction};
use crate::ranges::{ArenaShard, ranges};
use crate::schedule::CopyLimits;
use crate::thread::{CopyThread, Job};

/// A pool, an arena, and a model of what both should hold.
pub(super) struct World {
    engine: Option<Box<dyn CopyEngine>>,
    pub(super) pool: Arc<DevicePool>,
    memory: Arc<dyn DeviceMemory>,
    pub(super) compute: Box<dyn Compute>,
    shape: PoolShape,
    pub(super) map: Arc<ArenaMap>,
    shard: ArenaShard,
    pub(super) slots: u32,
    pub(super) blocks: u32,
    device: Vec<u8>,
    host: Vec<u8>,
}

impl World {
    pub(super) fn new(factory: &dyn EngineFactory, rng: &mut Rng) -> Self {
        let shape = random_shape(rng);
        let Rig {
            engine,
            pool,
            memory,
            compute,
        } = factory.build(&shape);
        let ranks = 1 + rng.below(3);
        let rank_bytes = pool.rank_bytes();
        // Sometimes slots touch, so that ranges merge; sometimes they are padded.
        let slot_bytes = ranks * rank_bytes + [0, 0, 1, 512][rng.index(4)];
        let slots = 6 + rng.index(20);
        let arena_bytes = (u64_from(slots) * slot_bytes).next_multiple_of(4096);
        let map = arena(arena_bytes);
        let shard = ArenaShard {
            map: Arc::clone(&map),
            slot_bytes,
            rank_offset: rng.below(ranks) * rank_bytes,
        };
        let device = vec![0; usize_from_u64(shape.bytes)];
        memory.write(0, &device);
        Self {
            engine: Some(engine),
            pool,
            memory,
            compute,
            blocks: shape.blocks,
            shape,
            host: vec![0; usize_from_u64(arena_bytes)],
            map,
            shard,
            slots: u32::try_from(slots).unwrap_or(0),
            device,
        }
    }

    /// The engine, started, with the arena attached.
    pub(super) fn started(&mut self) -> Box<dyn CopyEngine> {
        let Some(mut engine) = self.engine.take() else {
            panic!("each world has one engine");
        };
        assert_eq!(engine.start(), Ok(()), "start");
        assert_eq!(engine.attach(ARENA, &self.map), Ok(()), "attach");
        engine
    }

    /// The engine under a copy thread, with the arena attached.
    pub(super) fn thread(&mut self, limits: CopyLimits) -> CopyThread {
        let Some(engine) = self.engine.take() else {
            panic!("each world has one engine");
        };
        match CopyThread::spawn(engine, Arc::clone(&self.pool), limits) {
            Ok(thread) => {
                let attached = thread.attach(ARENA, self.shard.clone());
                assert_eq!(attached, Ok(()), "attach");
                thread
            }
            Err(error) => panic!("no copy thread: {error}"),
        }
    }

    fn ranges(&self, pairs: &[(SlotId, GpuBlock)]) -> Vec<CopyRange> {
        match ranges(&self.pool, &self.shard, pairs) {
            Ok(ranges) => ranges,
            Err(error) => panic!("the suite made a bad mapping: {error}"),
        }
    }

    pub(super) fn batch(&self, direction: Direction, pairs: &[(SlotId, GpuBlock)]) -> CopyBatch {
        CopyBatch {
            direction,
            arena: ARENA,
            ranges: self.ranges(pairs),
            after: ComputeMark::NONE,
        }
    }

    /// Every byte of both sides becomes a new random one.
    pub(super) fn scramble(&mut self, rng: &mut Rng) {
        self.scramble_device(rng);
        for (cell, byte) in cells(&self.map).iter().zip(&mut self.host) {
            *byte = rng.byte();
            cell.store(*byte, Ordering::Relaxed);
        }
    }

    /// Every byte of the device memory becomes a new random one.
    pub(super) fn scramble_device(&mut self, rng: &mut Rng) {
        self.device.iter_mut().for_each(|byte| *byte = rng.byte());
        self.memory.write(0, &self.device);
    }

    /// Does to the model what a copy of `pairs` should do, from the definition of the layout, not from `ranges`.
    pub(super) fn model(&mut self, direction: Direction, pairs: &[(SlotId, GpuBlock)]) {
        self.for_each_piece(pairs, |device, host| match direction {
            Direction::HostToDevice => device.copy_from_slice(host),
            Direction::DeviceToHost => host.copy_from_slice(device),
        });
    }

    /// Overwrites a job's destination, in the model and for real.
    pub(super) fn poison(&mut self, job: &Job) {
        let direction = job.kind.direction();
        self.for_each_piece(&job.pairs, |device, host| match direction {
            Direction::HostToDevice => device.fill(0xEE),
            Direction::DeviceToHost => host.fill(0xEE),
        });
        // The real bytes piece by piece: the rest may be in motion.
        for range in self.ranges(&job.pairs) {
            let poison = vec![0xEE; usize_from_u64(range.bytes)];
            match direction {
                Direction::HostToDevice => {
                    self.memory
                        .write(range.device - self.device_base(), &poison);
                }
                Direction::DeviceToHost => {
                    let start = usize_from_u64(range.arena_offset);
                    let cells = &cells(&self.map)[start..start + poison.len()];
                    cells
                        .iter()
                        .for_each(|cell| cell.store(0xEE, Ordering::Relaxed));
                }
            }
        }
    }

    fn for_each_piece(
        &mut self,
        pairs: &[(SlotId, GpuBlock)],
        mut each: impl FnMut(&mut [u8], &mut [u8]),
    ) {
        for &(slot, block) in pairs {
            let mut host = slot.index() * usize_from_u64(self.shard.slot_bytes)
                + usize_from_u64(self.shard.rank_offset);
            for region in &self.shape.regions {
                let bytes = usize_from_u64(region.block_bytes);
                let device = usize_from_u64(region.offset)
                    + block.index() * usize_from_u64(region.block_stride);
                each(
                    &mut self.device[device..device + bytes],
                    &mut self.host[host..host + bytes],
                );
                host += bytes;
            }
        }
    }

    /// Whether both sides hold exactly what the model holds.
    pub(super) fn matches(&self) -> bool {
        let mut device = vec![0; self.device.len()];
        self.memory.read(0, &mut device);
        let host = cells(&self.map)
            .iter()
            .map(|cell| cell.load(Ordering::Relaxed));
        device == self.device && host.eq(self.host.iter().copied())
    }

    pub(super) fn read_device(&self, range: CopyRange) -> Vec<u8> {
        let mut bytes = vec![0; usize_from_u64(range.bytes)];
        self.memory
            .read(range.device - self.device_base(), &mut bytes);
        bytes
    }

    /// Address of the first byte of the device memory: region 0 starts at its own offset.
    pub(super) fn device_base(&self) -> u64 {
        self.pool.regions()[0].base - self.shape.regions[0].offset
    }

    pub(super) fn device_end(&self) -> u64 {
        self.device_base() + self.shape.bytes
    }
}

/// Layer-outermost (one strided area per region) or block-outermost (regions interleaved), filling the memory exactly.
fn random_shape(rng: &mut Rng) -> PoolShape {
    let blocks = 6 + rng.index(20);
    let sizes: Vec<u64> = (0..1 + rng.index(5))
        .map(|_| [1 + rng.below(300), 64 * (1 + rng.below(8))][rng.index(2)])
        .collect();
    let gap = [0, 0, 1, 48][rng.index(4)];
    let mut regions = Vec::new();
    let mut offset = 0;
    let count = u64_from(blocks);
    let interleaved = rng.below(2) == 0;
    let whole: u64 = sizes.iter().map(|bytes| bytes + gap).sum();
    for &block_bytes in &sizes {
        let pitch = block_bytes + gap;
        let block_stride = if interleaved { whole } else { pitch };
        regions.push(RegionShape {
            offset,
            block_stride,
            block_bytes,
        });
        offset += if interleaved { pitch } else { pitch * count };
    }
    PoolShape {
        bytes: whole * count - gap,
        regions,
        blocks: u32::try_from(blocks).unwrap_or(0),
    }
}

/// An arena of whole pages, `bytes` or a little more.
///
/// # Panics
/// If there is no memory for it.
pub fn arena(bytes: u64) -> Arc<ArenaMap> {
    let bytes = bytes.next_multiple_of(4096);
    let map = ArenaFile::create(bytes, PageSize::Base4K).map(|file| {
        let fd = file.fd().try_clone_to_owned();
        fd.map(|fd| ArenaMap::map(fd, bytes))
    });
    match map {
        Ok(Ok(Ok(map))) => Arc::new(map),
        other => panic!("no arena: {other:?}"),
    }
}

/// The arena's bytes, readable while engines copy.
pub fn cells(map: &ArenaMap) -> &[AtomicU8] {
    // SAFETY: the mapping is `bytes()` long and lives as long as the borrow of `map`; atomic bytes have the size and
    // alignment of bytes, and may be shared with whoever writes the mapping.
    unsafe { std::slice::from_raw_parts(map.base().as_ptr().cast(), usize_from_u64(map.bytes())) }
}
