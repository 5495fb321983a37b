//! Hash → slot, per namespace and epoch. Readable blocks and blocks being filled live in two maps, so that a half-saved
//! block cannot be found by a reader at all.
//!
//! Owns names only: it never looks at a slot and frees nothing.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::error::StoreError;
use crate::ids::{BlockHash, Epoch, Namespace, NamespaceId, SlotId, Space};

/// Hashes keys that are digests already: adds up their words and spreads the sum with one multiplication.
///
/// Keys come from vLLM's SHA-256 family, so any 64 of their bits are uniform, and SipHash over 32 bytes would cost more than
/// the rest of a lookup. There is no secret in it: keys are computed by an engine on this machine, which is trusted; a user
/// who grinds prompts for colliding digests can slow a lookup down, never make it answer wrongly (keys are compared whole).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DigestHasher(u64);

/// 2^64 divided by the golden ratio, odd: the usual multiplier for spreading.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hasher for DigestHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = self.0.wrapping_add(u64::from_le_bytes(word));
        }
    }

    /// The length of a fixed-size key says nothing.
    fn write_usize(&mut self, _: usize) {}

    /// The table takes its bucket from the low bits and its tag from the high ones: both must depend on every key bit.
    fn finish(&self) -> u64 {
        let spread = self.0.wrapping_mul(SPREAD);
        spread ^ (spread >> 32)
    }
}

type Map = HashMap<BlockHash, SlotId, BuildHasherDefault<DigestHasher>>;

#[derive(Debug)]
struct Names {
    id: NamespaceId,
    epoch: Epoch,
    committed: Map,
    filling: Map,
}

impl Names {
    fn is_empty(&self) -> bool {
        self.committed.is_empty() && self.filling.is_empty()
    }
}

#[derive(Debug)]
pub(crate) struct Index {
    spaces: Vec<Names>,
    limit: usize,
    next_epoch: u64,
}

impl Index {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            spaces: Vec::new(),
            limit,
            next_epoch: 1,
        }
    }

    /// The current epoch of that namespace; a new one takes the place of one that has nothing stored when all are taken.
    pub(crate) fn open(&mut self, id: NamespaceId) -> Result<Namespace, StoreError> {
        if let Some(at) = self.spaces.iter().position(|names| names.id == id) {
            return Ok(self.handle(Space::from_index(at)));
        }
        let epoch = self.epoch();
        let names = Names {
            id,
            epoch,
            committed: Map::default(),
            filling: Map::default(),
        };
        if self.spaces.len() < self.limit {
            self.spaces.push(names);
            return Ok(self.handle(Space::from_index(self.spaces.len() - 1)));
        }
        let Some(at) = self.spaces.iter().position(Names::is_empty) else {
            return Err(StoreError::TooMany {
                what: "namespaces",
                limit: self.limit,
            });
        };
        self.spaces[at] = names;
        Ok(self.handle(Space::from_index(at)))
    }

    /// Ends the namespace's epoch: all its names are forgotten, and handles given so far are stale.
    pub(crate) fn reset(&mut self, space: Space) -> Namespace {
        let epoch = self.epoch();
        let names = &mut self.spaces[space.index()];
        names.epoch = epoch;
        names.committed = Map::default();
        names.filling = Map::default();
        self.handle(space)
    }

    /// Whether the handle is of the present epoch.
    pub(crate) fn is_current(&self, namespace: Namespace) -> bool {
        self.current(namespace).is_some()
    }

    /// How many of `hashes`, from the first on, are readable without a gap.
    pub(crate) fn prefix(&self, namespace: Namespace, hashes: &[BlockHash]) -> usize {
        let Some(names) = self.current(namespace) else {
            return 0;
        };
        hashes
            .iter()
            .take_while(|hash| names.committed.contains_key(hash))
            .count()
    }

    /// The slot of a readable block.
    pub(crate) fn committed(&self, namespace: Namespace, hash: &BlockHash) -> Option<SlotId> {
        self.current(namespace)?.committed.get(hash).copied()
    }

    /// The slot of a block that is readable or being filled.
    pub(crate) fn find(&self, namespace: Namespace, hash: &BlockHash) -> Option<SlotId> {
        let names = self.current(namespace)?;
        names
            .committed
            .get(hash)
            .or_else(|| names.filling.get(hash))
            .copied()
    }

    pub(crate) fn add_filling(&mut self, space: Space, hash: BlockHash, slot: SlotId) {
        let names = &mut self.spaces[space.index()];
        assert!(
            !names.committed.contains_key(&hash),
            "{hash:?} is stored already"
        );
        assert!(
            names.filling.insert(hash, slot).is_none(),
            "{hash:?} is being filled already"
        );
    }

    pub(crate) fn publish(&mut self, space: Space, hash: BlockHash) {
        let names = &mut self.spaces[space.index()];
        let slot = names.filling.remove(&hash);
        assert!(
            slot.is_some(),
            "{hash:?} is published without having been filled"
        );
        names.committed.extend(slot.map(|slot| (hash, slot)));
    }

    pub(crate) fn forget_filling(&mut self, space: Space, hash: &BlockHash) {
        assert!(
            self.spaces[space.index()].filling.remove(hash).is_some(),
            "{hash:?} was not being filled"
        );
    }

    pub(crate) fn forget_committed(&mut self, space: Space, hash: &BlockHash) {
        assert!(
            self.spaces[space.index()].committed.remove(hash).is_some(),
            "{hash:?} was not stored"
        );
    }

    /// Names in all namespaces: (committed, filling); for the audit.
    pub(crate) fn totals(&self) -> (usize, usize) {
        self.spaces
            .iter()
            .fold((0, 0), |(committed, filling), names| {
                (
                    committed + names.committed.len(),
                    filling + names.filling.len(),
                )
            })
    }

    /// Where the present epoch of a namespace keeps `hash`: (committed, filling); for the audit.
    pub(crate) fn places(
        &self,
        space: Space,
        hash: &BlockHash,
    ) -> (Option<SlotId>, Option<SlotId>) {
        let names = &self.spaces[space.index()];
        (
            names.committed.get(hash).copied(),
            names.filling.get(hash).copied(),
        )
    }

    fn current(&self, namespace: Namespace) -> Option<&Names> {
        self.spaces
            .get(namespace.space.index())
            .filter(|names| names.epoch == namespace.epoch)
    }

    fn handle(&self, space: Space) -> Namespace {
        Namespace {
            space,
            epoch: self.spaces[space.index()].epoch,
        }
    }

    fn epoch(&mut self) -> Epoch {
        let epoch = Epoch(self.next_epoch);
        self.next_epoch += 1;
        epoch
    }
}
