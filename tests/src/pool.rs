//! A block pool with the rules of vLLM's: reference counts, a free list in eviction order, a prefix cache by hash.
//! As in vLLM every call costs as much as the blocks it names, whatever the size of the pool.

use std::cell::Cell;

use kvstore::{BlockHash, DigestMap, GpuBlock};
use sidecar::hooks::{BlockUse, GpuPool, Published};

/// See the module's text.
pub struct SimPool {
    blocks: Vec<Block>,
    free: FreeList,
    /// Hashes are digests: hashing them again would cost more than the hooks themselves.
    cache: DigestMap<Vec<u32>>,
    /// Blocks handed out since the last question.
    handed_out: usize,
    /// Blocks that calls of the hooks have named since the last question.
    touched: Cell<usize>,
}

#[derive(Clone, Copy, Default)]
struct Block {
    references: u32,
    hash: Option<BlockHash>,
}

/// Unreferenced blocks, the first to be handed out next: a doubly linked list in two arrays. The place after the last
/// block is the list's head and end.
struct FreeList {
    next: Vec<u32>,
    previous: Vec<u32>,
    len: usize,
}

impl FreeList {
    /// All blocks, in order.
    fn new(blocks: u32) -> Self {
        let mut list = Self {
            next: vec![blocks; blocks as usize + 1],
            previous: vec![blocks; blocks as usize + 1],
            len: 0,
        };
        (0..blocks).for_each(|number| list.push_back(number));
        list
    }

    fn end(&self) -> u32 {
        (self.next.len() - 1) as u32
    }

    fn push_back(&mut self, number: u32) {
        self.insert(number, self.previous[self.end() as usize], self.end());
    }

    fn push_front(&mut self, number: u32) {
        self.insert(number, self.end(), self.next[self.end() as usize]);
    }

    fn insert(&mut self, number: u32, before: u32, after: u32) {
        (self.previous[number as usize], self.next[number as usize]) = (before, after);
        self.next[before as usize] = number;
        self.previous[after as usize] = number;
        self.len += 1;
    }

    /// The block must be in the list.
    fn remove(&mut self, number: u32) {
        let (before, after) = (self.previous[number as usize], self.next[number as usize]);
        self.next[before as usize] = after;
        self.previous[after as usize] = before;
        self.len -= 1;
    }

    fn iter(&self) -> impl Iterator<Item = u32> {
        std::iter::successors(Some(self.next[self.end() as usize]), |number| {
            Some(self.next[*number as usize])
        })
        .take(self.len)
    }
}

impl SimPool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: u32) -> Self {
        Self {
            blocks: vec![Block::default(); blocks as usize],
            free: FreeList::new(blocks),
            cache: DigestMap::default(),
            handed_out: 0,
            touched: Cell::new(0),
        }
    }

    /// Leading blocks of a chain that are cached.
    pub fn leading(&self, chain: &[BlockHash]) -> usize {
        self.lookup(chain)
            .iter()
            .take_while(|b| b.is_some())
            .count()
    }

    /// Blocks that calls of the hooks have named since the last question.
    pub fn take_touched(&mut self) -> usize {
        self.touched.take()
    }

    fn touch(&self, blocks: usize) {
        self.touched.set(self.touched.get() + blocks);
    }

    /// Takes blocks for tokens that are to be computed: those count as handed out.
    pub fn take_to_compute(&mut self, n: usize) -> Option<Vec<GpuBlock>> {
        let taken = self.take(n)?;
        self.handed_out += n;
        Some(taken)
    }

    /// Blocks handed out since the last call.
    pub fn take_handed_out(&mut self) -> usize {
        std::mem::take(&mut self.handed_out)
    }

    /// Empties the prefix cache; fails while anything is referenced, as vLLM's does.
    pub fn reset(&mut self) -> bool {
        if self.free.len < self.blocks.len() {
            return false;
        }
        self.cache.clear();
        self.blocks.iter_mut().for_each(|block| block.hash = None);
        true
    }

    /// Recounts: the free list holds exactly the unreferenced blocks, the cache exactly the hashed ones.
    pub fn check(&self) {
        let unreferenced = self.blocks.iter().filter(|b| b.references == 0).count();
        let listed = self.free.iter().inspect(|number| {
            let references = self.blocks[*number as usize].references;
            assert_eq!(references, 0, "block {number} is referenced and free");
        });
        assert_eq!(
            (unreferenced, unreferenced),
            (self.free.len, listed.count()),
            "free list and reference counts disagree"
        );
        for (hash, blocks) in &self.cache {
            for block in blocks {
                assert_eq!(self.blocks[*block as usize].hash, Some(*hash));
            }
        }
    }

    fn uncache(&mut self, number: u32) {
        if let Some(hash) = self.blocks[number as usize].hash.take() {
            let cached = self.cache.get_mut(&hash).unwrap();
            cached.retain(|other| *other != number);
            if cached.is_empty() {
                self.cache.remove(&hash);
            }
        }
    }
}

impl GpuPool for SimPool {
    fn total(&self) -> usize {
        self.blocks.len()
    }

    fn free(&self) -> usize {
        self.free.len
    }

    fn lookup(&self, hashes: &[BlockHash]) -> Vec<Option<GpuBlock>> {
        self.touch(hashes.len());
        hashes
            .iter()
            .map(|hash| self.cache.get(hash).map(|blocks| GpuBlock(blocks[0])))
            .collect()
    }

    fn uses(&self, blocks: &[GpuBlock]) -> Vec<BlockUse> {
        self.touch(blocks.len());
        let of = |b: &GpuBlock| &self.blocks[b.index()];
        blocks
            .iter()
            .map(|b| BlockUse {
                hash: of(b).hash,
                referenced: of(b).references > 0,
            })
            .collect()
    }

    fn free_list(&self, n: usize) -> Vec<Option<BlockHash>> {
        self.touch(n);
        self.free
            .iter()
            .take(n)
            .map(|number| self.blocks[number as usize].hash)
            .collect()
    }

    fn take(&mut self, n: usize) -> Option<Vec<GpuBlock>> {
        if n > self.free.len {
            return None;
        }
        self.touch(n);
        let taken: Vec<u32> = self.free.iter().take(n).collect();
        for number in &taken {
            self.free.remove(*number);
            self.uncache(*number);
            self.blocks[*number as usize].references = 1;
        }
        Some(taken.into_iter().map(GpuBlock).collect())
    }

    fn reference(&mut self, blocks: &[GpuBlock]) {
        self.touch(blocks.len());
        for block in blocks {
            if self.blocks[block.index()].references == 0 {
                self.free.remove(block.0);
            }
            self.blocks[block.index()].references += 1;
        }
    }

    fn evict(&mut self, blocks: &[GpuBlock]) {
        self.touch(blocks.len());
        for block in blocks {
            let references = self.blocks[block.index()].references;
            assert_eq!(references, 0, "only what nobody references is evicted");
            self.uncache(block.0);
        }
        self.reference(blocks);
        self.release(blocks);
    }

    fn release(&mut self, blocks: &[GpuBlock]) {
        self.touch(blocks.len());
        let mut uncached = Vec::new();
        for block in blocks {
            let state = &mut self.blocks[block.index()];
            state.references = state
                .references
                .checked_sub(1)
                .expect("released more often than referenced");
            if state.references == 0 {
                // As vLLM does: what caches nothing is handed out first.
                if state.hash.is_none() {
                    uncached.push(block.0)
                } else {
                    self.free.push_back(block.0)
                }
            }
        }
        uncached
            .into_iter()
            .for_each(|number| self.free.push_front(number));
    }

    fn publish(&mut self, entries: &[Published]) {
        self.touch(entries.len());
        for entry in entries {
            if !self.cache.contains_key(&entry.hash) {
                assert_eq!(self.blocks[entry.block.index()].hash, None);
                self.blocks[entry.block.index()].hash = Some(entry.hash);
                self.cache.insert(entry.hash, vec![entry.block.0]);
            }
        }
    }
}
