//! What the hooks need of an engine's own KV pool. The engine implements it; nothing here knows vLLM.

use kvstore::{BlockHash, GpuBlock};

/// State of one GPU block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockUse {
    /// The hash under which prefix caching knows it, if any.
    pub hash: Option<BlockHash>,
    /// Whether anybody holds a reference (a request, or the hooks).
    pub referenced: bool,
}

/// A block that becomes an ordinary entry of the engine's prefix cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// Which block.
    pub block: GpuBlock,
    /// Under which hash.
    pub hash: BlockHash,
    /// Position in its chain, 0 for the first block.
    pub position: u32,
}

/// The engine's block pool: reference-counted blocks, a free list in eviction order, a prefix cache by hash.
///
/// Called only from within a hook, on the scheduler's thread.
pub trait GpuPool {
    /// Blocks in the pool.
    fn total(&self) -> usize;
    /// Blocks on the free list, cached ones included.
    fn free(&self) -> usize;
    /// The cached block of each hash, if any.
    fn lookup(&self, hashes: &[BlockHash]) -> Vec<Option<GpuBlock>>;
    /// State of each block.
    fn uses(&self, blocks: &[GpuBlock]) -> Vec<BlockUse>;
    /// The hashes of the first `n` blocks that would be handed out next.
    fn free_list(&self, n: usize) -> Vec<Option<BlockHash>>;
    /// Takes `n` blocks from the head of the free list, evicting what they cached; one reference each.
    fn take(&mut self, n: usize) -> Option<Vec<GpuBlock>>;
    /// Adds a reference to each; a free block leaves the free list.
    fn reference(&mut self, blocks: &[GpuBlock]);
    /// Drops a reference of each, in this order: of those that become free, the first is evicted first.
    fn release(&mut self, blocks: &[GpuBlock]);
    /// Takes unreferenced blocks out of the prefix cache: they are handed out next.
    fn evict(&mut self, blocks: &[GpuBlock]);
    /// Enters blocks into the prefix cache; a hash that is cached already is skipped.
    fn publish(&mut self, entries: &[Published]);
}

/// Evicts those blocks of a chain that nobody references.
pub(super) fn evict(pool: &mut dyn GpuPool, chain: &[BlockHash]) {
    let idle = idle(pool, chain);
    if !idle.is_empty() {
        pool.evict(&idle);
    }
}

/// Moves the unreferenced ones among the cached blocks of a chain to the safe end of the free list, prefix safest.
pub(super) fn requeue(pool: &mut dyn GpuPool, chain: &[BlockHash]) {
    let mut idle = idle(pool, chain);
    if !idle.is_empty() {
        pool.reference(&idle);
        idle.reverse();
        pool.release(&idle);
    }
}

fn idle(pool: &dyn GpuPool, chain: &[BlockHash]) -> Vec<GpuBlock> {
    let blocks: Vec<GpuBlock> = pool.lookup(chain).into_iter().flatten().collect();
    let uses = pool.uses(&blocks);
    blocks
        .into_iter()
        .zip(uses)
        .filter_map(|(block, u)| (!u.referenced).then_some(block))
        .collect()
}
