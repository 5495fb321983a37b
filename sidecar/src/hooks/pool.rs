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

/// A block of a chain that is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resident {
    pub(super) block: GpuBlock,
    pub(super) referenced: bool,
}

/// The cached block of each hash, if any. `last` says where they were the last time, where that is known, and is brought
/// up to date: to ask blocks what they cache costs less than to search for hashes.
pub(super) fn residents(
    pool: &dyn GpuPool,
    chain: &[BlockHash],
    last: &mut [Option<GpuBlock>],
) -> Vec<Option<Resident>> {
    let known = those_known(last);
    if !known.is_empty() && known.len() == chain.len() {
        let uses = pool.uses(&known);
        if uses
            .iter()
            .zip(chain)
            .all(|(u, hash)| u.hash == Some(*hash))
        {
            let resident = |(block, u): (GpuBlock, BlockUse)| Resident {
                block,
                referenced: u.referenced,
            };
            return known
                .into_iter()
                .zip(uses)
                .map(resident)
                .map(Some)
                .collect();
        }
    }
    last.copy_from_slice(&pool.lookup(chain));
    let found = those_known(last);
    if found.is_empty() {
        return vec![None; chain.len()];
    }
    let mut uses = pool.uses(&found).into_iter();
    let resident = |block: &Option<GpuBlock>| {
        Some(Resident {
            block: (*block)?,
            referenced: uses.next()?.referenced,
        })
    };
    last.iter().map(resident).collect()
}

fn those_known(last: &[Option<GpuBlock>]) -> Vec<GpuBlock> {
    let mut known = Vec::with_capacity(last.len());
    known.extend(last.iter().flatten());
    known
}

/// Evicts those blocks of a chain that nobody references.
pub(super) fn evict(pool: &mut dyn GpuPool, chain: &[BlockHash]) {
    let idle = idle(&residents(pool, chain, &mut vec![None; chain.len()]));
    if !idle.is_empty() {
        pool.evict(&idle);
    }
}

/// Moves the unreferenced ones among the cached blocks of a chain to the safe end of the free list, prefix safest.
/// `last`: as in [`residents`].
pub(super) fn requeue(pool: &mut dyn GpuPool, chain: &[BlockHash], last: &mut [Option<GpuBlock>]) {
    let mut idle = idle(&residents(pool, chain, last));
    if !idle.is_empty() {
        pool.reference(&idle);
        idle.reverse();
        pool.release(&idle);
    }
}

fn idle(residents: &[Option<Resident>]) -> Vec<GpuBlock> {
    let mut idle = Vec::with_capacity(residents.len());
    let residents = residents.iter().flatten();
    idle.extend(residents.filter(|r| !r.referenced).map(|r| r.block));
    idle
}

#[cfg(test)]
mod tests {
    use super::super::testkit::StillPool;
    use super::*;

    #[test]
    fn blocks_are_searched_for_where_they_are_not_any_more() {
        let chain = [[1; 32], [2; 32]].map(BlockHash);
        let block = |hash, referenced| BlockUse {
            hash: Some(hash),
            referenced,
        };
        let [first, second] = [block(chain[0], true), block(chain[1], false)];
        let other = block(BlockHash([3; 32]), false);
        let at = |number, u: BlockUse| {
            Some(Resident {
                block: GpuBlock(number),
                referenced: u.referenced,
            })
        };
        let mut last = [None; 2];
        let mut look = |blocks: [BlockUse; 3]| {
            let pool = StillPool {
                blocks: blocks.to_vec(),
                ..StillPool::default()
            };
            let found = residents(&pool, &chain, &mut last);
            (found, pool.searched.get())
        };
        let here = vec![at(0, first), at(1, second)];
        assert_eq!(look([first, second, other]), (here.clone(), 2));
        assert_eq!(look([first, second, other]), (here, 0), "known");
        let moved = vec![at(0, first), at(2, second)];
        assert_eq!(look([first, other, second]), (moved.clone(), 2));
        assert_eq!(look([first, other, second]), (moved, 0));
        let gone = vec![None, at(2, second)];
        assert_eq!(look([other, other, second]), (gone.clone(), 2));
        assert_eq!(look([other, other, second]), (gone, 2), "it may come back");
    }
}
