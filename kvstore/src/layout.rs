//! From an engine's geometry to bytes in the arena. Knows sizes and offsets, never memory.

use crate::error::StoreError;
use crate::ids::SlotId;

/// Slots start on this boundary, in bytes: the small page size, so that a slot never shares a page of either kind half-way.
pub const SLOT_ALIGN: u64 = 4096;

/// Largest block on one rank, in bytes. A 256-token block of the widest model in use is below a tenth of it.
pub const RANK_BYTES_MAX: u64 = 1 << 30;

/// Most ranks that share one block.
pub const RANKS_MAX: u32 = 1024;

/// Most tokens in one block.
pub const BLOCK_TOKENS_MAX: u32 = 65_536;

/// What decides the size of a slot. Comes from an engine, so it is checked before use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one block on one rank, all layers.
    pub rank_bytes: u64,
    /// Tensor-parallel ranks whose shards make up one block.
    pub ranks: u32,
    /// Tokens in one block.
    pub block_tokens: u32,
}

impl Geometry {
    /// Refuses what no engine has.
    ///
    /// # Errors
    /// `BadConfig`, which names the field and the rule.
    pub fn validate(&self) -> Result<(), StoreError> {
        let rules = [
            (
                (1..=RANK_BYTES_MAX).contains(&self.rank_bytes),
                "rank_bytes",
                "must be between 1 byte and 1 GiB",
            ),
            (
                (1..=RANKS_MAX).contains(&self.ranks),
                "ranks",
                "must be between 1 and 1024",
            ),
            (
                (1..=BLOCK_TOKENS_MAX).contains(&self.block_tokens),
                "block_tokens",
                "must be between 1 and 65536",
            ),
        ];
        for (holds, field, rule) in rules {
            if !holds {
                return Err(StoreError::BadConfig { field, rule });
            }
        }
        Ok(())
    }

    /// Bytes of one slot: all ranks' shards, rounded up to [`SLOT_ALIGN`]. For a geometry that `validate` refuses it is
    /// only sure to be too large for any arena or wrong, never a panic.
    pub fn slot_bytes(&self) -> u64 {
        self.rank_bytes
            .saturating_mul(u64::from(self.ranks))
            .checked_next_multiple_of(SLOT_ALIGN)
            .unwrap_or(u64::MAX - (SLOT_ALIGN - 1))
    }

    /// How many slots fit an arena of that many bytes; the rest at the end stays unused.
    pub fn slots_in(&self, arena_bytes: u64) -> u32 {
        let slots = arena_bytes.checked_div(self.slot_bytes()).unwrap_or(0);
        u32::try_from(slots).unwrap_or(u32::MAX)
    }
}

/// Byte offset of a slot in the arena.
///
/// # Panics
/// If it lies beyond 64 bits: the slot size was not one of an arena that exists.
pub fn slot_offset(slot: SlotId, slot_bytes: u64) -> u64 {
    let offset = u64::from(slot.0).checked_mul(slot_bytes);
    assert!(
        offset.is_some(),
        "offset of {slot:?} at {slot_bytes} bytes each is beyond 64 bits"
    );
    offset.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            rank_bytes: 5000,
            ranks: 2,
            block_tokens: 16,
        }
    }

    #[test]
    fn a_slot_holds_all_ranks_and_ends_on_a_page() {
        assert_eq!(geometry().slot_bytes(), 12_288);
        assert_eq!(
            Geometry {
                rank_bytes: 4096,
                ranks: 1,
                block_tokens: 16
            }
            .slot_bytes(),
            4096
        );
    }

    #[test]
    fn an_arena_holds_whole_slots_only() {
        assert_eq!(geometry().slots_in(12_288 * 3 + 12_287), 3);
        assert_eq!(geometry().slots_in(12_287), 0);
    }

    #[test]
    fn offsets_follow_each_other() {
        assert_eq!(slot_offset(SlotId(0), 12_288), 0);
        assert_eq!(slot_offset(SlotId(7), 12_288), 86_016);
    }

    #[test]
    fn impossible_geometries_are_refused_by_name() {
        let refused = |geometry: Geometry| match geometry.validate() {
            Err(StoreError::BadConfig { field, .. }) => field,
            other => panic!("expected a refusal, got {other:?}"),
        };
        assert_eq!(geometry().validate(), Ok(()));
        assert_eq!(
            refused(Geometry {
                rank_bytes: 0,
                ..geometry()
            }),
            "rank_bytes"
        );
        assert_eq!(
            refused(Geometry {
                rank_bytes: RANK_BYTES_MAX + 1,
                ..geometry()
            }),
            "rank_bytes"
        );
        assert_eq!(
            refused(Geometry {
                ranks: 0,
                ..geometry()
            }),
            "ranks"
        );
        assert_eq!(
            refused(Geometry {
                block_tokens: 0,
                ..geometry()
            }),
            "block_tokens"
        );
    }

    #[test]
    fn no_geometry_makes_the_arithmetic_panic() {
        let monster = Geometry {
            rank_bytes: u64::MAX,
            ranks: u32::MAX,
            block_tokens: 1,
        };
        assert_eq!(monster.slots_in(1 << 40), 0);
        let empty = Geometry {
            rank_bytes: 0,
            ranks: 0,
            block_tokens: 0,
        };
        assert_eq!(empty.slots_in(1 << 40), 0);
    }
}
