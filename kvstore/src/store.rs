//! The one public store: ties slots, index, leases, pins and eviction together; none of them calls another.
//!
//! One owner at a time calls it (`&mut self`), it takes no lock, reads no clock and never blocks. It never touches the
//! arena: slots are names here. In shared memory it writes the presence filter only.

use std::time::{Duration, Instant};

use crate::effects::{Counts, Effects, Lease, PinOutcome, Reservation};
use crate::error::StoreError;
use crate::evict::{Class, Lru, Policy, Standing};
use crate::ids::{
    BlockHash, Depth, LeaseId, Namespace, NamespaceId, Owner, PinId, SlotId, Tick, usize_from,
};
use crate::index::{DigestSet, Index};
use crate::lease::{Grant, Leases, Record, Right, Tenure, Term, Why};
use crate::pins::Pins;
use crate::presence::Presence;
use crate::slots::{Filling, SlotState, Slots};

/// Longest time to live that a configuration may allow a lease.
pub const LEASE_TTL_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Most namespaces that a configuration may allow.
pub const NAMESPACES_LIMIT: usize = 65_536;

/// Sizes of everything in a store. Nothing grows beyond them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// Slots of the arena.
    pub slots: u32,
    /// Slots that may be pinned at a time.
    pub pin_budget_slots: u32,
    /// Longest time to live of a lease or reservation; longer ones are cut to it.
    pub lease_ttl_max: Duration,
    /// Leases and reservations at a time, ended ones whose slots drain included.
    pub leases_max: usize,
    /// Namespaces at a time. One with nothing stored makes room for another.
    pub namespaces_max: usize,
}

impl StoreConfig {
    /// Refuses what cannot work.
    ///
    /// # Errors
    /// `BadConfig`, which names the field and the rule.
    pub fn validate(&self) -> Result<(), StoreError> {
        let ttl = self.lease_ttl_max;
        let rules = [
            (self.slots >= 1, "slots", "must be at least 1"),
            (
                self.pin_budget_slots <= self.slots,
                "pin_budget_slots",
                "must be at most the number of slots",
            ),
            (
                !ttl.is_zero() && ttl <= LEASE_TTL_LIMIT,
                "lease_ttl_max",
                "must be more than nothing and at most 24 hours",
            ),
            (self.leases_max >= 1, "leases_max", "must be at least 1"),
            (
                (1..=NAMESPACES_LIMIT).contains(&self.namespaces_max),
                "namespaces_max",
                "must be between 1 and 65536",
            ),
        ];
        for (holds, field, rule) in rules {
            if !holds {
                return Err(StoreError::BadConfig { field, rule });
            }
        }
        Ok(())
    }
}

/// Which blocks are in which slots, and who may touch them.
#[derive(Debug)]
pub struct Store {
    pub(crate) slots: Slots,
    pub(crate) index: Index,
    pub(crate) leases: Leases,
    pub(crate) pins: Pins,
    pub(crate) policy: Box<dyn Policy>,
    pub(crate) tick: Tick,
}

/// Namespaces, and questions that change nothing.
impl Store {
    /// An empty store.
    ///
    /// # Errors
    /// `BadConfig`.
    pub fn new(config: StoreConfig) -> Result<Self, StoreError> {
        config.validate()?;
        Ok(Self {
            slots: Slots::new(config.slots),
            index: Index::new(config.namespaces_max),
            leases: Leases::new(config.leases_max, config.lease_ttl_max),
            pins: Pins::new(usize_from(config.pin_budget_slots)),
            policy: Box::new(Lru::default()),
            tick: Tick(0),
        })
    }

    /// Shows in `presence`, from now on, which blocks are readable. Nothing must be stored yet.
    #[must_use]
    pub fn shown_in(mut self, presence: Presence) -> Self {
        assert_eq!(self.index.totals(), (0, 0), "the store has blocks already");
        self.index.show_in(presence);
        self
    }

    /// Where that is shown.
    pub fn presence(&self) -> Option<&Presence> {
        self.index.presence()
    }

    /// The present epoch of a namespace; the first call for an id creates it. When all places are taken, one with nothing
    /// stored is given up: its handles are stale then.
    ///
    /// # Errors
    /// `TooMany` when every namespace has blocks.
    pub fn open_namespace(&mut self, id: NamespaceId) -> Result<Namespace, StoreError> {
        self.index.open(id)
    }

    /// Starts a new epoch: nothing stored before is ever found again, and nothing reserved before is ever committed. Free
    /// slots return at once, the others drain until their copies have ended; pins of the old epoch are void. Works on the
    /// namespace, so a handle from before an earlier reset does it too: a reset too many costs time, one too few is wrong. A
    /// handle of a namespace that was given up has nothing to reset and comes back as it is: open it again.
    pub fn reset_namespace(&mut self, namespace: Namespace) -> (Namespace, Effects) {
        let mut effects = Effects::default();
        if !self.index.is_open(namespace) {
            return (namespace, effects);
        }
        let space = namespace.space;
        for id in self.pins.select(|pin| pin.space == space) {
            effects.voided_pins += 1;
            effects += self.drop_pin(id);
        }
        let live_writes = |record: &Record| {
            record.namespace.space == space && record.right == Right::Write && record.is_live()
        };
        for id in self.leases.select(live_writes) {
            self.leases.end(id, Why::Reset);
        }
        let fresh = self.index.reset(space);
        for slot in self.slots.stored_in(space) {
            self.drop_stored(slot, &mut effects);
        }
        (fresh, effects)
    }

    /// Blocks of the longest readable prefix of `hashes`: 0 if the first is missing, or for a stale handle.
    pub fn match_prefix(&self, namespace: Namespace, hashes: &[BlockHash]) -> usize {
        self.index.prefix(namespace, hashes)
    }

    /// Whether a block is readable.
    pub fn contains(&self, namespace: Namespace, hash: &BlockHash) -> bool {
        self.index.committed(namespace, hash).is_some()
    }

    /// Whether the handle is of the namespace's present epoch.
    pub fn is_current(&self, namespace: Namespace) -> bool {
        self.index.is_current(namespace)
    }

    /// When `expire` has something to do next.
    pub fn next_expiry(&self) -> Option<Instant> {
        [self.leases.next_expiry(), self.pins.next_expiry()]
            .into_iter()
            .flatten()
            .min()
    }

    /// For how long the block that would be evicted next has not been used: how much of the past the arena remembers.
    pub fn coldest_idle(&self, now: Instant) -> Option<Duration> {
        let used = self.slots.get(self.policy.coldest()?).standing.used?;
        Some(now.saturating_duration_since(used))
    }

    /// How the slots stand at the moment.
    pub fn counts(&self) -> Counts {
        Counts {
            total: self.slots.len(),
            free: self.slots.count(SlotState::Free),
            filling: self.slots.count(SlotState::Filling),
            committed: self.slots.count(SlotState::Committed),
            draining: self.slots.count(SlotState::Draining),
            leased: self.slots.leased(),
            pinned: self.slots.pinned(),
            evictable: self.policy.len(),
            leases: self.leases.len(),
            pins: self.pins.len(),
        }
    }
}

/// Leases and reservations.
impl Store {
    /// Leases the longest readable prefix of `hashes` for reading; none if the first block is missing. It is a use of those
    /// blocks, and takes a retirement or demotion of them back.
    ///
    /// # Errors
    /// `StaleNamespace`, `TooMany`.
    pub fn lease_prefix(
        &mut self,
        owner: Owner,
        namespace: Namespace,
        hashes: &[BlockHash],
        term: Term,
    ) -> Result<Option<Lease>, StoreError> {
        self.check_current(namespace)?;
        let slots: Vec<SlotId> = hashes
            .iter()
            .map_while(|hash| self.index.committed(namespace, hash))
            .collect();
        if slots.is_empty() {
            return Ok(None);
        }
        self.leases.check_room()?;
        let tick = self.next_tick();
        let mut held = Vec::with_capacity(slots.len());
        for (at, &slot) in slots.iter().enumerate() {
            held.push(self.hold(slot));
            self.slots
                .restand(slot, Standing::in_use(tick, at, term.now));
        }
        let id = self.leases.grant(
            Grant {
                owner,
                namespace,
                right: Right::Read,
                held,
            },
            term,
        );
        Ok(Some(Lease { id, slots }))
    }

    /// Puts the expiry of a live lease or reservation off to `term` from now; never brings it forward.
    ///
    /// # Errors
    /// `UnknownLease`, `WrongOwner`, `LeaseExpired`, `StaleNamespace`.
    pub fn renew(&mut self, owner: Owner, lease: LeaseId, term: Term) -> Result<(), StoreError> {
        let namespace = self.leases.find(owner, lease)?.namespace;
        self.check_current(namespace)?;
        self.leases.renew(lease, term)
    }

    /// Its owner has ended all copies out of a read lease, and gives it back; in time or late makes no difference.
    ///
    /// # Errors
    /// `UnknownLease` (also for a reservation), `WrongOwner`.
    pub fn release(&mut self, owner: Owner, lease: LeaseId) -> Result<Effects, StoreError> {
        let record = self.leases.take(owner, lease, Right::Read)?;
        Ok(self.close(&record))
    }

    /// Reserves slots for those of `hashes` that are neither stored nor being filled, evicting what has to go; a run of
    /// neighbours if there is one. When leases and pins leave too little room the tail is left out; none if nothing is left
    /// to write. It is a use of all of `hashes`, so pass the whole chain where it is at hand: none of it is evicted for
    /// the rest of it.
    ///
    /// # Errors
    /// `StaleNamespace`, `TooMany`.
    pub fn reserve(
        &mut self,
        owner: Owner,
        namespace: Namespace,
        hashes: &[BlockHash],
        term: Term,
    ) -> Result<Option<Reservation>, StoreError> {
        self.check_current(namespace)?;
        self.leases.check_room()?;
        let tick = self.next_tick();
        let mut wanted = Vec::new();
        // A list that names a block twice gets one slot for it.
        let mut named = DigestSet::default();
        for (at, &hash) in hashes.iter().enumerate() {
            let standing = Standing::in_use(tick, at, term.now);
            if let Some(slot) = self.index.find(namespace, &hash) {
                self.restand(slot, standing);
            } else if named.insert(hash) {
                wanted.push(Filling {
                    hash,
                    space: namespace.space,
                    standing,
                });
            }
        }
        let mut effects = Effects::default();
        let room = if crate::fault!("store::reserve::full") {
            0
        } else {
            self.make_room(wanted.len(), tick, &mut effects)
        };
        wanted.truncate(room);
        if wanted.is_empty() {
            return Ok(None);
        }
        let mut held = Vec::with_capacity(room);
        let mut slots = Vec::with_capacity(room);
        for (slot, filling) in self.slots.pick(room).into_iter().zip(wanted) {
            held.push(self.slots.fill(slot, filling));
            self.index.add_filling(filling.space, filling.hash, slot);
            slots.push((filling.hash, slot));
        }
        let id = self.leases.grant(
            Grant {
                owner,
                namespace,
                right: Right::Write,
                held,
            },
            term,
        );
        Ok(Some(Reservation { id, slots, effects }))
    }

    /// Every rank has written every layer: all slots of the reservation become readable at once, except blocks retired
    /// meanwhile, which are freed.
    ///
    /// # Errors
    /// `LeaseExpired` and `StaleNamespace`: too late, nothing is published, the reservation is over and its slots are free.
    /// `UnknownLease` (also for a read lease), `WrongOwner`: nothing happened.
    pub fn commit(
        &mut self,
        owner: Owner,
        reservation: LeaseId,
        now: Instant,
    ) -> Result<Effects, StoreError> {
        let record = self.leases.take(owner, reservation, Right::Write)?;
        let refusal = match record.tenure {
            Tenure::Live { expires }
                if now < expires && !crate::fault!("store::commit::refused") =>
            {
                None
            }
            Tenure::Ended(Why::Reset) => Some(StoreError::StaleNamespace),
            Tenure::Live { .. } | Tenure::Ended(Why::Expired | Why::OwnerLeft) => {
                Some(StoreError::LeaseExpired)
            }
        };
        if let Some(refusal) = refusal {
            let Effects { freed, .. } = self.close(&record);
            assert_eq!(
                freed,
                record.held.len(),
                "a reservation's slots have no other holder"
            );
            return Err(refusal);
        }
        let mut effects = Effects::default();
        for &held in &record.held {
            self.publish(held, now, &mut effects);
        }
        Ok(effects)
    }

    /// Its owner has ended all copies into a reservation, and gives it back without a result; in time or late.
    ///
    /// # Errors
    /// `UnknownLease` (also for a read lease), `WrongOwner`.
    pub fn abort(&mut self, owner: Owner, reservation: LeaseId) -> Result<Effects, StoreError> {
        let record = self.leases.take(owner, reservation, Right::Write)?;
        Ok(self.close(&record))
    }

    /// Ends what is due. Slots of ended leases and reservations are not free: their copies may still run.
    pub fn expire(&mut self, now: Instant) -> Effects {
        let mut effects = Effects::default();
        for id in self.leases.due(now) {
            match self.end(id, Why::Expired, &mut effects) {
                Some(Right::Read) => effects.expired_leases += 1,
                Some(Right::Write) => effects.expired_reservations += 1,
                None => {}
            }
        }
        for id in self.pins.due(now) {
            effects.expired_pins += 1;
            effects += self.drop_pin(id);
        }
        effects
    }

    /// The engine's connection is gone: its leases and reservations end, their slots drain, since its workers may still copy.
    pub fn owner_left(&mut self, owner: Owner) -> Effects {
        let mut effects = Effects::default();
        for id in self
            .leases
            .select(|record| record.owner == owner && record.is_live())
        {
            effects.orphaned_leases +=
                usize::from(self.end(id, Why::OwnerLeft, &mut effects).is_some());
        }
        effects
    }

    /// None of the engine's processes can touch the arena any more (they exited, or said that all copies have ended): what
    /// it held is let go. Committed blocks stay.
    pub fn owner_gone(&mut self, owner: Owner) -> Effects {
        let mut effects = Effects::default();
        for id in self.leases.select(|record| record.owner == owner) {
            let Some(record) = self.leases.remove(id) else {
                continue;
            };
            effects.orphaned_leases += usize::from(record.is_live());
            effects += self.close(&record);
        }
        effects
    }
}

/// Hints about the future of blocks. A stale handle names no blocks.
impl Store {
    /// These blocks were just used, as one chain: they are evicted after everything used before, the deepest of them first.
    /// Takes a retirement or demotion back.
    pub fn touch(&mut self, namespace: Namespace, hashes: &[BlockHash], now: Instant) {
        let tick = self.next_tick();
        for (at, hash) in hashes.iter().enumerate() {
            if let Some(slot) = self.index.find(namespace, hash) {
                self.restand(slot, Standing::in_use(tick, at, now));
            }
        }
    }

    /// These blocks go first when room is needed, the deepest of them first. Retired ones stay retired. Returns how many are
    /// stored or being filled.
    pub fn demote(&mut self, namespace: Namespace, hashes: &[BlockHash]) -> usize {
        let tick = self.next_tick();
        let mut demoted = 0;
        for (at, hash) in hashes.iter().enumerate() {
            let Some(slot) = self.index.find(namespace, hash) else {
                continue;
            };
            demoted += 1;
            let standing = self.slots.get(slot).standing;
            if standing.class != Class::Retired {
                let (class, depth) = (Class::Demoted, Depth::from_index(at));
                self.restand(
                    slot,
                    Standing {
                        class,
                        tick,
                        depth,
                        ..standing
                    },
                );
            }
        }
        demoted
    }

    /// Nobody will need these blocks again: frees at once what is neither leased nor pinned nor being filled; the rest goes
    /// when it is let go, unless it is used again before that.
    pub fn retire(&mut self, namespace: Namespace, hashes: &[BlockHash]) -> Effects {
        let mut effects = Effects::default();
        for hash in hashes {
            let Some(slot) = self.index.find(namespace, hash) else {
                continue;
            };
            if self.slots.get(slot).evictable() {
                self.evict(slot, &mut effects);
                effects.evicted.retired += 1;
            } else {
                let standing = self.slots.get(slot).standing;
                self.slots.restand(
                    slot,
                    Standing {
                        class: Class::Retired,
                        ..standing
                    },
                );
            }
        }
        effects
    }

    /// Keeps readable blocks from eviction until the pin's time is over, as far as the budget goes, first blocks first.
    /// Pins are counted: a block stays until its last pin has ended. Takes a retirement back.
    pub fn pin(&mut self, namespace: Namespace, hashes: &[BlockHash], term: Term) -> PinOutcome {
        let mut outcome = PinOutcome {
            id: None,
            pinned: 0,
            missing: 0,
            clipped: 0,
        };
        let mut held = Vec::new();
        for hash in hashes {
            let Some(slot) = self.index.committed(namespace, hash) else {
                outcome.missing += 1;
                continue;
            };
            let new = usize::from(self.slots.get(slot).pins == 0);
            if self.pins.has_room_for(self.slots.pinned() + new) {
                held.push(self.add_pin(slot));
            } else {
                outcome.clipped += 1;
            }
        }
        outcome.pinned = held.len();
        if !held.is_empty() {
            outcome.id = Some(self.pins.add(namespace.space, held, term));
        }
        outcome
    }

    /// Ends one pin.
    ///
    /// # Errors
    /// `UnknownPin`.
    pub fn unpin(&mut self, pin: PinId) -> Result<Effects, StoreError> {
        let pin = self.pins.take(pin)?;
        Ok(self.close_pin(&pin))
    }

    /// Ends all pins: the operator's way out when pins leave no room.
    pub fn break_pins(&mut self) -> Effects {
        let mut effects = Effects::default();
        for id in self.pins.select(|_| true) {
            effects.voided_pins += 1;
            effects += self.drop_pin(id);
        }
        effects
    }
}

#[cfg(test)]
mod tests;
