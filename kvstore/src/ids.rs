//! Names of things: every id, index and count is its own type, and this is the only file that converts them.

use std::fmt;

use bytemuck::{Pod, Zeroable};

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
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A page number of the engine's own KV pool. Never an index into anything of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(transparent)]
pub struct GpuBlock(pub u32);

impl GpuBlock {
    /// Position as a table index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A connected engine as the store sees it: the owner of leases and reservations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner(pub u64);

/// A read lease or a write reservation. Ids are never reused within one store, so a stale one is always refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// Digest of everything besides the block hash that decides a block's bytes (weights, dtype, layout, ranks, hash seed, ...).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(transparent)]
pub struct NamespaceId(pub [u8; 32]);
