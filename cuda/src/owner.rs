//! The owner's side of the copy thread: the loop that calls the engine.
//!
//! Owns the engine and what is outstanding at it. Must never call the engine under the lock, wait without a reason to be
//! woken, or let a job end while one of its copies can still move a byte: also when the engine panics, it is dropped
//! (which waits for its copies) before the remaining jobs are reported as failed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{ArenaId, CopyBatch, CopyEngine, CopyError, Direction, JobId, Poll, Ticket};
use crate::ranges::ArenaShard;
use crate::schedule::{CopyLimits, Outstanding, Pacer};
use crate::sync::mpsc::SyncSender;
use crate::sync::thread::Builder;
use crate::thread::{ARENAS_MAX, Attach, Attached, Phase, Shared, State};

/// Lives on the owner thread.
pub(crate) struct Owner {
    engine: Box<dyn CopyEngine>,
    shared: Arc<Shared>,
    pacer: Pacer,
    sub_batch_bytes: u64,
    poll_interval: Duration,
    /// At the engine, oldest first.
    flights: Vec<Flight>,
    /// The last round of polls found nothing, so the next one may wait.
    quiet: bool,
}

struct Flight {
    ticket: Ticket,
    job: JobId,
    direction: Direction,
    bytes: u64,
}

/// One step of the owner, to be done without the lock.
enum Work {
    Attach(Attach),
    Detach(ArenaId, ArenaShard),
    Submit(JobId, CopyBatch),
    Poll,
    Stop,
}

/// What the owner thread runs. `started` is answered once.
pub(crate) fn run(mut owner: Owner, started: &SyncSender<Result<(), CopyError>>) {
    let shared = Arc::clone(&owner.shared);
    let name = owner.engine.name();
    let end = catch_unwind(AssertUnwindSafe(|| owner.serve(started)));
    match &end {
        Ok(Ok(())) => tracing::debug!(engine = name, "copy thread ends"),
        Ok(Err(error)) => tracing::error!(engine = name, %error, "copy engine is dead"),
        Err(_) => tracing::error!(engine = name, "copy engine panicked"),
    }
    // Dropping the engine waits for its copies, so it comes before any job is reported.
    if catch_unwind(AssertUnwindSafe(|| drop(owner))).is_err() {
        tracing::error!(engine = name, "copy engine panicked while it was dropped");
    }
    let cause = match end {
        Ok(Err(error)) => error,
        _ => CopyError::EngineDead,
    };
    let arenas = {
        let mut state = shared.state.lock();
        state.attaching.clear();
        state.jobs.fail_all(&cause, Instant::now());
        state.phase = Phase::Dead(cause);
        std::mem::take(&mut state.arenas)
    };
    shared.ended.notify_all();
    drop(arenas);
}

impl Owner {
    pub(crate) fn new(
        engine: Box<dyn CopyEngine>,
        shared: Arc<Shared>,
        limits: &CopyLimits,
    ) -> Self {
        Self {
            engine,
            shared,
            pacer: Pacer::new(limits),
            sub_batch_bytes: limits.sub_batch_bytes,
            poll_interval: limits.poll_interval,
            flights: Vec::new(),
            quiet: false,
        }
    }

    /// Serves until told to stop. An error means that the engine is dead.
    fn serve(&mut self, started: &SyncSender<Result<(), CopyError>>) -> Result<(), CopyError> {
        let start = self.engine.start();
        let failed = start.is_err();
        answer(started, start);
        if failed {
            return Ok(());
        }
        loop {
            match self.next_work() {
                Work::Attach(request) => self.attach(request)?,
                Work::Detach(id, shard) => {
                    self.engine.detach(id);
                    unmap(shard);
                }
                Work::Submit(job, batch) => self.submit(job, &batch)?,
                Work::Poll => self.poll()?,
                Work::Stop => return Ok(()),
            }
        }
    }

    /// Waits for the next step. Between two sub-batches everything that callers want comes first.
    fn next_work(&mut self) -> Work {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state.lock();
        loop {
            #[cfg(test)]
            {
                state.rounds += 1;
            }
            if let Some(request) = state.attaching.pop_front() {
                return Work::Attach(request);
            }
            if let Some((id, shard)) = state.take_detachable() {
                return Work::Detach(id, shard);
            }
            if let Some((job, batch)) = self.next_part(&mut state) {
                return Work::Submit(job, batch);
            }
            if self.flights.is_empty() {
                if state.phase == Phase::Stopping {
                    return Work::Stop;
                }
                shared.work.wait(&mut state);
            } else if self.quiet {
                self.quiet = false;
                shared.work.wait_for(&mut state, self.poll_interval);
            } else {
                return Work::Poll;
            }
        }
    }

    fn next_part(&mut self, state: &mut State) -> Option<(JobId, CopyBatch)> {
        let now = Instant::now();
        let kind = self
            .pacer
            .next(state.jobs.queued(), self.outstanding(), now)?;
        state.jobs.take_part(kind, self.sub_batch_bytes, now)
    }

    fn outstanding(&self) -> Outstanding {
        let mut count = Outstanding::default();
        for flight in &self.flights {
            match flight.direction {
                Direction::HostToDevice => count.loads += 1,
                Direction::DeviceToHost => count.saves += 1,
            }
        }
        count
    }

    fn attach(&mut self, request: Attach) -> Result<(), CopyError> {
        let Attach { id, shard, reply } = request;
        let mut result = self.shared.state.lock().may_attach(id);
        if result.is_ok() {
            result = self.engine.attach(id, &shard.map);
        }
        let fatal = result.clone().err().filter(CopyError::is_fatal);
        if result.is_ok() {
            let attached = Attached {
                shard,
                detaching: false,
            };
            self.shared.state.lock().arenas.insert(id, attached);
        }
        answer(&reply, result);
        fatal.map_or(Ok(()), Err)
    }

    fn submit(&mut self, job: JobId, batch: &CopyBatch) -> Result<(), CopyError> {
        match self.engine.submit(batch) {
            Ok(ticket) => {
                self.flights.push(Flight {
                    ticket,
                    job,
                    direction: batch.direction,
                    bytes: batch.bytes(),
                });
                Ok(())
            }
            Err(error) => self.settle(job, Err(error)),
        }
    }

    /// Polls oldest first up to the first one that has ended: host engines copy inside `poll`, and callers should not wait
    /// for more than one sub-batch to be heard.
    fn poll(&mut self) -> Result<(), CopyError> {
        for index in 0..self.flights.len() {
            let part = match self.engine.poll(self.flights[index].ticket) {
                Poll::Pending => continue,
                Poll::Done => Ok(self.flights[index].bytes),
                Poll::Failed(error) => Err(error),
            };
            let flight = self.flights.remove(index);
            return self.settle(flight.job, part);
        }
        self.quiet = true;
        Ok(())
    }

    fn settle(&mut self, job: JobId, part: Result<u64, CopyError>) -> Result<(), CopyError> {
        if let Err(error) = &part {
            if error.is_fatal() {
                return Err(error.clone());
            }
            tracing::warn!(engine = self.engine.name(), job = job.0, %error, "copy failed");
        }
        let mut state = self.shared.state.lock();
        state.jobs.part_ended(job, part, Instant::now());
        let ended = !state.jobs.is_live(job);
        drop(state);
        if ended && !kvstore::fault!("owner::settle::skip_wake") {
            self.shared.ended.notify_all();
        }
        Ok(())
    }
}

impl State {
    fn may_attach(&self, id: ArenaId) -> Result<(), CopyError> {
        match self.arenas.get(&id) {
            Some(attached) if attached.detaching => Err(CopyError::Busy),
            Some(_) => Err(CopyError::AlreadyAttached(id)),
            None if self.arenas.len() >= ARENAS_MAX => {
                Err(CopyError::TooManyArenas { limit: ARENAS_MAX })
            }
            None => Ok(()),
        }
    }

    /// Takes out an arena that was let go and has no live job.
    fn take_detachable(&mut self) -> Option<(ArenaId, ArenaShard)> {
        let (&id, _) = self
            .arenas
            .iter()
            .find(|(id, attached)| attached.detaching && !self.jobs.uses(**id))?;
        self.arenas.remove(&id).map(|attached| (id, attached.shard))
    }
}

/// Whoever asked may have given up; nothing depends on the answer then.
fn answer(reply: &SyncSender<Result<(), CopyError>>, result: Result<(), CopyError>) {
    if reply.send(result).is_err() {
        tracing::debug!("nobody waits for the copy thread's answer");
    }
}

/// Unmapping takes about 0.2 s per GiB of 4 KiB pages; loads from the next arena must not wait for it.
fn unmap(shard: ArenaShard) {
    let spawned = Builder::new()
        .name("greenroom-unmap".to_owned())
        .spawn(move || drop(shard));
    if let Err(error) = spawned {
        tracing::debug!(%error, "no thread to unmap on, unmapped on the copy thread");
    }
}
