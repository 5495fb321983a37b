//! The contract of an eviction policy: an ordered set of the slots that may be evicted, coldest first.
//!
//! The store decides *which* slots are in the set (committed, unleased, unpinned), the policy decides their order and
//! nothing else: it frees nothing, and it never sees hashes, leases or the arena.

mod lru;

use std::fmt::Debug;
use std::time::Instant;

use crate::ids::{Depth, SlotId, Tick};

pub(crate) use lru::Lru;

/// What is known about the future of a block, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// Its session is over: freed as soon as nobody holds or pins it, so a policy never sees it.
    Retired,
    /// Hinted as not needed soon: goes before all normal ones.
    Demoted,
    /// Nothing known against it.
    Normal,
}

/// Everything an order may depend on. The store keeps it per slot; while a slot is in the set its standing does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) class: Class,
    /// Which call used it last.
    pub(crate) tick: Tick,
    /// Its position in that call's list: a block is worth nothing without all before it.
    pub(crate) depth: Depth,
    /// When it was used last; none for a slot that has never held a block.
    pub(crate) used: Option<Instant>,
}

impl Standing {
    /// Of a slot that has never held a block.
    pub(crate) const UNUSED: Self = Self {
        class: Class::Normal,
        tick: Tick(0),
        depth: Depth::from_index(0),
        used: None,
    };

    /// Of the block at `position` of a chain that is used now.
    pub(crate) fn in_use(tick: Tick, position: usize, now: Instant) -> Self {
        Self {
            class: Class::Normal,
            tick,
            depth: Depth::from_index(position),
            used: Some(now),
        }
    }
}

/// An order over evictable slots.
pub(crate) trait Policy: Debug + Send {
    /// The slot becomes evictable. Panics if it is in the set.
    fn insert(&mut self, slot: SlotId, standing: Standing);
    /// The slot is not evictable any more. `standing` is the one it was inserted with. Panics if it is not in the set.
    fn remove(&mut self, slot: SlotId, standing: Standing);
    /// Which one goes first.
    fn coldest(&self) -> Option<SlotId>;
    /// Size of the set.
    fn len(&self) -> usize;
    /// Whether the slot is in the set with that standing.
    fn contains(&self, slot: SlotId, standing: Standing) -> bool;
}
