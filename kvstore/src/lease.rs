//! Who may touch which slots, until when. A read lease lets an engine copy out of committed slots; a reservation lets it
//! write slots nobody else can see.
//!
//! Owns the records and their terms, never a slot. A lease that ends without its owner saying that the copies are over
//! stays in the table as *ended*: its slots remain held until the owner says so or is gone. Ids are never reused, and every
//! record carries the generation of each of its slots, so neither a stale id nor a stale slot can pass for a live one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::error::StoreError;
use crate::ids::{LeaseId, Namespace, Owner};
use crate::slots::Held;

/// From when and for how long a lease, reservation or pin is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// The present.
    pub now: Instant,
    /// Time to live from then on; longer ones are cut to the configured maximum.
    pub ttl: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    Read,
    Write,
}

/// How a lease stands with time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tenure {
    Live { expires: Instant },
    Ended(Why),
}

/// Why a lease ended before its owner let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Expired,
    OwnerLeft,
    Reset,
}

#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) owner: Owner,
    pub(crate) namespace: Namespace,
    pub(crate) right: Right,
    pub(crate) tenure: Tenure,
    pub(crate) held: Vec<Held>,
}

impl Record {
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.tenure, Tenure::Live { .. })
    }
}

/// What a new lease is about.
#[derive(Debug)]
pub(crate) struct Grant {
    pub(crate) owner: Owner,
    pub(crate) namespace: Namespace,
    pub(crate) right: Right,
    pub(crate) held: Vec<Held>,
}

#[derive(Debug)]
pub(crate) struct Leases {
    records: BTreeMap<LeaseId, Record>,
    due: BTreeSet<(Instant, LeaseId)>,
    next_id: u64,
    limit: usize,
    ttl_max: Duration,
}

impl Leases {
    pub(crate) fn new(limit: usize, ttl_max: Duration) -> Self {
        Self {
            records: BTreeMap::new(),
            due: BTreeSet::new(),
            next_id: 1,
            limit,
            ttl_max,
        }
    }

    /// Asked before anything is evicted for a lease that would then be refused.
    pub(crate) fn check_room(&self) -> Result<(), StoreError> {
        if self.records.len() < self.limit {
            return Ok(());
        }
        Err(StoreError::TooMany {
            what: "leases",
            limit: self.limit,
        })
    }

    /// Needs `check_room` first.
    pub(crate) fn grant(&mut self, grant: Grant, term: Term) -> LeaseId {
        assert!(self.records.len() < self.limit, "a lease beyond the limit");
        let id = LeaseId(self.next_id);
        self.next_id += 1;
        let expires = self.expiry(term);
        let Grant {
            owner,
            namespace,
            right,
            held,
        } = grant;
        let tenure = Tenure::Live { expires };
        self.records.insert(
            id,
            Record {
                owner,
                namespace,
                right,
                tenure,
                held,
            },
        );
        self.due.insert((expires, id));
        id
    }

    /// The record, if it is that owner's.
    pub(crate) fn find(&self, owner: Owner, id: LeaseId) -> Result<&Record, StoreError> {
        let record = self.records.get(&id).ok_or(StoreError::UnknownLease)?;
        if record.owner != owner {
            return Err(StoreError::WrongOwner);
        }
        Ok(record)
    }

    /// Moves the expiry out; never in.
    pub(crate) fn renew(&mut self, id: LeaseId, term: Term) -> Result<(), StoreError> {
        let until = self.expiry(term);
        let record = self.records.get_mut(&id).ok_or(StoreError::UnknownLease)?;
        let Tenure::Live { expires } = record.tenure else {
            return Err(StoreError::LeaseExpired);
        };
        if expires <= term.now {
            return Err(StoreError::LeaseExpired);
        }
        let until = until.max(expires);
        self.due.remove(&(expires, id));
        self.due.insert((until, id));
        record.tenure = Tenure::Live { expires: until };
        Ok(())
    }

    /// Its owner lets go: the record leaves the table. A reservation is no read lease and the other way round.
    pub(crate) fn take(
        &mut self,
        owner: Owner,
        id: LeaseId,
        right: Right,
    ) -> Result<Record, StoreError> {
        if self.find(owner, id)?.right != right {
            return Err(StoreError::UnknownLease);
        }
        self.remove(id).ok_or(StoreError::UnknownLease)
    }

    /// The record leaves the table whatever its owner says.
    pub(crate) fn remove(&mut self, id: LeaseId) -> Option<Record> {
        let record = self.records.remove(&id)?;
        if let Tenure::Live { expires } = record.tenure {
            self.due.remove(&(expires, id));
        }
        Some(record)
    }

    /// Ends a live lease but keeps its record: its copies may still run. None if there is no such lease.
    pub(crate) fn end(&mut self, id: LeaseId, why: Why) -> Option<&Record> {
        let record = self.records.get_mut(&id)?;
        match record.tenure {
            Tenure::Live { expires } => self.due.remove(&(expires, id)),
            Tenure::Ended(before) => {
                panic!("{id:?} ended by {before:?} before it could end by {why:?}")
            }
        };
        record.tenure = Tenure::Ended(why);
        Some(record)
    }

    /// Live leases whose time is over, earliest first.
    pub(crate) fn due(&self, now: Instant) -> Vec<LeaseId> {
        self.due
            .iter()
            .take_while(|(expires, _)| *expires <= now)
            .map(|&(_, id)| id)
            .collect()
    }

    /// Leases that `wanted` picks, oldest first.
    pub(crate) fn select(&self, wanted: impl Fn(&Record) -> bool) -> Vec<LeaseId> {
        self.records
            .iter()
            .filter(|(_, record)| wanted(record))
            .map(|(&id, _)| id)
            .collect()
    }

    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.due.first().map(|&(expires, _)| expires)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (LeaseId, &Record)> {
        self.records.iter().map(|(&id, record)| (id, record))
    }

    /// Records, ended ones included.
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// Panics if the schedule and the records disagree; for the audit.
    pub(crate) fn check(&self) {
        let live = self
            .records
            .iter()
            .filter_map(|(&id, record)| match record.tenure {
                Tenure::Live { expires } => Some((expires, id)),
                Tenure::Ended(_) => None,
            });
        assert!(
            live.collect::<BTreeSet<_>>() == self.due,
            "the lease schedule is not that of the live leases"
        );
        assert!(self.records.len() <= self.limit, "more leases than allowed");
        for (id, record) in &self.records {
            assert!(!record.held.is_empty(), "{id:?} is about nothing");
            assert!(id.0 < self.next_id, "{id:?} has not been given yet");
        }
    }

    fn expiry(&self, term: Term) -> Instant {
        term.now + term.ttl.min(self.ttl_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, Generation, SlotId, Space};

    fn grant(leases: &mut Leases, owner: u64, now: Instant) -> LeaseId {
        let namespace = Namespace {
            space: Space::from_index(0),
            epoch: Epoch(1),
        };
        let held = vec![Held {
            slot: SlotId(0),
            generation: Generation::FIRST,
        }];
        let grant = Grant {
            owner: Owner(owner),
            namespace,
            right: Right::Read,
            held,
        };
        let id = leases.grant(
            grant,
            Term {
                now,
                ttl: Duration::from_secs(owner),
            },
        );
        leases.check();
        id
    }

    fn leases() -> Leases {
        Leases::new(3, Duration::from_secs(60))
    }

    #[test]
    fn due_leases_come_earliest_first_and_ended_ones_are_not_due_again() {
        let (mut leases, now) = (leases(), Instant::now());
        let late = grant(&mut leases, 5, now);
        let early = grant(&mut leases, 2, now);
        assert_eq!(leases.due(now + Duration::from_secs(1)), []);
        assert_eq!(leases.due(now + Duration::from_secs(5)), [early, late]);
        assert!(leases.end(early, Why::Expired).is_some());
        leases.check();
        assert_eq!(leases.due(now + Duration::from_secs(5)), [late]);
        assert_eq!(leases.len(), 2, "ended, not forgotten");
        assert_eq!(leases.next_expiry(), Some(now + Duration::from_secs(5)));
    }

    #[test]
    fn ids_are_never_used_again() {
        let (mut leases, now) = (leases(), Instant::now());
        let first = grant(&mut leases, 1, now);
        assert!(leases.take(Owner(1), first, Right::Read).is_ok());
        leases.check();
        let second = grant(&mut leases, 1, now);
        assert_ne!(first, second);
        assert_eq!(
            leases.take(Owner(1), first, Right::Read).err(),
            Some(StoreError::UnknownLease)
        );
    }

    #[test]
    fn the_owner_is_looked_at_before_anything_else() {
        let (mut leases, now) = (leases(), Instant::now());
        let id = grant(&mut leases, 1, now);
        assert_eq!(
            leases.take(Owner(2), id, Right::Write).err(),
            Some(StoreError::WrongOwner)
        );
        assert_eq!(
            leases.take(Owner(1), id, Right::Write).err(),
            Some(StoreError::UnknownLease)
        );
        assert!(leases.take(Owner(1), id, Right::Read).is_ok());
    }

    #[test]
    fn the_table_is_bounded_and_ended_leases_count() {
        let (mut leases, now) = (leases(), Instant::now());
        for _ in 0..3 {
            assert_eq!(leases.check_room(), Ok(()));
            let id = grant(&mut leases, 1, now);
            assert!(leases.end(id, Why::OwnerLeft).is_some());
        }
        assert_eq!(
            leases.check_room(),
            Err(StoreError::TooMany {
                what: "leases",
                limit: 3
            })
        );
    }

    #[test]
    #[should_panic(expected = "ended by OwnerLeft before it could end by Expired")]
    fn a_lease_ends_once() {
        let (mut leases, now) = (leases(), Instant::now());
        let id = grant(&mut leases, 1, now);
        assert!(leases.end(id, Why::OwnerLeft).is_some());
        let _ = leases.end(id, Why::Expired);
    }
}
