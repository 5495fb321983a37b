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
