//! The steps that the calls of [`Store`] are made of: each moves one block or one record, and keeps slots, index and
//! eviction order in step.

use std::time::Instant;

use crate::effects::Effects;
use crate::error::StoreError;
use crate::evict::{Class, Standing};
use crate::ids::{LeaseId, Namespace, PinId, SlotId, Tick};
use crate::lease::{Record, Right, Why};
use crate::pins::Pin;
use crate::slots::{Held, SlotState};
use crate::store::Store;

impl Store {
    pub(crate) fn check_current(&self, namespace: Namespace) -> Result<(), StoreError> {
        if self.index.is_current(namespace) {
            Ok(())
        } else {
            Err(StoreError::StaleNamespace)
        }
    }

    pub(crate) fn next_tick(&mut self) -> Tick {
        self.tick = Tick(self.tick.0 + 1);
        self.tick
    }

    /// Evicts until `wanted` slots are free, except blocks that were used in the call of `tick`. Returns how many there are,
    /// at most `wanted`.
    pub(crate) fn make_room(&mut self, wanted: usize, tick: Tick, effects: &mut Effects) -> usize {
        while self.slots.count(SlotState::Free) < wanted {
            let Some(slot) = self.policy.coldest() else {
                break;
            };
            let standing = self.slots.get(slot).standing;
            if standing.tick == tick {
                break;
            }
            self.evict(slot, effects);
            match standing.class {
                Class::Normal => effects.evicted.lru += 1,
                Class::Demoted => effects.evicted.demoted += 1,
                Class::Retired => unreachable!("{slot:?}: retired blocks are freed, not queued"),
            }
        }
        wanted.min(self.slots.count(SlotState::Free))
    }

    /// Frees an evictable block; the caller counts the reason.
    pub(crate) fn evict(&mut self, slot: SlotId, effects: &mut Effects) {
        self.policy.remove(slot, self.slots.get(slot).standing);
        self.forget(slot, effects);
    }

    /// Frees a readable block that nobody holds or pins, and that is not in the eviction order.
    fn forget(&mut self, slot: SlotId, effects: &mut Effects) {
        let row = self.slots.get(slot);
        self.index.forget_committed(row.space, &row.hash);
        self.free(slot, SlotState::Committed, effects);
    }

    fn free(&mut self, slot: SlotId, from: SlotState, effects: &mut Effects) {
        self.slots.shift(slot, from, SlotState::Free);
        effects.freed += 1;
    }

    /// A readable block that a lease or pin has let go: back to the eviction order, or to the allocator if it is retired.
    fn settle(&mut self, slot: SlotId, effects: &mut Effects) {
        let row = self.slots.get(slot);
        if !row.evictable() {
            return;
        }
        if row.standing.class == Class::Retired {
            self.forget(slot, effects);
            effects.evicted.retired += 1;
        } else {
            self.policy.insert(slot, row.standing);
        }
    }

    pub(crate) fn restand(&mut self, slot: SlotId, standing: Standing) {
        let row = self.slots.get(slot);
        if row.evictable() {
            self.policy.remove(slot, row.standing);
            self.policy.insert(slot, standing);
        }
        self.slots.restand(slot, standing);
    }

    /// One more reader of a readable block.
    pub(crate) fn hold(&mut self, slot: SlotId) -> Held {
        let row = self.slots.get(slot);
        if row.evictable() {
            self.policy.remove(slot, row.standing);
        }
        self.slots.hold(slot)
    }

    /// The writer has written the block: readers may come, unless it was retired meanwhile.
    pub(crate) fn publish(&mut self, held: Held, now: Instant, effects: &mut Effects) {
        let row = self.slots.get(held.slot);
        let (space, hash, standing) = (row.space, row.hash, row.standing);
        if standing.class == Class::Retired {
            self.let_go(held, effects);
            return;
        }
        let standing = Standing {
            used: Some(now),
            ..standing
        };
        self.index.publish(space, hash);
        self.slots.publish(held);
        self.slots.restand(held.slot, standing);
        self.policy.insert(held.slot, standing);
        effects.committed += 1;
    }

    /// A lease or reservation can touch the slot no more.
    fn let_go(&mut self, held: Held, effects: &mut Effects) {
        let slot = held.slot;
        self.slots.unhold(held);
        let row = self.slots.get(slot);
        match row.state {
            SlotState::Filling => {
                self.index.forget_filling(row.space, &row.hash);
                self.free(slot, SlotState::Filling, effects);
            }
            SlotState::Committed => self.settle(slot, effects),
            SlotState::Draining if row.holds == 0 => self.free(slot, SlotState::Draining, effects),
            SlotState::Draining => {}
            SlotState::Free => panic!("{held:?} was free while it was held"),
        }
    }

    /// All copies of a lease or reservation have ended.
    pub(crate) fn close(&mut self, record: &Record) -> Effects {
        let mut effects = Effects::default();
        for &held in &record.held {
            self.let_go(held, &mut effects);
        }
        effects
    }

    /// A live lease or reservation ends while its copies may still run. What was being written drains.
    pub(crate) fn end(&mut self, id: LeaseId, why: Why, effects: &mut Effects) -> Option<Right> {
        let record = self.leases.end(id, why)?;
        if record.right == Right::Write {
            for held in &record.held {
                let row = self.slots.get(held.slot);
                self.index.forget_filling(row.space, &row.hash);
                self.slots
                    .shift(held.slot, SlotState::Filling, SlotState::Draining);
                effects.draining += 1;
            }
        }
        Some(record.right)
    }

    /// The name of this block is gone already, since its namespace was reset; now its slot. It is not pinned any more.
    pub(crate) fn drop_stored(&mut self, slot: SlotId, effects: &mut Effects) {
        let row = self.slots.get(slot);
        let (state, standing) = (row.state, row.standing);
        if row.evictable() {
            self.policy.remove(slot, standing);
            self.free(slot, state, effects);
        } else {
            self.slots.shift(slot, state, SlotState::Draining);
            effects.draining += 1;
        }
        if state == SlotState::Committed {
            effects.evicted.reset += 1;
        }
    }

    /// One more pin on a readable block.
    pub(crate) fn add_pin(&mut self, slot: SlotId) -> Held {
        let row = self.slots.get(slot);
        if row.evictable() {
            self.policy.remove(slot, row.standing);
        }
        let standing = row.standing;
        if standing.class == Class::Retired {
            self.slots.restand(
                slot,
                Standing {
                    class: Class::Normal,
                    ..standing
                },
            );
        }
        self.slots.pin(slot)
    }

    pub(crate) fn close_pin(&mut self, pin: &Pin) -> Effects {
        let mut effects = Effects::default();
        for &held in &pin.held {
            self.slots.unpin(held);
            self.settle(held.slot, &mut effects);
        }
        effects
    }

    /// Ends a pin that is known to exist.
    pub(crate) fn drop_pin(&mut self, id: PinId) -> Effects {
        match self.pins.take(id) {
            Ok(pin) => self.close_pin(&pin),
            Err(error) => panic!("{id:?} was in the table a moment ago: {error}"),
        }
    }
}
