//! What can happen to a store, and how often. Events carry everything they need, so that a printed one can be read.

use std::ops::Range;
use std::time::Duration;

use greenroom_tests::random::Random;
use kvstore::{BlockHash, LeaseId, Namespace, NamespaceId, Owner, PinId};

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Open(NamespaceId),
    Reset(Namespace),
    Lease {
        owner: Owner,
        namespace: Namespace,
        hashes: Vec<BlockHash>,
        ttl: Duration,
    },
    Renew {
        owner: Owner,
        lease: LeaseId,
        ttl: Duration,
    },
    Release {
        owner: Owner,
        lease: LeaseId,
    },
    Reserve {
        owner: Owner,
        namespace: Namespace,
        hashes: Vec<BlockHash>,
        ttl: Duration,
    },
    Commit {
        owner: Owner,
        lease: LeaseId,
    },
    Abort {
        owner: Owner,
        lease: LeaseId,
    },
    Touch {
        namespace: Namespace,
        hashes: Vec<BlockHash>,
    },
    Demote {
        namespace: Namespace,
        hashes: Vec<BlockHash>,
    },
    Retire {
        namespace: Namespace,
        hashes: Vec<BlockHash>,
    },
    Pin {
        namespace: Namespace,
        hashes: Vec<BlockHash>,
        ttl: Duration,
    },
    Unpin(PinId),
    BreakPins,
    Advance(Duration),
    Expire,
    OwnerLeft(Owner),
    OwnerGone(Owner),
}

type Make = fn(&mut Source) -> Event;

/// How to make each kind of event, with its weight: everyday ones often, disasters seldom.
const KINDS: [(usize, Make); 18] = [
    (4, |source| Event::Open(source.namespace_id())),
    (1, |source| Event::Reset(source.handle())),
    (24, |source| {
        let (owner, namespace, ttl) = (source.owner(), source.handle(), source.ttl());
        Event::Lease {
            owner,
            namespace,
            hashes: source.hashes(),
            ttl,
        }
    }),
    (6, |source| {
        let (owner, lease) = if source.random.one_in(2) {
            source.read_lease()
        } else {
            source.reservation()
        };
        Event::Renew {
            owner,
            lease,
            ttl: source.ttl(),
        }
    }),
    (20, |source| {
        let (owner, lease) = source.read_lease();
        Event::Release { owner, lease }
    }),
    (30, |source| {
        let (owner, namespace, ttl) = (source.owner(), source.handle(), source.ttl());
        Event::Reserve {
            owner,
            namespace,
            hashes: source.hashes(),
            ttl,
        }
    }),
    (26, |source| {
        let (owner, lease) = source.reservation();
        Event::Commit { owner, lease }
    }),
    (4, |source| {
        let (owner, lease) = source.reservation();
        Event::Abort { owner, lease }
    }),
    (8, |source| Event::Touch {
        namespace: source.handle(),
        hashes: source.hashes(),
    }),
    (4, |source| Event::Demote {
        namespace: source.handle(),
        hashes: source.hashes(),
    }),
    (4, |source| Event::Retire {
        namespace: source.handle(),
        hashes: source.hashes(),
    }),
    (5, |source| Event::Pin {
        namespace: source.handle(),
        hashes: source.hashes(),
        ttl: source.ttl(),
    }),
    (4, |source| Event::Unpin(source.pin())),
    (1, |_| Event::BreakPins),
    (14, |source| Event::Advance(source.ttl() / 10)),
    (6, |_| Event::Expire),
    (1, |source| Event::OwnerLeft(source.owner())),
    (2, |source| Event::OwnerGone(source.owner())),
];

/// Engines there are.
pub(crate) const OWNERS: u64 = 3;
const NAMESPACES: u8 = 3;
const CHAINS: usize = 6;
const CHAIN_BLOCKS: usize = 14;

/// Longest time to live that events ask for, in milliseconds; the clock advances by up to a tenth of it.
const TTL_MS: usize = 1000;

/// How many of the last handles, leases and pins events refer to: enough to include stale and ended ones.
const REMEMBERED: usize = 12;

/// Everything events are made of.
pub(crate) struct Source {
    random: Random,
    chains: Vec<Vec<BlockHash>>,
    handles: Vec<Namespace>,
    reads: Rights,
    writes: Rights,
    pins: Vec<PinId>,
}

/// Leases or reservations: the ones not known to be over, and those that are.
#[derive(Default)]
struct Rights {
    open: Vec<(Owner, LeaseId)>,
    over: Vec<(Owner, LeaseId)>,
}

impl Source {
    pub(crate) fn new(mut random: Random) -> Self {
        let mut chains: Vec<Vec<BlockHash>> = Vec::new();
        for _ in 0..CHAINS {
            // Most chains share a prefix with an earlier one, as sessions share a system prompt.
            let shared = if chains.is_empty() {
                0
            } else {
                random.below(CHAIN_BLOCKS)
            };
            let mut chain = match chains.len() {
                0 => Vec::new(),
                _ => random.pick(&chains)[..shared].to_vec(),
            };
            chain.resize_with(CHAIN_BLOCKS, || hash(&mut random));
            chains.push(chain);
        }
        let (reads, writes) = (Rights::default(), Rights::default());
        Self {
            random,
            chains,
            handles: Vec::new(),
            reads,
            writes,
            pins: Vec::new(),
        }
    }

    /// Every block there can be.
    pub(crate) fn universe(&self) -> Vec<BlockHash> {
        let mut all: Vec<BlockHash> = self.chains.iter().flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Questions worth asking after every event: each chain through a recent handle, stale ones included.
    pub(crate) fn probes(&self) -> impl Iterator<Item = (Namespace, &[BlockHash])> {
        recent(&self.handles)
            .iter()
            .copied()
            .zip(self.chains.iter().map(Vec::as_slice).cycle())
    }

    pub(crate) fn saw_handle(&mut self, handle: Namespace) {
        self.handles.push(handle);
    }

    pub(crate) fn saw_lease(&mut self, owner: Owner, lease: LeaseId) {
        self.reads.open.push((owner, lease));
    }

    pub(crate) fn saw_reservation(&mut self, owner: Owner, lease: LeaseId) {
        self.writes.open.push((owner, lease));
    }

    /// It was let go: events mention it seldom from now on.
    pub(crate) fn saw_end(&mut self, lease: LeaseId) {
        for rights in [&mut self.reads, &mut self.writes] {
            let ended = rights.open.extract_if(.., |(_, id)| *id == lease);
            rights.over.extend(ended);
        }
    }

    pub(crate) fn saw_pin(&mut self, pin: PinId) {
        self.pins.push(pin);
    }

    pub(crate) fn next(&mut self) -> Event {
        if self.handles.is_empty() {
            return Event::Open(self.namespace_id());
        }
        let total: usize = KINDS.iter().map(|(weight, _)| weight).sum();
        let mut at = self.random.below(total);
        for (weight, make) in KINDS {
            if at < weight {
                return make(self);
            }
            at -= weight;
        }
        unreachable!("the weights add up to {total}")
    }

    fn read_lease(&mut self) -> (Owner, LeaseId) {
        if self.random.one_in(40) {
            self.right(|source| &source.writes)
        } else {
            self.right(|source| &source.reads)
        }
    }

    fn reservation(&mut self) -> (Owner, LeaseId) {
        if self.random.one_in(40) {
            self.right(|source| &source.reads)
        } else {
            self.right(|source| &source.writes)
        }
    }

    /// Mostly one that is not known to be over; now and then an old one, somebody else's, or one that was never given.
    fn right(&mut self, of: impl Fn(&Self) -> &Rights) -> (Owner, LeaseId) {
        let rights = of(self);
        let (open, over) = (recent(&rights.open).to_vec(), recent(&rights.over).to_vec());
        let from = if open.is_empty() || self.random.one_in(10) {
            over
        } else {
            open
        };
        if from.is_empty() {
            return (self.owner(), LeaseId(u64::MAX));
        }
        let (owner, lease) = *self.random.pick(&from);
        if self.random.one_in(20) {
            (self.owner(), lease)
        } else {
            (owner, lease)
        }
    }

    /// One of the last pins, or one that was never given.
    fn pin(&mut self) -> PinId {
        let pins = recent(&self.pins).to_vec();
        if pins.is_empty() {
            PinId(u64::MAX)
        } else {
            *self.random.pick(&pins)
        }
    }

    fn owner(&mut self) -> Owner {
        Owner(self.random.number() % OWNERS)
    }

    fn namespace_id(&mut self) -> NamespaceId {
        let n = u8::try_from(self.random.below(usize::from(NAMESPACES))).unwrap();
        NamespaceId([n; 32])
    }

    /// Mostly the newest handle, sometimes an older one, which may be stale.
    fn handle(&mut self) -> Namespace {
        let newest = self.handles[self.handles.len() - 1];
        if self.random.one_in(6) {
            *self.random.pick(recent(&self.handles))
        } else {
            newest
        }
    }

    fn ttl(&mut self) -> Duration {
        Duration::from_millis(u64::try_from(self.random.below(TTL_MS)).unwrap())
    }

    /// Mostly a prefix of a chain, often a part of it, sometimes blocks in any order with repetitions.
    fn hashes(&mut self) -> Vec<BlockHash> {
        if self.random.one_in(20) {
            let universe = self.universe();
            return (0..self.random.below(10))
                .map(|_| *self.random.pick(&universe))
                .collect();
        }
        let from = if self.random.one_in(3) {
            self.random.below(CHAIN_BLOCKS)
        } else {
            0
        };
        let range: Range<usize> = from..from + self.random.below(CHAIN_BLOCKS - from + 1);
        self.random.pick(&self.chains)[range].to_vec()
    }
}

fn hash(random: &mut Random) -> BlockHash {
    let mut bytes = [0; 32];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random.number().to_le_bytes());
    }
    BlockHash(bytes)
}

fn recent<T>(all: &[T]) -> &[T] {
    &all[all.len().saturating_sub(REMEMBERED)..]
}
