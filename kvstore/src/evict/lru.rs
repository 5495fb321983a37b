//! Plain recency: demoted before normal, then the least recently used call, then suffix before prefix within a call.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::{Class, Policy, Standing};
use crate::ids::{Depth, SlotId, Tick};

/// The order, spelled out as a tuple. The slot only makes it unique.
type Key = (Class, Tick, Reverse<Depth>, SlotId);

/// An ordered set: logarithmic, and neighbours of a chain sit side by side. A linked list would be faster to touch, but
/// could not put a block whose pin has ended back where its last use says it belongs.
#[derive(Debug, Default)]
pub(crate) struct Lru {
    order: BTreeSet<Key>,
}

fn key(slot: SlotId, standing: Standing) -> Key {
    (standing.class, standing.tick, Reverse(standing.depth), slot)
}

impl Policy for Lru {
    fn insert(&mut self, slot: SlotId, standing: Standing) {
        assert_ne!(
            standing.class,
            Class::Retired,
            "{slot:?}: retired blocks are freed, not queued"
        );
        assert!(
            self.order.insert(key(slot, standing)),
            "{slot:?} is evictable already"
        );
    }

    fn remove(&mut self, slot: SlotId, standing: Standing) {
        assert!(
            self.order.remove(&key(slot, standing)),
            "{slot:?} was not evictable"
        );
    }

    fn coldest(&self) -> Option<SlotId> {
        self.order.first().map(|&(_, _, _, slot)| slot)
    }

    fn len(&self) -> usize {
        self.order.len()
    }

    fn contains(&self, slot: SlotId, standing: Standing) -> bool {
        self.order.contains(&key(slot, standing))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn standing(class: Class, tick: u64, depth: usize) -> Standing {
        Standing {
            class,
            ..Standing::in_use(Tick(tick), depth, Instant::now())
        }
    }

    fn drain(lru: &mut Lru, standings: &[Standing]) -> Vec<u32> {
        let mut out = Vec::new();
        while let Some(slot) = lru.coldest() {
            lru.remove(slot, standings[slot.index()]);
            out.push(slot.0);
        }
        out
    }

    #[test]
    fn demoted_first_then_oldest_then_deepest() {
        let standings = [
            standing(Class::Normal, 5, 0),
            standing(Class::Normal, 5, 1),
            standing(Class::Normal, 4, 0),
            standing(Class::Demoted, 9, 0),
            standing(Class::Demoted, 9, 1),
        ];
        let mut lru = Lru::default();
        for (index, &standing) in standings.iter().enumerate() {
            lru.insert(SlotId::from_index(index), standing);
        }
        assert_eq!(lru.len(), 5);
        assert_eq!(drain(&mut lru, &standings), [4, 3, 2, 1, 0]);
    }

    #[test]
    #[should_panic(expected = "evictable already")]
    fn a_slot_is_in_the_set_once() {
        let mut lru = Lru::default();
        let standing = standing(Class::Normal, 1, 0);
        lru.insert(SlotId(1), standing);
        lru.insert(SlotId(1), standing);
    }
}
