//! Waiting sessions: which of them are held on the GPU, which are brought back, and what stands against it.
//!
//! The sidecar says how much it wants each session ([`Wish`]); this folder looks at the pool and decides what to do now.
//! [`holds`] keeps blocks from being evicted, without references; [`fetches`] looks for what is missing and chooses
//! chunks to copy in; [`places`] tells whose a block is. All run on the scheduler's thread, so a step looks at or moves
//! a bounded number of blocks ([`Touches`]) and leaves the rest to the next one.

mod fetches;
mod holds;
mod places;

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Instant;

use kvstore::{BlockHash, GpuBlock, SlotId};

use self::holds::Round;
use self::places::{Chain, Place, Places};
use super::pool::GpuPool;
use super::saves::Saves;
use super::turns::LeasedRun;
use crate::engine::frames::{Residence, SessionNews, WantOutcome, Wish};
use crate::planner::budget::PoolFacts;

/// Holds and residence are looked at again after this share of the pool has been handed out (one part in ...).
const REFRESH_PART: usize = 16;
/// What it costs to judge a session without a call of the pool, in touches.
const SESSION_TOUCHES: usize = 2;
/// What a call of the pool costs besides its blocks, in touches.
const CALL_TOUCHES: usize = 16;

/// A want as it arrived.
#[derive(Clone, Debug)]
pub(super) struct NewWant {
    pub(super) want: u64,
    pub(super) wish: Wish,
    /// Of two sessions that are due, the one with the higher priority comes first.
    pub(super) priority: i32,
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
    priority: i32,
    expected: Option<Instant>,
    hold_until: Instant,
    chain: Vec<BlockHash>,
    /// Where each of its blocks was when it was last looked at; it may have been evicted since.
    last: Vec<Option<GpuBlock>>,
    run: Option<LeasedRun>,
    /// The lookup that is out, if any: its number, and the position that it starts from.
    asked: Option<(u64, usize)>,
    look: Look,
    /// The host tier does not have the block at this position, or could not copy it.
    gone: Option<usize>,
    loading: bool,
    /// The round that holds it, and whether the last one that ended does.
    held_in: Option<u64>,
    held: bool,
    residence: Residence,
    gpu_blocks: u32,
    /// Positions fetched since its last turn.
    fetched: BTreeSet<u32>,
    pairs: Vec<(u32, u32)>,
}

/// How far the pool has been searched for a session's chain. Blocks that were seen may be evicted while the search goes
/// on over several steps: then the request itself loads them, and the next round of looks finds out.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    /// Leading blocks found so far.
    seen: usize,
    /// How many of them nobody referenced: fetching the rest must not evict them.
    kept: usize,
    /// The session, itself or another, whose blocks were last moved away from the eviction end for its next chunk, and
    /// how many were.
    moved: Option<u64>,
    moves: u8,
    /// When all are found, they have to be moved to the safe end in order: prefix and suffix together, or the prefix
    /// would be evicted first.
    restore: bool,
}

/// A chunk to copy in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fetch {
    pub(super) session: u64,
    pub(super) blocks: Vec<GpuBlock>,
    pub(super) slots: Vec<SlotId>,
    pub(super) hashes: Vec<BlockHash>,
    pub(super) positions: Vec<u32>,
    /// The slots that it was chosen from; its lease protects them until the chunk has ended.
    pub(super) run: LeasedRun,
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

/// One step, as the watch sees it.
pub(super) struct View<'a> {
    pub(super) facts: PoolFacts,
    pub(super) pool: &'a mut dyn GpuPool,
    /// Blocks that are still to be saved: a fetch does not evict them.
    pub(super) saves: &'a Saves,
    pub(super) now: Instant,
    pub(super) touches: Touches,
}

/// How many blocks of the pool a step may still look at or move.
#[derive(Debug)]
pub(super) struct Touches(usize);

impl Touches {
    pub(super) fn new(blocks: usize) -> Self {
        Self(blocks)
    }

    fn take_half(&mut self) -> Self {
        let half = self.0 / 2;
        self.0 -= half;
        Self(half)
    }

    fn are_left(&self) -> bool {
        self.0 > 0
    }

    fn spend_on_session(&mut self) {
        self.0 = self.0.saturating_sub(SESSION_TOUCHES);
    }

    /// The last call of a step may go beyond by the blocks of one window.
    fn spend(&mut self, blocks: usize) {
        self.0 = self.0.saturating_sub(blocks + CALL_TOUCHES);
    }
}

/// A session to look at, in the order in which that is done: who is due before who comes back when there is room, then
/// the higher priority, then the nearest expected return, unknown last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    urgency: Urgency,
    priority: Reverse<i32>,
    expected: Return,
    session: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    Now,
    WhenRoom,
    /// Only to see where it is.
    Residence,
}

/// An expected return; the unknown one is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Return(Option<Instant>);

impl Ord for Return {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.0.is_none(), self.0).cmp(&(other.0.is_none(), other.0))
    }
}

impl PartialOrd for Return {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// All waiting sessions of this engine.
#[derive(Debug)]
pub(super) struct Watch {
    limits: WatchLimits,
    table: HashMap<u64, Waiting>,
    /// The table, nearest expected return first.
    order: BTreeSet<(Return, u64)>,
    places: Places,
    /// Sessions under which the pool may have changed since they were last looked at.
    due: BTreeSet<Due>,
    /// Sessions that found no room.
    deferred: HashSet<u64>,
    /// Blocks beyond the reserve when somebody was last deferred: with more than that it is worth another look.
    room_when_deferred: usize,
    round: Round,
    /// Blocks handed out since the last round of holds began.
    handed_out: usize,
    news: Vec<SessionNews>,
    /// A chunk is being copied.
    fetching: bool,
}

impl Watch {
    pub(super) fn new(limits: WatchLimits) -> Self {
        Self {
            limits,
            table: HashMap::new(),
            order: BTreeSet::new(),
            places: Places::default(),
            due: BTreeSet::new(),
            deferred: HashSet::new(),
            room_when_deferred: usize::MAX,
            round: Round::default(),
            handed_out: 0,
            news: Vec::new(),
            fetching: false,
        }
    }

    /// Takes a want; returns leases that are no longer needed.
    pub(super) fn want(&mut self, session: u64, new: NewWant, now: Instant) -> Vec<u64> {
        let mut released: Vec<u64> = Vec::new();
        if new.wish == Wish::Nothing {
            let old = self.remove(session).and_then(|w| w.run);
            released.extend(old.map(|run| run.lease));
            released.extend(new.lease.map(|run| run.lease));
            return released;
        }
        self.unlist(session);
        let mut old = self.table.remove(&session);
        let same = old.as_ref().is_some_and(|w| w.chain == new.chain);
        let comes_back = new.wish.comes_back();
        let spares_the_same = same
            && comes_back
            && old.as_ref().is_some_and(|w| {
                (new.wish == Wish::Now || w.wish != Wish::Now)
                    && new.priority >= w.priority
                    && Return(new.expected) <= Return(w.expected)
            });
        if !spares_the_same && old.as_ref().is_some_and(|w| w.wish.comes_back()) {
            self.room_is_made();
        }
        let old_chain = old
            .as_ref()
            .map_or(Chain::default(), Waiting::chain_as_filed);
        let new_chain = Chain {
            hashes: &new.chain,
            every_block: comes_back,
        };
        self.places.replace(session, old_chain, new_chain);
        // Slots belong to the chain that they were leased for; a running chunk has its lease with it, and is this
        // session's only as long as its chain is the same.
        let lease = old.as_ref().and_then(|w| w.run.as_ref());
        released.extend(lease.map(|run| run.lease));
        let loading = same && old.as_ref().is_some_and(|w| w.loading);
        // A chain mostly begins as the one before it.
        let last = old.as_mut().map(|w| std::mem::take(&mut w.last));
        let mut last = last.unwrap_or_default();
        last.resize(new.chain.len(), None);
        let waiting = Waiting {
            want: new.want,
            answered: false,
            wish: new.wish,
            priority: new.priority,
            expected: new.expected,
            hold_until: new.hold_until,
            chain: new.chain,
            last,
            run: new.lease,
            asked: None,
            look: Look::default(),
            gone: None,
            loading,
            held_in: old.as_ref().and_then(|w| w.held_in),
            held: new.hold_until > now,
            residence: old.as_ref().map_or(Residence::Hold, |w| w.residence),
            gpu_blocks: old.as_ref().map_or(0, |w| w.gpu_blocks),
            fetched: old
                .as_mut()
                .map(|w| std::mem::take(&mut w.fetched))
                .unwrap_or_default(),
            pairs: old.map(|w| w.pairs).filter(|_| loading).unwrap_or_default(),
        };
        self.order.insert((Return(waiting.expected), session));
        self.table.insert(session, waiting);
        // Wants also come while no step is taken.
        self.file_places(0);
        if comes_back {
            self.look_anew(session, new.wish == Wish::Now);
        }
        released
    }

    fn remove(&mut self, session: u64) -> Option<Waiting> {
        self.unlist(session);
        let waiting = self.table.remove(&session)?;
        if waiting.wish.comes_back() {
            self.room_is_made();
        }
        let filed = waiting.chain_as_filed();
        self.places.replace(session, filed, Chain::default());
        self.file_places(0);
        Some(waiting)
    }

    /// Files some of what the index of places has not been told yet, a share of it at least.
    fn file_places(&mut self, blocks: usize) {
        let table = &self.table;
        self.places.file(blocks, |hash, place| {
            let waiting = table.get(&place.session);
            waiting.is_some_and(|w| w.files(hash, place))
        });
    }

    /// A session leaves those whose blocks are spared: who was deferred may fit now.
    fn room_is_made(&mut self) {
        if !self.deferred.is_empty() {
            self.room_when_deferred = 0;
        }
    }

    /// Takes a session out of the orders that its want decides.
    fn unlist(&mut self, session: u64) {
        self.deferred.remove(&session);
        if let Some(waiting) = self.table.get(&session) {
            self.due.remove(&waiting.due(session));
            self.order.remove(&(Return(waiting.expected), session));
        }
    }

    /// The pool is searched for the whole chain, from its start.
    fn look_anew(&mut self, session: u64, restore: bool) {
        if let Some(waiting) = self.table.get_mut(&session) {
            waiting.look = Look {
                restore: restore || waiting.look.restore,
                ..Look::default()
            };
            self.due.insert(waiting.due(session));
        }
    }

    /// The search goes on where it stopped.
    fn look_on(&mut self, session: u64) {
        if let Some(waiting) = self.table.get(&session) {
            self.due.insert(waiting.due(session));
        }
    }

    /// Positions that were fetched for a session whose turn begins now; and how many more were still on their way.
    pub(super) fn turn_begins(&mut self, session: u64) -> (Vec<u32>, usize) {
        self.table.get_mut(&session).map_or((Vec::new(), 0), |w| {
            let late = if w.loading { w.pairs.len() } else { 0 };
            (std::mem::take(&mut w.fetched).into_iter().collect(), late)
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
                waiting.gone = run.is_none().then_some(from);
                let old = if run.is_some() {
                    std::mem::replace(&mut waiting.run, run)
                } else {
                    None
                };
                self.look_on(session);
                old.map(|run| run.lease)
            }
            None => run.map(|run| run.lease),
        }
    }

    /// A chunk has ended. Returns leases that are no longer needed: that of the chunk stays with the session if there is
    /// more to fetch with it.
    pub(super) fn fetched(&mut self, fetch: &Fetch, outcome: CopyOutcome) -> Vec<u64> {
        self.fetching = false;
        // One that is wanted only since a reset, another connection or another chain has nothing to do with this chunk and
        // its lease.
        let waiting = self.table.get_mut(&fetch.session).filter(|w| w.loading);
        let Some(waiting) = waiting else {
            return vec![fetch.run.lease];
        };
        waiting.loading = false;
        waiting.pairs.clear();
        (waiting.look.moved, waiting.look.moves) = (None, 0);
        let mut released = Vec::new();
        match outcome {
            CopyOutcome::Published => {
                waiting.fetched.extend(&fetch.positions);
                waiting.look.restore = true;
                let latest = waiting.run.replace(fetch.run.clone());
                released.extend(latest.map(|run| run.lease));
            }
            CopyOutcome::Lost => {
                let first = fetch.positions.first();
                waiting.gone = first.and_then(|position| usize::try_from(*position).ok());
                released.push(fetch.run.lease);
            }
        }
        self.look_on(fetch.session);
        released
    }

    /// Forgets everything; returns leases to give back. A running chunk ends as one that nobody waits for.
    pub(super) fn clear(&mut self) -> Vec<u64> {
        self.places.clear();
        self.order.clear();
        self.due.clear();
        self.deferred.clear();
        self.round = Round::default();
        let runs = self.table.drain().filter_map(|(_, w)| w.run);
        runs.map(|run| run.lease).collect()
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
        self.is_unfinished()
            || (!self.table.is_empty()
                && (self.handed_out >= refresh_blocks(total) || !self.deferred.is_empty()))
    }

    /// Whether the last step left something to do that the next one can do.
    pub(super) fn is_unfinished(&self) -> bool {
        !self.places.is_filed()
            || (!self.table.is_empty() && (!self.round.is_over() || !self.due.is_empty()))
    }

    /// One step: holds refreshed, at most one chunk chosen.
    pub(super) fn step(&mut self, view: &mut View<'_>) -> Findings {
        let mut findings = Findings::default();
        self.file_places(view.touches.0);
        if self.table.is_empty() {
            return findings;
        }
        if self.handed_out >= refresh_blocks(view.facts.total) && self.round.is_over() {
            self.handed_out = 0;
            self.begin_round();
        }
        // Neither may starve the other.
        let for_looks = view.touches.take_half();
        self.refresh_holds(view);
        view.touches = for_looks;
        let room = view.facts.free.saturating_sub(view.facts.reserve);
        if room > self.room_when_deferred {
            self.room_when_deferred = usize::MAX;
            for session in std::mem::take(&mut self.deferred) {
                self.look_anew(session, false);
            }
        }
        self.look_at_due(view, &mut findings);
        if !self.deferred.is_empty() {
            self.room_when_deferred = self.room_when_deferred.min(room);
        }
        findings
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
    fn chain_as_filed(&self) -> Chain<'_> {
        Chain {
            hashes: &self.chain,
            every_block: self.wish.comes_back(),
        }
    }

    /// Whether the index is to say that a block is at this place: it lags, so that its readers ask, too.
    fn files(&self, hash: &BlockHash, place: &Place) -> bool {
        self.chain_as_filed().files(hash, place.position)
    }

    fn due(&self, session: u64) -> Due {
        Due {
            urgency: match self.wish {
                Wish::Now => Urgency::Now,
                Wish::WhenRoom => Urgency::WhenRoom,
                Wish::Keep | Wish::Nothing => Urgency::Residence,
            },
            priority: Reverse(self.priority),
            expected: Return(self.expected),
            session,
        }
    }

    /// Updates where the session is, and reports a change.
    fn note(&mut self, key: u64, news: &mut Vec<SessionNews>) {
        let residence = if self.look.seen < self.chain.len() {
            Residence::Host
        } else if !self.fetched.is_empty() || self.wish == Wish::Now {
            Residence::Ready
        } else if self.held {
            Residence::Hold
        } else {
            Residence::Shadow
        };
        let leading = u32::try_from(self.look.seen).unwrap_or(u32::MAX);
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
}

/// After how many blocks handed out holds and residence are looked at again.
fn refresh_blocks(total: usize) -> usize {
    (total / REFRESH_PART).max(1)
}
