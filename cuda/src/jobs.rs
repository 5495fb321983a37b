//! The jobs of one copy thread: what is queued, what is at the engine, how each one ended.
//!
//! Owns every job from its submission until its end has been collected. Plain state, locked by its user; calls no engine
//! and reads no clock.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use crate::engine::{ArenaId, ComputeMark, CopyBatch, CopyError, CopyKind, JobId};
use crate::ranges::Cutter;
use crate::schedule::Queued;

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every byte has been copied.
    Done,
    /// Cancelled before its end was known. What its destination holds is undefined, even if all bytes arrived.
    Cancelled,
    /// A part failed; what the destination holds is undefined.
    Failed(CopyError),
}

/// The end of one job. After it, no byte of the job moves.
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct JobEnd {
    /// The job.
    pub id: JobId,
    /// What it was for.
    pub kind: CopyKind,
    /// How it ended.
    pub outcome: Outcome,
    /// Bytes of the parts that were copied.
    pub bytes: u64,
    /// Seconds from the first part given to the engine to the end; 0 if none was.
    pub seconds: f64,
}

/// A checked job, ready to queue.
pub(crate) struct NewJob {
    pub(crate) id: JobId,
    pub(crate) kind: CopyKind,
    pub(crate) arena: ArenaId,
    pub(crate) after: ComputeMark,
    pub(crate) cutter: Cutter,
}

struct Live {
    job: NewJob,
    /// Sub-batches at the engine.
    outstanding: usize,
    bytes: u64,
    started: Option<Instant>,
    /// Why it will not end as done.
    spoiled: Option<Outcome>,
}

/// All jobs that are queued, at the engine, or ended and not collected.
pub(crate) struct Jobs {
    limit: usize,
    live: HashMap<JobId, Live>,
    /// Live jobs with something left to cut, oldest first, one queue per kind in priority order.
    queues: [VecDeque<JobId>; 3],
    ended: Vec<JobEnd>,
}

impl Jobs {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            live: HashMap::new(),
            queues: Default::default(),
            ended: Vec::new(),
        }
    }

    pub(crate) fn live(&self) -> usize {
        self.live.len()
    }

    pub(crate) fn is_live(&self, id: JobId) -> bool {
        self.live.contains_key(&id)
    }

    pub(crate) fn uses(&self, arena: ArenaId) -> bool {
        self.live.values().any(|live| live.job.arena == arena)
    }

    /// Whether a job with this id may be added.
    pub(crate) fn admit(&self, id: JobId) -> Result<(), CopyError> {
        if self.live.contains_key(&id) {
            return Err(CopyError::DuplicateJob(id));
        }
        if self.live.len() + self.ended.len() >= self.limit {
            return Err(CopyError::Busy);
        }
        Ok(())
    }

    /// Adds a job that has been admitted. One without bytes ends at once.
    pub(crate) fn add(&mut self, job: NewJob, now: Instant) {
        assert!(self.admit(job.id).is_ok(), "added without admission");
        let (id, kind) = (job.id, job.kind);
        if !job.cutter.is_empty() {
            self.queue(kind).push_back(id);
        }
        let live = Live {
            job,
            outstanding: 0,
            bytes: 0,
            started: None,
            spoiled: None,
        };
        self.live.insert(id, live);
        self.end_if_over(id, now);
    }

    pub(crate) fn queued(&self) -> Queued {
        let [demand, prefetch, save] = &self.queues;
        Queued {
            demand: !demand.is_empty(),
            prefetch: !prefetch.is_empty(),
            save: !save.is_empty(),
        }
    }

    /// Cuts the next sub-batch off the oldest job of a kind. The caller gives it to the engine and then to
    /// [`part_ended`](Self::part_ended).
    pub(crate) fn take_part(
        &mut self,
        kind: CopyKind,
        cap: u64,
        now: Instant,
    ) -> Option<(JobId, CopyBatch)> {
        let id = *self.queue(kind).front()?;
        let Some(live) = self.live.get_mut(&id) else {
            panic!("queues name live jobs only");
        };
        let ranges = live.job.cutter.take(cap);
        debug_assert!(!ranges.is_empty(), "queued jobs have something left");
        live.outstanding += 1;
        live.started.get_or_insert(now);
        let batch = CopyBatch {
            direction: kind.direction(),
            arena: live.job.arena,
            ranges,
            after: live.job.after,
        };
        if live.job.cutter.is_empty() {
            self.queue(kind).pop_front();
        }
        Some((id, batch))
    }

    /// A sub-batch of `id` has ended: with its bytes copied, or with an error that spoils the job.
    pub(crate) fn part_ended(&mut self, id: JobId, part: Result<u64, CopyError>, now: Instant) {
        let Some(live) = self.live.get_mut(&id) else {
            panic!("a job lives until its last part has ended");
        };
        assert!(live.outstanding > 0, "more parts ended than were taken");
        live.outstanding -= 1;
        match part {
            Ok(bytes) => live.bytes += bytes,
            Err(error) => self.spoil(id, Outcome::Failed(error)),
        }
        self.end_if_over(id, now);
    }

    /// Drops what has not been taken of these jobs; each ends as soon as none of its parts is at the engine. Ids that
    /// are not live are fine.
    pub(crate) fn cancel(&mut self, ids: &[JobId], now: Instant) {
        for &id in ids {
            if self.is_live(id) {
                self.spoil(id, Outcome::Cancelled);
                self.end_if_over(id, now);
            }
        }
    }

    pub(crate) fn cancel_all(&mut self, now: Instant) {
        let ids: Vec<JobId> = self.live.keys().copied().collect();
        self.cancel(&ids, now);
    }

    /// Ends every live job with the same error, whatever is outstanding: only after the engine is gone.
    pub(crate) fn fail_all(&mut self, error: &CopyError, now: Instant) {
        self.queues = Default::default();
        for (_, live) in self.live.drain() {
            let outcome = Outcome::Failed(error.clone());
            self.ended.push(live.end(outcome, now));
        }
    }

    pub(crate) fn take_ended(&mut self) -> Vec<JobEnd> {
        std::mem::take(&mut self.ended)
    }

    /// A cancelled job stays cancelled: its end is nobody's miss any more. The first failure is the one reported.
    fn spoil(&mut self, id: JobId, outcome: Outcome) {
        let Some(live) = self.live.get_mut(&id) else {
            return;
        };
        let kind = live.job.kind;
        if outcome == Outcome::Cancelled || live.spoiled.is_none() {
            live.spoiled = Some(outcome);
        }
        if !live.job.cutter.is_empty() {
            live.job.cutter.clear();
            self.queue(kind).retain(|queued| *queued != id);
        }
    }

    fn end_if_over(&mut self, id: JobId, now: Instant) {
        let over = |live: &Live| live.outstanding == 0 && live.job.cutter.is_empty();
        if self.live.get(&id).is_some_and(over)
            && let Some(mut live) = self.live.remove(&id)
        {
            let outcome = live.spoiled.take().unwrap_or(Outcome::Done);
            self.ended.push(live.end(outcome, now));
        }
    }

    fn queue(&mut self, kind: CopyKind) -> &mut VecDeque<JobId> {
        match kind {
            CopyKind::Demand => &mut self.queues[0],
            CopyKind::Prefetch => &mut self.queues[1],
            CopyKind::Save => &mut self.queues[2],
        }
    }
}

impl Live {
    fn end(&self, outcome: Outcome, now: Instant) -> JobEnd {
        let seconds = self.started.map_or(0.0, |started| {
            now.saturating_duration_since(started).as_secs_f64()
        });
        JobEnd {
            id: self.job.id,
            kind: self.job.kind,
            outcome,
            bytes: self.bytes,
            seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::CopyRange;

    fn job(id: u64, kind: CopyKind, bytes: u64) -> NewJob {
        let range = CopyRange {
            arena_offset: 0,
            device: 4096,
            bytes,
        };
        let ranges = if bytes == 0 { vec![] } else { vec![range] };
        NewJob {
            id: JobId(id),
            kind,
            arena: ArenaId(1),
            after: ComputeMark(9),
            cutter: Cutter::new(ranges),
        }
    }

    fn outcomes(jobs: &mut Jobs) -> Vec<(u64, Outcome)> {
        let ends = jobs.take_ended();
        ends.into_iter()
            .map(|end| (end.id.0, end.outcome))
            .collect()
    }

    const FAILED: CopyError = CopyError::Driver {
        operation: "copy",
        code: 1,
    };

    #[test]
    fn a_job_ends_when_its_last_part_has() {
        let mut jobs = Jobs::new(4);
        let now = Instant::now();
        jobs.add(job(1, CopyKind::Save, 10), now);
        let (id, batch) = jobs.take_part(CopyKind::Save, 6, now).expect("6 bytes");
        assert_eq!((batch.bytes(), batch.after), (6, ComputeMark(9)));
        assert_eq!(batch.direction, crate::Direction::DeviceToHost);
        jobs.part_ended(id, Ok(6), now);
        assert!(jobs.is_live(id) && jobs.queued().save);
        let (_, batch) = jobs.take_part(CopyKind::Save, 6, now).expect("4 bytes");
        assert_eq!(batch.bytes(), 4);
        assert!(!jobs.queued().save && jobs.uses(ArenaId(1)));
        jobs.part_ended(id, Ok(4), now);
        assert!(!jobs.uses(ArenaId(1)));
        let ends = jobs.take_ended();
        assert_eq!((ends.len(), ends[0].bytes), (1, 10));
        assert_eq!(jobs.take_ended(), []);
    }

    #[test]
    fn uncollected_ends_count_against_the_limit() {
        let mut jobs = Jobs::new(2);
        let now = Instant::now();
        jobs.add(job(1, CopyKind::Demand, 0), now);
        jobs.add(job(2, CopyKind::Demand, 5), now);
        assert_eq!(jobs.live(), 1, "a job without bytes has ended");
        assert_eq!(jobs.admit(JobId(3)), Err(CopyError::Busy));
        assert_eq!(jobs.admit(JobId(2)), Err(CopyError::DuplicateJob(JobId(2))));
        assert_eq!(outcomes(&mut jobs), [(1, Outcome::Done)]);
        assert_eq!(jobs.admit(JobId(3)), Ok(()));
    }

    #[test]
    fn the_first_failure_stops_a_job_and_a_cancel_has_the_last_word() {
        let mut jobs = Jobs::new(4);
        let now = Instant::now();
        for id in [1, 2] {
            jobs.add(job(id, CopyKind::Prefetch, 30), now);
            for _ in 0..2 {
                assert!(jobs.take_part(CopyKind::Prefetch, 10, now).is_some());
            }
            jobs.part_ended(JobId(id), Err(FAILED), now);
            assert!(!jobs.queued().prefetch, "nothing more of it is taken");
        }
        jobs.cancel(&[JobId(2), JobId(99)], now);
        assert_eq!(jobs.live(), 2, "each has a part at the engine");
        jobs.part_ended(JobId(1), Err(CopyError::Busy), now);
        jobs.part_ended(JobId(2), Ok(10), now);
        let expected = [(1, Outcome::Failed(FAILED)), (2, Outcome::Cancelled)];
        assert_eq!(outcomes(&mut jobs), expected);
    }

    #[test]
    fn a_dead_engine_fails_whatever_is_live() {
        let mut jobs = Jobs::new(4);
        let now = Instant::now();
        jobs.add(job(1, CopyKind::Demand, 5), now);
        jobs.add(job(2, CopyKind::Save, 5), now);
        assert!(jobs.take_part(CopyKind::Save, 5, now).is_some());
        jobs.fail_all(&CopyError::EngineDead, now);
        let mut ends = outcomes(&mut jobs);
        ends.sort_by_key(|(id, _)| *id);
        let dead = Outcome::Failed(CopyError::EngineDead);
        assert_eq!(ends, [(1, dead.clone()), (2, dead)]);
        assert!(jobs.live() == 0 && !jobs.queued().demand);
    }
}
