//! What an engine's scheduler calls, engine-neutral: `SchedulerHooks` over a [`GpuPool`].
//!
//! Every decision about the engine's own pool is made here, on the scheduler's thread, without waiting for anything:
//! messages to the sidecar are queued, its answers are found in the inbox at the next step, and a step with nothing new
//! costs one atomic load. Copies are described by a [`StepPlan`] that the worker executes.
//!
//! **Invariant** (fencing): a block is given back to the pool, and a lease to the sidecar, only after every rank has
//! reported the end of every copy that touches them.

mod jobs;
mod pool;
mod saves;
mod turns;
mod watch;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use kvstore::{BlockHash, GpuBlock, SlotId};
use sha2::{Digest, Sha256};

pub use self::pool::{BlockUse, GpuPool, Published};
pub use self::watch::Prefetch;
pub use crate::engine::client::Waker;

use self::jobs::{Job, Jobs, Work};
use self::saves::{Saves, Shipment};
use self::turns::{Answer, LeasedRun, Lookup, Turn, Turns};
use self::watch::{CopyOutcome, Fetch, Findings, NewWant, Watch, WatchLimits};
use crate::engine::client::{Inbound, SchedulerLink};
use crate::engine::frames::{
    CopySample, Figures, Hashes, Hello, Hook, HookSample, PAIRS_MAX, Role, ToEngine, ToSidecar,
};
use crate::engine::plan::{PlannedJob, Report, StepPlan};
use crate::planner::budget::PoolFacts;

/// Bytes of one rank that one prefetch or save job moves at most: 2.6 ms of a PCIe 4 link.
const CHUNK_BYTES: u64 = 64 << 20;
/// Blocks of one such job at most.
const CHUNK_BLOCKS_MAX: u64 = 256;
/// Longest that a request waits for the prefetch of its own blocks.
const COPY_PATIENCE: Duration = Duration::from_secs(2);
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
    /// Blocks handed out since the last step.
    pub handed_out: usize,
    /// Whether new copies may be started.
    pub mode: StepMode,
}

/// Whether the engine is at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepMode {
    /// As usual.
    Running,
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
    workers_ready: bool,
    fenced: bool,
}

/// The scheduler's side of Greenroom.
pub struct SchedulerHooks {
    config: HooksConfig,
    link: SchedulerLink,
    seen: u64,
    sequence: u64,
    connection: Connection,
    namespace: Option<[u8; 32]>,
    /// Epoch of the cache: a job of an earlier one never becomes readable on the GPU or in the arena.
    epoch: u64,
    turns: Turns,
    saves: Saves,
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
            return Err(HooksError::BadConfig { field: "gpu_hold_ratio", must_be: "between 0 and 1" });
        }
        if config.rank_bytes == 0 || config.ranks == 0 || config.block_tokens == 0 {
            return Err(HooksError::BadConfig { field: "geometry", must_be: "of at least one byte, rank and token" });
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
        let limits =
            WatchLimits { chunk: chunk_blocks(config.rank_bytes), hold_ratio: config.hold_ratio, prefetch: config.prefetch };
        Ok(Self {
            config,
            link,
            seen: 0,
            sequence: 1,
            connection: Connection::default(),
            namespace: None,
            epoch: 0,
            turns: Turns::default(),
            saves: Saves::default(),
            watch: Watch::new(limits),
            jobs: Jobs::default(),
            next: StepPlan::default(),
            work_due: false,
            figures: Figures::default(),
            figures_sent: None,
            totals: HookFigures::default(),
        })
    }

    /// Closes the namespace: `material` is everything besides the block hash that decides a block's bytes.
    /// Called once, with the first request at the latest.
    pub fn open_namespace(&mut self, material: &[u8]) {
        let id: [u8; 32] = Sha256::digest(material).into();
        self.namespace = Some(id);
        self.send(&ToSidecar::OpenNamespace { id });
    }

    /// Whether the namespace has been closed.
    pub fn has_namespace(&self) -> bool {
        self.namespace.is_some()
    }

    /// A request was enqueued: the lookup of its prompt's full blocks is sent ahead.
    pub fn turn_started(&mut self, request: &str, identity: Option<&str>, hashes: &[BlockHash], now: Instant) {
        self.receive(now);
        let (ticket, before) = self.turns.insert(request, hashes.to_vec());
        if let Some(mut before) = before {
            let mut released = Vec::new();
            before.give_back(&mut released);
            self.release(&released);
            self.send(&ToSidecar::TurnEnded { turn: before.ticket, hashes: Hashes(before.hashes) });
        }
        let sent = self.send(&ToSidecar::TurnStarted {
            turn: ticket,
            request: request.to_owned(),
            identity: identity.map(str::to_owned),
            hashes: Hashes(hashes.to_vec()),
        });
        if let (Some(sequence), Some(turn)) = (sent, self.turns.get_mut(request)) {
            turn.lookup = Lookup::Waiting { sequence, since: now, from: 0 };
        }
        self.time(Hook::TurnStarted, now);
    }

    /// A request carried a hint envelope.
    pub fn hints(&mut self, json: &str) {
        self.send(&ToSidecar::Hints { json: json.to_owned() });
    }

    /// How much of a prompt can be loaded beyond the `local` blocks that the GPU has, of `blocks_max` that are of use.
    /// Never waits; pending for [`HooksConfig::lookup_wait`] at most (longer only while its own blocks are being
    /// prefetched).
    pub fn match_prefix(&mut self, request: &str, local: usize, blocks_max: usize, now: Instant) -> Match {
        self.receive(now);
        let answer = self.weigh(request, local, blocks_max, now);
        self.time(Hook::MatchPrefix, now);
        answer
    }

    fn weigh(&mut self, request: &str, local: usize, blocks_max: usize, now: Instant) -> Match {
        let ready = self.is_ready();
        let Some(turn) = self.turns.get_mut(request) else { return Match::Miss };
        self.figures.prefetch_used += count_prefetched(turn, local);
        turn.local = local;
        let blocks_max = blocks_max.min(turn.hashes.len());
        if local < blocks_max && self.jobs.is_loading(&turn.hashes[local]) {
            let since = *turn.waiting_for_copy.get_or_insert(now);
            if now.saturating_duration_since(since) < COPY_PATIENCE {
                return Match::Pending;
            }
        }
        turn.waiting_for_copy = None;
        let wasted = std::mem::take(&mut turn.prefetched).len();
        self.figures.prefetch_wasted += u64::try_from(wasted).unwrap_or(u64::MAX);
        if !ready {
            return Match::Miss;
        }
        let overdue = matches!(turn.lookup, Lookup::Waiting { .. });
        let mut released = Vec::new();
        let answer = turn.answer(local, blocks_max, (now, self.config.lookup_wait), &mut released);
        let matched = match answer {
            Answer::Hit(n) => {
                if let Lookup::Ready(run) = &turn.lookup {
                    turn.offered = Some((local, run.clone()));
                }
                Match::Hit(n)
            }
            Answer::Pending => Match::Pending,
            Answer::Miss => {
                self.figures.timeouts += u64::from(overdue);
                self.totals.timeouts += u64::from(overdue);
                Match::Miss
            }
            Answer::Ask { from } => {
                let (ticket, hashes) = (turn.ticket, Hashes(turn.hashes[from..].to_vec()));
                let sent = self.send(&ToSidecar::Lookup { turn: ticket, for_session: false, hashes });
                match (sent, self.turns.get_mut(request)) {
                    (Some(sequence), Some(turn)) => {
                        turn.lookup = Lookup::Waiting { sequence, since: now, from };
                        Match::Pending
                    }
                    _ => Match::Miss,
                }
            }
        };
        self.release(&released);
        matched
    }

    /// Blocks were allocated for what the last [`Match::Hit`] offered: the demand load. An empty list means that the
    /// request starts without one.
    pub fn swap_in(&mut self, request: &str, gpu_blocks: &[GpuBlock]) {
        let Some(turn) = self.turns.get_mut(request) else { return };
        let offered = turn.offered.take();
        if gpu_blocks.is_empty() {
            let mut released = Vec::new();
            if matches!(turn.lookup, Lookup::Nothing { .. } | Lookup::Waiting { .. }) {
                let missed = turn.hashes.len().saturating_sub(turn.local);
                self.figures.match_misses += u64::try_from(missed).unwrap_or(u64::MAX);
                turn.lookup = Lookup::Idle;
            }
            turn.give_back(&mut released);
            self.release(&released);
            return;
        }
        let lookup = std::mem::replace(&mut turn.lookup, Lookup::Idle);
        let run = match (lookup, offered) {
            (Lookup::Ready(run), Some((local, offered))) if run == offered => Some((local, run)),
            (_, offered) => offered,
        };
        let pairs = run.as_ref().map(|(local, run)| {
            (*local..).zip(gpu_blocks).map_while(|(position, block)| Some((run.slot(position)?, *block))).collect::<Vec<_>>()
        });
        let boot = self.connection.boot.filter(|_| pairs.as_ref().is_some_and(|p| p.len() == gpu_blocks.len()));
        let hashes = run.as_ref().map_or(Vec::new(), |(local, _)| {
            turn.hashes[*local..].iter().take(gpu_blocks.len()).copied().collect()
        });
        let count = u64::try_from(gpu_blocks.len()).unwrap_or(u64::MAX);
        self.figures.match_hits += count;
        self.totals.demand_blocks += count;
        let work = Work::Demand {
            request: request.to_owned(),
            lease: run.map(|(_, run)| run.lease),
            blocks: gpu_blocks.to_vec(),
            hashes,
        };
        // Without slots the job is shipped all the same: the worker fails it, and the engine recomputes the blocks.
        let pairs = match (boot, pairs) {
            (Some(_), Some(pairs)) => pairs,
            _ => gpu_blocks.iter().map(|block| (SlotId(0), *block)).collect(),
        };
        self.ship(work, boot.unwrap_or(0), &pairs);
        self.work_due = true;
    }

    /// More blocks of a running request are full; `full` counts all of them.
    pub fn blocks_filled(&mut self, request: &str, full: usize, new: &[BlockHash]) {
        let Some(turn) = self.turns.get_mut(request) else { return };
        if full > turn.filled {
            let fresh = (full - turn.filled).min(new.len());
            self.saves.push(&new[new.len() - fresh..]);
            turn.filled = full;
            self.work_due = true;
        }
    }

    /// A request ended with these full blocks, which are about to be freed.
    pub fn turn_ended(&mut self, request: &str, hashes: &[BlockHash], now: Instant) {
        self.receive(now);
        let Some(mut turn) = self.turns.remove(request) else { return };
        self.saves.push(hashes.get(turn.filled..).unwrap_or_default());
        let mut released = Vec::new();
        turn.give_back(&mut released);
        self.release(&released);
        self.send(&ToSidecar::TurnEnded { turn: turn.ticket, hashes: Hashes(hashes.to_vec()) });
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
        self.receive(now);
        self.recheck_saves(pool);
        if step.mode == StepMode::Running && self.is_ready() {
            // Saves first: what they reference cannot be evicted by the fetch that follows.
            self.ship_saves(step.reserve, pool, now);
            let facts = PoolFacts { total: pool.total(), free: pool.free(), reserve: step.reserve };
            let findings = self.watch.step(facts, pool, now);
            self.act(findings);
        }
        self.work_due = false;
        self.report(pool, now);
        let plan = std::mem::take(&mut self.next);
        self.time(Hook::Plan, now);
        if plan.is_empty() { None } else { plan.encode().ok() }
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
                requests.extend(self.finish(job, pool));
            }
        }
        self.work_due = true;
        self.send_fenced();
        self.time(Hook::CopiesDone, now);
        Ok(requests)
    }

    /// The engine resets its cache (weights changed, sleep): nothing of before is ever readable again.
    pub fn reset(&mut self) {
        self.epoch += 1;
        self.send(&ToSidecar::Reset);
        for lease in self.saves.reset() {
            self.send(&ToSidecar::Settle { lease, commit: false });
        }
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

    /// Whether the engine must keep stepping: copies in flight, or something new to act on.
    pub fn pending(&self) -> bool {
        !self.jobs.is_empty() || self.is_due()
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
        self.connection.boot?;
        self.sequence += 1;
        self.link.send(self.sequence, message).ok().map(|()| self.sequence)
    }

    fn release(&mut self, leases: &[u64]) {
        for lease in leases {
            self.send(&ToSidecar::Release { lease: *lease });
        }
    }

    /// Takes in what has arrived.
    fn receive(&mut self, now: Instant) {
        let epoch = self.link.epoch();
        if epoch == self.seen {
            return;
        }
        self.seen = epoch;
        self.work_due = true;
        while let Some(inbound) = self.link.receive() {
            match inbound {
                Inbound::Connected { boot } => self.connected(boot),
                Inbound::Refused(reason) => tracing::error!(reason, "the sidecar refuses this engine"),
                Inbound::Lost => self.disconnected(),
                Inbound::Message { sequence, message } => self.message(sequence, message, now),
            }
        }
    }

    fn connected(&mut self, boot: u64) {
        let number = self.connection.number + 1;
        self.connection = Connection { number, boot: Some(boot), workers_ready: false, fenced: false };
        if let Some(id) = self.namespace {
            self.send(&ToSidecar::OpenNamespace { id });
        }
        self.send_fenced();
    }

    /// Every lease is void now; the sidecar keeps their slots until [`ToSidecar::Fenced`] or this process is gone.
    fn disconnected(&mut self) {
        self.connection.boot = None;
        self.connection.workers_ready = false;
        self.saves.disconnect();
        self.watch.disconnect();
        for turn in self.turns.iter_mut() {
            turn.lookup = Lookup::Idle;
            turn.session = None;
        }
    }

    /// Tells the sidecar, once per connection, that no copy of an earlier connection runs any more.
    fn send_fenced(&mut self) {
        if !self.connection.fenced && !self.jobs.any_before(self.connection.number) {
            self.connection.fenced = self.send(&ToSidecar::Fenced).is_some();
        }
    }

    fn message(&mut self, sequence: u64, message: ToEngine, now: Instant) {
        match message {
            ToEngine::Workers { ready } => self.connection.workers_ready = ready,
            ToEngine::Match { turn, for_session, session, lease, slots, ttl_ms } => {
                let slots = slots.into_iter().map(SlotId).collect();
                let expires = now + millis(ttl_ms);
                let run = lease.map(|lease| LeasedRun { lease, from: 0, slots, expires });
                if for_session {
                    let released = self.watch.found(turn, sequence, run);
                    self.release(released.as_slice());
                } else {
                    self.matched(sequence, (turn, session), run);
                }
            }
            ToEngine::Reserved { lease, slots, ttl_ms } => {
                if !self.saves.answered(sequence, lease, &slots, now + millis(ttl_ms))
                    && let Some(lease) = lease
                {
                    self.send(&ToSidecar::Settle { lease, commit: false });
                }
            }
            ToEngine::Want { session, want, wish, expected_ms, hold_ms, hashes, lease, slots, ttl_ms } => {
                let slots = slots.into_iter().map(SlotId).collect();
                let expires = now + millis(ttl_ms);
                let new = NewWant {
                    want,
                    wish,
                    expected: expected_ms.map(|ms| now + millis(ms)),
                    hold_until: now + millis(hold_ms),
                    chain: hashes.0,
                    lease: lease.map(|lease| LeasedRun { lease, from: 0, slots, expires }),
                };
                let released = self.watch.want(session, new);
                self.release(&released);
            }
            ToEngine::Welcome { .. } | ToEngine::Refused { .. } => {
                tracing::warn!("a second welcome from the sidecar is ignored");
            }
        }
    }

    /// The answer to a request's lookup; a late one gives its lease back.
    fn matched(&mut self, sequence: u64, (ticket, session): (u64, u64), run: Option<LeasedRun>) {
        let Some(turn) = self.turns.by_ticket_mut(ticket) else {
            return self.release(run.map(|run| run.lease).as_slice());
        };
        if turn.session.is_none() {
            turn.session = Some(session);
            let (fetched, late) = self.watch.turn_begins(session);
            turn.prefetched = fetched;
            self.figures.prefetch_late += u64::try_from(late).unwrap_or(u64::MAX);
        }
        let late = match turn.lookup {
            Lookup::Waiting { sequence: waiting, from, .. } if waiting == sequence => {
                turn.lookup = match run {
                    Some(run) => Lookup::Ready(LeasedRun { from, ..run }),
                    None => Lookup::Nothing { from },
                };
                None
            }
            _ => run,
        };
        self.release(late.map(|run| run.lease).as_slice());
    }

    /// Looks after the blocks of running saves before anything computes.
    fn recheck_saves(&mut self, pool: &mut dyn GpuPool) {
        for (id, job) in self.jobs.saves_mut() {
            if let Work::Save { blocks, fenced, .. } = &mut job.work
                && !saves::recheck(blocks, pool)
                && !std::mem::replace(fenced, true)
            {
                self.next.fence.push(id);
                self.figures.fenced += 1;
                self.totals.fenced += 1;
            }
        }
    }

    fn ship_saves(&mut self, reserve: usize, pool: &mut dyn GpuPool, now: Instant) {
        let chunk = chunk_blocks(self.config.rank_bytes);
        while self.jobs.count_saves() < saves::OUTSTANDING_MAX {
            let Some(grant) = self.saves.pop_grant() else { break };
            if now + Duration::from_secs(1) >= grant.expires {
                self.send(&ToSidecar::Settle { lease: grant.lease, commit: false });
                self.saves.push(&grant.entries.iter().map(|(hash, _)| *hash).collect::<Vec<_>>());
                continue;
            }
            let room = pool.free().saturating_sub(reserve);
            match saves::prepare(&grant, pool, room) {
                Shipment::Ready(blocks) => {
                    let pairs: Vec<_> = grant.entries.iter().zip(&blocks).map(|((_, slot), b)| (*slot, b.block)).collect();
                    let boot = self.connection.boot.unwrap_or(0);
                    self.totals.saved_blocks += u64::try_from(blocks.len()).unwrap_or(u64::MAX);
                    self.ship(Work::Save { lease: grant.lease, blocks, fenced: false }, boot, &pairs);
                }
                Shipment::Later => {
                    self.saves.unpop_grant(grant);
                    break;
                }
                Shipment::Gone(there) => {
                    self.send(&ToSidecar::Settle { lease: grant.lease, commit: false });
                    self.saves.push(&there);
                }
            }
        }
        while let Some(hashes) = self.saves.next_batch(chunk) {
            match self.send(&ToSidecar::Reserve { hashes: Hashes(hashes.clone()) }) {
                Some(sequence) => self.saves.asked(sequence, hashes),
                None => return self.saves.push(&hashes),
            }
        }
    }

    /// Carries out what the watch found.
    fn act(&mut self, findings: Findings) {
        self.release(&findings.released);
        for (session, hashes, from) in findings.ask {
            let lookup = ToSidecar::Lookup { turn: session, for_session: true, hashes: Hashes(hashes) };
            if let Some(sequence) = self.send(&lookup) {
                self.watch.asked(session, sequence, from);
            }
        }
        for outcome in findings.outcomes {
            self.send(&ToSidecar::Outcome {
                session: outcome.session,
                want: outcome.want,
                outcome: outcome.outcome,
                blocks: outcome.blocks,
                pairs: outcome.pairs.into_iter().take(PAIRS_MAX).collect(),
            });
        }
        if let Some(fetch) = findings.fetch {
            let pairs: Vec<_> = fetch.slots.iter().copied().zip(fetch.blocks.iter().copied()).collect();
            let boot = self.connection.boot.unwrap_or(0);
            self.totals.prefetch_blocks += u64::try_from(pairs.len()).unwrap_or(u64::MAX);
            self.ship(Work::Prefetch(fetch), boot, &pairs);
        }
    }

    /// Enters a job and puts it into the next plan.
    fn ship(&mut self, work: Work, boot: u64, pairs: &[(SlotId, GpuBlock)]) {
        let kind = work.kind();
        let id = self.jobs.insert(Job::new(work, self.epoch, self.connection.number, self.config.ranks));
        let pairs = pairs.iter().map(|(slot, block)| (slot.0, block.0)).collect();
        let job = PlannedJob { id, kind, boot, pairs };
        match kind {
            crate::engine::frames::CopyClass::Save => self.next.saves.push(job),
            _ => self.next.loads.push(job),
        }
    }

    /// All ranks have reported: commit or drop, publish or free. Returns the request that waited for it.
    fn finish(&mut self, job: Job, pool: &mut dyn GpuPool) -> Option<String> {
        let (kind, current) = (job.work.kind(), job.epoch == self.epoch);
        let same = job.connection == self.connection.number;
        let good = !job.failed && current;
        push_bounded(&mut self.figures.copies, CopySample { kind, bytes: job.bytes, micros: job.micros });
        self.totals.failed += u64::from(job.failed && current);
        match job.work {
            Work::Demand { request, lease, blocks, hashes } => {
                if !job.failed && !current {
                    // The bytes are old and the request still waits: fail the load, so that it is recomputed.
                    let pairs: Vec<_> = blocks.iter().map(|block| (SlotId(0), *block)).collect();
                    self.ship(Work::Demand { request, lease, blocks, hashes }, 0, &pairs);
                    return None;
                }
                self.release(lease.filter(|_| same).as_slice());
                Some(request)
            }
            Work::Prefetch(fetch) => {
                self.finish_fetch(&fetch, if good { CopyOutcome::Published } else { CopyOutcome::Lost }, pool);
                None
            }
            Work::Save { lease, blocks, .. } => {
                saves::finish(&blocks, pool);
                if same {
                    self.send(&ToSidecar::Settle { lease, commit: good });
                }
                None
            }
        }
    }

    fn finish_fetch(&mut self, fetch: &Fetch, outcome: CopyOutcome, pool: &mut dyn GpuPool) {
        if outcome == CopyOutcome::Published {
            let entries = fetch.blocks.iter().zip(&fetch.hashes).zip(&fetch.positions);
            let entries: Vec<Published> =
                entries.map(|((block, hash), position)| Published { block: *block, hash: *hash, position: *position }).collect();
            pool.publish(&entries);
        } else {
            self.figures.prefetch_cancelled += u64::try_from(fetch.blocks.len()).unwrap_or(u64::MAX);
        }
        let mut blocks = fetch.blocks.clone();
        blocks.reverse();
        pool.release(&blocks);
        let released = self.watch.fetched(fetch, outcome, pool);
        self.release(released.as_slice());
    }

    /// Sends news at once and figures now and then.
    fn report(&mut self, pool: &dyn GpuPool, now: Instant) {
        let news = self.watch.take_news();
        if !news.is_empty() {
            self.send(&ToSidecar::News(news));
        }
        if self.figures_sent.is_some_and(|at| now.saturating_duration_since(at) < FIGURES_EVERY) {
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

/// Prefetched positions below `local`: the request uses them. The others stay in the turn.
fn count_prefetched(turn: &mut Turn, local: usize) -> u64 {
    let before = turn.prefetched.len();
    turn.prefetched.retain(|position| usize::try_from(*position).is_ok_and(|p| p >= local));
    u64::try_from(before - turn.prefetched.len()).unwrap_or(u64::MAX)
}

fn push_bounded<T>(samples: &mut Vec<T>, sample: T) {
    if samples.len() < SAMPLES_MAX {
        samples.push(sample);
    }
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(u64::from(ms))
}

/// Blocks of one prefetch or save job.
fn chunk_blocks(rank_bytes: u64) -> usize {
    usize::try_from((CHUNK_BYTES / rank_bytes).clamp(1, CHUNK_BLOCKS_MAX)).unwrap_or(1)
}
