//! Hash → slot, per namespace and epoch. Readable blocks and blocks being filled live in two maps, so that a half-saved
//! block cannot be found by a reader at all.
//!
//! Owns names only: it never looks at a slot and frees nothing.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use crate::STRICT;
use crate::error::StoreError;
use crate::ids::{BlockHash, Epoch, Namespace, NamespaceId, SlotId, Space, low_half};
use crate::presence::Presence;

/// Hashes keys that are digests already: adds up their words and spreads the sum with one multiplication.
///
/// Keys come from vLLM's SHA-256 family, so any 64 of their bits are uniform, and SipHash over 32 bytes would cost more than
/// the rest of a lookup. There is no secret in it: keys are computed by an engine on this machine, which is trusted; a user
/// who grinds prompts for colliding digests can slow a lookup down, never make it answer wrongly (keys are compared whole).
#[derive(Clone, Copy, Debug, Default)]
pub struct DigestHasher(u64);

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

    /// The table takes its bucket from the low bits and its tag from the high ones: both must depend on every key bit, so
    /// both halves of the product count.
    fn finish(&self) -> u64 {
        let spread = u128::from(self.0) * u128::from(SPREAD);
        low_half(spread) ^ low_half(spread >> 64)
    }
}

/// Something known of each block, by name.
pub type DigestMap<T> = HashMap<BlockHash, T, BuildHasherDefault<DigestHasher>>;

type Map = DigestMap<SlotId>;

/// Blocks by name alone.
pub(crate) type DigestSet = HashSet<BlockHash, BuildHasherDefault<DigestHasher>>;

#[derive(Debug)]
struct Names {
    id: NamespaceId,
    /// When this namespace took the place: handles of an older epoch belong to one that had it before.
    opened: Epoch,
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
    /// Told of every name that becomes readable and of every one that is forgotten.
    presence: Option<Presence>,
}

impl Index {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            spaces: Vec::new(),
            limit,
            next_epoch: 1,
            presence: None,
        }
    }

    /// Before anything is stored.
    pub(crate) fn show_in(&mut self, presence: Presence) {
        self.presence = Some(presence);
    }

    /// The current epoch of that namespace; a new one takes the place of one that has nothing stored when all are taken.
    pub(crate) fn open(&mut self, id: NamespaceId) -> Result<Namespace, StoreError> {
        if let Some(at) = self.spaces.iter().position(|names| names.id == id) {
            return Ok(self.handle(Space::from_index(at)));
        }
        let epoch = self.epoch();
        let names = Names {
            id,
            opened: epoch,
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

    /// Whether the namespace of this handle, of whatever epoch, still has its place.
    pub(crate) fn is_open(&self, namespace: Namespace) -> bool {
        self.spaces
            .get(namespace.space.index())
            .is_some_and(|names| names.opened <= namespace.epoch)
    }

    /// Ends the namespace's epoch: all its names are forgotten, and handles given so far are stale.
    pub(crate) fn reset(&mut self, space: Space) -> Namespace {
        let epoch = self.epoch();
        let names = &mut self.spaces[space.index()];
        names.epoch = epoch;
        if let Some(presence) = &self.presence {
            names
                .committed
                .keys()
                .for_each(|hash| presence.remove(hash));
        }
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
            !STRICT || !names.committed.contains_key(&hash),
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
        if let Some(presence) = &self.presence {
            presence.add(&hash);
        }
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
        if let Some(presence) = &self.presence {
            presence.remove(hash);
        }
    }

    pub(crate) fn presence(&self) -> Option<&Presence> {
        self.presence.as_ref()
    }

    /// Recounts what engines see; for the audit.
    pub(crate) fn check_presence(&self) {
        if let Some(presence) = &self.presence {
            presence.check(self.spaces.iter().flat_map(|names| names.committed.keys()));
        }
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

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher;

    use super::*;

    fn index() -> (Index, Namespace) {
        let mut index = Index::new(1);
        let namespace = index.open(NamespaceId([7; 32])).unwrap();
        (index, namespace)
    }

    #[test]
    fn a_block_is_in_one_map_at_a_time() {
        let (mut index, namespace) = index();
        let (space, hash) = (namespace.space, BlockHash([3; 32]));
        index.add_filling(space, hash, SlotId(9));
        assert_eq!(
            (
                index.committed(namespace, &hash),
                index.find(namespace, &hash)
            ),
            (None, Some(SlotId(9)))
        );
        assert_eq!(index.totals(), (0, 1));
        index.publish(space, hash);
        assert_eq!(index.committed(namespace, &hash), Some(SlotId(9)));
        assert_eq!(index.totals(), (1, 0));
        index.forget_committed(space, &hash);
        assert_eq!(index.find(namespace, &hash), None);
    }

    #[test]
    #[should_panic(expected = "stored already")]
    fn a_stored_block_is_not_filled_again() {
        let (mut index, namespace) = index();
        let (space, hash) = (namespace.space, BlockHash([3; 32]));
        index.add_filling(space, hash, SlotId(0));
        index.publish(space, hash);
        index.add_filling(space, hash, SlotId(1));
    }

    #[test]
    fn an_old_handle_finds_nothing() {
        let (mut index, old) = index();
        let hash = BlockHash([3; 32]);
        index.add_filling(old.space, hash, SlotId(0));
        index.publish(old.space, hash);
        let fresh = index.reset(old.space);
        index.add_filling(fresh.space, hash, SlotId(1));
        index.publish(fresh.space, hash);
        assert_eq!(
            (index.prefix(old, &[hash]), index.prefix(fresh, &[hash])),
            (0, 1)
        );
        assert_eq!(
            (index.find(old, &hash), index.find(fresh, &hash)),
            (None, Some(SlotId(1)))
        );
        assert!(index.is_open(old), "the namespace is still there");
    }

    /// Digests are uniform, test patterns are not: neither may crowd into few buckets or tags.
    #[test]
    fn the_hasher_spreads_digests_and_patterns() {
        let hasher = BuildHasherDefault::<DigestHasher>::default();
        let counters = |at: usize| {
            (0..=u16::MAX).map(move |n| {
                let mut bytes = [0; 32];
                bytes[at..at + 2].copy_from_slice(&n.to_be_bytes());
                BlockHash(bytes)
            })
        };
        for at in [0, 6, 15, 24, 30] {
            let hashes: Vec<u64> = counters(at).map(|key| hasher.hash_one(key)).collect();
            let buckets: HashSet<u64> = hashes.iter().map(|hash| hash & 0xffff).collect();
            let tags: HashSet<u64> = hashes.iter().map(|hash| hash >> 57).collect();
            assert!(
                buckets.len() > 30_000,
                "{} buckets for a counter at byte {at}",
                buckets.len()
            );
            assert!(
                tags.len() > 100,
                "{} tags for a counter at byte {at}",
                tags.len()
            );
        }
    }
}
