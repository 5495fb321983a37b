//! Fetches: sessions looked at in the order of their urgency, what is missing found, one chunk at a time chosen.
//!
//! A fetch takes its blocks off the head of the free list, never one of a session that comes before it or level with it
//! (no ping-pong), and never below the reserve ([`budget::admit`]).

use std::cmp::Reverse;
use std::time::Instant;

use kvstore::{BlockHash, GpuBlock, SlotId};

use super::places::Place;
use super::{Fetch, Findings, Prefetch, Return, View, Waiting, Watch};
use crate::engine::frames::{WantOutcome, Wish};
use crate::hooks::pool::{Resident, residents};
use crate::hooks::turns::LeasedRun;
use crate::planner::budget::{self, Admission, Demand};

/// Blocks that are looked up at once: first a few, since most of those that wait have lost the first block already.
const PROBE_BLOCKS: usize = 16;
/// See [`PROBE_BLOCKS`].
const WINDOW_BLOCKS: usize = 64;

/// Sessions that are moved out of the way of one chunk, at most.
const MOVES_MAX: u8 = 8;

/// What follows from one look at a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// More of its chain is to be looked at.
    Part,
    /// All of it is on the GPU.
    All,
    /// The block after those seen is missing, and is not to be fetched.
    Gap,
    /// Nothing to do until something arrives: an answer, the end of a chunk, another want.
    Settled,
    /// Something is done first, by this step or the next ones: its chain is filed, so that its own blocks are spared; or
    /// blocks that a fetch would take are saved.
    NotYet,
    /// No room: another look when there is more.
    NoRoom(WantOutcome),
    /// Blocks of this session, which may be the same, lie where a fetch would take them: they are moved first.
    InTheWay(u64),
}

impl Watch {
    /// Looks at sessions that are due, until a chunk is chosen or this step has done enough.
    pub(super) fn look_at_due(&mut self, view: &mut View<'_>, findings: &mut Findings) {
        while !self.fetching
            && view.touches.are_left()
            && let Some(due) = self.due.first().copied()
        {
            let moved = self.table.get(&due.session).and_then(|w| w.look.moved);
            if moved.is_some_and(|session| self.round.moves(session)) {
                self.refresh_holds(view);
                if moved.is_some_and(|session| self.round.moves(session)) {
                    return;
                }
            }
            self.due.remove(&due);
            let key = due.session;
            match self.look(key, view, findings) {
                Seen::Part => self.look_on(key),
                Seen::All => self.all_there(key, findings),
                Seen::Gap => self.let_go(key, view.now, findings),
                Seen::Settled => {}
                Seen::NotYet => {
                    self.look_on(key);
                    return;
                }
                Seen::NoRoom(outcome) => self.defer(key, outcome, findings),
                Seen::InTheWay(session) => {
                    self.round.put_in_order(session);
                    self.look_on(key);
                }
            }
            self.fetching |= findings.fetch.is_some();
        }
    }

    fn look(&mut self, key: u64, view: &mut View<'_>, findings: &mut Findings) -> Seen {
        let Some(waiting) = self.table.get_mut(&key).filter(|w| !w.loading) else {
            return Seen::Settled;
        };
        let (start, len) = (waiting.look.seen, waiting.chain.len());
        let window = if start == 0 {
            PROBE_BLOCKS
        } else {
            WINDOW_BLOCKS
        };
        let part = start..len.min(start + window);
        let (chain, last) = (&waiting.chain[part.clone()], &mut waiting.last[part]);
        let found = residents(view.pool, chain, last);
        view.touches.spend(found.len());
        let resident: Vec<Resident> = found.into_iter().map_while(|block| block).collect();
        if !resident.is_empty() || start == len {
            view.touches.spend(resident.len());
            waiting.look.kept += resident.iter().filter(|r| !r.referenced).count();
            waiting.look.seen += resident.len();
            return if waiting.look.seen == len {
                Seen::All
            } else {
                Seen::Part
            };
        }
        waiting.note(key, &mut self.news);
        match waiting.wish {
            Wish::Keep | Wish::Nothing => return Seen::Gap,
            _ if self.limits.prefetch == Prefetch::Off => {
                waiting.answer(key, WantOutcome::Deferred, &mut findings.outcomes);
                return Seen::Gap;
            }
            Wish::WhenRoom if budget::is_busy(view.facts) => {
                return Seen::NoRoom(WantOutcome::Deferred);
            }
            Wish::WhenRoom | Wish::Now => {}
        }
        if self.places.is_behind(key) {
            return Seen::NotYet;
        }
        let demand = Demand {
            missing: len - start,
            kept: waiting.look.kept,
            chunk: self.limits.chunk,
        };
        let count = match budget::admit(view.facts, demand) {
            Admission::Fetch(count) => count,
            Admission::Later => return Seen::NoRoom(WantOutcome::Deferred),
            Admission::TooLarge => return Seen::NoRoom(WantOutcome::Clipped),
        };
        let usable =
            |run: &&LeasedRun| run.is_usable(view.now) && run.from <= start && start < run.end();
        let Some(run) = waiting.run.as_ref().filter(usable) else {
            // Of no use any more, and nobody may evict its slots as long as it is held.
            let useless = waiting.run.take();
            findings.released.extend(useless.map(|run| run.lease));
            if waiting.gone == Some(start) {
                waiting.answer(key, WantOutcome::Missing, &mut findings.outcomes);
            } else {
                let rest = waiting.chain[start..].to_vec();
                findings.ask.push((key, rest, start));
            }
            return Seen::Settled;
        };
        let run_end = run.end().min(len);
        let chunk = start..run_end.min(start + self.limits.chunk);
        view.touches.spend(chunk.len());
        let found = view.pool.lookup(&waiting.chain[chunk.clone()]);
        let missing: Vec<usize> = chunk
            .zip(found)
            .filter_map(|(position, block)| block.is_none().then_some(position))
            .collect();
        let count = count.min(missing.len());
        view.touches.spend(2 * count);
        let head = view.pool.free_list(count);
        let (count, in_the_way) = self.spared(key, &head, view.now);
        if let Some(session) = in_the_way
            && let Some(waiting) = self.table.get_mut(&key)
            && waiting.look.moves < MOVES_MAX
            // At the head again after it was moved: there is nothing else left to take.
            && waiting.look.moved != Some(session)
        {
            waiting.look.moved = Some(session);
            waiting.look.moves += 1;
            return Seen::InTheWay(session);
        }
        if view.saves.any_of(&head[..count]) {
            return Seen::NotYet;
        }
        let Some(blocks) = (count > 0).then(|| view.pool.take(count)).flatten() else {
            return Seen::NoRoom(WantOutcome::Deferred);
        };
        let fits = view
            .facts
            .free
            .saturating_sub(view.facts.reserve + demand.kept)
            >= demand.missing;
        let whole = run_end == len && fits && count == missing.len();
        self.submit(key, (&missing[..count], blocks), whole, findings);
        Seen::Settled
    }

    /// Puts a chunk into the findings.
    fn submit(
        &mut self,
        key: u64,
        (positions, blocks): (&[usize], Vec<GpuBlock>),
        whole: bool,
        findings: &mut Findings,
    ) {
        let Some(waiting) = self.table.get_mut(&key) else {
            return;
        };
        let Some(run) = waiting.run.take() else {
            return;
        };
        let slots: Vec<SlotId> = positions.iter().filter_map(|i| run.slot(*i)).collect();
        assert_eq!(
            slots.len(),
            blocks.len(),
            "every missing position was chosen inside the leased run"
        );
        waiting.loading = true;
        waiting.pairs = slots
            .iter()
            .zip(&blocks)
            .map(|(slot, block)| (slot.0, block.0))
            .collect();
        let outcome = if whole {
            WantOutcome::Accepted
        } else {
            WantOutcome::Clipped
        };
        waiting.answer(key, outcome, &mut findings.outcomes);
        self.news.push(waiting.news(key));
        findings.fetch = Some(Fetch {
            session: key,
            run,
            hashes: positions.iter().map(|i| waiting.chain[*i]).collect(),
            positions: positions
                .iter()
                .map(|i| u32::try_from(*i).unwrap_or(u32::MAX))
                .collect(),
            slots,
            blocks,
        });
    }

    fn all_there(&mut self, key: u64, findings: &mut Findings) {
        let Some(waiting) = self.table.get_mut(&key) else {
            return;
        };
        waiting.note(key, &mut self.news);
        if std::mem::take(&mut waiting.look.restore) {
            self.round.put_in_order(key);
        }
        waiting.answer(key, WantOutcome::Accepted, &mut findings.outcomes);
        let run = waiting.run.take();
        findings.released.extend(run.map(|run| run.lease));
    }

    /// A session that was only held has lost blocks and its hold is over: nobody looks after it any more.
    fn let_go(&mut self, key: u64, now: Instant, findings: &mut Findings) {
        let over = |w: &Waiting| w.wish == Wish::Keep && w.hold_until <= now && !w.loading;
        let run = self.table.get_mut(&key).and_then(|w| w.run.take());
        findings.released.extend(run.map(|run| run.lease));
        if self.table.get(&key).is_some_and(over) {
            self.remove(key);
        }
    }

    fn defer(&mut self, key: u64, outcome: WantOutcome, findings: &mut Findings) {
        let Some(waiting) = self.table.get_mut(&key) else {
            return;
        };
        // A lease that waits for room would keep the slots from everybody; the next look asks for a fresh one.
        let run = waiting.run.take();
        findings.released.extend(run.map(|run| run.lease));
        waiting.answer(key, outcome, &mut findings.outcomes);
        self.deferred.insert(key);
    }

    /// How many of the blocks at the head of the free list may be taken for a session: up to the first that it needs
    /// itself, or that belongs to another waiting session that comes before it or level with it. And whose that is.
    ///
    /// When a tool ends is a guess until it has: a session that is due now comes before those that are not, however long
    /// they are overdue. Of those that are due the higher priority comes first, then, as of the others, the nearest
    /// expected return. At any moment that is one order, so no sessions take each other's blocks in turns.
    fn spared(&self, key: u64, head: &[Option<BlockHash>], now: Instant) -> (usize, Option<u64>) {
        let Some(waiting) = self.table.get(&key) else {
            return (0, None);
        };
        let rank = |w: &Waiting| {
            let due = w.wish == Wish::Now && w.expected.is_some_and(|at| at <= now);
            let priority = if due { w.priority } else { 0 };
            (!due, Reverse(priority), Return(w.expected))
        };
        let own_rank = rank(waiting);
        let needed = |hash: &BlockHash, place: &Place| {
            let Some(other) = self.table.get(&place.session) else {
                return false;
            };
            if place.session == key {
                return other.files(hash, place) && place.position < other.look.seen;
            }
            other.wish.comes_back()
                && other.files(hash, place)
                && other.expected.is_some()
                && rank(other) <= own_rank
        };
        let blocks = head.iter().enumerate();
        let mut blocked = blocks.filter_map(|(at, hash)| {
            let hash = hash.as_ref()?;
            let mut places = self.places.of(hash).iter();
            Some((at, places.find(|place| needed(hash, place))?.session))
        });
        match blocked.next() {
            Some((at, session)) => (at, Some(session)),
            None => (head.len(), None),
        }
    }
}
