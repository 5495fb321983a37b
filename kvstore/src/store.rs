//! The one public store: ties slots, index, leases, pins and eviction together; none of them calls another.
//!
//! One owner at a time calls it (`&mut self`), it takes no lock, reads no clock and never blocks. It never touches the
//! arena: slots are names here.

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
mod tests {
    use super::*;

    const ENGINE: Owner = Owner(1);
    const OTHER: Owner = Owner(2);
    const TTL: Duration = Duration::from_secs(10);

    /// A small store with one open namespace, a clock that only moves when told, and a check after every call.
    struct Bench {
        store: Store,
        ns: Namespace,
        now: Instant,
    }

    fn hash(n: u8) -> BlockHash {
        let mut bytes = [n.wrapping_mul(31); 32];
        bytes[0] = n;
        BlockHash(bytes)
    }

    /// The chain of blocks `from..to`.
    fn chain(from: u8, to: u8) -> Vec<BlockHash> {
        (from..to).map(hash).collect()
    }

    fn config(slots: u32) -> StoreConfig {
        StoreConfig {
            slots,
            pin_budget_slots: slots / 2,
            lease_ttl_max: Duration::from_secs(60),
            leases_max: 16,
            namespaces_max: 2,
        }
    }

    impl Bench {
        fn new(slots: u32) -> Self {
            let mut store = Store::new(config(slots)).unwrap();
            let ns = store.open_namespace(NamespaceId([1; 32])).unwrap();
            Self {
                store,
                ns,
                now: Instant::now(),
            }
        }

        fn term(&self) -> Term {
            Term {
                now: self.now,
                ttl: TTL,
            }
        }

        fn reserve(&mut self, hashes: &[BlockHash]) -> Option<Reservation> {
            let reservation = self
                .store
                .reserve(ENGINE, self.ns, hashes, self.term())
                .unwrap();
            self.store.check_invariants();
            reservation
        }

        fn commit(&mut self, id: LeaseId) -> Result<Effects, StoreError> {
            let outcome = self.store.commit(ENGINE, id, self.now);
            self.store.check_invariants();
            outcome
        }

        /// Saves a chain whole.
        fn save(&mut self, hashes: &[BlockHash]) {
            let reservation = self.reserve(hashes).unwrap();
            assert_eq!(
                self.commit(reservation.id).unwrap().committed,
                reservation.slots.len()
            );
        }

        fn lease(&mut self, hashes: &[BlockHash]) -> Option<Lease> {
            let lease = self
                .store
                .lease_prefix(ENGINE, self.ns, hashes, self.term())
                .unwrap();
            self.store.check_invariants();
            lease
        }

        fn release(&mut self, id: LeaseId) -> Result<Effects, StoreError> {
            let outcome = self.store.release(ENGINE, id);
            self.store.check_invariants();
            outcome
        }

        fn pin(&mut self, hashes: &[BlockHash]) -> PinOutcome {
            let outcome = self.store.pin(self.ns, hashes, self.term());
            self.store.check_invariants();
            outcome
        }

        fn expire(&mut self) -> Effects {
            let effects = self.store.expire(self.now);
            self.store.check_invariants();
            effects
        }

        fn matched(&self, hashes: &[BlockHash]) -> usize {
            self.store.match_prefix(self.ns, hashes)
        }

        fn stored(&self, blocks: impl IntoIterator<Item = u8>) -> Vec<u8> {
            blocks
                .into_iter()
                .filter(|&n| self.store.contains(self.ns, &hash(n)))
                .collect()
        }

        /// Blocks of `candidates` in the order in which room-making evicts them, found by asking for one slot at a time.
        fn eviction_order(&mut self, candidates: std::ops::Range<u8>) -> Vec<u8> {
            let mut order = Vec::new();
            let mut left = self.stored(candidates);
            let mut filler = 200;
            while !left.is_empty() && filler < 250 {
                let Some(reservation) = self.reserve(&[hash(filler)]) else {
                    break;
                };
                filler += 1;
                assert_eq!(reservation.slots.len(), 1);
                let now_left = self.stored(left.iter().copied());
                order.extend(left.iter().copied().filter(|n| !now_left.contains(n)));
                left = now_left;
            }
            order
        }
    }

    #[test]
    fn a_prefix_matches_up_to_the_first_gap() {
        let mut bench = Bench::new(16);
        bench.save(&chain(0, 3));
        bench.save(&chain(5, 7));
        assert_eq!(bench.matched(&chain(0, 3)), 3);
        assert_eq!(
            bench.matched(&chain(0, 7)),
            3,
            "blocks after a gap do not count"
        );
        assert_eq!(bench.matched(&chain(4, 7)), 0, "first block missing");
        assert_eq!(bench.matched(&chain(5, 9)), 2);
        assert_eq!(bench.matched(&[]), 0);
        assert_eq!(bench.lease(&chain(0, 7)).unwrap().slots.len(), 3);
        assert_eq!(bench.lease(&chain(4, 7)), None);
        assert_eq!(bench.lease(&[]), None);
    }

    #[test]
    fn a_half_saved_block_is_invisible_and_a_miss_becomes_a_hit() {
        let mut bench = Bench::new(8);
        let reservation = bench.reserve(&chain(0, 3)).unwrap();
        assert_eq!(bench.matched(&chain(0, 3)), 0);
        assert!(!bench.store.contains(bench.ns, &hash(0)));
        assert_eq!(bench.lease(&chain(0, 3)), None);
        assert_eq!(bench.pin(&chain(0, 3)).missing, 3);
        let effects = bench.commit(reservation.id).unwrap();
        assert_eq!(effects.committed, 3);
        assert_eq!(bench.matched(&chain(0, 3)), 3);
        let lease = bench.lease(&chain(0, 3)).unwrap();
        let reserved: Vec<SlotId> = reservation.slots.iter().map(|&(_, slot)| slot).collect();
        assert_eq!(lease.slots, reserved, "read where it was written");
    }

    #[test]
    fn an_aborted_reservation_leaves_nothing_behind() {
        let mut bench = Bench::new(4);
        let reservation = bench.reserve(&chain(0, 4)).unwrap();
        assert_eq!(bench.store.abort(ENGINE, reservation.id).unwrap().freed, 4);
        bench.store.check_invariants();
        assert_eq!(bench.store.counts().free, 4);
        assert_eq!(bench.matched(&chain(0, 4)), 0);
    }

    #[test]
    fn a_block_is_stored_once() {
        let mut bench = Bench::new(16);
        bench.save(&chain(0, 4));
        assert_eq!(bench.reserve(&chain(0, 4)), None, "all there");
        let filling = bench.reserve(&chain(2, 6)).unwrap();
        let hashes: Vec<BlockHash> = filling.slots.iter().map(|&(hash, _)| hash).collect();
        assert_eq!(hashes, chain(4, 6), "only what is missing");
        let term = bench.term();
        assert_eq!(
            bench.store.reserve(OTHER, bench.ns, &chain(0, 6), term),
            Ok(None),
            "others fill it already"
        );
        let twice = bench.reserve(&[hash(9), hash(9), hash(9)]).unwrap();
        assert_eq!(twice.slots.len(), 1);
    }

    #[test]
    fn a_reservation_gets_neighbouring_slots() {
        let mut bench = Bench::new(16);
        bench.save(&chain(0, 3));
        bench.save(&chain(10, 12));
        bench.save(&chain(20, 24));
        let _effects = bench.store.retire(bench.ns, &chain(10, 12));
        let reservation = bench.reserve(&chain(30, 34)).unwrap();
        let slots: Vec<u32> = reservation.slots.iter().map(|(_, slot)| slot.0).collect();
        assert_eq!(
            slots,
            [9, 10, 11, 12],
            "the hole of two is no place for four"
        );
    }

    #[test]
    fn when_everything_is_pinned_or_leased_a_reservation_is_short_or_none() {
        let mut bench = Bench::new(8);
        bench.save(&chain(0, 8));
        assert_eq!(bench.pin(&chain(0, 4)).pinned, 4);
        let lease = bench.lease(&chain(4, 7)).unwrap();
        let short = bench.reserve(&chain(20, 25)).unwrap();
        assert_eq!(short.slots.len(), 1, "the tail is left out");
        assert_eq!(short.slots[0].0, hash(20));
        assert_eq!(bench.reserve(&chain(21, 25)), None);
        assert_eq!(
            bench.stored(0..7).len(),
            7,
            "what is pinned or leased stays"
        );
        let _effects = bench.release(lease.id).unwrap();
        assert_eq!(bench.reserve(&chain(21, 25)).unwrap().slots.len(), 3);
    }

    #[test]
    fn a_chain_never_evicts_itself() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 4));
        assert_eq!(bench.reserve(&chain(0, 8)), None);
        assert_eq!(bench.matched(&chain(0, 4)), 4);
    }

    #[test]
    fn eviction_takes_the_oldest_call_first_and_its_suffix_before_its_prefix() {
        let mut bench = Bench::new(9);
        bench.save(&chain(0, 3));
        bench.save(&chain(3, 6));
        bench.save(&chain(6, 9));
        bench.store.touch(bench.ns, &chain(0, 3), bench.now);
        assert_eq!(bench.eviction_order(0..9), [5, 4, 3, 8, 7, 6, 2, 1, 0]);
    }

    #[test]
    fn a_chain_saved_in_parts_keeps_its_order_when_it_is_named_whole() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 2));
        bench.save(&chain(0, 4));
        assert_eq!(bench.eviction_order(0..4), [3, 2, 1, 0]);
    }

    #[test]
    fn demoted_blocks_go_first_until_they_are_used_again() {
        let mut bench = Bench::new(6);
        bench.save(&chain(0, 2));
        bench.save(&chain(2, 4));
        bench.save(&chain(4, 6));
        assert_eq!(bench.store.demote(bench.ns, &chain(2, 7)), 4);
        bench.store.touch(bench.ns, &chain(2, 4), bench.now);
        assert_eq!(bench.eviction_order(0..6), [5, 4, 1, 0, 3, 2]);
    }

    #[test]
    fn eviction_says_why() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 2));
        bench.save(&chain(2, 4));
        assert_eq!(bench.store.demote(bench.ns, &chain(2, 4)), 2);
        let effects = bench.reserve(&chain(10, 13)).unwrap().effects;
        assert_eq!(
            (effects.evicted.demoted, effects.evicted.lru, effects.freed),
            (2, 1, 3)
        );
    }

    #[test]
    fn a_lease_is_a_use_and_keeps_its_blocks_from_eviction() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 2));
        bench.save(&chain(2, 4));
        let lease = bench.lease(&chain(0, 2)).unwrap();
        assert_eq!(bench.store.counts().evictable, 2);
        let _effects = bench.release(lease.id).unwrap();
        assert_eq!(bench.eviction_order(0..4), [3, 2, 1, 0]);
    }

    #[test]
    fn an_expired_read_lease_still_protects_until_its_engine_is_gone() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 4));
        let lease = bench.lease(&chain(0, 4)).unwrap();
        bench.now += TTL;
        assert_eq!(bench.store.next_expiry(), Some(bench.now));
        assert_eq!(bench.expire().expired_leases, 1);
        assert_eq!(bench.store.next_expiry(), None);
        assert_eq!(bench.matched(&chain(0, 4)), 4, "still readable");
        assert_eq!(
            bench.reserve(&chain(10, 12)),
            None,
            "a copy may still read it"
        );
        let term = bench.term();
        assert_eq!(
            bench.store.renew(ENGINE, lease.id, term),
            Err(StoreError::LeaseExpired)
        );
        let _effects = bench.store.owner_gone(ENGINE);
        bench.store.check_invariants();
        assert_eq!(bench.reserve(&chain(10, 12)).unwrap().slots.len(), 2);
        assert_eq!(bench.release(lease.id), Err(StoreError::UnknownLease));
    }

    #[test]
    fn a_late_release_ends_the_draining() {
        let mut bench = Bench::new(2);
        bench.save(&chain(0, 2));
        let lease = bench.lease(&chain(0, 2)).unwrap();
        bench.now += TTL;
        let _effects = bench.expire();
        assert_eq!(bench.release(lease.id), Ok(Effects::default()));
        assert_eq!(bench.store.counts().evictable, 2);
    }

    #[test]
    fn a_renewed_lease_lives_on_and_never_shorter() {
        let mut bench = Bench::new(2);
        bench.save(&chain(0, 2));
        let lease = bench.lease(&chain(0, 2)).unwrap();
        let start = bench.now;
        bench.now += TTL / 2;
        let term = bench.term();
        bench.store.renew(ENGINE, lease.id, term).unwrap();
        assert_eq!(bench.store.next_expiry(), Some(bench.now + TTL));
        bench
            .store
            .renew(
                ENGINE,
                lease.id,
                Term {
                    now: bench.now,
                    ttl: Duration::ZERO,
                },
            )
            .unwrap();
        assert_eq!(
            bench.store.next_expiry(),
            Some(bench.now + TTL),
            "not brought forward"
        );
        assert_eq!(
            bench.store.renew(OTHER, lease.id, term),
            Err(StoreError::WrongOwner)
        );
        bench.now = start + TTL + TTL / 2;
        let term = bench.term();
        assert_eq!(
            bench.store.renew(ENGINE, lease.id, term),
            Err(StoreError::LeaseExpired),
            "due, if not swept yet"
        );
    }

    #[test]
    fn a_time_to_live_is_cut_to_the_maximum() {
        let mut bench = Bench::new(2);
        bench.save(&chain(0, 1));
        let term = Term {
            now: bench.now,
            ttl: Duration::MAX,
        };
        let lease = bench
            .store
            .lease_prefix(ENGINE, bench.ns, &chain(0, 1), term)
            .unwrap()
            .unwrap();
        assert_eq!(
            bench.store.next_expiry(),
            Some(bench.now + Duration::from_secs(60))
        );
        let _effects = bench.release(lease.id).unwrap();
        assert_eq!(bench.store.pin(bench.ns, &chain(0, 1), term).pinned, 1);
        assert_eq!(
            bench.store.next_expiry(),
            Some(bench.now + crate::PIN_TTL_MAX)
        );
    }

    #[test]
    fn a_late_commit_never_publishes_whether_swept_or_not() {
        for swept in [true, false] {
            let mut bench = Bench::new(4);
            let reservation = bench.reserve(&chain(0, 3)).unwrap();
            bench.now += TTL;
            if swept {
                let effects = bench.expire();
                assert_eq!(
                    (
                        effects.expired_reservations,
                        effects.draining,
                        effects.freed
                    ),
                    (1, 3, 0)
                );
                assert_eq!(bench.store.counts().draining, 3);
                assert_eq!(
                    bench.reserve(&chain(0, 3)).unwrap().slots.len(),
                    1,
                    "a new writer, in other slots"
                );
            }
            assert_eq!(bench.commit(reservation.id), Err(StoreError::LeaseExpired));
            assert_eq!(bench.matched(&chain(0, 3)), 0);
            assert_eq!(
                bench.store.counts().draining,
                0,
                "its writer has ended, the slots are free"
            );
            assert_eq!(bench.commit(reservation.id), Err(StoreError::UnknownLease));
        }
    }

    #[test]
    fn an_expired_reservation_keeps_its_slots_until_abort_or_the_end_of_its_engine() {
        for gone in [true, false] {
            let mut bench = Bench::new(2);
            let reservation = bench.reserve(&chain(0, 2)).unwrap();
            bench.now += TTL;
            let _effects = bench.expire();
            assert_eq!(
                bench.reserve(&chain(5, 7)),
                None,
                "a copy may still write there"
            );
            let effects = if gone {
                bench.store.owner_gone(ENGINE)
            } else {
                bench.store.abort(ENGINE, reservation.id).unwrap()
            };
            assert_eq!((effects.freed, effects.orphaned_leases), (2, 0));
            assert_eq!(bench.reserve(&chain(5, 7)).unwrap().slots.len(), 2);
        }
    }

    #[test]
    fn double_release_and_wrong_owner_are_refused_and_change_nothing() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 2));
        let lease = bench.lease(&chain(0, 2)).unwrap();
        let reservation = bench.reserve(&chain(2, 4)).unwrap();
        let before = bench.store.counts();
        assert_eq!(
            bench.store.release(OTHER, lease.id),
            Err(StoreError::WrongOwner)
        );
        assert_eq!(
            bench.store.commit(OTHER, reservation.id, bench.now),
            Err(StoreError::WrongOwner)
        );
        assert_eq!(
            bench.store.abort(OTHER, reservation.id),
            Err(StoreError::WrongOwner)
        );
        assert_eq!(
            bench.release(reservation.id),
            Err(StoreError::UnknownLease),
            "a reservation is no read lease"
        );
        assert_eq!(
            bench.commit(lease.id),
            Err(StoreError::UnknownLease),
            "a read lease is no reservation"
        );
        assert_eq!(bench.release(LeaseId(999)), Err(StoreError::UnknownLease));
        assert_eq!(bench.store.counts(), before);
        assert_eq!(bench.release(lease.id), Ok(Effects::default()));
        assert_eq!(bench.release(lease.id), Err(StoreError::UnknownLease));
        assert_eq!(bench.commit(reservation.id).unwrap().committed, 2);
        assert_eq!(bench.commit(reservation.id), Err(StoreError::UnknownLease));
    }

    #[test]
    fn when_an_engine_leaves_its_writes_drain_and_its_reads_stay_readable() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 2));
        let _lease = bench.lease(&chain(0, 2)).unwrap();
        let reservation = bench.reserve(&chain(2, 4)).unwrap();
        let effects = bench.store.owner_left(ENGINE);
        bench.store.check_invariants();
        assert_eq!(
            (effects.orphaned_leases, effects.draining, effects.freed),
            (2, 2, 0)
        );
        assert_eq!(bench.matched(&chain(0, 2)), 2);
        assert_eq!(bench.commit(reservation.id), Err(StoreError::LeaseExpired));
        assert_eq!(bench.store.counts().free, 2);
        let effects = bench.store.owner_gone(ENGINE);
        assert_eq!((effects.orphaned_leases, effects.freed), (0, 0));
        assert_eq!(
            bench.store.counts().evictable,
            2,
            "committed blocks outlive their engine"
        );
        assert_eq!(bench.store.owner_left(ENGINE), Effects::default());
    }

    #[test]
    fn an_engine_that_goes_takes_only_its_own_leases() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 2));
        let term = bench.term();
        let lease = bench
            .store
            .lease_prefix(OTHER, bench.ns, &chain(0, 2), term)
            .unwrap()
            .unwrap();
        let _mine = bench.lease(&chain(0, 2)).unwrap();
        assert_eq!(bench.store.owner_gone(ENGINE).orphaned_leases, 1);
        bench.store.check_invariants();
        assert_eq!(bench.store.counts().leased, 2);
        assert_eq!(bench.store.release(OTHER, lease.id), Ok(Effects::default()));
        assert_eq!(bench.store.counts().leased, 0);
    }

    #[test]
    fn a_reset_frees_what_is_idle_and_drains_what_is_in_use() {
        let mut bench = Bench::new(8);
        bench.save(&chain(0, 4));
        let lease = bench.lease(&chain(0, 2)).unwrap();
        assert_eq!(bench.pin(&chain(2, 3)).pinned, 1);
        let reservation = bench.reserve(&chain(4, 6)).unwrap();
        let old = bench.ns;
        let (fresh, effects) = bench.store.reset_namespace(old);
        bench.store.check_invariants();
        assert_eq!(
            (
                effects.evicted.reset,
                effects.freed,
                effects.draining,
                effects.voided_pins
            ),
            (4, 2, 4, 1)
        );
        bench.ns = fresh;
        assert!(fresh.epoch() > old.epoch());
        assert_eq!(bench.store.open_namespace(NamespaceId([1; 32])), Ok(fresh));
        assert_eq!(bench.matched(&chain(0, 4)), 0);
        assert_eq!(bench.store.match_prefix(old, &chain(0, 4)), 0);
        let term = bench.term();
        assert_eq!(
            bench.store.reserve(ENGINE, old, &chain(0, 1), term),
            Err(StoreError::StaleNamespace)
        );
        assert_eq!(
            bench.store.lease_prefix(ENGINE, old, &chain(0, 1), term),
            Err(StoreError::StaleNamespace)
        );
        assert_eq!(
            bench.store.renew(ENGINE, lease.id, term),
            Err(StoreError::StaleNamespace)
        );
        bench.save(&chain(0, 4));
        assert_eq!(
            bench.commit(reservation.id),
            Err(StoreError::StaleNamespace),
            "old KV never answers new weights"
        );
        assert_eq!(bench.stored(4..6), []);
        assert_eq!(bench.release(lease.id).unwrap().freed, 2);
        assert_eq!(
            bench.matched(&chain(0, 4)),
            4,
            "the new epoch's blocks are other slots"
        );
        assert_eq!(bench.store.counts().draining, 0);
    }

    #[test]
    fn hints_through_a_stale_handle_do_nothing() {
        let mut bench = Bench::new(4);
        let old = bench.ns;
        bench.ns = bench.store.reset_namespace(old).0;
        bench.save(&chain(0, 2));
        assert_eq!(bench.store.retire(old, &chain(0, 2)), Effects::default());
        assert_eq!(bench.store.demote(old, &chain(0, 2)), 0);
        assert_eq!(bench.store.pin(old, &chain(0, 2), bench.term()).missing, 2);
        bench.store.touch(old, &chain(0, 2), bench.now);
        assert_eq!(bench.matched(&chain(0, 2)), 2);
    }

    #[test]
    fn namespaces_do_not_see_each_other() {
        let mut bench = Bench::new(8);
        bench.save(&chain(0, 2));
        let other = bench.store.open_namespace(NamespaceId([2; 32])).unwrap();
        assert_eq!(bench.store.match_prefix(other, &chain(0, 2)), 0);
        let term = bench.term();
        let copy = bench
            .store
            .reserve(OTHER, other, &chain(0, 2), term)
            .unwrap()
            .unwrap();
        assert_eq!(
            bench
                .store
                .commit(OTHER, copy.id, bench.now)
                .unwrap()
                .committed,
            2,
            "same hash, other bytes"
        );
        assert_eq!(bench.store.retire(other, &chain(0, 2)).evicted.retired, 2);
        assert_eq!(bench.matched(&chain(0, 2)), 2);
        let _effects = bench.store.reset_namespace(other);
        bench.store.check_invariants();
        assert_eq!(bench.matched(&chain(0, 2)), 2);
    }

    #[test]
    fn an_empty_namespace_makes_room_for_another() {
        let mut bench = Bench::new(8);
        let empty = bench.store.open_namespace(NamespaceId([2; 32])).unwrap();
        bench.save(&chain(0, 2));
        let third = bench.store.open_namespace(NamespaceId([3; 32])).unwrap();
        assert!(!bench.store.is_current(empty));
        let term = bench.term();
        let kept = bench
            .store
            .reserve(ENGINE, third, &chain(5, 6), term)
            .unwrap()
            .unwrap();
        assert_eq!(
            bench.store.reset_namespace(empty),
            (empty, Effects::default()),
            "no say over its successor"
        );
        assert_eq!(bench.commit(kept.id).unwrap().committed, 1);
        let full = StoreError::TooMany {
            what: "namespaces",
            limit: 2,
        };
        assert_eq!(bench.store.open_namespace(NamespaceId([4; 32])), Err(full));
        assert_eq!(
            bench.store.open_namespace(NamespaceId([1; 32])),
            Ok(bench.ns)
        );
    }

    #[test]
    fn a_namespace_that_is_only_being_filled_keeps_its_place() {
        let mut bench = Bench::new(8);
        bench.save(&chain(0, 1));
        let second = bench.store.open_namespace(NamespaceId([2; 32])).unwrap();
        let term = bench.term();
        let filling = bench
            .store
            .reserve(OTHER, second, &chain(0, 1), term)
            .unwrap()
            .unwrap();
        assert!(bench.store.open_namespace(NamespaceId([3; 32])).is_err());
        assert_eq!(
            bench
                .store
                .commit(OTHER, filling.id, bench.now)
                .unwrap()
                .committed,
            1
        );
    }

    #[test]
    fn a_reset_leaves_the_reservations_of_other_namespaces_alone() {
        let mut bench = Bench::new(8);
        let other = bench.store.open_namespace(NamespaceId([2; 32])).unwrap();
        let reservation = bench.reserve(&chain(0, 2)).unwrap();
        assert_eq!(bench.store.reset_namespace(other).1, Effects::default());
        bench.store.check_invariants();
        assert_eq!(bench.commit(reservation.id).unwrap().committed, 2);
    }

    #[test]
    fn a_slow_save_keeps_its_place_between_the_calls_that_came_after() {
        let mut bench = Bench::new(4);
        let slow = bench.reserve(&chain(0, 2)).unwrap();
        bench.save(&chain(2, 4));
        assert_eq!(bench.commit(slow.id).unwrap().committed, 2);
        assert_eq!(
            bench.eviction_order(0..4),
            [1, 0, 3, 2],
            "used when it was reserved"
        );
    }

    #[test]
    fn retiring_frees_at_once_what_nobody_holds_and_the_rest_when_it_is_let_go() {
        let mut bench = Bench::new(8);
        bench.save(&chain(0, 5));
        let lease = bench.lease(&chain(0, 2)).unwrap();
        let pin = bench.pin(&chain(2, 3));
        let effects = bench.store.retire(bench.ns, &chain(0, 6));
        bench.store.check_invariants();
        assert_eq!((effects.evicted.retired, effects.freed), (2, 2));
        assert_eq!(bench.stored(0..5), [0, 1, 2]);
        let effects = bench.release(lease.id).unwrap();
        assert_eq!((effects.evicted.retired, effects.freed), (2, 2));
        assert_eq!(
            bench.store.unpin(pin.id.unwrap()).unwrap().evicted.retired,
            1
        );
        assert_eq!(bench.store.counts().free, 8);
    }

    #[test]
    fn a_shared_prefix_that_another_session_uses_survives_retirement() {
        let mut bench = Bench::new(8);
        bench.save(&chain(0, 4));
        let lease = bench.lease(&chain(0, 4)).unwrap();
        let _effects = bench.store.retire(bench.ns, &chain(0, 4));
        bench.store.touch(bench.ns, &chain(0, 2), bench.now);
        assert_eq!(bench.release(lease.id).unwrap().evicted.retired, 2);
        assert_eq!(bench.stored(0..4), [0, 1]);
    }

    #[test]
    fn demoting_a_retired_block_does_not_bring_it_back() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 1));
        let lease = bench.lease(&chain(0, 1)).unwrap();
        let _effects = bench.store.retire(bench.ns, &chain(0, 1));
        assert_eq!(bench.store.demote(bench.ns, &chain(0, 1)), 1);
        assert_eq!(bench.release(lease.id).unwrap().evicted.retired, 1);
    }

    #[test]
    fn a_block_retired_while_it_is_saved_is_not_published() {
        let mut bench = Bench::new(4);
        let reservation = bench.reserve(&chain(0, 2)).unwrap();
        let _effects = bench.store.retire(bench.ns, &chain(1, 2));
        let effects = bench.commit(reservation.id).unwrap();
        assert_eq!((effects.committed, effects.freed), (1, 1));
        assert_eq!(bench.stored(0..2), [0]);
    }

    #[test]
    fn pins_are_counted() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 4));
        let first = bench.pin(&chain(0, 2));
        let second = bench.pin(&chain(0, 1));
        assert_eq!((first.pinned, second.pinned), (2, 1));
        assert_ne!(first.id, second.id);
        assert_eq!(bench.store.counts().pinned, 2);
        let _effects = bench.store.unpin(first.id.unwrap()).unwrap();
        assert_eq!(bench.store.counts().pinned, 1, "still pinned by the second");
        assert_eq!(
            bench.store.unpin(first.id.unwrap()),
            Err(StoreError::UnknownPin)
        );
        let _effects = bench.store.unpin(second.id.unwrap()).unwrap();
        assert_eq!(bench.store.counts().pinned, 0);
    }

    #[test]
    fn pins_end_by_time() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 2));
        let pin = bench.pin(&chain(0, 2));
        bench.now += TTL - Duration::from_nanos(1);
        assert_eq!(bench.expire(), Effects::default());
        bench.now += Duration::from_nanos(1);
        assert_eq!(bench.expire().expired_pins, 1);
        assert_eq!(bench.store.counts().pinned, 0);
        assert_eq!(
            bench.store.unpin(pin.id.unwrap()),
            Err(StoreError::UnknownPin)
        );
    }

    #[test]
    fn pins_stay_within_their_budget_first_blocks_first() {
        let mut bench = Bench::new(8);
        bench.save(&chain(0, 8));
        let outcome = bench.pin(&chain(0, 10));
        assert_eq!(
            (outcome.pinned, outcome.clipped, outcome.missing),
            (4, 4, 2)
        );
        let again = bench.pin(&chain(0, 5));
        assert_eq!(
            (again.pinned, again.clipped),
            (4, 1),
            "a block that is pinned already costs nothing"
        );
        let none = bench.pin(&chain(5, 6));
        assert_eq!((none.id, none.clipped), (None, 1));
    }

    #[test]
    fn pins_can_be_broken() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 4));
        let pin = bench.pin(&chain(0, 2));
        assert_eq!(bench.reserve(&chain(10, 14)).unwrap().slots.len(), 2);
        assert_eq!(bench.store.break_pins().voided_pins, 1);
        bench.store.check_invariants();
        assert_eq!(
            bench.store.unpin(pin.id.unwrap()),
            Err(StoreError::UnknownPin)
        );
        assert_eq!(bench.reserve(&chain(20, 22)).unwrap().slots.len(), 2);
    }

    #[test]
    fn a_block_whose_pin_has_ended_goes_back_to_where_its_last_use_says() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 2));
        bench.save(&chain(2, 4));
        let pin = bench.pin(&chain(0, 2));
        let _effects = bench.store.unpin(pin.id.unwrap()).unwrap();
        assert_eq!(bench.eviction_order(0..4), [1, 0, 3, 2]);
    }

    #[test]
    fn too_many_leases_are_refused_before_anything_is_evicted() {
        let mut bench = Bench::new(4);
        bench.save(&chain(0, 4));
        let leases: Vec<Lease> = (0..16)
            .map(|_| bench.lease(&chain(0, 1)).unwrap())
            .collect();
        let full = StoreError::TooMany {
            what: "leases",
            limit: 16,
        };
        let term = bench.term();
        assert_eq!(
            bench.store.reserve(ENGINE, bench.ns, &chain(10, 12), term),
            Err(full)
        );
        assert_eq!(
            bench
                .store
                .lease_prefix(ENGINE, bench.ns, &chain(0, 1), term),
            Err(full)
        );
        assert_eq!(
            bench
                .store
                .lease_prefix(ENGINE, bench.ns, &chain(9, 10), term),
            Ok(None),
            "a miss needs no room"
        );
        assert_eq!(bench.matched(&chain(0, 4)), 4);
        let _effects = bench.release(leases[0].id).unwrap();
        assert!(bench.reserve(&chain(10, 12)).is_some());
    }

    #[test]
    fn the_age_of_the_coldest_block_is_known() {
        let mut bench = Bench::new(4);
        assert_eq!(bench.store.coldest_idle(bench.now), None);
        bench.save(&chain(0, 1));
        bench.now += TTL;
        bench.save(&chain(1, 2));
        assert_eq!(bench.store.coldest_idle(bench.now), Some(TTL));
    }

    #[test]
    fn bad_configurations_are_refused_by_name() {
        let refused = |config: StoreConfig| match Store::new(config) {
            Err(StoreError::BadConfig { field, .. }) => field,
            other => panic!("expected a refusal, got {other:?}"),
        };
        assert_eq!(
            refused(StoreConfig {
                slots: 0,
                ..config(4)
            }),
            "slots"
        );
        assert_eq!(
            refused(StoreConfig {
                pin_budget_slots: 5,
                ..config(4)
            }),
            "pin_budget_slots"
        );
        assert_eq!(
            refused(StoreConfig {
                lease_ttl_max: Duration::ZERO,
                ..config(4)
            }),
            "lease_ttl_max"
        );
        assert_eq!(
            refused(StoreConfig {
                leases_max: 0,
                ..config(4)
            }),
            "leases_max"
        );
        assert_eq!(
            refused(StoreConfig {
                namespaces_max: 0,
                ..config(4)
            }),
            "namespaces_max"
        );
    }
}
