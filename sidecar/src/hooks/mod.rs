//! What an engine's scheduler calls, engine-neutral: `SchedulerHooks` over a [`GpuPool`].
//!
//! Every decision about the engine's own pool is made here, on the scheduler's thread, without waiting for anything:
//! messages to the sidecar are queued, its answers are found in the inbox at the next step, and a step with nothing new
//! costs one atomic load. Copies are described by a [`StepPlan`] that the worker executes.
//!
//! **Invariant** (fencing): a block is given back to the pool, and a lease to the sidecar, only after every rank has
//! reported the end of every copy that touches them.

mod demand;
mod inbox;
mod jobs;
mod pool;
mod saves;
mod steps;
mod stored;
#[cfg(test)]
pub(crate) mod testkit;
mod turns;
mod watch;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kvstore::BlockHash;
use sha2::{Digest, Sha256};

pub use self::pool::{BlockUse, GpuPool, Published};
pub use self::watch::Prefetch;
pub use crate::engine::client::Waker;

use self::jobs::Jobs;
use self::saves::Saves;
use self::stored::Stored;
use self::turns::{Lookup, Turns};
use self::watch::{Touches, View, Watch, WatchLimits};
use crate::engine;
use crate::engine::client::{Outbox, SchedulerLink};
use crate::engine::frames::{Figures, Hashes, Hello, Hook, HookSample, Role, ToSidecar};
use crate::engine::plan::{Report, StepPlan};
pub use crate::planner::budget::Holders;
use crate::planner::budget::PoolFacts;

/// Bytes of one rank that one prefetch or save job moves at most: 2.6 ms of a PCIe 4 link.
const CHUNK_BYTES: u64 = 64 << 20;
/// Blocks of one such job at most: taking them and giving them back is work of one step each. Only blocks of less than a
/// MiB come to it.
const CHUNK_BLOCKS_MAX: u64 = 64;
/// Blocks of the pool that a step looks at or moves for waiting sessions, about, less those that it saves: each costs up to
/// 0.3 µs in vLLM.
const BUSY_STEP_BLOCKS: usize = 128;
/// The same in a step that has shipped saves.
const BUSY_STEP_LEAST: usize = 32;
/// The same in a step that no request waits for.
const IDLE_STEP_BLOCKS: usize = 16_384;
/// Most blocks of retired sessions that wait to be evicted; beyond it the oldest are left to age.
const RETIRED_BLOCKS: usize = 1 << 16;
/// Longest that a request waits for the prefetch of its own blocks.
const COPY_PATIENCE: Duration = Duration::from_secs(2);
/// Steps for which a load waits until there is room for it beside the requests that hold blocks; then it starts all the
/// same, as vLLM would have started the request without it.
pub const LOAD_STEPS_MAX: u32 = 200;
/// How often figures are sent, at most.
const FIGURES_EVERY: Duration = Duration::from_secs(1);
/// Samples kept between two reports.
const SAMPLES_MAX: usize = 512;

/// How the hooks are set up.
#[derive(Clone, Debug)]
pub struct HooksConfig {
    /// The sidecar's engine socket.
    pub socket: PathBuf,
    /// The engine's own id, the same in its scheduler and workers.
    pub engine: String,
    /// Bytes of one block on one rank.
    pub rank_bytes: u64,
    /// Tensor-parallel ranks.
    pub ranks: u32,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// Blocks in the engine's pool.
    pub gpu_blocks: u32,
    /// How long a request may wait for a lookup's answer.
    pub lookup_wait: Duration,
    /// Share of the pool that holds may protect, 0 to 1.
    pub hold_ratio: f64,
    /// Whether waiting sessions are brought back.
    pub prefetch: Prefetch,
}

/// The hooks could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum HooksError {
    /// A field is out of range.
    #[error("{field} must be {must_be}")]
    BadConfig {
        /// Which field.
        field: &'static str,
        /// What it must be.
        must_be: &'static str,
    },
    /// The link's thread could not be started.
    #[error("cannot start the thread that talks to the sidecar: {0}")]
    Thread(#[from] std::io::Error),
}

/// What the scheduler knows at one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Blocks that running, loading and startable requests still need, plus the next step's decode blocks.
    pub reserve: usize,
    /// Blocks handed out since the last step for tokens that are to be computed; the hooks know of those for loads.
    pub handed_out: usize,
    /// Whether new copies may be started, and how much may be looked at.
    pub mode: StepMode,
}

/// Whether the engine is at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepMode {
    /// Requests run or wait: the step is short.
    Busy,
    /// There are none: nobody waits for the scheduler.
    Idle,
    /// Paused or asleep: what runs may end, nothing is started.
    Paused,
}

/// Answer of [`SchedulerHooks::match_prefix`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// This many blocks beyond the GPU's own can be loaded.
    Hit(usize),
    /// Not known yet: ask again at the next step.
    Pending,
    /// None.
    Miss,
}

/// Totals since the hooks were made, for the engine's own metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HookFigures {
    /// Blocks that demand loads brought in.
    pub demand_blocks: u64,
    /// Blocks that prefetches brought in.
    pub prefetch_blocks: u64,
    /// Blocks saved.
    pub saved_blocks: u64,
    /// Prefetched blocks that a request used.
    pub prefetch_used: u64,
    /// Copies that had to be fenced.
    pub fenced: u64,
    /// Lookups not answered in time.
    pub timeouts: u64,
    /// Copies that failed.
    pub failed: u64,
    /// Waiting sessions.
    pub waiting: u64,
    /// Whether a sidecar is connected and every worker has its arena.
    pub ready: bool,
}

/// The connection as the hooks see it. Leases and jobs carry its number: those of an earlier one are void.
#[derive(Debug, Default)]
struct Connection {
    number: u64,
    boot: Option<u64>,
    outbox: Option<Outbox>,
    stored: Stored,
    workers_ready: bool,
    fenced: bool,
    /// Number of the `OpenNamespace` that is not answered yet: until it is, every lease that arrives belongs to an
    /// earlier namespace and is given back.
    opening: Option<u64>,
}

/// The scheduler's side of Greenroom.
pub struct SchedulerHooks {
    config: HooksConfig,
    link: SchedulerLink,
    seen: u64,
    sequence: u64,
    connection: Connection,
    namespace: Option<[u8; 32]>,
    /// A number that no other start of an engine has.
    start: u64,
    /// Epoch of the cache: a job of an earlier one never becomes readable on the GPU or in the arena.
    epoch: u64,
    turns: Turns,
    saves: Saves,
    /// Blocks of retired sessions that are still to be evicted from the GPU.
    retired: VecDeque<BlockHash>,
    watch: Watch,
    jobs: Jobs,
    next: StepPlan,
    work_due: bool,
    figures: Figures,
    figures_sent: Option<Instant>,
    totals: HookFigures,
}

impl SchedulerHooks {
    /// Sets the hooks up; the connection to the sidecar is made in the background. `waker` is called from another
    /// thread whenever a step of the engine could do something.
    ///
    /// # Errors
    /// [`HooksError`].
    pub fn connect(config: HooksConfig, waker: Waker) -> Result<Self, HooksError> {
        if !(0.0..=1.0).contains(&config.hold_ratio) {
            return Err(HooksError::BadConfig {
                field: "gpu_hold_ratio",
                must_be: "between 0 and 1",
            });
        }
        if config.rank_bytes == 0 || config.ranks == 0 || config.block_tokens == 0 {
            return Err(HooksError::BadConfig {
                field: "geometry",
                must_be: "of at least one byte, rank and token",
            });
        }
        let hello = Hello {
            role: Role::Scheduler,
            engine: config.engine.clone(),
            rank_bytes: config.rank_bytes,
            ranks: config.ranks,
            block_tokens: config.block_tokens,
            gpu_blocks: config.gpu_blocks,
        };
        let link = SchedulerLink::open(config.socket.clone(), hello, waker)?;
        Ok(Self::over(link, config))
    }

    /// Hooks over a link, with a configuration that has been checked.
    pub(crate) fn over(link: SchedulerLink, config: HooksConfig) -> Self {
        let limits = WatchLimits {
            chunk: chunk_blocks(config.rank_bytes),
            hold_ratio: config.hold_ratio,
            prefetch: config.prefetch,
        };
        Self {
            config,
            link,
            seen: 0,
            sequence: 1,
            connection: Connection::default(),
            namespace: None,
            start: engine::start_id(),
            epoch: 0,
            turns: Turns::default(),
            saves: Saves::default(),
            retired: VecDeque::new(),
            watch: Watch::new(limits),
            jobs: Jobs::default(),
            next: StepPlan::default(),
            work_due: false,
            figures: Figures::default(),
            figures_sent: None,
            totals: HookFigures::default(),
        }
    }

    /// Closes the namespace: `material` is everything besides the block hash that decides a block's bytes.
    /// Called once, with the first request at the latest.
    pub fn open_namespace(&mut self, material: &[u8]) {
        let id = Sha256::digest(material).into();
        let id = match self.epoch {
            0 => id,
            _ => self.own_namespace(id),
        };
        self.enter_namespace(id);
    }

    /// After a reset the files on disk no longer tell what the weights are: from then on the namespace is this start's
    /// alone. A later start of the same engine may have other weights at the same epoch.
    fn own_namespace(&self, id: [u8; 32]) -> [u8; 32] {
        let mut own = Sha256::new();
        own.update(id);
        own.update(self.start.to_le_bytes());
        own.update(self.epoch.to_le_bytes());
        own.finalize().into()
    }

    pub(in crate::hooks) fn enter_namespace(&mut self, id: [u8; 32]) {
        self.namespace = Some(id);
        self.connection.opening = self.send(&ToSidecar::OpenNamespace { id });
    }

    /// Whether the namespace has been closed.
    pub fn has_namespace(&self) -> bool {
        self.namespace.is_some()
    }

    /// A request was enqueued: the lookup of its prompt's full blocks is sent ahead.
    pub fn turn_started(
        &mut self,
        request: &str,
        identity: Option<&str>,
        hashes: &[BlockHash],
        now: Instant,
    ) {
        self.receive();
        let (ticket, before) = self.turns.insert(request, hashes.to_vec());
        if let Some(mut before) = before {
            let mut released = Vec::new();
            before.give_back(&mut released);
            self.release(&released);
            self.send(&ToSidecar::TurnEnded {
                turn: before.ticket,
                hashes: Hashes(before.hashes),
            });
        }
        let sent = self.send(&ToSidecar::TurnStarted {
            turn: ticket,
            request: request.to_owned(),
            identity: identity.map(str::to_owned),
            hashes: Hashes(hashes.to_vec()),
        });
        if let (Some(sequence), Some(turn)) = (sent, self.turns.get_mut(request)) {
            turn.lookup = Lookup::Waiting {
                sequence,
                since: now,
                from: 0,
            };
        }
        self.time(Hook::TurnStarted, now);
    }

    /// A request carried a hint envelope.
    pub fn hints(&mut self, json: &str) {
        self.send(&ToSidecar::Hints {
            json: json.to_owned(),
        });
    }

    /// How much of a prompt can be loaded beyond the `local` blocks that the GPU has, of `blocks_max` that are of use.
    /// Never waits; pending for [`HooksConfig::lookup_wait`] at most. Longer only while its own blocks are being
    /// prefetched, and, of what can be loaded, for [`LOAD_STEPS_MAX`] steps at most in which there is no room for it beside
    /// the `holders`.
    pub fn match_prefix(
        &mut self,
        request: &str,
        (local, blocks_max): (usize, usize),
        holders: Holders,
        now: Instant,
    ) -> Match {
        self.receive();
        let answer = self.weigh(request, (local, blocks_max), holders, now);
        self.time(Hook::MatchPrefix, now);
        answer
    }

    /// Whether the sidecar has told to which session a request belongs. No request waits for that, but simulated engines
    /// do, whose steps take no time.
    pub fn knows_session(&mut self, request: &str) -> bool {
        self.receive();
        let turn = self.turns.get_mut(request);
        turn.is_some_and(|turn| turn.session.is_some())
    }

    /// More blocks of a running request are full; `full` counts all of them.
    pub fn blocks_filled(&mut self, request: &str, full: usize, new: &[BlockHash]) {
        let Some(turn) = self.turns.get_mut(request) else {
            return;
        };
        // A preempted request fills its blocks anew: what was saved is known to the sidecar, what was lost is saved now.
        self.saves.push(new);
        turn.filled = full;
        self.work_due = true;
    }

    /// A request ended with these full blocks, which are about to be freed.
    pub fn turn_ended(&mut self, request: &str, hashes: &[BlockHash], now: Instant) {
        self.receive();
        let Some(mut turn) = self.turns.remove(request) else {
            return;
        };
        self.saves
            .push(hashes.get(turn.filled..).unwrap_or_default());
        let mut released = Vec::new();
        turn.give_back(&mut released);
        self.release(&released);
        self.send(&ToSidecar::TurnEnded {
            turn: turn.ticket,
            hashes: Hashes(hashes.to_vec()),
        });
        self.work_due = true;
        self.time(Hook::TurnEnded, now);
    }

    /// One engine step. Returns the plan for the workers, encoded, or `None` when there is nothing for them; then, with
    /// nothing in flight and nothing new, it has made no system call and not looked at the pool.
    pub fn plan(&mut self, step: Step, pool: &mut dyn GpuPool, now: Instant) -> Option<Vec<u8>> {
        self.watch.count(step.handed_out);
        if !self.is_due() && self.jobs.is_empty() && !self.watch.needs_step(pool.total()) {
            return None;
        }
        self.receive();
        self.recheck_saves(pool);
        let active = step.mode != StepMode::Paused;
        if active && self.is_ready() {
            // Saves first: what they reference cannot be evicted by the fetch that follows.
            let saved =
                self.ship_saves(step.reserve, pool, now) + self.evict_retired(step.mode, pool);
            let facts = PoolFacts {
                total: pool.total(),
                free: pool.free(),
                reserve: step.reserve,
            };
            let touches = Touches::new(match step.mode {
                StepMode::Idle => IDLE_STEP_BLOCKS,
                StepMode::Busy | StepMode::Paused => {
                    BUSY_STEP_BLOCKS.saturating_sub(saved).max(BUSY_STEP_LEAST)
                }
            });
            let findings = self.watch.step(&mut View {
                facts,
                pool: &mut *pool,
                saves: &self.saves,
                now,
                touches,
            });
            self.act(findings);
            self.work_due = self.watch.is_unfinished() || !self.retired.is_empty();
        } else if active {
            self.work_due = false;
        }
        self.report(pool, now);
        let plan = std::mem::take(&mut self.next);
        self.time(Hook::Plan, now);
        if plan.is_empty() {
            None
        } else {
            plan.encode().ok()
        }
    }

    /// One rank's report. Returns the requests whose demand load has ended with it, each once.
    ///
    /// # Errors
    /// If the bytes are not a report.
    pub fn copies_done(
        &mut self,
        report: &[u8],
        pool: &mut dyn GpuPool,
        now: Instant,
    ) -> Result<Vec<String>, crate::engine::frames::FrameError> {
        let report = Report::decode(report)?;
        let mut requests = Vec::new();
        for ended in &report.ended {
            if let Some(job) = self.jobs.rank_done(ended) {
                requests.extend(self.finish(job, pool, now));
            }
        }
        self.work_due = true;
        self.send_fenced();
        self.time(Hook::CopiesDone, now);
        Ok(requests)
    }

    /// The engine resets its cache (weights changed, sleep): nothing of before is ever readable again.
    pub fn reset(&mut self) {
        if kvstore::fault!("hooks::reset::skip") {
            return;
        }
        self.epoch += 1;
        self.send(&ToSidecar::Reset);
        if let Some(id) = self.namespace {
            self.enter_namespace(self.own_namespace(id));
        }
        for lease in self.saves.reset() {
            self.abort(lease);
        }
        self.retired.clear();
        let mut released = self.watch.clear();
        for turn in self.turns.iter_mut() {
            turn.give_back(&mut released);
            turn.lookup = Lookup::Idle;
            turn.offered = None;
        }
        self.release(&released);
        self.next.cancel.extend(self.jobs.ids());
        self.work_due = true;
    }

    /// Whether the engine must keep stepping: copies in flight, or something to act on. A paused engine acts on nothing,
    /// and is asked here again when it goes on: what has arrived is taken in meanwhile and kept until then.
    pub fn pending(&mut self, paused: bool) -> bool {
        if paused {
            self.receive();
        }
        !self.jobs.is_empty() || (!paused && self.is_due())
    }

    /// Whether copies are in flight.
    pub fn copies_in_flight(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Whether blocks will become free when running copies end.
    pub fn holds_references(&self) -> bool {
        self.jobs.hold_references()
    }

    /// Totals since the hooks were made.
    pub fn figures(&self) -> HookFigures {
        HookFigures {
            waiting: u64::try_from(self.watch.len()).unwrap_or(u64::MAX),
            // With what the next report takes along.
            prefetch_used: self.totals.prefetch_used + self.figures.prefetch_used,
            ready: self.is_ready(),
            ..self.totals
        }
    }

    /// Ends the connection. The caller must not hold a lock that the waker takes.
    pub fn close(&mut self) {
        self.link.close();
    }

    fn is_ready(&self) -> bool {
        self.connection.boot.is_some() && self.connection.workers_ready && self.namespace.is_some()
    }

    fn is_due(&self) -> bool {
        self.work_due || self.seen != self.link.epoch()
    }

    /// Queues a message; returns its number, or `None` without a connection.
    fn send(&mut self, message: &ToSidecar) -> Option<u64> {
        let outbox = self.connection.outbox.as_ref()?;
        self.sequence += 1;
        outbox
            .send(self.sequence, message)
            .ok()
            .map(|()| self.sequence)
    }

    fn release(&mut self, leases: &[u64]) {
        for lease in leases {
            self.send(&ToSidecar::Release { lease: *lease });
        }
    }

    /// Gives a reservation back without a result.
    fn abort(&mut self, lease: u64) {
        self.send(&ToSidecar::Settle {
            lease,
            commit: false,
        });
    }

    /// Sends news at once; figures now and then, and what is counted before the engine may stop stepping.
    fn report(&mut self, pool: &dyn GpuPool, now: Instant) {
        let news = self.watch.take_news();
        if !news.is_empty() {
            self.send(&ToSidecar::News(news));
        }
        let last = self.jobs.is_empty() && !self.work_due && self.figures.count_anything();
        let recent = self
            .figures_sent
            .is_some_and(|at| now.saturating_duration_since(at) < FIGURES_EVERY);
        if recent && !last {
            return;
        }
        self.figures_sent = Some(now);
        self.figures.gpu_free = u32::try_from(pool.free()).unwrap_or(u32::MAX);
        let figures = std::mem::take(&mut self.figures);
        self.totals.prefetch_used += figures.prefetch_used;
        self.send(&ToSidecar::Figures(Box::new(figures)));
    }

    fn time(&mut self, hook: Hook, since: Instant) {
        let micros = u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX);
        push_bounded(&mut self.figures.hooks, HookSample { hook, micros });
    }
}

fn push_bounded<T>(samples: &mut Vec<T>, sample: T) {
    if samples.len() < SAMPLES_MAX {
        samples.push(sample);
    }
}

/// Blocks of one prefetch or save job.
fn chunk_blocks(rank_bytes: u64) -> usize {
    usize::try_from((CHUNK_BYTES / rank_bytes).clamp(1, CHUNK_BLOCKS_MAX)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hooks without a sidecar; all are starts of one engine.
    fn hooks() -> SchedulerHooks {
        let config = HooksConfig {
            socket: "/nonexistent/greenroom.sock".into(),
            ..testkit::config()
        };
        SchedulerHooks::connect(config, Box::new(|| {})).expect("a thread")
    }

    #[test]
    fn a_namespace_is_shared_until_the_first_reset() {
        let [mut first, mut second] = [hooks(), hooks()];
        for hooks in [&mut first, &mut second] {
            hooks.open_namespace(b"weights");
        }
        assert_eq!(first.namespace, second.namespace);
        for hooks in [&mut first, &mut second] {
            hooks.reset();
        }
        assert_ne!(first.namespace, second.namespace);
    }

    #[test]
    fn weights_that_change_before_the_first_request_are_not_those_of_the_files() {
        let [mut changed, mut other] = [hooks(), hooks()];
        changed.reset();
        for hooks in [&mut changed, &mut other] {
            hooks.open_namespace(b"weights");
        }
        assert_ne!(changed.namespace, other.namespace);
    }
}
