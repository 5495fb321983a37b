//! From mappings to memory: the one checked function that turns (slot, gpu block) pairs into copy ranges, and the cutter
//! that turns ranges into sub-batches.
//!
//! Nothing else in the workspace computes an arena offset or a device address for a copy. Pure arithmetic; touches no memory.

use std::borrow::Cow;
use std::sync::Arc;

use kvstore::{ArenaMap, GpuBlock, SlotId};

use crate::device::DevicePool;
use crate::engine::{CopyError, CopyRange};

/// One rank's view of an arena: its bytes of slot `s` start at `s * slot_bytes + rank_offset`.
#[derive(Clone)]
pub struct ArenaShard {
    /// The mapping, kept alive by whoever copies.
    pub map: Arc<ArenaMap>,
    /// Bytes from one slot to the next.
    pub slot_bytes: u64,
    /// Where this rank's share starts within a slot.
    pub rank_offset: u64,
}

impl ArenaShard {
    /// Slots that lie wholly inside the mapping; 0 for a shard without slot size.
    pub fn slots(&self) -> u64 {
        self.map.bytes().checked_div(self.slot_bytes).unwrap_or(0)
    }

    /// Checks that this rank's share of a block fits into a slot. Errors: [`CopyError::BadConfig`].
    pub fn validate(&self, pool: &DevicePool) -> Result<(), CopyError> {
        let end = self.rank_offset.checked_add(pool.rank_bytes());
        if end.is_none_or(|end| end > self.slot_bytes) {
            return Err(CopyError::BadConfig(
                "the rank's share does not fit into a slot",
            ));
        }
        Ok(())
    }
}

/// The ranges that copy `pairs`, either way. Neighbours that touch on both sides are merged; pairs are taken in slot
/// order, so a job's ranges are unordered with respect to its pairs.
///
/// Errors: [`CopyError::SlotOutOfRange`], [`CopyError::BlockOutOfRange`], [`CopyError::BadConfig`] for a shard that does
/// not fit the pool. Nothing is returned for the valid part of a bad list.
pub fn ranges(
    pool: &DevicePool,
    shard: &ArenaShard,
    pairs: &[(SlotId, GpuBlock)],
) -> Result<Vec<CopyRange>, CopyError> {
    shard.validate(pool)?;
    let slots = shard.slots();
    let mut out = Vec::with_capacity(pairs.len());
    for &(slot, block) in in_slot_order(pairs).iter() {
        if u64::from(slot.0) >= slots {
            return Err(CopyError::SlotOutOfRange { slot, slots });
        }
        if block.0 >= pool.blocks() {
            let blocks = pool.blocks();
            return Err(CopyError::BlockOutOfRange { block, blocks });
        }
        // Neither sum can overflow: the slot ends inside the mapping, the block inside a span that the pool has checked.
        let mut arena_offset = u64::from(slot.0) * shard.slot_bytes + shard.rank_offset;
        for region in pool.regions() {
            push_merged(
                &mut out,
                CopyRange {
                    arena_offset,
                    device: region.base + u64::from(block.0) * region.block_stride,
                    bytes: region.block_bytes,
                },
            );
            arena_offset += region.block_bytes;
        }
    }
    Ok(out)
}

/// Blocks are often handed out backwards; in slot order such runs merge too.
fn in_slot_order(pairs: &[(SlotId, GpuBlock)]) -> Cow<'_, [(SlotId, GpuBlock)]> {
    if pairs.is_sorted() {
        return Cow::Borrowed(pairs);
    }
    let mut sorted = pairs.to_vec();
    sorted.sort_unstable();
    Cow::Owned(sorted)
}

fn push_merged(out: &mut Vec<CopyRange>, next: CopyRange) {
    if let Some(last) = out.last_mut()
        && last.arena_offset + last.bytes == next.arena_offset
        && last.device + last.bytes == next.device
    {
        last.bytes += next.bytes;
        return;
    }
    out.push(next);
}

/// A job's ranges that have not been given to the engine yet.
#[derive(Debug)]
pub(crate) struct Cutter {
    ranges: Vec<CopyRange>,
    /// First range that is not wholly taken.
    next: usize,
    /// Bytes already taken of that range.
    taken: u64,
}

impl Cutter {
    pub(crate) fn new(ranges: Vec<CopyRange>) -> Self {
        debug_assert!(ranges.iter().all(|range| range.bytes > 0));
        Self {
            ranges,
            next: 0,
            taken: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.next == self.ranges.len()
    }

    /// Forgets what is left.
    pub(crate) fn clear(&mut self) {
        self.next = self.ranges.len();
    }

    /// The next sub-batch: at most `cap` bytes, a range that does not fit is split. Empty only when nothing is left.
    pub(crate) fn take(&mut self, cap: u64) -> Vec<CopyRange> {
        assert!(cap > 0, "a sub-batch holds at least one byte");
        let mut out = Vec::new();
        let mut room = cap;
        while room > 0
            && let Some(range) = self.ranges.get(self.next)
        {
            let bytes = room.min(range.bytes - self.taken);
            out.push(CopyRange {
                arena_offset: range.arena_offset + self.taken,
                device: range.device + self.taken,
                bytes,
            });
            room -= bytes;
            self.taken += bytes;
            if self.taken == range.bytes {
                self.next += 1;
                self.taken = 0;
            }
        }
        out
    }
}
