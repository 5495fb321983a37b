//! The caller's side of the copy thread: jobs in, ends out.
//!
//! Owns the state that callers and the owner thread share, under one lock that is never held while the engine is called,
//! an arena is mapped or unmapped, or ranges are computed. Any thread may call any method; only `attach`, `fence` and
//! `wait_idle` wait for the owner.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use kvstore::{GpuBlock, SlotId};

use crate::device::DevicePool;
use crate::engine::{ArenaId, ComputeMark, CopyEngine, CopyError, CopyKind, JobId};
use crate::jobs::{JobEnd, Jobs, NewJob};
use crate::owner::{self, Owner};
use crate::ranges::{ArenaShard, Cutter, ranges};
use crate::schedule::CopyLimits;
use crate::sync::mpsc::{SyncSender, sync_channel};
use crate::sync::thread::{Builder, JoinHandle};
use crate::sync::{Condvar, Mutex};

/// Arenas attached at once: one is in use, the others wait for the last jobs of sidecars that have gone.
pub(crate) const ARENAS_MAX: usize = 16;

/// An ordered list of block copies that begins, ends and is cancelled as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Not in use by a job that is still in flight.
    pub id: JobId,
    /// Priority and direction.
    pub kind: CopyKind,
    /// Where the slots are.
    pub arena: ArenaId,
    /// What is copied, to or from.
    pub pairs: Vec<(SlotId, GpuBlock)>,
}

/// The one thread that calls a copy engine.
///
/// Dropping it cancels every job, waits until no copy is running, and ends the thread.
pub struct CopyThread {
    shared: Arc<Shared>,
    pool: Arc<DevicePool>,
    owner: Option<JoinHandle<()>>,
}

pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    /// The owner has something to look at.
    pub(crate) work: Condvar,
    /// A job has ended, or the owner has.
    pub(crate) ended: Condvar,
}

pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) jobs: Jobs,
    pub(crate) arenas: HashMap<ArenaId, Attached>,
    /// Each entry is a caller waiting in `attach`.
    pub(crate) attaching: VecDeque<Attach>,
    /// How often the owner has looked for work.
    #[cfg(test)]
    pub(crate) rounds: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Running,
    /// The handle is being dropped.
    Stopping,
    /// The owner has ended, for this reason, and dropped the engine: no copy runs.
    Dead(CopyError),
}

pub(crate) struct Attached {
    pub(crate) shard: ArenaShard,
    /// Takes no more jobs; let go when the last one has ended.
    pub(crate) detaching: bool,
}

pub(crate) struct Attach {
    pub(crate) id: ArenaId,
    pub(crate) shard: ArenaShard,
    pub(crate) reply: SyncSender<Result<(), CopyError>>,
}

impl CopyThread {
    /// Starts the thread and, on it, the engine. `pool` is the one that the engine was made for.
    ///
    /// Errors: [`CopyError::BadConfig`], [`CopyError::NoThread`], or what the engine's `start` says.
    pub fn spawn(
        engine: Box<dyn CopyEngine>,
        pool: Arc<DevicePool>,
        limits: CopyLimits,
    ) -> Result<Self, CopyError> {
        limits.validate()?;
        let state = State {
            phase: Phase::Running,
            jobs: Jobs::new(limits.queue_jobs),
            arenas: HashMap::new(),
            attaching: VecDeque::new(),
            #[cfg(test)]
            rounds: 0,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            work: Condvar::new(),
            ended: Condvar::new(),
        });
        let (reply, started) = sync_channel(1);
        let owner = Owner::new(engine, Arc::clone(&shared), &limits);
        let owner = Builder::new()
            .name("greenroom-copy".to_owned())
            .spawn(move || owner::run(owner, &reply))
            .map_err(|error| CopyError::NoThread(error.kind()))?;
        let thread = Self {
            shared,
            pool,
            owner: Some(owner),
        };
        started.recv().unwrap_or(Err(CopyError::EngineDead))?;
        Ok(thread)
    }

    /// Makes an arena usable and blocks until it is; a CUDA engine registers its memory meanwhile.
    ///
    /// Errors: [`CopyError::BadConfig`] for a shard that does not fit the pool, [`CopyError::AlreadyAttached`],
    /// [`CopyError::Busy`] while an earlier attachment of this id is being let go, [`CopyError::TooManyArenas`],
    /// a [fatal](CopyError::is_fatal) error, or what the engine says.
    pub fn attach(&self, id: ArenaId, shard: ArenaShard) -> Result<(), CopyError> {
        shard.validate(&self.pool)?;
        let (reply, attached) = sync_channel(1);
        {
            let mut state = self.shared.state.lock();
            state.alive()?;
            state.attaching.push_back(Attach { id, shard, reply });
        }
        self.shared.work.notify_one();
        // The owner drops unanswered requests when it dies.
        attached.recv().unwrap_or(Err(CopyError::EngineDead))
    }

    /// Takes no more jobs for an arena, and lets go of it when the last of its jobs has ended. Does not wait; an unknown
    /// id is fine.
    pub fn detach(&self, id: ArenaId) {
        let mut state = self.shared.state.lock();
        if let Some(attached) = state.arenas.get_mut(&id) {
            attached.detaching = true;
            drop(state);
            self.shared.work.notify_one();
        }
    }

    /// Queues a job whose copies run after `after`. All of its pairs are checked before any of it is queued.
    ///
    /// Errors: [`CopyError::Busy`] when `queue_jobs` jobs are in flight or not collected, [`CopyError::UnknownArena`],
    /// [`CopyError::DuplicateJob`], [`CopyError::SlotOutOfRange`], [`CopyError::BlockOutOfRange`],
    /// or a [fatal](CopyError::is_fatal) error. After an error the job does not exist and will not be reported.
    pub fn submit(&self, job: Job, after: ComputeMark) -> Result<(), CopyError> {
        let shard = self.shared.state.lock().admit(&job)?;
        let cutter = Cutter::new(ranges(&self.pool, &shard, &job.pairs)?);
        {
            let mut state = self.shared.state.lock();
            // Both may have changed while the ranges were computed.
            state.admit(&job)?;
            let job = NewJob {
                id: job.id,
                kind: job.kind,
                arena: job.arena,
                after,
                cutter,
            };
            state.jobs.add(job, Instant::now());
        }
        if !kvstore::fault!("thread::submit::skip_wake") {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    /// Drops the parts of these jobs that the engine has not been given. Each ends as cancelled once its other parts have
    /// ended. Does not wait; ids that are unknown or have ended are fine.
    pub fn cancel(&self, jobs: &[JobId]) {
        let mut state = self.shared.state.lock();
        state.jobs.cancel(jobs, Instant::now());
        drop(state);
        self.shared.ended.notify_all();
        // The last job of a detached arena may have ended.
        self.shared.work.notify_one();
    }

    /// Cancels these jobs and blocks until they have ended: afterwards no copy of them is running or will run. Never
    /// call it while holding something that a copy's compute mark waits for.
    pub fn fence(&self, jobs: &[JobId]) {
        self.cancel(jobs);
        if kvstore::fault!("thread::fence::skip_wait") {
            return;
        }
        let mut state = self.shared.state.lock();
        while jobs.iter().any(|&id| state.jobs.is_live(id)) {
            self.shared.ended.wait(&mut state);
        }
    }

    /// Blocks until every job submitted so far, and every one submitted meanwhile, has ended by itself.
    pub fn wait_idle(&self) {
        let mut state = self.shared.state.lock();
        while state.jobs.live() > 0 {
            self.shared.ended.wait(&mut state);
        }
    }

    /// The ends of jobs since the last call, in the order in which they ended; each job's exactly once.
    pub fn take_finished(&self) -> Vec<JobEnd> {
        if kvstore::fault!("thread::take_finished::late") {
            return Vec::new();
        }
        self.shared.state.lock().jobs.take_ended()
    }

    /// Jobs that have been submitted and have not ended.
    pub fn in_flight(&self) -> usize {
        self.shared.state.lock().jobs.live()
    }

    /// Whether the engine failed for good: every further call that could fail says why, with a
    /// [fatal](CopyError::is_fatal) error.
    pub fn is_dead(&self) -> bool {
        matches!(self.shared.state.lock().phase, Phase::Dead(_))
    }

    #[cfg(test)]
    pub(crate) fn rounds(&self) -> u64 {
        self.shared.state.lock().rounds
    }
}

impl Drop for CopyThread {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state.lock();
            if state.phase == Phase::Running {
                state.phase = Phase::Stopping;
            }
            state.jobs.cancel_all(Instant::now());
        }
        self.shared.ended.notify_all();
        self.shared.work.notify_one();
        if let Some(owner) = self.owner.take()
            && owner.join().is_err()
        {
            tracing::error!("the copy thread ended in a panic of its own");
        }
    }
}

impl State {
    fn alive(&self) -> Result<(), CopyError> {
        match &self.phase {
            Phase::Running => Ok(()),
            Phase::Stopping => Err(CopyError::EngineDead),
            Phase::Dead(cause) => Err(cause.clone()),
        }
    }

    fn admit(&self, job: &Job) -> Result<ArenaShard, CopyError> {
        self.alive()?;
        let attached = self
            .arenas
            .get(&job.arena)
            .filter(|attached| !attached.detaching)
            .ok_or(CopyError::UnknownArena(job.arena))?;
        self.jobs.admit(job.id)?;
        Ok(attached.shard.clone())
    }
}

#[cfg(test)]
mod tests;
