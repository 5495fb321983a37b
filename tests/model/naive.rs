//! The store as one would write it with all the time in the world: lists, searched from end to end, counted anew each time.
//!
//! It shares no code with the real one and knows one thing less: which free slots a reservation gets.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use kvstore::{
    BlockHash, Counts, Effects, LeaseId, Namespace, NamespaceId, Owner, PIN_TTL_MAX, PinId, SlotId,
    StoreConfig, StoreError,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Filling,
    Committed,
    Draining,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Retired,
    Demoted,
    Normal,
}

/// One slot in use. `serial` names this use of it for good.
#[derive(Clone, Debug)]
struct Block {
    serial: u64,
    slot: SlotId,
    namespace: Namespace,
    hash: BlockHash,
    state: State,
    class: Class,
    tick: u64,
    depth: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Expired,
    OwnerLeft,
    Reset,
}

#[derive(Clone, Debug)]
struct Lease {
    id: LeaseId,
    owner: Owner,
    namespace: Namespace,
    writes: bool,
    expires: Instant,
    ended: Option<End>,
    blocks: Vec<u64>,
}

#[derive(Clone, Debug)]
struct Pin {
    id: PinId,
    namespace: Namespace,
    expires: Instant,
    blocks: Vec<u64>,
}

/// A place for a namespace: who has it, and all its handles, the present one last.
#[derive(Clone, Debug)]
struct Place {
    id: NamespaceId,
    handles: Vec<Namespace>,
}

/// What a reservation should be, up to the choice of slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reserved {
    pub(crate) hashes: Vec<BlockHash>,
    pub(crate) effects: Effects,
    serials: Vec<u64>,
}

#[derive(Clone, Debug)]
pub(crate) struct Naive {
    config: StoreConfig,
    places: Vec<Place>,
    blocks: Vec<Block>,
    leases: Vec<Lease>,
    pins: Vec<Pin>,
    serial: u64,
    tick: u64,
}

impl Naive {
    pub(crate) fn new(config: StoreConfig) -> Self {
        let (places, blocks, leases, pins) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self {
            config,
            places,
            blocks,
            leases,
            pins,
            serial: 0,
            tick: 0,
        }
    }

    pub(crate) fn current(&self) -> Vec<Namespace> {
        self.places
            .iter()
            .map(|place| place.handles[place.handles.len() - 1])
            .collect()
    }

    pub(crate) fn is_current(&self, namespace: Namespace) -> bool {
        self.current().contains(&namespace)
    }

    fn check_current(&self, namespace: Namespace) -> Result<(), StoreError> {
        if self.is_current(namespace) {
            Ok(())
        } else {
            Err(StoreError::StaleNamespace)
        }
    }

    fn holds(&self, serial: u64) -> usize {
        self.leases
            .iter()
            .flat_map(|lease| &lease.blocks)
            .filter(|held| **held == serial)
            .count()
    }

    fn pinned(&self, serial: u64) -> bool {
        self.pins.iter().any(|pin| pin.blocks.contains(&serial))
    }

    fn evictable(&self, block: &Block) -> bool {
        block.state == State::Committed
            && self.holds(block.serial) == 0
            && !self.pinned(block.serial)
    }

    fn find(&self, namespace: Namespace, hash: BlockHash, states: &[State]) -> Option<usize> {
        if !self.is_current(namespace) {
            return None;
        }
        let wanted = |block: &Block| {
            block.namespace == namespace && block.hash == hash && states.contains(&block.state)
        };
        self.blocks.iter().position(wanted)
    }

    pub(crate) fn contains(&self, namespace: Namespace, hash: BlockHash) -> bool {
        self.find(namespace, hash, &[State::Committed]).is_some()
    }

    /// Readable or being filled.
    pub(crate) fn stores(&self, namespace: Namespace, hash: BlockHash) -> bool {
        self.find(namespace, hash, &[State::Committed, State::Filling])
            .is_some()
    }

    pub(crate) fn match_prefix(&self, namespace: Namespace, hashes: &[BlockHash]) -> usize {
        hashes
            .iter()
            .take_while(|hash| self.contains(namespace, **hash))
            .count()
    }

    fn free(&self) -> usize {
        usize::try_from(self.config.slots).unwrap() - self.blocks.len()
    }

    pub(crate) fn occupied(&self, slot: SlotId) -> bool {
        self.blocks.iter().any(|block| block.slot == slot)
    }

    /// Longest run of free neighbours.
    pub(crate) fn longest_free_run(&self) -> usize {
        let (mut longest, mut here) = (0, 0);
        for slot in 0..self.config.slots {
            here = if self.occupied(SlotId(slot)) {
                0
            } else {
                here + 1
            };
            longest = longest.max(here);
        }
        longest
    }

    pub(crate) fn counts(&self) -> Counts {
        let count = |wanted: &dyn Fn(&Block) -> bool| {
            self.blocks.iter().filter(|block| wanted(block)).count()
        };
        Counts {
            total: usize::try_from(self.config.slots).unwrap(),
            free: self.free(),
            filling: count(&|block| block.state == State::Filling),
            committed: count(&|block| block.state == State::Committed),
            draining: count(&|block| block.state == State::Draining),
            leased: count(&|block| block.state == State::Committed && self.holds(block.serial) > 0),
            pinned: count(&|block| self.pinned(block.serial)),
            evictable: count(&|block| self.evictable(block)),
            leases: self.leases.len(),
            pins: self.pins.len(),
        }
    }

    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        let leases = self
            .leases
            .iter()
            .filter(|lease| lease.ended.is_none())
            .map(|lease| lease.expires);
        leases.chain(self.pins.iter().map(|pin| pin.expires)).min()
    }

    /// What opening should give: a handle given before, or a new one, or a refusal.
    pub(crate) fn open(&mut self, id: NamespaceId, answer: Result<Namespace, StoreError>) {
        if let Some(place) = self.places.iter().find(|place| place.id == id) {
            assert_eq!(
                answer,
                Ok(place.handles[place.handles.len() - 1]),
                "an open namespace keeps its handle"
            );
            return;
        }
        let named = |handle: Namespace| {
            let visible =
                |block: &Block| block.namespace == handle && block.state != State::Draining;
            self.blocks.iter().any(visible)
        };
        let limit = self.config.namespaces_max;
        let empty = self.current().iter().position(|handle| !named(*handle));
        let at = if self.places.len() < limit {
            Some(self.places.len())
        } else {
            empty
        };
        let Some(at) = at else {
            assert_eq!(
                answer,
                Err(StoreError::TooMany {
                    what: "namespaces",
                    limit
                })
            );
            return;
        };
        let handle = answer.unwrap();
        self.check_new(handle);
        let place = Place {
            id,
            handles: vec![handle],
        };
        self.places.truncate(limit);
        if at == self.places.len() {
            self.places.push(place)
        } else {
            self.places[at] = place
        }
    }

    fn check_new(&self, handle: Namespace) {
        let given = self.places.iter().flat_map(|place| &place.handles);
        assert!(
            given.clone().all(|old| *old != handle),
            "{handle:?} was given before"
        );
        assert!(
            given.clone().all(|old| old.epoch() < handle.epoch()),
            "{handle:?} is no new epoch"
        );
    }

    pub(crate) fn reset(&mut self, namespace: Namespace, answer: Namespace) -> Effects {
        let mut effects = Effects::default();
        let Some(at) = self
            .places
            .iter()
            .position(|place| place.handles.contains(&namespace))
        else {
            assert_eq!(
                answer, namespace,
                "a namespace that was given up has nothing to reset"
            );
            return effects;
        };
        self.check_new(answer);
        let old = self.current()[at];
        effects.voided_pins = self.pins.iter().filter(|pin| pin.namespace == old).count();
        for pin in self
            .pins
            .clone()
            .into_iter()
            .filter(|pin| pin.namespace == old)
        {
            effects += self.drop_pin(pin.id);
        }
        for lease in &mut self.leases {
            if lease.namespace == old && lease.writes && lease.ended.is_none() {
                lease.ended = Some(End::Reset);
            }
        }
        for mut block in std::mem::take(&mut self.blocks) {
            let visible = block.namespace == old && block.state != State::Draining;
            if !visible {
                self.blocks.push(block);
                continue;
            }
            effects.evicted.reset += usize::from(block.state == State::Committed);
            if self.holds(block.serial) > 0 {
                block.state = State::Draining;
                effects.draining += 1;
                self.blocks.push(block);
            } else {
                effects.freed += 1;
            }
        }
        self.places[at].handles.push(answer);
        effects
    }

    fn check_room(&self) -> Result<(), StoreError> {
        let limit = self.config.leases_max;
        if self.leases.len() < limit {
            Ok(())
        } else {
            Err(StoreError::TooMany {
                what: "leases",
                limit,
            })
        }
    }

    fn use_block(&mut self, at: usize, depth: usize) {
        let tick = self.tick;
        let block = &mut self.blocks[at];
        (block.class, block.tick, block.depth) = (Class::Normal, tick, depth);
    }

    /// The slots of the lease, or none; then the caller says which id it got.
    pub(crate) fn lease(
        &mut self,
        namespace: Namespace,
        hashes: &[BlockHash],
    ) -> Result<Option<Vec<SlotId>>, StoreError> {
        self.check_current(namespace)?;
        let prefix = self.match_prefix(namespace, hashes);
        if prefix == 0 {
            return Ok(None);
        }
        self.check_room()?;
        self.tick += 1;
        let mut slots = Vec::new();
        for (depth, hash) in hashes[..prefix].iter().enumerate() {
            let at = self.find(namespace, *hash, &[State::Committed]).unwrap();
            self.use_block(at, depth);
            slots.push(self.blocks[at].slot);
        }
        Ok(Some(slots))
    }

    /// Notes the lease that the store gave for those slots.
    pub(crate) fn leased(
        &mut self,
        lease: (LeaseId, Owner),
        namespace: Namespace,
        slots: &[SlotId],
        expires: Instant,
    ) {
        let serial = |slot: &SlotId| {
            self.blocks
                .iter()
                .find(|block| block.slot == *slot)
                .unwrap()
                .serial
        };
        let blocks = slots.iter().map(serial).collect();
        self.grant(Lease {
            id: lease.0,
            owner: lease.1,
            namespace,
            writes: false,
            expires,
            ended: None,
            blocks,
        });
    }

    fn grant(&mut self, lease: Lease) {
        assert!(
            self.leases.iter().all(|old| old.id < lease.id),
            "{:?} is not a new id",
            lease.id
        );
        self.leases.push(lease);
    }

    pub(crate) fn lease_expiry(&self, now: Instant, ttl: Duration) -> Instant {
        now + ttl.min(self.config.lease_ttl_max)
    }

    pub(crate) fn reserve(
        &mut self,
        namespace: Namespace,
        hashes: &[BlockHash],
    ) -> Result<Option<Reserved>, StoreError> {
        self.check_current(namespace)?;
        self.check_room()?;
        self.tick += 1;
        let mut wanted: Vec<(usize, BlockHash)> = Vec::new();
        for (depth, hash) in hashes.iter().enumerate() {
            match self.find(namespace, *hash, &[State::Committed, State::Filling]) {
                Some(at) => self.use_block(at, depth),
                None if wanted.iter().any(|(_, other)| other == hash) => {}
                None => wanted.push((depth, *hash)),
            }
        }
        let mut effects = Effects::default();
        while self.free() < wanted.len() {
            let order = |block: &&Block| (block.class, block.tick, Reverse(block.depth));
            let coldest = self
                .blocks
                .iter()
                .filter(|block| self.evictable(block))
                .min_by_key(order)
                .cloned();
            let Some(coldest) = coldest.filter(|block| block.tick < self.tick) else {
                break;
            };
            match coldest.class {
                Class::Normal => effects.evicted.lru += 1,
                Class::Demoted => effects.evicted.demoted += 1,
                Class::Retired => panic!("{coldest:?} should have been freed"),
            }
            effects.freed += 1;
            self.blocks.retain(|block| block.serial != coldest.serial);
        }
        wanted.truncate(self.free());
        if wanted.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.promise(namespace, &wanted, effects)))
    }

    fn promise(
        &mut self,
        namespace: Namespace,
        wanted: &[(usize, BlockHash)],
        effects: Effects,
    ) -> Reserved {
        let (mut hashes, mut serials) = (Vec::new(), Vec::new());
        for (depth, hash) in wanted {
            self.serial += 1;
            hashes.push(*hash);
            serials.push(self.serial);
            self.blocks.push(Block {
                serial: self.serial,
                slot: SlotId(u32::MAX),
                namespace,
                hash: *hash,
                state: State::Filling,
                class: Class::Normal,
                tick: self.tick,
                depth: *depth,
            });
        }
        Reserved {
            hashes,
            effects,
            serials,
        }
    }

    /// Notes the reservation and slots that the store gave for what `reserve` said; they must be free ones.
    pub(crate) fn reserved(
        &mut self,
        lease: (LeaseId, Owner),
        slots: &[SlotId],
        promise: &Reserved,
        expires: Instant,
    ) {
        for (serial, slot) in promise.serials.iter().zip(slots) {
            assert!(slot.0 < self.config.slots, "{slot:?} is not in the arena");
            assert!(
                !self.occupied(*slot),
                "{slot:?} was given away while in use"
            );
            let block = self
                .blocks
                .iter_mut()
                .find(|block| block.serial == *serial)
                .unwrap();
            block.slot = *slot;
        }
        let blocks = promise.serials.clone();
        let namespace = self
            .blocks
            .iter()
            .find(|block| block.serial == blocks[0])
            .unwrap()
            .namespace;
        self.grant(Lease {
            id: lease.0,
            owner: lease.1,
            namespace,
            writes: true,
            expires,
            ended: None,
            blocks,
        });
    }

    fn owned(&self, owner: Owner, id: LeaseId) -> Result<usize, StoreError> {
        let at = self
            .leases
            .iter()
            .position(|lease| lease.id == id)
            .ok_or(StoreError::UnknownLease)?;
        if self.leases[at].owner == owner {
            Ok(at)
        } else {
            Err(StoreError::WrongOwner)
        }
    }

    pub(crate) fn renew(
        &mut self,
        who: (Owner, LeaseId),
        now: Instant,
        ttl: Duration,
    ) -> Result<(), StoreError> {
        let at = self.owned(who.0, who.1)?;
        self.check_current(self.leases[at].namespace)?;
        let until = self.lease_expiry(now, ttl);
        let lease = &mut self.leases[at];
        if lease.ended.is_some() || lease.expires <= now {
            return Err(StoreError::LeaseExpired);
        }
        lease.expires = lease.expires.max(until);
        Ok(())
    }

    fn take(&mut self, owner: Owner, id: LeaseId, writes: bool) -> Result<Lease, StoreError> {
        let at = self.owned(owner, id)?;
        if self.leases[at].writes != writes {
            return Err(StoreError::UnknownLease);
        }
        Ok(self.leases.remove(at))
    }

    pub(crate) fn release(&mut self, owner: Owner, id: LeaseId) -> Result<Effects, StoreError> {
        let lease = self.take(owner, id, false)?;
        Ok(self.close(&lease))
    }

    pub(crate) fn abort(&mut self, owner: Owner, id: LeaseId) -> Result<Effects, StoreError> {
        let lease = self.take(owner, id, true)?;
        Ok(self.close(&lease))
    }

    pub(crate) fn commit(
        &mut self,
        owner: Owner,
        id: LeaseId,
        now: Instant,
    ) -> Result<Effects, StoreError> {
        let lease = self.take(owner, id, true)?;
        let refusal = match lease.ended {
            Some(End::Reset) => Some(StoreError::StaleNamespace),
            Some(End::Expired | End::OwnerLeft) => Some(StoreError::LeaseExpired),
            None if lease.expires <= now => Some(StoreError::LeaseExpired),
            None => None,
        };
        if let Some(refusal) = refusal {
            let _freed = self.close(&lease);
            return Err(refusal);
        }
        let mut effects = Effects::default();
        for serial in &lease.blocks {
            let at = self
                .blocks
                .iter()
                .position(|block| block.serial == *serial)
                .unwrap();
            if self.blocks[at].class == Class::Retired {
                self.blocks.remove(at);
                effects.freed += 1;
            } else {
                self.blocks[at].state = State::Committed;
                effects.committed += 1;
            }
        }
        Ok(effects)
    }

    /// Frees what nobody needs any more among these blocks. The lease or pin has left its list before.
    fn settle(&mut self, serials: &[u64]) -> Effects {
        let mut effects = Effects::default();
        for serial in serials {
            let Some(at) = self.blocks.iter().position(|block| block.serial == *serial) else {
                continue;
            };
            let block = &self.blocks[at];
            let retired = self.evictable(block) && block.class == Class::Retired;
            if retired || (block.state != State::Committed && self.holds(*serial) == 0) {
                self.blocks.remove(at);
                effects.freed += 1;
                effects.evicted.retired += usize::from(retired);
            }
        }
        effects
    }

    fn close(&mut self, lease: &Lease) -> Effects {
        self.settle(&lease.blocks)
    }

    fn end(&mut self, id: LeaseId, why: End) -> usize {
        let lease = self.leases.iter_mut().find(|lease| lease.id == id).unwrap();
        lease.ended = Some(why);
        if !lease.writes {
            return 0;
        }
        for block in &mut self.blocks {
            if lease.blocks.contains(&block.serial) {
                block.state = State::Draining;
            }
        }
        lease.blocks.len()
    }

    pub(crate) fn expire(&mut self, now: Instant) -> Effects {
        let mut effects = Effects::default();
        for lease in self.leases.clone() {
            if lease.ended.is_none() && lease.expires <= now {
                effects.draining += self.end(lease.id, End::Expired);
                effects.expired_leases += usize::from(!lease.writes);
                effects.expired_reservations += usize::from(lease.writes);
            }
        }
        for pin in self.pins.clone() {
            if pin.expires <= now {
                effects += self.drop_pin(pin.id);
                effects.expired_pins += 1;
            }
        }
        effects
    }

    pub(crate) fn owner_left(&mut self, owner: Owner) -> Effects {
        let mut effects = Effects::default();
        for lease in self.leases.clone() {
            if lease.owner == owner && lease.ended.is_none() {
                effects.draining += self.end(lease.id, End::OwnerLeft);
                effects.orphaned_leases += 1;
            }
        }
        effects
    }

    pub(crate) fn owner_gone(&mut self, owner: Owner) -> Effects {
        let mut effects = Effects::default();
        for lease in self.leases.clone() {
            if lease.owner == owner {
                effects.orphaned_leases += usize::from(lease.ended.is_none());
                self.leases.retain(|other| other.id != lease.id);
                effects += self.close(&lease);
            }
        }
        effects
    }

    pub(crate) fn touch(&mut self, namespace: Namespace, hashes: &[BlockHash]) {
        self.tick += 1;
        for (depth, hash) in hashes.iter().enumerate() {
            if let Some(at) = self.find(namespace, *hash, &[State::Committed, State::Filling]) {
                self.use_block(at, depth);
            }
        }
    }

    pub(crate) fn demote(&mut self, namespace: Namespace, hashes: &[BlockHash]) -> usize {
        self.tick += 1;
        let mut demoted = 0;
        for (depth, hash) in hashes.iter().enumerate() {
            let Some(at) = self.find(namespace, *hash, &[State::Committed, State::Filling]) else {
                continue;
            };
            demoted += 1;
            if self.blocks[at].class != Class::Retired {
                self.use_block(at, depth);
                self.blocks[at].class = Class::Demoted;
            }
        }
        demoted
    }

    pub(crate) fn retire(&mut self, namespace: Namespace, hashes: &[BlockHash]) -> Effects {
        let mut effects = Effects::default();
        for hash in hashes {
            if let Some(at) = self.find(namespace, *hash, &[State::Committed, State::Filling]) {
                self.blocks[at].class = Class::Retired;
                if self.evictable(&self.blocks[at]) {
                    self.blocks.remove(at);
                    effects.freed += 1;
                    effects.evicted.retired += 1;
                }
            }
        }
        effects
    }

    /// (pinned, missing, clipped), and the serials to pin; the caller says which id they got.
    pub(crate) fn pin(
        &mut self,
        namespace: Namespace,
        hashes: &[BlockHash],
    ) -> ([usize; 3], Vec<u64>) {
        let (mut missing, mut clipped) = (0, 0);
        let mut serials: Vec<u64> = Vec::new();
        for hash in hashes {
            let Some(at) = self.find(namespace, *hash, &[State::Committed]) else {
                missing += 1;
                continue;
            };
            let mut after: Vec<u64> = self
                .pins
                .iter()
                .flat_map(|pin| pin.blocks.clone())
                .collect();
            after.extend(&serials);
            after.push(self.blocks[at].serial);
            after.sort_unstable();
            after.dedup();
            if after.len() > usize::try_from(self.config.pin_budget_slots).unwrap() {
                clipped += 1;
                continue;
            }
            serials.push(self.blocks[at].serial);
            if self.blocks[at].class == Class::Retired {
                self.blocks[at].class = Class::Normal;
            }
        }
        ([serials.len(), missing, clipped], serials)
    }

    pub(crate) fn pinned_as(
        &mut self,
        id: PinId,
        namespace: Namespace,
        blocks: Vec<u64>,
        until: (Instant, Duration),
    ) {
        assert!(
            self.pins.iter().all(|old| old.id < id),
            "{id:?} is not a new id"
        );
        self.pins.push(Pin {
            id,
            namespace,
            expires: until.0 + until.1.min(PIN_TTL_MAX),
            blocks,
        });
    }

    fn drop_pin(&mut self, id: PinId) -> Effects {
        let at = self.pins.iter().position(|pin| pin.id == id).unwrap();
        let pin = self.pins.remove(at);
        self.settle(&pin.blocks)
    }

    pub(crate) fn unpin(&mut self, id: PinId) -> Result<Effects, StoreError> {
        if self.pins.iter().all(|pin| pin.id != id) {
            return Err(StoreError::UnknownPin);
        }
        Ok(self.drop_pin(id))
    }

    pub(crate) fn break_pins(&mut self) -> Effects {
        let mut effects = Effects {
            voided_pins: self.pins.len(),
            ..Effects::default()
        };
        for pin in self.pins.clone() {
            effects += self.drop_pin(pin.id);
        }
        effects
    }
}
