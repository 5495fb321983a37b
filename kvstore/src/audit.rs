//! Recounts a whole store from scratch. For tests, fuzzing and the doctor; linear in slots and leases.

use crate::evict::Class;
use crate::ids::SlotId;
use crate::lease::{Record, Right, Tenure};
use crate::slots::{Held, Slot, SlotState};
use crate::store::Store;

/// What leases and pins say about one slot.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Claims {
    holds: u32,
    pins: u32,
    live_writers: u32,
}

impl Store {
    /// Checks every relation between the parts of the store.
    ///
    /// # Panics
    /// If one does not hold; the message says which, and for which slot.
    pub fn check_invariants(&self) {
        let claims = self.claims();
        self.check_slots(&claims);
        self.check_totals();
        self.index.check_presence();
        self.leases.check();
        self.pins.check(self.slots.pinned());
    }

    fn claims(&self) -> Vec<Claims> {
        let mut claims = vec![Claims::default(); self.slots.len()];
        for (id, record) in self.leases.iter() {
            for held in &record.held {
                self.check_generation(held);
                let claim = &mut claims[held.slot.index()];
                claim.holds += 1;
                claim.live_writers += u32::from(record.right == Right::Write && record.is_live());
                let state = self.slots.get(held.slot).state;
                assert!(
                    may_hold(record, state),
                    "{id:?} ({:?}, {:?}) holds {held:?}, which is {state:?}",
                    record.right,
                    record.tenure
                );
            }
        }
        for pin in self.pins.iter() {
            for held in &pin.held {
                self.check_generation(held);
                assert_eq!(
                    self.slots.get(held.slot).space,
                    pin.space,
                    "{held:?} is pinned through another namespace"
                );
                claims[held.slot.index()].pins += 1;
            }
        }
        claims
    }

    fn check_generation(&self, held: &Held) {
        let generation = self.slots.get(held.slot).generation;
        assert_eq!(
            held.generation, generation,
            "{:?} was given away while it was held",
            held.slot
        );
    }

    fn check_slots(&self, claims: &[Claims]) {
        for ((slot, row), claim) in self.slots.iter().zip(claims) {
            assert_eq!(
                row.holds, claim.holds,
                "{slot:?}: holds on the slot and in the leases"
            );
            assert_eq!(
                row.pins, claim.pins,
                "{slot:?}: pins on the slot and in the pins"
            );
            assert_eq!(
                self.slots.is_free(slot),
                row.state == SlotState::Free,
                "{slot:?}: allocator and state disagree"
            );
            let queued = self.policy.contains(slot, row.standing);
            assert_eq!(
                queued,
                row.evictable(),
                "{slot:?}: eviction order and state disagree"
            );
            self.check_state(slot, row, *claim);
        }
    }

    fn check_state(&self, slot: SlotId, row: &Slot, claim: Claims) {
        match row.state {
            SlotState::Free => assert!(claim == Claims::default(), "{slot:?} is free, but claimed"),
            SlotState::Filling => {
                assert_eq!(
                    (claim.holds, claim.live_writers),
                    (1, 1),
                    "{slot:?} is filled by one live reservation"
                );
                assert_eq!(row.pins, 0, "{slot:?} is pinned before it is readable");
                let places = self.index.places(row.space, &row.hash);
                assert_eq!(
                    places,
                    (None, Some(slot)),
                    "{slot:?} is filled under this name alone"
                );
            }
            SlotState::Committed => {
                assert_eq!(claim.live_writers, 0, "{slot:?} is written while readable");
                let places = self.index.places(row.space, &row.hash);
                assert_eq!(
                    places,
                    (Some(slot), None),
                    "{slot:?} is readable under this name alone"
                );
                let kept = claim.holds > 0 || claim.pins > 0;
                assert!(
                    kept || row.standing.class != Class::Retired,
                    "{slot:?} is retired and kept by nobody"
                );
            }
            SlotState::Draining => {
                assert!(claim.holds > 0, "{slot:?} drains for nobody");
                assert_eq!(
                    (claim.pins, claim.live_writers),
                    (0, 0),
                    "{slot:?} drains, but is in use"
                );
            }
        }
        assert!(
            row.standing.tick <= self.tick,
            "{slot:?} was used in the future"
        );
    }

    fn check_totals(&self) {
        let count = |wanted: &dyn Fn(&Slot) -> bool| {
            self.slots.iter().filter(|(_, row)| wanted(row)).count()
        };
        let counts = self.counts();
        assert_eq!(
            counts.free,
            count(&|row| row.state == SlotState::Free),
            "count of free slots"
        );
        assert_eq!(
            counts.filling,
            count(&|row| row.state == SlotState::Filling),
            "count of filling slots"
        );
        assert_eq!(
            counts.committed,
            count(&|row| row.state == SlotState::Committed),
            "count of committed slots"
        );
        assert_eq!(
            counts.draining,
            count(&|row| row.state == SlotState::Draining),
            "count of draining slots"
        );
        assert_eq!(
            counts.pinned,
            count(&|row| row.pins > 0),
            "count of pinned slots"
        );
        assert_eq!(
            counts.evictable,
            count(&Slot::evictable),
            "count of evictable slots"
        );
        let leased = count(&|row| row.state == SlotState::Committed && row.holds > 0);
        assert_eq!(counts.leased, leased, "count of leased slots");
        assert_eq!(
            self.index.totals(),
            (counts.committed, counts.filling),
            "names in the index and slots behind them"
        );
    }
}

/// A reader's slot stays committed or drains after a reset; a writer's is filled while the reservation lives and drains after.
fn may_hold(record: &Record, state: SlotState) -> bool {
    match (record.right, record.tenure) {
        (Right::Read, _) => matches!(state, SlotState::Committed | SlotState::Draining),
        (Right::Write, Tenure::Live { .. }) => state == SlotState::Filling,
        (Right::Write, Tenure::Ended(_)) => state == SlotState::Draining,
    }
}
