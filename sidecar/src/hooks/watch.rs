//! Waiting sessions: which of them are held on the GPU, which are brought back, and what stands against it.
//!
//! The sidecar says how much it wants each session ([`Wish`]); this file looks at the pool and decides what to fetch now.
//! A hold takes no reference: it re-queues blocks at the safe end of the free list, again after every so many blocks
//! handed out. A fetch takes a chunk of blocks off the head of the free list, never one that a session expected back
//! no later still has there (no ping-pong), and never below the reserve ([`budget::admit`]).

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use kvstore::{BlockHash, GpuBlock, SlotId};

use super::pool::{GpuPool, requeue};
use super::turns::LeasedRun;
use crate::engine::frames::{Residence, SessionNews, WantOutcome, Wish};
use crate::planner::budget::{self, Admission, Demand, PoolFacts};

/// How long after its expected return a session that is back stays protected.
const READY_GRACE: Duration = Duration::from_secs(5);
/// Holds and residence are looked at again after this share of the pool has been handed out (one part in ...).
const REFRESH_PART: usize = 16;
/// Most blocks that are re-queued for holds in one step.
const REFRESH_BLOCKS: usize = 256;

/// A want as it arrived.
#[derive(Clone, Debug)]
pub(super) struct NewWant {
    pub(super) want: u64,
    pub(super) wish: Wish,
    pub(super) expected: Option<Instant>,
    pub(super) hold_until: Instant,
    pub(super) chain: Vec<BlockHash>,
    pub(super) lease: Option<LeasedRun>,
}

/// One waiting session.
#[derive(Debug)]
struct Waiting {
    want: u64,
    /// Whether the want's outcome has been sent.
    answered: bool,
    wish: Wish,
    expected: Option<Instant>,
    hold_until: Instant,
    chain: Vec<BlockHash>,
    run: Option<LeasedRun>,
    /// The lookup that is out, if any: its number, and the position that it starts from.
    asked: Option<(u64, usize)>,
    /// Whether the pool may have changed under it since it was last examined.
    dirty: bool,
    /// It was examined and found no room.
    deferred: bool,
    /// The host tier does not have what is missing.
    gone: bool,
    loading: bool,
    residence: Residence,
    gpu_blocks: u32,
    /// Positions fetched since its last turn.
    fetched: Vec<u32>,
    pairs: Vec<(u32, u32)>,
}

/// A chunk to copy in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fetch {
    pub(super) session: u64,
    pub(super) blocks: Vec<GpuBlock>,
    pub(super) slots: Vec<SlotId>,
    pub(super) hashes: Vec<BlockHash>,
    pub(super) positions: Vec<u32>,
    /// What protects the slots until the chunk has ended.
    pub(super) lease: u64,
}

/// What the watch wants done after a step.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// At most one chunk to copy in.
    pub(super) fetch: Option<Fetch>,
    /// Lookups to send: (session, hashes from the first missing block on, position of that block).
    pub(super) ask: Vec<(u64, Vec<BlockHash>, usize)>,
    /// Leases to give back.
    pub(super) released: Vec<u64>,
    /// Outcomes to report.
    pub(super) outcomes: Vec<OutcomeOf>,
}

/// What became of a want.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OutcomeOf {
    pub(super) session: u64,
    pub(super) want: u64,
    pub(super) outcome: WantOutcome,
    /// Blocks on the GPU or on their way.
    pub(super) blocks: u32,
    /// (slot, GPU block) of the chunk that was submitted.
    pub(super) pairs: Vec<(u32, u32)>,
}

/// How the watch is set up.
#[derive(Clone, Copy, Debug)]
pub(super) struct WatchLimits {
    /// Blocks of one chunk.
    pub(super) chunk: usize,
    /// Share of the pool that holds may protect.
    pub(super) hold_ratio: f64,
    /// Whether anything is brought back at all.
    pub(super) prefetch: Prefetch,
}

/// Whether waiting sessions are brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// As the planner wants it.
    On,
    /// Holds only; every load waits for its request.
    Off,
}

/// All waiting sessions of this engine.
#[derive(Debug)]
pub(super) struct Watch {
    limits: WatchLimits,
    table: HashMap<u64, Waiting>,
    /// Which waiting sessions have a block in their chain.
    owners: HashMap<BlockHash, Vec<u64>>,
    /// Blocks handed out since holds were last looked at.
    handed_out: usize,
    refresh: Vec<u64>,
    news: Vec<SessionNews>,
    /// A chunk is being copied.
    fetching: bool,
    /// Blocks beyond the reserve when somebody was last deferred: with more than that it is worth another look.
    room_when_deferred: usize,
}

impl Watch {
    pub(super) fn new(limits: WatchLimits) -> Self {
        Self {
            limits,
            table: HashMap::new(),
            owners: HashMap::new(),
            handed_out: 0,
            refresh: Vec::new(),
            news: Vec::new(),
            fetching: false,
            room_when_deferred: usize::MAX,
        }
    }

    /// Takes a want; returns leases that are no longer needed.
    pub(super) fn want(&mut self, session: u64, new: NewWant) -> Vec<u64> {
        let old = self.remove(session);
        let mut released: Vec<u64> = Vec::new();
        let loading = old.as_ref().is_some_and(|w| w.loading);
        // Slots belong to the chain that they were leased for; a running chunk has its lease with it.
        released.extend(
            old.as_ref()
                .and_then(|w| w.run.as_ref())
                .map(|run| run.lease),
        );
        if new.wish == Wish::Nothing && !loading {
            released.extend(new.lease.map(|run| run.lease));
            return released;
        }
        for hash in &new.chain {
            self.owners.entry(*hash).or_default().push(session);
        }
        let waiting = Waiting {
            want: new.want,
            answered: false,
            wish: new.wish,
            expected: new.expected,
            hold_until: new.hold_until,
            chain: new.chain,
            run: new.lease,
            asked: None,
            dirty: true,
            deferred: false,
            gone: false,
            loading,
            residence: old.as_ref().map_or(Residence::Hold, |w| w.residence),
            gpu_blocks: old.as_ref().map_or(0, |w| w.gpu_blocks),
            fetched: old.map(|w| w.fetched).unwrap_or_default(),
            pairs: Vec::new(),
        };
        self.table.insert(session, waiting);
        released
    }

    fn remove(&mut self, session: u64) -> Option<Waiting> {
        let waiting = self.table.remove(&session)?;
        for hash in &waiting.chain {
            if let Some(owners) = self.owners.get_mut(hash) {
                owners.retain(|owner| *owner != session);
                if owners.is_empty() {
                    self.owners.remove(hash);
                }
            }
        }
        Some(waiting)
    }

    /// Positions that were fetched for a session whose turn begins now; and how many more were still on their way.
    pub(super) fn turn_begins(&mut self, session: u64) -> (Vec<u32>, usize) {
        self.table.get_mut(&session).map_or((Vec::new(), 0), |w| {
            let late = if w.loading {
                w.pairs.len().saturating_sub(w.fetched.len())
            } else {
                0
            };
            (std::mem::take(&mut w.fetched), late)
        })
    }

    /// The answer to a lookup for a session. Gives the run back if nobody wants it any more.
    pub(super) fn found(
        &mut self,
        session: u64,
        sequence: u64,
        run: Option<LeasedRun>,
    ) -> Option<u64> {
        let waiting = self.table.get_mut(&session);
        match waiting.and_then(|w| Some((w.asked.filter(|(asked, _)| *asked == sequence)?.1, w))) {
            Some((from, waiting)) => {
                let run = run.map(|run| LeasedRun { from, ..run });
                waiting.asked = None;
                waiting.dirty = true;
                waiting.gone = run.is_none();
                let old = if run.is_some() {
                    std::mem::replace(&mut waiting.run, run)
                } else {
                    None
                };
                old.map(|run| run.lease)
            }
            None => run.map(|run| run.lease),
        }
    }

    /// A chunk has ended. Returns a lease that the session has got meanwhile and does not need.
    pub(super) fn fetched(
        &mut self,
        fetch: &Fetch,
        outcome: CopyOutcome,
        pool: &mut dyn GpuPool,
    ) -> Option<u64> {
        self.fetching = false;
        let waiting = self.table.get_mut(&fetch.session)?;
        waiting.loading = false;
        waiting.dirty = true;
        match outcome {
            CopyOutcome::Published => {
                let same = |(position, hash): (&u32, &BlockHash)| {
                    usize::try_from(*position).is_ok_and(|at| waiting.chain.get(at) == Some(hash))
                };
                if fetch.positions.iter().zip(&fetch.hashes).all(same) {
                    waiting.fetched.extend(&fetch.positions);
                }
                // Prefix and suffix go to the safe end together, or the prefix would be evicted first.
                requeue(pool, &waiting.chain);
            }
            CopyOutcome::Lost => waiting.gone = true,
        }
        if waiting.wish == Wish::Nothing {
            return self
                .remove(fetch.session)
                .and_then(|w| w.run)
                .map(|run| run.lease);
        }
        None
    }

    /// Forgets everything; returns leases to give back. A running chunk ends as one that nobody waits for.
    pub(super) fn clear(&mut self) -> Vec<u64> {
        self.owners.clear();
        self.refresh.clear();
        self.table
            .drain()
            .filter_map(|(_, w)| w.run)
            .map(|run| run.lease)
            .collect()
    }

    /// Leases are void (the connection is gone).
    pub(super) fn disconnect(&mut self) {
        self.clear();
    }

    /// What has moved since the last call.
    pub(super) fn take_news(&mut self) -> Vec<SessionNews> {
        std::mem::take(&mut self.news)
    }

    /// Waiting sessions.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Notes which lookup is out for a session.
    pub(super) fn asked(&mut self, session: u64, sequence: u64, from: usize) {
        if let Some(waiting) = self.table.get_mut(&session) {
            waiting.asked = Some((sequence, from));
        }
    }

    /// Counts blocks that have left the free list.
    pub(super) fn count(&mut self, handed_out: usize) {
        self.handed_out += handed_out;
    }

    /// Whether [`Self::step`] has something to do on this step although nothing has arrived.
    pub(super) fn needs_step(&self, total: usize) -> bool {
        !self.table.is_empty()
            && (self.handed_out >= refresh_blocks(total)
                || !self.refresh.is_empty()
                || self.room_when_deferred != usize::MAX)
    }

    /// One step: holds refreshed, at most one chunk chosen.
    pub(super) fn step(
        &mut self,
        facts: PoolFacts,
        pool: &mut dyn GpuPool,
        now: Instant,
    ) -> Findings {
        let mut findings = Findings::default();
        if self.table.is_empty() {
            return findings;
        }
        if self.handed_out >= refresh_blocks(facts.total) {
            self.handed_out = 0;
            findings.released.extend(self.let_go(now));
            self.plan_refresh(facts, now);
            for waiting in self.table.values_mut() {
                waiting.dirty = true;
            }
        }
        self.refresh_holds(pool);
        let room = facts.free.saturating_sub(facts.reserve);
        if room > self.room_when_deferred {
            self.room_when_deferred = usize::MAX;
            for waiting in self.table.values_mut().filter(|w| w.deferred) {
                (waiting.dirty, waiting.deferred) = (true, false);
            }
        }
        if !self.fetching && self.limits.prefetch == Prefetch::On {
            self.choose_fetch(facts, pool, now, &mut findings);
        }
        if self.table.values().any(|w| w.deferred) {
            self.room_when_deferred = self.room_when_deferred.min(room);
        }
        findings
    }

    /// Forgets sessions that were only held, once their hold is over; returns their leases.
    fn let_go(&mut self, now: Instant) -> Vec<u64> {
        let over = |w: &Waiting| w.wish == Wish::Keep && w.hold_until <= now && !w.loading;
        let keys: Vec<u64> = self
            .table
            .iter()
            .filter(|(_, w)| over(w))
            .map(|(key, _)| *key)
            .collect();
        let gone = keys.into_iter().filter_map(|key| {
            let waiting = self.remove(key)?;
            let (residence, gpu_blocks) = (Residence::Shadow, waiting.gpu_blocks);
            self.news.push(SessionNews {
                session: key,
                residence,
                gpu_blocks,
            });
            waiting.run.map(|run| run.lease)
        });
        gone.collect()
    }

    /// Which holds to refresh: nearest expected return first until the budget of unique blocks is spent, re-queued in
    /// the opposite order so that the nearest ends up safest.
    fn plan_refresh(&mut self, facts: PoolFacts, now: Instant) {
        let protected = |w: &Waiting| {
            let ready_until = w
                .expected
                .filter(|_| w.residence == Residence::Ready)
                .map(|at| at + READY_GRACE);
            w.wish != Wish::Nothing
                && (w.hold_until > now || ready_until.is_some_and(|until| until > now))
        };
        let mut held: Vec<(&u64, &Waiting)> =
            self.table.iter().filter(|(_, w)| protected(w)).collect();
        held.sort_by_key(|(key, w)| (w.expected.is_none(), w.expected, **key));
        let budget = budget_blocks(facts.total, self.limits.hold_ratio);
        let mut unique: HashSet<BlockHash> = HashSet::new();
        // Nearest first here; `pop` then takes the farthest first.
        let within = held.into_iter().take_while(|(_, waiting)| {
            unique.extend(&waiting.chain);
            unique.len() <= budget
        });
        self.refresh = within.map(|(key, _)| *key).collect();
    }

    fn refresh_holds(&mut self, pool: &mut dyn GpuPool) {
        let mut blocks = 0;
        while blocks < REFRESH_BLOCKS {
            let Some(key) = self.refresh.pop() else {
                return;
            };
            let Some(waiting) = self.table.get(&key) else {
                continue;
            };
            blocks += waiting.chain.len();
            requeue(pool, &waiting.chain);
        }
    }

    fn choose_fetch(
        &mut self,
        facts: PoolFacts,
        pool: &mut dyn GpuPool,
        now: Instant,
        findings: &mut Findings,
    ) {
        let mut order: Vec<(Wish, Option<Instant>, u64)> = self
            .table
            .iter()
            .filter(|(_, w)| {
                matches!(w.wish, Wish::Now | Wish::WhenRoom)
                    && w.dirty
                    && w.asked.is_none()
                    && !w.loading
            })
            .map(|(key, w)| (w.wish, w.expected, *key))
            .collect();
        // `Now` before `WhenRoom`, then the nearest expected return; unknown last.
        order.sort_by_key(|(wish, expected, key)| {
            (*wish != Wish::Now, expected.is_none(), *expected, *key)
        });
        for (wish, _, key) in order {
            if wish == Wish::WhenRoom && budget::is_busy(facts) {
                return;
            }
            self.examine(key, facts, (pool, now), findings);
            if findings.fetch.is_some() {
                self.fetching = true;
                return;
            }
        }
    }

    /// Looks at one session and fills in what follows from it.
    fn examine(
        &mut self,
        key: u64,
        facts: PoolFacts,
        (pool, now): (&mut dyn GpuPool, Instant),
        findings: &mut Findings,
    ) {
        let Some(waiting) = self.table.get_mut(&key) else {
            return;
        };
        waiting.dirty = false;
        let found = pool.lookup(&waiting.chain);
        let leading = found.iter().take_while(|block| block.is_some()).count();
        waiting.note(key, leading, &mut self.news);
        if leading == waiting.chain.len() {
            requeue(pool, &waiting.chain);
            waiting.answer(key, WantOutcome::Accepted, &mut findings.outcomes);
            findings
                .released
                .extend(waiting.run.take().map(|run| run.lease));
            return;
        }
        let run = waiting
            .run
            .as_ref()
            .filter(|run| run.is_usable(now) && run.from <= leading && leading < run.end());
        let Some(run) = run else {
            if waiting.gone {
                waiting.answer(key, WantOutcome::Missing, &mut findings.outcomes);
            } else {
                findings
                    .ask
                    .push((key, waiting.chain[leading..].to_vec(), leading));
            }
            return;
        };
        let end = run.end().min(waiting.chain.len());
        let missing: Vec<usize> = (leading..end).filter(|i| found[*i].is_none()).collect();
        let resident: Vec<GpuBlock> = found[..end].iter().copied().flatten().collect();
        let kept = pool
            .uses(&resident)
            .iter()
            .filter(|u| !u.referenced)
            .count();
        let demand = Demand {
            missing: missing.len(),
            kept,
            chunk: self.limits.chunk,
        };
        let count = match budget::admit(facts, demand) {
            Admission::Fetch(count) => count,
            Admission::Later => return waiting.defer(key, WantOutcome::Deferred, findings),
            Admission::TooLarge => return waiting.defer(key, WantOutcome::Clipped, findings),
        };
        // Its own blocks leave the head first, so that fetching the suffix cannot evict the prefix.
        requeue(pool, &waiting.chain[..end]);
        let expected = waiting.expected;
        let count = self.spared(key, expected, pool.free_list(count));
        let Some(waiting) = self.table.get_mut(&key) else {
            return;
        };
        let Some(blocks) = (count > 0).then(|| pool.take(count)).flatten() else {
            return waiting.defer(key, WantOutcome::Deferred, findings);
        };
        let room = facts.free.saturating_sub(facts.reserve + kept);
        let Some(run) = waiting.run.take() else {
            return;
        };
        let fetch = waiting.fetch(key, run, &missing[..count], blocks);
        let whole = end == waiting.chain.len()
            && room >= missing.len()
            && count == missing.len().min(self.limits.chunk);
        let outcome = if whole {
            WantOutcome::Accepted
        } else {
            WantOutcome::Clipped
        };
        waiting.answer(key, outcome, &mut findings.outcomes);
        self.news.push(waiting.news(key));
        findings.fetch = Some(fetch);
    }

    /// How many of the blocks at the head of the free list may be taken for a session expected at `expected`: up to the
    /// first that belongs to another waiting session expected back no later.
    fn spared(&self, key: u64, expected: Option<Instant>, head: Vec<Option<BlockHash>>) -> usize {
        let nearer = |other: &u64| {
            *other != key
                && self.table.get(other).is_some_and(|w| {
                    matches!(w.wish, Wish::Now | Wish::WhenRoom)
                        && match (w.expected, expected) {
                            (Some(theirs), Some(ours)) => theirs <= ours,
                            (Some(_), None) => true,
                            (None, _) => false,
                        }
                })
        };
        let blocked = |hash: &Option<BlockHash>| {
            hash.and_then(|hash| self.owners.get(&hash))
                .is_some_and(|owners| owners.iter().any(nearer))
        };
        head.iter().position(blocked).unwrap_or(head.len())
    }
}

/// How a chunk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CopyOutcome {
    /// Its blocks are in the engine's prefix cache.
    Published,
    /// It failed, was cancelled or was overtaken by a reset.
    Lost,
}

impl Waiting {
    /// Updates where the session is, and reports a change.
    fn note(&mut self, key: u64, leading: usize, news: &mut Vec<SessionNews>) {
        let residence = if leading < self.chain.len() {
            Residence::Host
        } else if self.fetched.is_empty() && self.wish != Wish::Now {
            Residence::Hold
        } else {
            Residence::Ready
        };
        let leading = u32::try_from(leading).unwrap_or(u32::MAX);
        if (residence, leading) != (self.residence, self.gpu_blocks) {
            (self.residence, self.gpu_blocks) = (residence, leading);
            news.push(self.news(key));
        }
    }

    fn news(&self, key: u64) -> SessionNews {
        let residence = if self.loading {
            Residence::Loading
        } else {
            self.residence
        };
        SessionNews {
            session: key,
            residence,
            gpu_blocks: self.gpu_blocks,
        }
    }

    /// Reports the want's outcome, once.
    fn answer(&mut self, key: u64, outcome: WantOutcome, outcomes: &mut Vec<OutcomeOf>) {
        if !std::mem::replace(&mut self.answered, true) {
            let moving = u32::try_from(self.pairs.len()).unwrap_or(u32::MAX);
            outcomes.push(OutcomeOf {
                session: key,
                want: self.want,
                outcome,
                blocks: self.gpu_blocks.saturating_add(moving),
                pairs: self.pairs.clone(),
            });
        }
    }

    /// No room: another look when there is more.
    fn defer(&mut self, key: u64, outcome: WantOutcome, findings: &mut Findings) {
        self.deferred = true;
        // A lease that waits for room would keep the slots from everybody; the next look asks for a fresh one.
        findings
            .released
            .extend(self.run.take().map(|run| run.lease));
        self.answer(key, outcome, &mut findings.outcomes);
    }

    fn fetch(
        &mut self,
        session: u64,
        run: LeasedRun,
        positions: &[usize],
        blocks: Vec<GpuBlock>,
    ) -> Fetch {
        let slots: Vec<SlotId> = positions.iter().filter_map(|i| run.slot(*i)).collect();
        assert_eq!(
            slots.len(),
            blocks.len(),
            "every missing position was chosen inside the leased run"
        );
        self.loading = true;
        self.pairs = slots
            .iter()
            .zip(&blocks)
            .map(|(slot, block)| (slot.0, block.0))
            .collect();
        Fetch {
            session,
            lease: run.lease,
            hashes: positions.iter().map(|i| self.chain[*i]).collect(),
            positions: positions
                .iter()
                .map(|i| u32::try_from(*i).unwrap_or(u32::MAX))
                .collect(),
            slots,
            blocks,
        }
    }
}

/// After how many blocks handed out holds and residence are looked at again.
fn refresh_blocks(total: usize) -> usize {
    (total / REFRESH_PART).max(1)
}

fn budget_blocks(total: usize, ratio: f64) -> usize {
    let total = u32::try_from(total).unwrap_or(u32::MAX);
    // The ratio is checked to be within 0..=1 when the hooks are made.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 <= ratio <= 1, so it fits"
    )]
    let blocks = (f64::from(total) * ratio) as u32;
    usize::try_from(blocks).unwrap_or(usize::MAX)
}
