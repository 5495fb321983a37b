//! The host engine as the tests of this crate see it: memory that can be looked at, a switch, a printed seed.

#![allow(
    unsafe_code,
    reason = "tests vouch for the memory that they hand to the host engine"
)]

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvstore::{ArenaFile, ArenaMap, PageSize, u64_from, usize_from_u64};

use crate::conformance::{Compute, DeviceMemory, EngineFactory, PoolShape, Rig};
use crate::device::{DevicePool, DeviceRegion};
use crate::engine::ComputeMark;
use crate::host::{HostEngine, HostSwitch};

/// A fresh seed, printed, or that of `GREENROOM_TEST_SEED` to replay one.
pub(crate) fn seed() -> u64 {
    let replay = std::env::var("GREENROOM_TEST_SEED").ok();
    let seed = match replay {
        Some(text) => text.parse().expect("GREENROOM_TEST_SEED is a number"),
        None => RandomState::new().hash_one("greenroom"),
    };
    println!("GREENROOM_TEST_SEED={seed}");
    seed
}

/// Device memory that is ordinary memory. Atomic bytes, because engines write them behind Rust's back.
pub(crate) struct HostMemory {
    cells: Box<[AtomicU8]>,
}

impl HostMemory {
    pub(crate) fn new(bytes: u64) -> Self {
        Self {
            cells: (0..bytes).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    pub(crate) fn base(&self) -> u64 {
        u64_from(self.cells.as_ptr().expose_provenance())
    }
}

impl DeviceMemory for HostMemory {
    fn read(&self, offset: u64, into: &mut [u8]) {
        let start = usize_from_u64(offset);
        let cells = &self.cells[start..start + into.len()];
        for (byte, cell) in into.iter_mut().zip(cells) {
            *byte = cell.load(Ordering::Relaxed);
        }
    }

    fn write(&self, offset: u64, from: &[u8]) {
        let start = usize_from_u64(offset);
        for (byte, cell) in from.iter().zip(&self.cells[start..start + from.len()]) {
            cell.store(*byte, Ordering::Relaxed);
        }
    }
}

impl Compute for HostSwitch {
    fn launch(&self) -> ComputeMark {
        HostSwitch::launch(self)
    }

    fn finish(&self) {
        HostSwitch::finish(self);
    }
}

/// Host engines that share one switch.
#[derive(Default)]
pub(crate) struct HostFactory {
    pub(crate) switch: HostSwitch,
}

impl EngineFactory for HostFactory {
    fn build(&self, shape: &PoolShape) -> Rig {
        let memory = Arc::new(HostMemory::new(shape.bytes));
        let regions = shape.regions.iter().map(|region| DeviceRegion {
            base: memory.base() + region.offset,
            block_stride: region.block_stride,
            block_bytes: region.block_bytes,
        });
        // SAFETY: the regions lie in `memory`, whose cells may be written through shared references, and which the rig's
        // user keeps until the engine is gone.
        let pool = unsafe { DevicePool::new(regions.collect(), shape.blocks) };
        let pool = Arc::new(pool.expect("the suite makes valid pools"));
        Rig {
            engine: Box::new(HostEngine::with_switch(
                Arc::clone(&pool),
                self.switch.clone(),
            )),
            pool,
            memory,
            compute: Box::new(self.switch.clone()),
        }
    }
}

/// A pool of numbers that nothing copies with.
pub(crate) fn paper_pool(regions: &[(u64, u64, u64)], blocks: u32) -> DevicePool {
    let regions = regions
        .iter()
        .map(|&(base, block_stride, block_bytes)| DeviceRegion {
            base,
            block_stride,
            block_bytes,
        });
    // SAFETY: only used for arithmetic, never given to an engine.
    unsafe { DevicePool::new(regions.collect(), blocks) }.expect("a valid pool")
}

/// An arena of at least `bytes` bytes, whole pages, none touched.
pub(crate) fn arena(bytes: u64) -> Arc<ArenaMap> {
    let bytes = bytes.next_multiple_of(4096);
    let file = ArenaFile::create(bytes, PageSize::Base4K).expect("a memfd");
    let fd = file.fd().try_clone_to_owned().expect("a descriptor");
    Arc::new(ArenaMap::map(fd, bytes).expect("a mapping"))
}
