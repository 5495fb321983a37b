//! Blocks on their way from the engine's pool to the arena.
//!
//! Full blocks queue by hash; slots are reserved ahead by message; a granted reservation is shipped as one job as soon
//! as its blocks are found in the pool. A save holds no reference on a block that a request references: it would keep
//! the block from being freed when that request is preempted, and another would fall. Instead every step re-checks the
//! blocks of running saves ([`recheck`]) before anything computes.

use std::collections::VecDeque;
use std::time::Instant;

use kvstore::{BlockHash, DigestMap, GpuBlock, SlotId};

use super::pool::GpuPool;

/// Most blocks that wait for a reservation; beyond it the oldest are dropped (they are only a future miss).
const QUEUE_BLOCKS: usize = 1 << 16;
/// Reservations asked for or granted, and save jobs, at a time.
pub(super) const OUTSTANDING_MAX: usize = 2;

/// Slots granted for blocks to be saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    pub(super) lease: u64,
    pub(super) entries: Vec<(BlockHash, SlotId)>,
    pub(super) expires: Instant,
}

/// A block that a running save reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SavedBlock {
    pub(super) hash: BlockHash,
    pub(super) block: GpuBlock,
    /// Whether we hold a reference on it.
    pub(super) ours: bool,
}

/// What may become of a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shipment {
    /// All blocks are there; those marked `ours` have just been referenced.
    Ready(Vec<SavedBlock>),
    /// Referencing the free ones now would cut into the reserve; that of the first so many entries would not.
    TooMany(usize),
    /// Some blocks are gone from the pool; these are still there.
    Gone(Vec<BlockHash>),
}

/// The queue in front of the jobs.
#[derive(Debug, Default)]
pub(super) struct Saves {
    queue: VecDeque<BlockHash>,
    asked: VecDeque<(u64, Vec<BlockHash>)>,
    granted: VecDeque<Grant>,
    /// Most blocks to ask for at once, after a grant was too large for the room there is.
    narrow: Option<usize>,
}

impl Saves {
    /// Queues full blocks.
    pub(super) fn push(&mut self, hashes: &[BlockHash]) {
        self.queue.extend(hashes);
        let excess = self.queue.len().saturating_sub(QUEUE_BLOCKS);
        self.queue.drain(..excess);
    }

    /// Drops blocks that nobody needs any more from the queue.
    pub(super) fn forget(&mut self, hashes: &[BlockHash]) {
        if !self.queue.is_empty() {
            let useless: DigestMap<()> = hashes.iter().map(|hash| (*hash, ())).collect();
            self.queue.retain(|hash| !useless.contains_key(hash));
        }
    }

    /// The next blocks to reserve slots for, unless enough is under way: a whole batch (`blocks_max`), or, after one that
    /// was too large, as many as there is room for now.
    pub(super) fn next_batch(
        &mut self,
        blocks_max: usize,
        room: impl Fn() -> usize,
    ) -> Option<Vec<BlockHash>> {
        if self.queue.is_empty() || self.asked.len() + self.granted.len() >= OUTSTANDING_MAX {
            return None;
        }
        let wider = self.narrow.map(|fit| fit.max(room()));
        self.narrow = wider.filter(|fit| *fit < blocks_max);
        let batch = self.narrow.unwrap_or(blocks_max).min(self.queue.len());
        Some(self.queue.drain(..batch).collect())
    }

    /// Queues the blocks of a grant for which there is no room again, as the next ones, to be asked for in parts that
    /// fit. They must not wait for room as a whole: under a reserve that stays high it may never come, and fetches, which
    /// do not evict what is still to be saved, would wait with them.
    pub(super) fn again_in_parts(&mut self, grant: Grant, fit: usize) {
        self.narrow = Some(fit);
        for (hash, _) in grant.entries.into_iter().rev() {
            self.queue.push_front(hash);
        }
    }

    /// Whether any of these blocks waits to be saved.
    pub(super) fn any_of(&self, blocks: &[Option<BlockHash>]) -> bool {
        if self.queue.is_empty() && self.asked.is_empty() && self.granted.is_empty() {
            return false;
        }
        let blocks = blocks.iter().flatten();
        let blocks: DigestMap<()> = blocks.map(|block| (*block, ())).collect();
        let asked = self.asked.iter().flat_map(|(_, hashes)| hashes);
        let granted = self.granted.iter().flat_map(|grant| &grant.entries);
        let granted = granted.map(|(hash, _)| hash);
        let mut unsaved = self.queue.iter().chain(asked).chain(granted);
        unsaved.any(|hash| blocks.contains_key(hash))
    }

    /// Remembers what was asked under which number.
    pub(super) fn asked(&mut self, sequence: u64, hashes: Vec<BlockHash>) {
        self.asked.push_back((sequence, hashes));
    }

    /// An answer: pairs of (index into what was asked, slot). False if nobody asked.
    pub(super) fn answered(
        &mut self,
        sequence: u64,
        lease: Option<u64>,
        slots: &[(u32, u32)],
        expires: Instant,
    ) -> bool {
        let Some(at) = self.asked.iter().position(|(asked, _)| *asked == sequence) else {
            return false;
        };
        let Some((_, hashes)) = self.asked.remove(at) else {
            return false;
        };
        let entries = slots
            .iter()
            .filter_map(|(index, slot)| {
                Some((*hashes.get(usize::try_from(*index).ok()?)?, SlotId(*slot)))
            })
            .collect();
        if let Some(lease) = lease {
            self.granted.push_back(Grant {
                lease,
                entries,
                expires,
            });
        }
        true
    }

    /// The oldest grant.
    pub(super) fn pop_grant(&mut self) -> Option<Grant> {
        self.granted.pop_front()
    }

    /// Puts a grant back for the next step.
    pub(super) fn unpop_grant(&mut self, grant: Grant) {
        self.granted.push_front(grant);
    }

    /// Forgets reservations (the connection is gone); what they were for is queued again.
    pub(super) fn disconnect(&mut self) {
        let asked = self.asked.drain(..).flat_map(|(_, hashes)| hashes);
        let granted = self
            .granted
            .drain(..)
            .flat_map(|grant| grant.entries.into_iter().map(|(hash, _)| hash));
        let again: Vec<BlockHash> = asked.chain(granted).collect();
        self.push(&again);
    }

    /// Forgets everything; returns the reservations to give back.
    pub(super) fn reset(&mut self) -> Vec<u64> {
        self.queue.clear();
        self.asked.clear();
        self.granted.drain(..).map(|grant| grant.lease).collect()
    }
}

/// Finds a grant's blocks in the pool and takes the references that are needed, if there is `room` for them.
pub(super) fn prepare(grant: &Grant, pool: &mut dyn GpuPool, room: usize) -> Shipment {
    let hashes: Vec<BlockHash> = grant.entries.iter().map(|(hash, _)| *hash).collect();
    let found = pool.lookup(&hashes);
    if found.iter().any(Option::is_none) {
        let there = hashes
            .iter()
            .zip(&found)
            .filter(|(_, block)| block.is_some());
        return Shipment::Gone(there.map(|(hash, _)| *hash).collect());
    }
    let blocks: Vec<GpuBlock> = found.into_iter().flatten().collect();
    let uses = pool.uses(&blocks);
    let idle_at = (0..blocks.len()).filter(|i| !uses[*i].referenced);
    let idle_at: Vec<usize> = idle_at.collect();
    if let Some(first_beyond) = idle_at.get(room) {
        return Shipment::TooMany(*first_beyond);
    }
    let idle: Vec<GpuBlock> = idle_at.into_iter().map(|i| blocks[i]).collect();
    pool.reference(&idle);
    let saved = hashes.iter().zip(&blocks).zip(&uses);
    Shipment::Ready(
        saved
            .map(|((hash, block), u)| SavedBlock {
                hash: *hash,
                block: *block,
                ours: !u.referenced,
            })
            .collect(),
    )
}

/// Looks after the blocks of a running save: takes a reference on those that were freed since. False if one has been
/// given away: the save must be fenced before this step computes.
pub(super) fn recheck(blocks: &mut [SavedBlock], pool: &mut dyn GpuPool) -> bool {
    let theirs: Vec<usize> = (0..blocks.len()).filter(|i| !blocks[*i].ours).collect();
    let uses = pool.uses(&theirs.iter().map(|i| blocks[*i].block).collect::<Vec<_>>());
    let mut intact = true;
    let mut freed = Vec::new();
    for (i, u) in theirs.into_iter().zip(uses) {
        if u.hash != Some(blocks[i].hash) {
            intact = false;
        } else if !u.referenced {
            blocks[i].ours = true;
            freed.push(blocks[i].block);
        }
    }
    pool.reference(&freed);
    intact
}

/// Gives the references of an ended save back, suffix first towards the eviction end.
pub(super) fn finish(blocks: &[SavedBlock], pool: &mut dyn GpuPool) {
    let ours: Vec<GpuBlock> = blocks
        .iter()
        .rev()
        .filter(|b| b.ours)
        .map(|b| b.block)
        .collect();
    if !ours.is_empty() {
        pool.release(&ours);
    }
}
