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
            self.save_blocked_since = None;
            true
        };
        waited_enough && outstanding.saves < self.per_direction
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Rng;
    use crate::testkit::seed;

    const IDLE: Queued = Queued {
        demand: false,
        prefetch: false,
        save: false,
    };
    const ALL: Queued = Queued {
        demand: true,
        prefetch: true,
        save: true,
    };

    fn pacer(save_every: Duration) -> Pacer {
        Pacer::new(&CopyLimits {
            save_every,
            ..CopyLimits::default()
        })
    }

    fn at(loads: usize, saves: usize) -> Outstanding {
        Outstanding { loads, saves }
    }

    #[test]
    fn most_urgent_first_and_at_most_two_per_direction() {
        let mut pacer = pacer(Duration::from_millis(20));
        let now = Instant::now();
        let no_demand = Queued {
            demand: false,
            ..ALL
        };
        let only_saves = Queued { save: true, ..IDLE };
        assert_eq!(pacer.next(ALL, at(0, 0), now), Some(CopyKind::Demand));
        assert_eq!(
            pacer.next(no_demand, at(1, 0), now),
            Some(CopyKind::Prefetch)
        );
        assert_eq!(pacer.next(ALL, at(2, 0), now), None);
        assert_eq!(pacer.next(only_saves, at(0, 1), now), Some(CopyKind::Save));
        assert_eq!(pacer.next(only_saves, at(0, 2), now), None);
        assert_eq!(pacer.next(ALL, at(1, 2), now), Some(CopyKind::Demand));
        assert_eq!(pacer.next(IDLE, at(0, 0), now), None);
    }

    #[test]
    fn saves_pause_while_loads_are_queued_or_outstanding() {
        let mut pacer = pacer(Duration::from_millis(20));
        let now = Instant::now();
        let only_saves = Queued { save: true, ..IDLE };
        assert_eq!(pacer.next(only_saves, at(1, 0), now), None);
        assert_eq!(pacer.next(only_saves, at(0, 0), now), Some(CopyKind::Save));
    }

    #[test]
    fn one_save_goes_ahead_per_time_waited() {
        let mut pacer = pacer(Duration::from_millis(20));
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        assert_eq!(pacer.next(ALL, at(2, 0), after(0)), None);
        assert_eq!(pacer.next(ALL, at(2, 0), after(19)), None);
        // Its turn has come: even while the loads have room.
        assert_eq!(pacer.next(ALL, at(1, 0), after(20)), Some(CopyKind::Save));
        assert_eq!(pacer.next(ALL, at(1, 1), after(20)), Some(CopyKind::Demand));
        assert_eq!(pacer.next(ALL, at(2, 1), after(39)), None);
        assert_eq!(pacer.next(ALL, at(2, 1), after(40)), Some(CopyKind::Save));
        // Full on the other side: it keeps its turn.
        assert_eq!(pacer.next(ALL, at(2, 2), after(60)), None);
        assert_eq!(pacer.next(ALL, at(2, 2), after(80)), None);
        assert_eq!(pacer.next(ALL, at(2, 1), after(81)), Some(CopyKind::Save));
        // A queue that ran empty starts waiting anew.
        let loads = Queued { save: false, ..ALL };
        assert_eq!(pacer.next(loads, at(2, 0), after(90)), None);
        assert_eq!(pacer.next(ALL, at(2, 0), after(200)), None);
        assert_eq!(pacer.next(ALL, at(2, 0), after(220)), Some(CopyKind::Save));
    }

    /// Random arrivals and completions in made-up time, against the rules stated anew.
    #[test]
    fn random_traffic_keeps_the_rules() {
        let mut rng = Rng::new(seed());
        for _ in 0..200 {
            let limits = CopyLimits {
                outstanding_per_direction: 1 + rng.index(3),
                save_every: Duration::from_millis(rng.below(30)),
                ..CopyLimits::default()
            };
            let mut pacer = Pacer::new(&limits);
            let mut now = Instant::now();
            let mut waiting = [0_u32; 3];
            let mut out = Outstanding::default();
            let mut save_blocked: Option<Instant> = None;
            for _ in 0..400 {
                match rng.below(5) {
                    kind @ 0..3 => waiting[usize::try_from(kind).expect("small")] += 1,
                    3 => out.loads = out.loads.saturating_sub(1),
                    _ => out.saves = out.saves.saturating_sub(1),
                }
                now += Duration::from_millis(rng.below(4));
                loop {
                    let [demand, prefetch, save] = waiting.map(|count| count > 0);
                    let queued = Queued {
                        demand,
                        prefetch,
                        save,
                    };
                    let loads = demand || prefetch || out.loads > 0;
                    if save && loads {
                        save_blocked.get_or_insert(now);
                    } else {
                        save_blocked = None;
                    }
                    let due = save_blocked.is_some_and(|since| now - since >= limits.save_every);
                    let room = out.saves < limits.outstanding_per_direction;
                    match pacer.next(queued, out, now) {
                        None => {
                            assert!(!(save && room && (!loads || due)), "a save was owed");
                            let full = out.loads == limits.outstanding_per_direction;
                            assert!(full || !(demand || prefetch), "a load was owed");
                            break;
                        }
                        Some(CopyKind::Save) => {
                            assert!(save && room && (!loads || due), "a save overtook");
                            save_blocked = None;
                            waiting[2] -= 1;
                            out.saves += 1;
                        }
                        Some(kind) => {
                            assert!(!(due && room), "a load took the save's turn");
                            assert_eq!(kind == CopyKind::Demand, demand, "demand first");
                            waiting[usize::from(kind == CopyKind::Prefetch)] -= 1;
                            out.loads += 1;
                        }
                    }
                    assert!(out.loads <= limits.outstanding_per_direction);
                    assert!(out.saves <= limits.outstanding_per_direction);
                }
            }
        }
    }

    #[test]
    fn limits_without_sense_are_refused() {
        let good = CopyLimits::default();
        assert_eq!(good.validate(), Ok(()));
        for bad in [
            CopyLimits {
                sub_batch_bytes: 0,
                ..good
            },
            CopyLimits {
                outstanding_per_direction: 0,
                ..good
            },
            CopyLimits {
                queue_jobs: 0,
                ..good
            },
            CopyLimits {
                poll_interval: Duration::ZERO,
                ..good
            },
        ] {
            assert!(
                matches!(bad.validate(), Err(CopyError::BadConfig(_))),
                "{bad:?}"
            );
        }
    }
}
