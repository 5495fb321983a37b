//! Names of things: every id, index and count is its own type, and this is the only file that converts them.

use std::fmt;

use bytemuck::{Pod, Zeroable};

const _: () = assert!(
    usize::BITS == 64,
    "table indices are u32 and byte counts u64: both must fit usize"
);

/// A 32-bit count or position as a table index.
pub const fn usize_from(n: u32) -> usize {
    n as usize
}

/// A count of things in memory as a 64-bit figure, for byte maths and metrics.
pub const fn u64_from(n: usize) -> u64 {
    n as u64
}

/// A byte count or offset as a size in this process's memory.
pub const fn usize_from_u64(n: u64) -> usize {
    n as usize
}

/// The low 64 bits of a product.
pub(crate) const fn low_half(n: u128) -> u64 {
    n as u64
}

/// vLLM's own 32-byte block hash: names the KV of one full block *and* everything before it (a hash chain).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(transparent)]
pub struct BlockHash(pub [u8; 32]);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0[..6] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("…")
    }
}

/// One fixed-size cell of the arena, by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(transparent)]
pub struct SlotId(pub u32);

impl SlotId {
    /// Position as a table index.
    pub const fn index(self) -> usize {
        usize_from(self.0)
    }

    /// The slot at a table index.
    ///
    /// # Panics
    /// If the index is beyond 32 bits: no table of slots is that long.
    pub fn from_index(index: usize) -> Self {
        assert!(
            u32::try_from(index).is_ok(),
            "slot index {index} beyond 32 bits"
        );
        Self(index as u32)
    }
}

impl SlotId {
    /// Undoes packing a slot into the low 32 bits of a key.
    pub(crate) const fn from_low_bits(key: u128) -> Self {
        Self(key as u32)
    }
}

/// A page number of the engine's own KV pool. Never an index into anything of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(transparent)]
pub struct GpuBlock(pub u32);

impl GpuBlock {
    /// Position as a table index.
    pub const fn index(self) -> usize {
        usize_from(self.0)
    }
}

/// A connected engine as the store sees it: the owner of leases and reservations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner(pub u64);

/// A read lease or a write reservation. Ids are never reused within one store, so a stale one is always refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// One call of `pin` that pinned something. Never reused within one store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PinId(pub u64);

/// Digest of everything besides the block hash that decides a block's bytes (weights, dtype, layout, ranks, hash seed, ...).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(transparent)]
pub struct NamespaceId(pub [u8; 32]);

/// One life of a namespace: a reset ends it and starts the next. Unique within one store, over all namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// Handle to one epoch of an open namespace. A handle from before a reset finds nothing and saves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Namespace {
    pub(crate) space: Space,
    pub(crate) epoch: Epoch,
}

impl Namespace {
    /// The epoch this handle belongs to.
    pub const fn epoch(self) -> Epoch {
        self.epoch
    }
}

/// Position of a namespace in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Space(u32);

impl Space {
    /// Stands in a slot that has never been used.
    pub(crate) const NONE: Self = Self(u32::MAX);

    pub(crate) const fn index(self) -> usize {
        usize_from(self.0)
    }

    pub(crate) fn from_index(index: usize) -> Self {
        assert!(
            index < usize_from(u32::MAX),
            "namespace index {index} beyond 32 bits"
        );
        Self(index as u32)
    }
}

/// How often a slot has been given out: tells one use of a slot from the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Generation(u32);

impl Generation {
    pub(crate) const FIRST: Self = Self(0);

    /// Wraps after four billion uses of one slot; no lease lives that long.
    pub(crate) const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// The store's own order of events: one step per call that uses blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tick(pub(crate) u64);

/// Position of a block in the list of one call; beyond 32 bits they all count as deepest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Depth(pub(crate) u32);

impl Depth {
    pub(crate) const fn from_index(index: usize) -> Self {
        if index > usize_from(u32::MAX) {
            Self(u32::MAX)
        } else {
            Self(index as u32)
        }
    }
}
