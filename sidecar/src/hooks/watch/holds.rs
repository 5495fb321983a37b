//! Holds: the blocks of sessions that are expected soon, kept away from the eviction end of the free list.
//!
//! A hold takes no reference: it re-queues blocks at the safe end, again after every so many blocks handed out. One
//! round chooses whom to hold, the nearest expected return first, until the budget of unique blocks is spent; then it
//! moves the chosen in the opposite order, so that the nearest ends up safest, and of each the suffix first.

use std::ops::Bound::{Excluded, Unbounded};
use std::time::{Duration, Instant};

use kvstore::BlockHash;

use super::places::SAMPLED;
use super::{Return, View, Waiting, Watch};
use crate::engine::frames::{Residence, Wish};
use crate::hooks::pool::requeue;

/// How long after its expected return a session that is back stays protected.
const READY_GRACE: Duration = Duration::from_secs(5);
/// Most blocks that are moved with one call.
const PIECE_BLOCKS: usize = 64;

/// After so many sessions that did not fit the budget counts as spent.
const MISFITS_MAX: usize = 8;

/// A round over all waiting sessions, done in pieces.
#[derive(Debug, Default)]
pub(super) struct Round {
    number: u64,
    phase: Phase,
    /// Unique blocks of those that this round holds.
    blocks: usize,
    /// Sessions that did not fit into the budget.
    misfits: usize,
    /// To be moved, nearest first; also sessions that have come back in pieces and are put in order.
    chosen: Vec<u64>,
    /// The session that is being moved, and the position from which on its blocks have been.
    moving: Option<(u64, usize)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Whom to hold, nearest expected return first; the last one judged.
    Judging(Option<(Return, u64)>),
    /// Everybody's residence is to be looked at again; the last one told so.
    Looking(Option<(Return, u64)>),
    #[default]
    Over,
}

impl Round {
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Over && self.chosen.is_empty() && self.moving.is_none()
    }

    /// Moves a session's blocks to the safe end, after what is being moved already.
    pub(super) fn put_in_order(&mut self, session: u64) {
        if !self.chosen.contains(&session) {
            self.chosen.push(session);
        }
    }

    /// Whether a session's blocks are still to be moved.
    pub(super) fn moves(&self, session: u64) -> bool {
        self.chosen.contains(&session) || self.moving.is_some_and(|(moving, _)| moving == session)
    }
}

impl Watch {
    /// Begins a round.
    pub(super) fn begin_round(&mut self) {
        self.round.number += 1;
        self.round.phase = Phase::Judging(None);
        self.round.blocks = 0;
        self.round.misfits = 0;
    }

    /// Goes on with the round.
    pub(super) fn refresh_holds(&mut self, view: &mut View<'_>) {
        let budget = budget_blocks(view.facts.total, self.limits.hold_ratio);
        while view.touches.are_left()
            && let Phase::Judging(last) = self.round.phase
        {
            view.touches.spend_on_session();
            self.round.phase = match self.after(last) {
                Some(next) if self.judge(next.1, budget, view.now) => Phase::Judging(Some(next)),
                _ => Phase::Looking(None),
            };
        }
        if !matches!(self.round.phase, Phase::Judging(_)) {
            self.move_chosen(view);
        }
        while view.touches.are_left()
            && let Phase::Looking(last) = self.round.phase
        {
            view.touches.spend_on_session();
            self.round.phase = match self.after(last) {
                Some(next) => {
                    self.look_again(next.1);
                    Phase::Looking(Some(next))
                }
                None => Phase::Over,
            };
        }
    }

    fn after(&self, last: Option<(Return, u64)>) -> Option<(Return, u64)> {
        match last {
            Some(last) => self
                .order
                .range((Excluded(last), Unbounded))
                .next()
                .copied(),
            None => self.order.first().copied(),
        }
    }

    /// Holds a session if it is to be and fits; false once the budget is spent.
    fn judge(&mut self, key: u64, budget: usize, now: Instant) -> bool {
        if !self.table.get(&key).is_some_and(|w| is_protected(w, now)) {
            return true;
        }
        let blocks = self.own_blocks(key);
        if self.round.blocks + blocks > budget {
            // A long one must not keep those after it from being held.
            self.round.misfits += 1;
            return self.round.misfits < MISFITS_MAX;
        }
        self.round.blocks += blocks;
        self.round.chosen.push(key);
        if let Some(waiting) = self.table.get_mut(&key) {
            waiting.held_in = Some(self.round.number);
        }
        true
    }

    fn look_again(&mut self, key: u64) {
        let Some(waiting) = self.table.get_mut(&key) else {
            return;
        };
        waiting.held = waiting.held_in == Some(self.round.number);
        let settled = !waiting.loading && waiting.asked.is_none() && waiting.wish != Wish::Nothing;
        // A search that is under way goes on: it would never end if every round began it anew.
        if settled && !self.due.contains(&waiting.due(key)) {
            self.deferred.remove(&key);
            self.look_anew(key, false);
        }
    }

    fn move_chosen(&mut self, view: &mut View<'_>) {
        while view.touches.are_left() {
            let round = &mut self.round;
            let next = round.moving.take();
            let Some((key, end)) = next.or_else(|| Some((round.chosen.pop()?, usize::MAX))) else {
                return;
            };
            let Some(waiting) = self.table.get_mut(&key) else {
                continue;
            };
            let end = end.min(waiting.chain.len());
            let start = end.saturating_sub(PIECE_BLOCKS);
            let piece = start..end;
            requeue(
                view.pool,
                &waiting.chain[piece.clone()],
                &mut waiting.last[piece],
            );
            view.touches.spend(2 * (end - start));
            if start > 0 {
                self.round.moving = Some((key, start));
            }
        }
    }

    /// Blocks of a session that no session held in this round shares, up to [`SAMPLED`] - 1 too many. Chains that share a
    /// block share all before it.
    fn own_blocks(&self, key: u64) -> usize {
        let Some(waiting) = self.table.get(&key) else {
            return 0;
        };
        let is_held = |hash: &BlockHash| {
            self.places.of(hash).iter().any(|place| {
                let other = self.table.get(&place.session);
                other.is_some_and(|w| w.held_in == Some(self.round.number) && w.files(hash, place))
            })
        };
        let (sampled, _) = waiting.chain.as_chunks::<SAMPLED>();
        let held = sampled.partition_point(|blocks| is_held(&blocks[SAMPLED - 1]));
        waiting.chain.len() - held * SAMPLED
    }
}

fn is_protected(waiting: &Waiting, now: Instant) -> bool {
    let ready_until = waiting
        .expected
        .filter(|_| waiting.residence == Residence::Ready)
        .map(|at| at + READY_GRACE);
    waiting.wish != Wish::Nothing
        && (waiting.hold_until > now || ready_until.is_some_and(|until| until > now))
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
