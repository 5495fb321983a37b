//! Hooks by hand, for unit tests: a link that no thread serves, messages that do nothing but come, a pool to look at.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::cell::Cell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kvstore::{BlockHash, GpuBlock};

use super::{BlockUse, GpuPool, HooksConfig, Prefetch, Published, SchedulerHooks, Step, StepMode};
use crate::engine::client::Inbound;
use crate::engine::frames::{HEADER_BYTES, ToEngine, ToSidecar, decode};
use crate::sync::Receiver;

/// A pool that is only looked at: nothing in it moves.
#[derive(Default)]
pub(crate) struct StillPool {
    pub(crate) blocks: Vec<BlockUse>,
    /// Hashes that were searched for.
    pub(crate) searched: Cell<usize>,
}

impl GpuPool for StillPool {
    fn total(&self) -> usize {
        8
    }
    fn free(&self) -> usize {
        8
    }
    fn lookup(&self, hashes: &[BlockHash]) -> Vec<Option<GpuBlock>> {
        self.searched.update(|searched| searched + hashes.len());
        let find = |hash: &BlockHash| self.blocks.iter().position(|u| u.hash == Some(*hash));
        let found = hashes.iter().map(find);
        found
            .map(|at| at.map(|at| GpuBlock(u32::try_from(at).unwrap())))
            .collect()
    }
    fn uses(&self, blocks: &[GpuBlock]) -> Vec<BlockUse> {
        blocks.iter().map(|b| self.blocks[b.index()]).collect()
    }
    fn free_list(&self, n: usize) -> Vec<Option<BlockHash>> {
        vec![None; n]
    }
    fn take(&mut self, _: usize) -> Option<Vec<GpuBlock>> {
        unreachable!("nothing is fetched")
    }
    fn reference(&mut self, _: &[GpuBlock]) {
        unreachable!("nothing is moved")
    }
    fn release(&mut self, _: &[GpuBlock]) {
        unreachable!("nothing was taken")
    }
    fn evict(&mut self, _: &[GpuBlock]) {
        unreachable!("nothing is moved")
    }
    fn publish(&mut self, _: &[Published]) {
        unreachable!("nothing was fetched")
    }
}

/// Of an engine with eight blocks.
pub(crate) fn config() -> HooksConfig {
    HooksConfig {
        socket: PathBuf::new(),
        engine: "engine".into(),
        rank_bytes: 4096,
        ranks: 1,
        block_tokens: 16,
        gpu_blocks: 8,
        lookup_wait: Duration::ZERO,
        hold_ratio: 0.5,
        prefetch: Prefetch::On,
    }
}

/// A lease for a request that nobody knows: it is given back when it is taken in.
pub(crate) fn late_match(lease: u64) -> Inbound {
    Inbound::Message {
        sequence: 1,
        message: ToEngine::Match {
            turn: 77,
            for_session: false,
            session: 1,
            lease: Some(lease),
            slots: vec![0],
            ttl_ms: 1000,
        },
        at: Instant::now(),
    }
}

/// The leases that have been given back since the last call.
pub(crate) fn given_back(frames: &Receiver<Vec<u8>>) -> Vec<u64> {
    let frames = std::iter::from_fn(|| frames.try_recv().ok());
    let lease = |frame: Vec<u8>| match decode(&frame[HEADER_BYTES..]).unwrap() {
        ToSidecar::Release { lease } => Some(lease),
        _ => None,
    };
    frames.filter_map(lease).collect()
}

/// A step of an idle engine, in which there is nothing to copy.
pub(crate) fn step(hooks: &mut SchedulerHooks) {
    let step = Step {
        reserve: 0,
        handed_out: 0,
        mode: StepMode::Idle,
    };
    assert_eq!(
        hooks.plan(step, &mut StillPool::default(), Instant::now()),
        None
    );
}
