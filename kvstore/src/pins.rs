//! Pins: counted "do not evict", each call of `pin` one record with a time to live. Advice, so always breakable.
//!
//! Owns the records and the budget, never a slot.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::error::StoreError;
use crate::ids::{PinId, Space};
use crate::lease::Term;
use crate::slots::Held;

/// Longest life of a pin; longer ones are cut to it. Who needs more pins again.
pub const PIN_TTL_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Most pins at a time; further ones are clipped whole.
pub const PINS_MAX: usize = 65_536;

#[derive(Debug)]
pub(crate) struct Pin {
    pub(crate) space: Space,
    pub(crate) held: Vec<Held>,
    expires: Instant,
}

#[derive(Debug)]
pub(crate) struct Pins {
    records: BTreeMap<PinId, Pin>,
    due: BTreeSet<(Instant, PinId)>,
    next_id: u64,
    budget: usize,
}

impl Pins {
    pub(crate) fn new(budget: usize) -> Self {
        Self {
            records: BTreeMap::new(),
            due: BTreeSet::new(),
            next_id: 1,
            budget,
        }
    }

    /// Whether one more pin fits that brings the number of pinned slots to `pinned`.
    pub(crate) fn has_room_for(&self, pinned: usize) -> bool {
        self.records.len() < PINS_MAX && pinned <= self.budget
    }

    pub(crate) fn add(&mut self, space: Space, held: Vec<Held>, term: Term) -> PinId {
        assert!(self.records.len() < PINS_MAX, "a pin beyond the limit");
        assert!(!held.is_empty(), "a pin of nothing");
        let id = PinId(self.next_id);
        self.next_id += 1;
        let expires = term.now + term.ttl.min(PIN_TTL_MAX);
        self.due.insert((expires, id));
        self.records.insert(
            id,
            Pin {
                space,
                held,
                expires,
            },
        );
        id
    }

    pub(crate) fn take(&mut self, id: PinId) -> Result<Pin, StoreError> {
        let pin = self.records.remove(&id).ok_or(StoreError::UnknownPin)?;
        self.due.remove(&(pin.expires, id));
        Ok(pin)
    }

    /// Pins whose time is over, earliest first.
    pub(crate) fn due(&self, now: Instant) -> Vec<PinId> {
        self.due
            .iter()
            .take_while(|(expires, _)| *expires <= now)
            .map(|&(_, id)| id)
            .collect()
    }

    /// Pins that `wanted` picks, oldest first.
    pub(crate) fn select(&self, wanted: impl Fn(&Pin) -> bool) -> Vec<PinId> {
        self.records
            .iter()
            .filter(|(_, pin)| wanted(pin))
            .map(|(&id, _)| id)
            .collect()
    }

    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.due.first().map(|&(expires, _)| expires)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Pin> {
        self.records.values()
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// Panics if the schedule and the records disagree, or the budget is overdrawn; for the audit.
    pub(crate) fn check(&self, pinned: usize) {
        let due: BTreeSet<_> = self
            .records
            .iter()
            .map(|(&id, pin)| (pin.expires, id))
            .collect();
        assert!(due == self.due, "the pin schedule is not that of the pins");
        assert!(
            pinned <= self.budget,
            "{pinned} slots pinned on a budget of {}",
            self.budget
        );
        assert!(self.records.len() <= PINS_MAX, "more pins than allowed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Generation, SlotId};

    fn add(pins: &mut Pins, now: Instant, seconds: u64) -> PinId {
        let held = vec![Held {
            slot: SlotId(0),
            generation: Generation::FIRST,
        }];
        pins.add(
            Space::from_index(0),
            held,
            Term {
                now,
                ttl: Duration::from_secs(seconds),
            },
        )
    }

    #[test]
    fn due_pins_come_earliest_first_and_are_taken_once() {
        let (mut pins, now) = (Pins::new(4), Instant::now());
        let late = add(&mut pins, now, 5);
        let early = add(&mut pins, now, 2);
        pins.check(1);
        assert_eq!(pins.next_expiry(), Some(now + Duration::from_secs(2)));
        assert_eq!(pins.due(now + Duration::from_secs(9)), [early, late]);
        assert!(pins.take(early).is_ok());
        assert_eq!(pins.take(early).err(), Some(StoreError::UnknownPin));
        pins.check(1);
        assert_eq!(pins.due(now + Duration::from_secs(9)), [late]);
    }

    #[test]
    fn room_is_the_budget_and_the_table() {
        let (mut pins, now) = (Pins::new(4), Instant::now());
        assert!(pins.has_room_for(4) && !pins.has_room_for(5));
        for _ in 0..PINS_MAX {
            let _ = add(&mut pins, now, 1);
        }
        assert!(
            !pins.has_room_for(1),
            "a full table has no room for a pin of pinned slots either"
        );
    }
}
