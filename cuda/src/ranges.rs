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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testkit::{arena, paper_pool};

    /// Which arena byte goes with which device byte.
    fn bytes_of(ranges: &[CopyRange]) -> Vec<(u64, u64)> {
        let mut bytes: Vec<_> = ranges
            .iter()
            .flat_map(|range| (0..range.bytes).map(|n| (range.arena_offset + n, range.device + n)))
            .collect();
        bytes.sort_unstable();
        bytes
    }

    #[derive(Clone, Debug)]
    struct Layout {
        /// (gap before the region, block stride beyond block bytes, block bytes)
        regions: Vec<(u64, u64, u64)>,
        blocks: u32,
        slots: u32,
        ranks: u64,
        rank: u64,
        slot_padding: u64,
        pairs: Vec<(SlotId, GpuBlock)>,
    }

    fn layouts() -> impl Strategy<Value = Layout> {
        let region = (0..3_u64, 0..3_u64, 1..9_u64);
        (
            prop::collection::vec(region, 1..5),
            (1..20_u32, 1..20_u32),
            (1..4_u64, 0..4_u64, 0..3_u64),
            any::<prop::sample::Index>(),
            any::<bool>(),
        )
            .prop_flat_map(
                |(regions, (blocks, slots), (ranks, rank, slot_padding), count, shuffle)| {
                    let layout = Layout {
                        regions,
                        blocks,
                        slots,
                        ranks,
                        rank: rank % ranks,
                        slot_padding,
                        pairs: Vec::new(),
                    };
                    let most = usize::try_from(blocks.min(slots)).expect("small");
                    let count = count.index(most + 1);
                    let order = |n: u32| {
                        let all: Vec<u32> = (0..n).collect();
                        if shuffle {
                            Just(all).prop_shuffle().boxed()
                        } else {
                            Just(all).boxed()
                        }
                    };
                    (Just(layout), order(slots), order(blocks)).prop_map(
                        move |(layout, slots, blocks)| {
                            let pairs = slots
                                .into_iter()
                                .map(SlotId)
                                .zip(blocks.into_iter().map(GpuBlock));
                            Layout {
                                pairs: pairs.take(count).collect(),
                                ..layout
                            }
                        },
                    )
                },
            )
    }

    fn build(layout: &Layout) -> (DevicePool, ArenaShard) {
        let mut base = 1_000;
        let mut regions = Vec::new();
        for &(gap, extra, bytes) in &layout.regions {
            base += gap;
            regions.push((base, bytes + extra, bytes));
            base += u64::from(layout.blocks) * (bytes + extra);
        }
        let pool = paper_pool(&regions, layout.blocks);
        let slot_bytes = layout.ranks * pool.rank_bytes() + layout.slot_padding;
        let shard = ArenaShard {
            map: arena(u64::from(layout.slots) * slot_bytes),
            slot_bytes,
            rank_offset: layout.rank * pool.rank_bytes(),
        };
        (pool, shard)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_byte_of_every_pair_once(layout in layouts()) {
            let (pool, shard) = build(&layout);
            let ranges = ranges(&pool, &shard, &layout.pairs).expect("all pairs are inside");
            let mut expected = Vec::new();
            for &(slot, block) in &layout.pairs {
                let mut offset = u64::from(slot.0) * shard.slot_bytes + shard.rank_offset;
                for region in pool.regions() {
                    let start = region.base + u64::from(block.0) * region.block_stride;
                    for n in 0..region.block_bytes {
                        expected.push((offset, start + n));
                        offset += 1;
                    }
                }
            }
            expected.sort_unstable();
            prop_assert_eq!(bytes_of(&ranges), expected);
            for pair in ranges.windows(2) {
                let touch = pair[0].arena_offset + pair[0].bytes == pair[1].arena_offset
                    && pair[0].device + pair[0].bytes == pair[1].device;
                prop_assert!(!touch, "neighbours that touch on both sides are one range");
            }
            for range in &ranges {
                prop_assert!(pool.contains(range.device, range.bytes));
                prop_assert!(range.arena_offset + range.bytes <= shard.map.bytes());
            }
        }

        #[test]
        fn cutting_keeps_every_byte_and_the_cap(layout in layouts(), cap in 1..64_u64) {
            let (pool, shard) = build(&layout);
            let ranges = ranges(&pool, &shard, &layout.pairs).expect("all pairs are inside");
            let mut cutter = Cutter::new(ranges.clone());
            let mut parts = Vec::new();
            while !cutter.is_empty() {
                let part = cutter.take(cap);
                let bytes: u64 = part.iter().map(|range| range.bytes).sum();
                prop_assert!(bytes <= cap);
                prop_assert!(bytes == cap || cutter.is_empty(), "only the last part is short");
                prop_assert!(part.iter().all(|range| range.bytes > 0));
                parts.extend(part);
            }
            prop_assert!(cutter.take(cap).is_empty());
            prop_assert_eq!(bytes_of(&parts), bytes_of(&ranges));
        }
    }

    #[test]
    fn runs_merge_into_one_range_also_backwards() {
        let pool = paper_pool(&[(4096, 512, 512)], 16);
        let map = arena(8 * 512);
        let shard = ArenaShard {
            map,
            slot_bytes: 512,
            rank_offset: 0,
        };
        let mut pairs: Vec<_> = (0..8).map(|n| (SlotId(n), GpuBlock(n + 3))).collect();
        let whole = vec![CopyRange {
            arena_offset: 0,
            device: 4096 + 3 * 512,
            bytes: 8 * 512,
        }];
        assert_eq!(ranges(&pool, &shard, &pairs), Ok(whole.clone()));
        pairs.reverse();
        assert_eq!(ranges(&pool, &shard, &pairs), Ok(whole));
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let pool = paper_pool(&[(4096, 512, 512)], 16);
        let shard = ArenaShard {
            map: arena(4096),
            slot_bytes: 512,
            rank_offset: 0,
        };
        let good = (SlotId(7), GpuBlock(15));
        assert!(ranges(&pool, &shard, &[good]).is_ok());
        let slot = SlotId(8);
        assert_eq!(
            ranges(&pool, &shard, &[good, (slot, GpuBlock(0))]),
            Err(CopyError::SlotOutOfRange { slot, slots: 8 })
        );
        assert!(ranges(&pool, &shard, &[(SlotId(u32::MAX), GpuBlock(0))]).is_err());
        let block = GpuBlock(16);
        assert_eq!(
            ranges(&pool, &shard, &[(SlotId(0), block), good]),
            Err(CopyError::BlockOutOfRange { block, blocks: 16 })
        );
        for (slot_bytes, rank_offset) in [(512, 1), (511, 0), (0, 0), (u64::MAX, u64::MAX)] {
            let bad = ArenaShard {
                slot_bytes,
                rank_offset,
                ..shard.clone()
            };
            assert!(matches!(
                ranges(&pool, &bad, &[]),
                Err(CopyError::BadConfig(_))
            ));
        }
        let huge = ArenaShard {
            slot_bytes: u64::MAX,
            ..shard.clone()
        };
        assert_eq!(
            ranges(&pool, &huge, &[(SlotId(0), GpuBlock(0))]),
            Err(CopyError::SlotOutOfRange {
                slot: SlotId(0),
                slots: 0
            })
        );
    }
}
