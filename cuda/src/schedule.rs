//! Which copy goes next: priorities, pacing and the save quota as one pure decision.
//!
//! Copy engines run what they are given back to back and know no priorities, so a bound on what is outstanding is the only
//! way to keep the inference engine's own small copies from waiting behind ours. No thread, no clock: `now` is a parameter.

use std::time::{Duration, Instant};

use crate::engine::{CopyError, CopyKind};

/// Limits of one [`CopyThread`](crate::CopyThread).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyLimits {
    /// Bytes of one sub-batch, the unit of pacing and of cancelling: 4 MiB are 0.16 ms on PCIe 4.
    pub sub_batch_bytes: u64,
    /// Sub-batches at the engine per direction: 2 hide the time between polls, more only delay others.
    pub outstanding_per_direction: usize,
    /// Jobs that have been submitted and whose end has not been collected; one more is `Busy`.
    pub queue_jobs: usize,
    /// Saves pause while loads are queued or outstanding, but after waiting this long one sub-batch of a save goes ahead:
    /// blocks that are never saved would block their eviction.
    pub save_every: Duration,
    /// Time between polls of outstanding copies. Nothing is polled when nothing is outstanding.
    pub poll_interval: Duration,
}

impl Default for CopyLimits {
    fn default() -> Self {
        Self {
            sub_batch_bytes: 4 << 20,
            outstanding_per_direction: 2,
            queue_jobs: 1024,
            save_every: Duration::from_millis(20),
            poll_interval: Duration::from_micros(50),
        }
    }
}

impl CopyLimits {
    /// Errors: [`CopyError::BadConfig`] naming the field that is 0 where 0 makes no sense.
    pub fn validate(&self) -> Result<(), CopyError> {
        if self.sub_batch_bytes == 0 {
            return Err(CopyError::BadConfig("sub_batch_bytes is 0"));
        }
        if self.outstanding_per_direction == 0 {
            return Err(CopyError::BadConfig("outstanding_per_direction is 0"));
        }
        if self.queue_jobs == 0 {
            return Err(CopyError::BadConfig("queue_jobs is 0"));
        }
        if self.poll_interval.is_zero() {
            return Err(CopyError::BadConfig("poll_interval is 0"));
        }
        Ok(())
    }
}

/// Which kinds have parts that the engine has not been given yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Queued {
    pub(crate) demand: bool,
    pub(crate) prefetch: bool,
    pub(crate) save: bool,
}

/// Sub-batches at the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outstanding {
    pub(crate) loads: usize,
    pub(crate) saves: usize,
}

/// Decides what the engine is given next.
#[derive(Debug)]
pub(crate) struct Pacer {
    per_direction: usize,
    save_every: Duration,
    /// Since when loads have kept the first queued save waiting.
    save_blocked_since: Option<Instant>,
}

impl Pacer {
    pub(crate) fn new(limits: &CopyLimits) -> Self {
        Self {
            per_direction: limits.outstanding_per_direction,
            save_every: limits.save_every,
            save_blocked_since: None,
        }
    }

    /// The kind whose next sub-batch is to be submitted now; `None` until something ends, arrives or time passes.
    pub(crate) fn next(
        &mut self,
        queued: Queued,
        outstanding: Outstanding,
        now: Instant,
    ) -> Option<CopyKind> {
        // A save whose turn has come goes before the loads: they would never leave it a gap.
        if self.save_may_start(queued, outstanding, now) {
            self.save_blocked_since = None;
            return Some(CopyKind::Save);
        }
        if outstanding.loads >= self.per_direction {
            None
        } else if queued.demand {
            Some(CopyKind::Demand)
        } else if queued.prefetch {
            Some(CopyKind::Prefetch)
        } else {
            None
        }
    }

    fn save_may_start(&mut self, queued: Queued, outstanding: Outstanding, now: Instant) -> bool {
        if !queued.save {
            self.save_blocked_since = None;
            return false;
        }
        let loads_wait = queued.demand || queued.prefetch || outstanding.loads > 0;
        let waited_enough = if loads_wait {
            let since = *self.save_blocked_since.get_or_insert(now);
            now.saturating_duration_since(since) >= self.save_every
        } else {
            true
        };
        waited_enough && outstanding.saves < self.per_direction
    }
}
