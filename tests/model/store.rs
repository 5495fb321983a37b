//! Drives a real store and the naive one with the same events, and compares every answer and the whole state after each.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::thread;
use std::time::{Duration, Instant};

use greenroom_tests::random::{Random, from_environment, seed};
use kvstore::{
    BlockHash, Effects, LeaseId, Namespace, Owner, PinOutcome, Presence, SlotId, Store,
    StoreConfig, StoreError, Term,
};

use crate::events::{Event, Source};
use crate::naive::Naive;

/// Events of one store before the next is made, with other sizes.
const EVENTS_PER_STORE: u64 = 4_000;

/// Long enough to meet everything in [`EXPECTED`] many times over.
const EVENTS: u64 = if cfg!(debug_assertions) {
    40_000
} else {
    400_000
};

/// What a run must have met at least once, or it has proved nothing about it.
const EXPECTED: [&str; 24] = [
    "commit: published",
    "commit: LeaseExpired",
    "commit: StaleNamespace",
    "commit: WrongOwner",
    "commit: UnknownLease",
    "release: done",
    "release: UnknownLease",
    "renew: done",
    "renew: LeaseExpired",
    "renew: StaleNamespace",
    "reserve: whole",
    "reserve: short",
    "reserve: none",
    "reserve: TooMany",
    "reserve: one run",
    "open: TooMany",
    "pin: clipped",
    "evicted: lru",
    "evicted: demoted",
    "evicted: retired",
    "evicted: reset",
    "left draining",
    "unpin: done",
    "unpin: UnknownPin",
];

/// Says how to replay when a run fails.
struct Replay {
    seed: u64,
    step: u64,
    event: Option<Event>,
}

impl Drop for Replay {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "replay with GREENROOM_SEED={}; failed at event {}: {:?}",
                self.seed, self.step, self.event
            );
        }
    }
}

struct Pair {
    store: Store,
    naive: Naive,
    source: Source,
    universe: Vec<BlockHash>,
    now: Instant,
}

/// How often each outcome was met.
type Met = BTreeMap<String, u64>;

#[test]
fn the_store_agrees_with_a_naive_one() {
    let seed = seed();
    println!("GREENROOM_SEED={seed}");
    let events = from_environment("GREENROOM_EVENTS").unwrap_or(EVENTS);
    let mut replay = Replay {
        seed,
        step: 0,
        event: None,
    };
    let mut random = Random::new(seed);
    let mut met = Met::new();
    while replay.step < events {
        let mut pair = Pair::new(&mut random);
        for _ in 0..EVENTS_PER_STORE.min(events - replay.step) {
            let event = pair.source.next();
            replay.event = Some(event.clone());
            pair.apply(event, &mut met);
            pair.compare();
            replay.step += 1;
        }
        pair.wind_up();
    }
    println!("{met:#?}");
    for expected in EXPECTED.iter().filter(|_| events >= EVENTS) {
        assert!(
            met.contains_key(*expected),
            "{expected:?} was never met in {events} events"
        );
    }
}

/// Both answered the same; counts how.
fn agree<T: Debug + PartialEq>(
    call: &str,
    real: &Result<T, StoreError>,
    naive: &Result<T, StoreError>,
    met: &mut Met,
) {
    assert_eq!(real, naive, "{call}");
    let outcome = match real {
        Ok(_) => "done".to_owned(),
        Err(error) => format!("{error:?}")
            .split([' ', '{'])
            .next()
            .unwrap_or_default()
            .to_owned(),
    };
    count(&format!("{call}: {outcome}"), met);
}

fn count(what: &str, met: &mut Met) {
    *met.entry(what.to_owned()).or_default() += 1;
}

fn count_effects(effects: &Effects, met: &mut Met) {
    for (figure, name) in [
        (effects.evicted.lru, "evicted: lru"),
        (effects.evicted.demoted, "evicted: demoted"),
        (effects.evicted.retired, "evicted: retired"),
        (effects.evicted.reset, "evicted: reset"),
        (effects.draining, "left draining"),
        (effects.committed, "commit: published"),
    ] {
        if figure > 0 {
            count(name, met);
        }
    }
}

impl Pair {
    fn new(random: &mut Random) -> Self {
        let slots = u32::try_from(1 + random.below(48)).unwrap();
        let config = StoreConfig {
            slots,
            pin_budget_slots: u32::try_from(random.below(12)).unwrap().min(slots),
            lease_ttl_max: Duration::from_millis(900),
            leases_max: 3 + random.below(20),
            namespaces_max: 1 + random.below(3),
        };
        let source = Source::new(Random::new(random.number()));
        let universe = source.universe();
        Self {
            store: Store::new(config)
                .unwrap()
                .shown_in(Presence::create(slots).unwrap()),
            naive: Naive::new(config),
            source,
            universe,
            now: Instant::now(),
        }
    }

    fn apply(&mut self, event: Event, met: &mut Met) {
        let now = self.now;
        match event {
            Event::Lease {
                owner,
                namespace,
                hashes,
                ttl,
            } => self.lease((owner, ttl), namespace, &hashes, met),
            Event::Reserve {
                owner,
                namespace,
                hashes,
                ttl,
            } => self.reserve((owner, ttl), namespace, &hashes, met),
            Event::Pin {
                namespace,
                hashes,
                ttl,
            } => self.pin(namespace, &hashes, ttl, met),
            Event::Renew { owner, lease, ttl } => {
                let real = self.store.renew(owner, lease, Term { now, ttl });
                agree(
                    "renew",
                    &real,
                    &self.naive.renew((owner, lease), now, ttl),
                    met,
                );
            }
            Event::Release { owner, lease } => {
                let real = self.store.release(owner, lease);
                self.ended(lease, real);
                self.settled("release", real, |naive| naive.release(owner, lease), met);
            }
            Event::Commit { owner, lease } => {
                let real = self.store.commit(owner, lease, now);
                self.ended(lease, real);
                self.settled("commit", real, |naive| naive.commit(owner, lease, now), met);
            }
            Event::Abort { owner, lease } => {
                let real = self.store.abort(owner, lease);
                self.ended(lease, real);
                self.settled("abort", real, |naive| naive.abort(owner, lease), met);
            }
            Event::Unpin(pin) => {
                let real = self.store.unpin(pin);
                self.settled("unpin", real, |naive| naive.unpin(pin), met);
            }
            event => self.apply_simple(event, met),
        }
    }

    /// Events that cannot be refused.
    fn apply_simple(&mut self, event: Event, met: &mut Met) {
        let now = self.now;
        let (real, naive) = match event {
            Event::Open(id) => {
                let answer = self.store.open_namespace(id);
                self.naive.open(id, answer);
                match answer {
                    Ok(handle) => self.source.saw_handle(handle),
                    Err(_) => count("open: TooMany", met),
                }
                return;
            }
            Event::Reset(namespace) => {
                let (fresh, effects) = self.store.reset_namespace(namespace);
                self.source.saw_handle(fresh);
                (effects, self.naive.reset(namespace, fresh))
            }
            Event::Retire { namespace, hashes } => (
                self.store.retire(namespace, &hashes),
                self.naive.retire(namespace, &hashes),
            ),
            Event::Touch { namespace, hashes } => {
                self.store.touch(namespace, &hashes, now);
                self.naive.touch(namespace, &hashes);
                return;
            }
            Event::Demote { namespace, hashes } => {
                assert_eq!(
                    self.store.demote(namespace, &hashes),
                    self.naive.demote(namespace, &hashes),
                    "demote"
                );
                return;
            }
            Event::Advance(by) => {
                self.now += by;
                return;
            }
            Event::BreakPins => (self.store.break_pins(), self.naive.break_pins()),
            Event::Expire => (self.store.expire(now), self.naive.expire(now)),
            Event::OwnerLeft(owner) => (self.store.owner_left(owner), self.naive.owner_left(owner)),
            Event::OwnerGone(owner) => (self.store.owner_gone(owner), self.naive.owner_gone(owner)),
            event => panic!("{event:?} can be refused"),
        };
        assert_eq!(real, naive, "effects");
        count_effects(&real, met);
    }

    fn ended(&mut self, lease: LeaseId, answer: Result<Effects, StoreError>) {
        if !matches!(answer, Err(StoreError::WrongOwner)) {
            self.source.saw_end(lease);
        }
    }

    fn settled(
        &mut self,
        call: &str,
        real: Result<Effects, StoreError>,
        naive: impl FnOnce(&mut Naive) -> Result<Effects, StoreError>,
        met: &mut Met,
    ) {
        agree(call, &real, &naive(&mut self.naive), met);
        if let Ok(effects) = real {
            count_effects(&effects, met);
        }
    }

    fn lease(
        &mut self,
        who: (Owner, Duration),
        namespace: Namespace,
        hashes: &[BlockHash],
        met: &mut Met,
    ) {
        let (owner, ttl) = who;
        let real = self
            .store
            .lease_prefix(owner, namespace, hashes, Term { now: self.now, ttl });
        let slots = real
            .as_ref()
            .map(|lease| lease.as_ref().map(|lease| lease.slots.clone()))
            .map_err(|error| *error);
        agree("lease", &slots, &self.naive.lease(namespace, hashes), met);
        if let Ok(Some(lease)) = real {
            let expires = self.naive.lease_expiry(self.now, ttl);
            self.naive
                .leased((lease.id, owner), namespace, &lease.slots, expires);
            self.source.saw_lease(owner, lease.id);
        }
    }

    fn reserve(
        &mut self,
        who: (Owner, Duration),
        namespace: Namespace,
        hashes: &[BlockHash],
        met: &mut Met,
    ) {
        let (owner, ttl) = who;
        let real = self
            .store
            .reserve(owner, namespace, hashes, Term { now: self.now, ttl });
        let naive = self.naive.reserve(namespace, hashes);
        let promised = match (&real, &naive) {
            (Ok(Some(real)), Ok(Some(promised))) => (real, promised),
            (Ok(None), Ok(None)) => return count("reserve: none", met),
            (Err(real), Err(naive)) => {
                return agree::<()>("reserve", &Err(*real), &Err(*naive), met);
            }
            _ => panic!("reserve: {real:?}, naively {naive:?}"),
        };
        let (reservation, promise) = promised;
        let (got, slots): (Vec<BlockHash>, Vec<SlotId>) = reservation.slots.iter().copied().unzip();
        assert_eq!(got, promise.hashes, "which blocks the reservation is about");
        assert_eq!(
            reservation.effects, promise.effects,
            "what had to go for it"
        );
        if self.naive.longest_free_run() >= slots.len() {
            assert!(
                slots.windows(2).all(|pair| pair[0].0 + 1 == pair[1].0),
                "{slots:?} could have been one run"
            );
            count("reserve: one run", met);
        }
        let expires = self.naive.lease_expiry(self.now, ttl);
        self.naive
            .reserved((reservation.id, owner), &slots, promise, expires);
        self.source.saw_reservation(owner, reservation.id);
        count_effects(&reservation.effects, met);
        let missing = hashes
            .iter()
            .filter(|hash| !got.contains(hash) && !self.naive.stores(namespace, **hash))
            .count();
        count(
            if missing == 0 {
                "reserve: whole"
            } else {
                "reserve: short"
            },
            met,
        );
    }

    fn pin(&mut self, namespace: Namespace, hashes: &[BlockHash], ttl: Duration, met: &mut Met) {
        let outcome = self
            .store
            .pin(namespace, hashes, Term { now: self.now, ttl });
        let PinOutcome {
            id,
            pinned,
            missing,
            clipped,
        } = outcome;
        let (figures, serials) = self.naive.pin(namespace, hashes);
        assert_eq!(
            [pinned, missing, clipped],
            figures,
            "pinned, missing, clipped"
        );
        assert_eq!(id.is_some(), pinned > 0, "a pin of something has an id");
        if let Some(id) = id {
            self.naive
                .pinned_as(id, namespace, serials, (self.now, ttl));
            self.source.saw_pin(id);
        }
        if clipped > 0 {
            count("pin: clipped", met);
        }
    }

    /// Compares all that can be seen, and has the store check what cannot.
    fn compare(&self) {
        self.store.check_invariants();
        assert_eq!(self.store.counts(), self.naive.counts());
        assert_eq!(self.store.next_expiry(), self.naive.next_expiry());
        for namespace in self.naive.current() {
            assert!(self.store.is_current(namespace), "{namespace:?} is current");
            for hash in &self.universe {
                let real = self.store.contains(namespace, hash);
                assert_eq!(
                    real,
                    self.naive.contains(namespace, *hash),
                    "{hash:?} in {namespace:?}"
                );
            }
        }
        for (handle, hashes) in self.source.probes() {
            let real = self.store.match_prefix(handle, hashes);
            assert_eq!(
                real,
                self.naive.match_prefix(handle, hashes),
                "prefix in {handle:?}"
            );
            assert_eq!(
                self.store.is_current(handle),
                self.naive.is_current(handle),
                "{handle:?}"
            );
        }
    }

    /// When every engine is gone and every pin broken, every slot is free or may be evicted: nothing has leaked.
    fn wind_up(mut self) {
        let _voided = self.store.break_pins();
        for owner in 0..crate::events::OWNERS {
            let _ended = self.store.owner_gone(Owner(owner));
        }
        self.store.check_invariants();
        let counts = self.store.counts();
        assert_eq!(
            counts.free + counts.evictable,
            counts.total,
            "slots leaked: {counts:?}"
        );
        assert_eq!((counts.leases, counts.pins), (0, 0));
    }
}
