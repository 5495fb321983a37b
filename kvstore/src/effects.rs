//! What calls of the store hand back: plain figures and ids, no behaviour.

use std::ops::AddAssign;

use crate::ids::{BlockHash, LeaseId, PinId, SlotId};

/// A read lease: these slots keep their bytes until it is let go.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a lease that is dropped protects its slots until it expires, and drains after that"]
pub struct Lease {
    /// What to release it by.
    pub id: LeaseId,
    /// One slot per block of the prefix, in chain order.
    pub slots: Vec<SlotId>,
}

/// A write reservation: nobody else can see or get these slots until it is committed or aborted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a reservation that is dropped keeps its slots until its owner is gone"]
pub struct Reservation {
    /// What to commit or abort it by.
    pub id: LeaseId,
    /// What to write where, in the order asked for. Blocks that are stored, being filled or without room are left out.
    pub slots: Vec<(BlockHash, SlotId)>,
    /// What had to go for it.
    pub effects: Effects,
}

/// What became of a call of `pin`. `pinned + missing + clipped` is the number of blocks asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the id is the only way to unpin before the time to live is over"]
pub struct PinOutcome {
    /// What to unpin by; none if nothing was pinned.
    pub id: Option<PinId>,
    /// Blocks pinned by this call, whether or not they were pinned before.
    pub pinned: usize,
    /// Blocks that are not stored (or only half).
    pub missing: usize,
    /// Blocks left out for want of budget, deepest first.
    pub clipped: usize,
}

/// What a call did besides its answer, for metrics and for those who wait for room. Calls add up with `+=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "effects are what metrics count and waiters wait for"]
pub struct Effects {
    /// Blocks that became readable.
    pub committed: usize,
    /// Slots that returned to the allocator, for whatever reason.
    pub freed: usize,
    /// Stored blocks that are not any more, by reason.
    pub evicted: Evicted,
    /// Read leases that ended by time.
    pub expired_leases: usize,
    /// Reservations that ended by time.
    pub expired_reservations: usize,
    /// Pins that ended by time.
    pub expired_pins: usize,
    /// Pins that were broken, or voided by a reset.
    pub voided_pins: usize,
    /// Leases and reservations that ended because their owner left or was gone.
    pub orphaned_leases: usize,
    /// Slots that began to drain: not readable, not free until their copies have ended.
    pub draining: usize,
}

/// Why stored blocks went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Room was needed, and these had not been used for longest.
    pub lru: usize,
    /// Room was needed, and these were hinted as not needed soon.
    pub demoted: usize,
    /// Their session was over.
    pub retired: usize,
    /// Their namespace was reset.
    pub reset: usize,
}

impl AddAssign for Effects {
    fn add_assign(&mut self, other: Self) {
        self.committed += other.committed;
        self.freed += other.freed;
        self.evicted.lru += other.evicted.lru;
        self.evicted.demoted += other.evicted.demoted;
        self.evicted.retired += other.evicted.retired;
        self.evicted.reset += other.evicted.reset;
        self.expired_leases += other.expired_leases;
        self.expired_reservations += other.expired_reservations;
        self.expired_pins += other.expired_pins;
        self.voided_pins += other.voided_pins;
        self.orphaned_leases += other.orphaned_leases;
        self.draining += other.draining;
    }
}

/// How the slots stand. `free + filling + committed + draining = total`; the others are part of `committed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Slots in all.
    pub total: usize,
    /// Slots the allocator can give out at once.
    pub free: usize,
    /// Slots being written under a live reservation.
    pub filling: usize,
    /// Slots that are readable.
    pub committed: usize,
    /// Slots that are neither readable nor free: a copy may still touch them.
    pub draining: usize,
    /// Committed slots that at least one read lease holds, ended leases included.
    pub leased: usize,
    /// Committed slots with at least one pin.
    pub pinned: usize,
    /// Committed slots that eviction may take.
    pub evictable: usize,
    /// Leases and reservations, ended ones included.
    pub leases: usize,
    /// Pins.
    pub pins: usize,
}
