//! The table of slots and the allocator over it: what every slot holds, who may still touch it, which ones are free.
//!
//! Owns slot state; [`Slots::shift`] is the only code that changes it. Knows nothing of hashes' order, leases' terms or
//! eviction. Never gives out a slot that somebody may still read or write.

use std::cmp::Reverse;

use crate::evict::Standing;
use crate::ids::{BlockHash, Generation, SlotId, Space, usize_from};

/// Where a slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotState {
    /// In the allocator; its bytes mean nothing.
    Free,
    /// Given to one live reservation that writes it; no reader can find it.
    Filling,
    /// Readable: every layer of every rank has been written.
    Committed,
    /// Neither readable nor free: a copy may still read or write it.
    Draining,
}

const STATES: usize = 4;

impl SlotState {
    const fn row(self) -> usize {
        match self {
            Self::Free => 0,
            Self::Filling => 1,
            Self::Committed => 2,
            Self::Draining => 3,
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) hash: BlockHash,
    pub(crate) space: Space,
    pub(crate) generation: Generation,
    pub(crate) state: SlotState,
    /// Leases and reservations, live or ended, whose copies may still touch this memory.
    pub(crate) holds: u32,
    pub(crate) pins: u32,
    pub(crate) standing: Standing,
}

impl Slot {
    /// Whether eviction may take it.
    pub(crate) fn evictable(&self) -> bool {
        self.state == SlotState::Committed && self.holds == 0 && self.pins == 0
    }
}

/// One use of a slot, as a lease or pin remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) slot: SlotId,
    pub(crate) generation: Generation,
}

/// What a slot is about to hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filling {
    pub(crate) hash: BlockHash,
    pub(crate) space: Space,
    pub(crate) standing: Standing,
}

#[derive(Debug)]
pub(crate) struct Slots {
    table: Vec<Slot>,
    free: FreeMap,
    in_state: [usize; STATES],
    leased: usize,
    pinned: usize,
}

impl Slots {
    /// A table of free slots.
    pub(crate) fn new(count: u32) -> Self {
        let row = Slot {
            hash: BlockHash([0; 32]),
            space: Space::NONE,
            generation: Generation::FIRST,
            state: SlotState::Free,
            holds: 0,
            pins: 0,
            standing: Standing::UNUSED,
        };
        let count = usize_from(count);
        let mut in_state = [0; STATES];
        in_state[SlotState::Free.row()] = count;
        Self {
            table: vec![row; count],
            free: FreeMap::full(count),
            in_state,
            leased: 0,
            pinned: 0,
        }
    }

    pub(crate) fn get(&self, slot: SlotId) -> &Slot {
        &self.table[slot.index()]
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Slots that readers of the namespace find, or will find.
    pub(crate) fn stored_in(&self, space: Space) -> Vec<SlotId> {
        let stored = |slot: &Slot| {
            slot.space == space && matches!(slot.state, SlotState::Committed | SlotState::Filling)
        };
        self.iter()
            .filter(|(_, slot)| stored(slot))
            .map(|(id, _)| id)
            .collect()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (SlotId, &Slot)> {
        self.table
            .iter()
            .enumerate()
            .map(|(index, slot)| (SlotId::from_index(index), slot))
    }

    pub(crate) fn count(&self, state: SlotState) -> usize {
        self.in_state[state.row()]
    }

    /// Committed slots that at least one lease holds.
    pub(crate) fn leased(&self) -> usize {
        self.leased
    }

    /// Slots with at least one pin.
    pub(crate) fn pinned(&self) -> usize {
        self.pinned
    }

    /// Free slots for `wanted` blocks in copy order: one run of neighbours if there is one, else the longest runs first.
    pub(crate) fn pick(&self, wanted: usize) -> Vec<SlotId> {
        assert!(
            wanted <= self.count(SlotState::Free),
            "asked for {wanted} slots, fewer are free"
        );
        self.free.pick(wanted)
    }

    /// Gives a free slot to a reservation, which holds it from now on.
    pub(crate) fn fill(&mut self, slot: SlotId, filling: Filling) -> Held {
        self.shift(slot, SlotState::Free, SlotState::Filling);
        let row = &mut self.table[slot.index()];
        row.hash = filling.hash;
        row.space = filling.space;
        row.standing = filling.standing;
        row.generation = row.generation.next();
        row.holds = 1;
        Held {
            slot,
            generation: row.generation,
        }
    }

    /// The reservation's copy has ended well: its hold ends, and readers may come.
    pub(crate) fn publish(&mut self, held: Held) {
        let row = self.held_row(held);
        assert_eq!(
            row.holds, 1,
            "{held:?} is being filled, so only its writer holds it"
        );
        row.holds = 0;
        self.shift(held.slot, SlotState::Filling, SlotState::Committed);
    }

    /// Another lease reads a committed slot.
    pub(crate) fn hold(&mut self, slot: SlotId) -> Held {
        let row = &mut self.table[slot.index()];
        assert_eq!(
            row.state,
            SlotState::Committed,
            "{slot:?}: only committed slots are leased for reading"
        );
        row.holds += 1;
        if row.holds == 1 {
            self.leased += 1;
        }
        Held {
            slot,
            generation: row.generation,
        }
    }

    /// One lease less can touch the slot.
    pub(crate) fn unhold(&mut self, held: Held) {
        let row = self.held_row(held);
        assert!(row.holds > 0, "{held:?}: let go once more than held");
        row.holds -= 1;
        if row.holds == 0 && row.state == SlotState::Committed {
            self.leased -= 1;
        }
    }

    pub(crate) fn pin(&mut self, slot: SlotId) -> Held {
        let row = &mut self.table[slot.index()];
        assert_eq!(
            row.state,
            SlotState::Committed,
            "{slot:?}: only committed slots are pinned"
        );
        row.pins += 1;
        if row.pins == 1 {
            self.pinned += 1;
        }
        Held {
            slot,
            generation: row.generation,
        }
    }

    pub(crate) fn unpin(&mut self, held: Held) {
        let row = self.held_row(held);
        assert_eq!(
            row.state,
            SlotState::Committed,
            "{held:?}: pinned, so still committed"
        );
        assert!(row.pins > 0, "{held:?}: unpinned once more than pinned");
        row.pins -= 1;
        if row.pins == 0 {
            self.pinned -= 1;
        }
    }

    /// New place in the eviction order; the caller keeps the policy in step.
    pub(crate) fn restand(&mut self, slot: SlotId, standing: Standing) {
        self.table[slot.index()].standing = standing;
    }

    /// The only function that moves a slot from one state to another.
    pub(crate) fn shift(&mut self, slot: SlotId, from: SlotState, to: SlotState) {
        use SlotState::{Committed, Draining, Filling, Free};
        let row = &mut self.table[slot.index()];
        assert_eq!(
            row.state, from,
            "{slot:?} was to go from {from:?} to {to:?}"
        );
        match (from, to) {
            (Free, Filling) => self.free.take(slot),
            (Filling, Committed) => assert_eq!(row.holds, 0, "{slot:?}: its writer has ended"),
            (Filling, Draining) => assert_eq!(row.holds, 1, "{slot:?}: its writer may still write"),
            (Committed, Draining) => {
                assert!(
                    row.holds > 0 && row.pins == 0,
                    "{slot:?}: drains for its readers only"
                );
                self.leased -= 1;
            }
            (Filling | Committed | Draining, Free) => {
                assert!(
                    row.holds == 0 && row.pins == 0,
                    "{slot:?}: freed while somebody may touch it"
                );
                self.free.give(slot);
            }
            _ => panic!("{slot:?}: no way from {from:?} to {to:?}"),
        }
        row.state = to;
        self.in_state[from.row()] -= 1;
        self.in_state[to.row()] += 1;
    }

    /// Whether the allocator would give this slot out; for the audit.
    pub(crate) fn is_free(&self, slot: SlotId) -> bool {
        self.free.contains(slot)
    }

    fn held_row(&mut self, held: Held) -> &mut Slot {
        let row = &mut self.table[held.slot.index()];
        assert_eq!(
            row.generation, held.generation,
            "{held:?}: the slot was given away meanwhile"
        );
        row
    }
}

/// A run of neighbouring free slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: usize,
    len: usize,
}

/// One bit per slot, set when free. 100k slots are 1,563 words: scanning them all costs about a microsecond when the arena
/// is nearly full, which is its usual state.
#[derive(Debug)]
struct FreeMap {
    words: Vec<u64>,
    len: usize,
}

const WORD: usize = 64;

impl FreeMap {
    fn full(len: usize) -> Self {
        let mut words = vec![u64::MAX; len.div_ceil(WORD)];
        if let Some(last) = words.last_mut()
            && !len.is_multiple_of(WORD)
        {
            *last = (1 << (len % WORD)) - 1;
        }
        Self { words, len }
    }

    fn contains(&self, slot: SlotId) -> bool {
        self.words[slot.index() / WORD] >> (slot.index() % WORD) & 1 == 1
    }

    fn take(&mut self, slot: SlotId) {
        assert!(self.contains(slot), "{slot:?} taken twice");
        self.words[slot.index() / WORD] &= !(1 << (slot.index() % WORD));
    }

    fn give(&mut self, slot: SlotId) {
        assert!(!self.contains(slot), "{slot:?} freed twice");
        self.words[slot.index() / WORD] |= 1 << (slot.index() % WORD);
    }

    /// Position of the first bit at or after `from` that is set in `flip(word)`; `len` if there is none.
    fn next(&self, from: usize, flip: impl Fn(u64) -> u64) -> usize {
        let mut word = from / WORD;
        let mut mask = u64::MAX << (from % WORD);
        while word < self.words.len() {
            let bits = flip(self.words[word]) & mask;
            if bits != 0 {
                let at = word * WORD + usize_from(bits.trailing_zeros());
                return at.min(self.len);
            }
            mask = u64::MAX;
            word += 1;
        }
        self.len
    }

    fn run_from(&self, from: usize) -> Option<Run> {
        let start = self.next(from, |word| word);
        if start >= self.len {
            return None;
        }
        let end = self.next(start, |word| !word);
        Some(Run {
            start,
            len: end - start,
        })
    }

    fn pick(&self, wanted: usize) -> Vec<SlotId> {
        let mut runs = Vec::new();
        let mut from = 0;
        while let Some(run) = self.run_from(from) {
            if run.len >= wanted {
                runs.clear();
                runs.push(run);
                break;
            }
            runs.push(run);
            from = run.start + run.len;
        }
        runs.sort_by_key(|run| Reverse(run.len));
        let slots = runs.iter().flat_map(|run| run.start..run.start + run.len);
        let picked: Vec<SlotId> = slots.take(wanted).map(SlotId::from_index).collect();
        assert_eq!(
            picked.len(),
            wanted,
            "the free map has fewer slots than the counter says"
        );
        picked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(count: u32) -> Slots {
        Slots::new(count)
    }

    fn fill(slots: &mut Slots, at: u32) -> Held {
        let filling = Filling {
            hash: BlockHash([1; 32]),
            space: Space::from_index(0),
            standing: Standing::UNUSED,
        };
        slots.fill(SlotId(at), filling)
    }

    fn free(slots: &mut Slots, held: Held) {
        slots.unhold(held);
        slots.shift(held.slot, SlotState::Filling, SlotState::Free);
    }

    fn positions(picked: &[SlotId]) -> Vec<u32> {
        picked.iter().map(|slot| slot.0).collect()
    }

    #[test]
    fn picks_the_first_run_that_fits_else_the_longest_ones() {
        let mut slots = slots(200);
        // Runs left over: 0..3, 4..8, 9..70 (across a word), 71..200.
        for at in [3, 8, 70] {
            let _ = fill(&mut slots, at);
        }
        assert_eq!(positions(&slots.pick(3)), [0, 1, 2]);
        assert_eq!(positions(&slots.pick(4)), [4, 5, 6, 7]);
        assert_eq!(positions(&slots.pick(61)), (9..70).collect::<Vec<_>>());
        assert_eq!(positions(&slots.pick(129)), (71..200).collect::<Vec<_>>());
        assert_eq!(
            positions(&slots.pick(131)),
            (71..200).chain(9..11).collect::<Vec<_>>()
        );
        assert_eq!(slots.pick(197).len(), 197);
        assert_eq!(slots.pick(0), []);
    }

    #[test]
    fn a_table_of_any_length_gives_out_every_slot_once() {
        for count in [1, 63, 64, 65, 127, 128, 130] {
            let mut slots = slots(count);
            let picked = slots.pick(usize_from(count));
            assert_eq!(positions(&picked), (0..count).collect::<Vec<_>>());
            for slot in picked {
                let _ = fill(&mut slots, slot.0);
            }
            assert_eq!(slots.count(SlotState::Free), 0);
            assert_eq!(slots.pick(0), []);
        }
    }

    #[test]
    #[should_panic(expected = "fewer are free")]
    fn never_gives_out_more_than_it_has() {
        let mut slots = slots(2);
        let _ = fill(&mut slots, 0);
        let _ = slots.pick(2);
    }

    #[test]
    #[should_panic(expected = "was to go from Free to Filling")]
    fn a_slot_is_given_out_once() {
        let mut slots = slots(2);
        let _ = fill(&mut slots, 1);
        let _ = fill(&mut slots, 1);
    }

    #[test]
    #[should_panic(expected = "freed while somebody may touch it")]
    fn a_held_slot_is_never_freed() {
        let mut slots = slots(2);
        let held = fill(&mut slots, 1);
        slots.publish(held);
        let _ = slots.hold(held.slot);
        slots.shift(held.slot, SlotState::Committed, SlotState::Free);
    }

    #[test]
    #[should_panic(expected = "given away meanwhile")]
    fn a_right_from_an_earlier_use_of_the_slot_is_refused() {
        let mut slots = slots(1);
        let stale = fill(&mut slots, 0);
        free(&mut slots, stale);
        let _ = fill(&mut slots, 0);
        slots.unhold(stale);
    }

    #[test]
    #[should_panic(expected = "no way from Filling to Filling")]
    fn there_is_no_way_from_a_state_to_itself() {
        let mut slots = slots(1);
        let held = fill(&mut slots, 0);
        slots.shift(held.slot, SlotState::Filling, SlotState::Filling);
    }

    #[test]
    fn counters_follow_holds_and_pins() {
        let mut slots = slots(2);
        let held = fill(&mut slots, 0);
        slots.publish(held);
        let first = slots.hold(held.slot);
        let second = slots.hold(held.slot);
        let pin = slots.pin(held.slot);
        assert_eq!((slots.leased(), slots.pinned()), (1, 1));
        assert!(!slots.get(held.slot).evictable());
        slots.unhold(first);
        slots.unpin(pin);
        assert_eq!((slots.leased(), slots.pinned()), (1, 0));
        slots.shift(held.slot, SlotState::Committed, SlotState::Draining);
        assert_eq!((slots.leased(), slots.count(SlotState::Draining)), (0, 1));
        slots.unhold(second);
        slots.shift(held.slot, SlotState::Draining, SlotState::Free);
        assert_eq!(slots.count(SlotState::Free), 2);
    }
}
