//! Requests that the scheduler knows, and the lookups sent ahead for them.
//!
//! A lookup is one message out and one back; this file only keeps the books and never waits.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use kvstore::{BlockHash, SlotId};

/// A lease this close to its end is not used any more, neither to load nor to save. Half of the shortest that can be
/// configured.
pub(super) const LEASE_MARGIN: Duration = Duration::from_millis(500);

/// Slots of consecutive blocks of one chain, leased for reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeasedRun {
    /// The lease.
    pub(super) lease: u64,
    /// Position in the chain of the first slot's block.
    pub(super) from: usize,
    /// Slots in chain order.
    pub(super) slots: Vec<SlotId>,
    /// When the lease ends.
    pub(super) expires: Instant,
}

impl LeasedRun {
    /// Whether a copy that starts now would end within the lease, by any sensible measure.
    pub(super) fn is_usable(&self, now: Instant) -> bool {
        now + LEASE_MARGIN < self.expires
    }

    /// Position after the last block.
    pub(super) fn end(&self) -> usize {
        self.from + self.slots.len()
    }

    /// The slot of the block at `position`.
    pub(super) fn slot(&self, position: usize) -> Option<SlotId> {
        self.slots.get(position.checked_sub(self.from)?).copied()
    }
}

/// What is known of the host tier's part of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    /// Nothing asked, or the answer was used up.
    Idle,
    /// Asked for the blocks from `from` on.
    Waiting {
        sequence: u64,
        since: Instant,
        from: usize,
    },
    /// Answered: these.
    Ready(LeasedRun),
    /// Answered: the block at `from` is not there.
    Nothing { from: usize },
    /// Seen in the presence filter: the first block of use is not there. It may be by the next step.
    Absent,
}

/// One request.
#[derive(Debug)]
pub(super) struct Turn {
    /// Our number for it.
    pub(super) ticket: u64,
    /// Session that the sidecar counts it to.
    pub(super) session: Option<u64>,
    /// Full blocks of its prompt.
    pub(super) hashes: Vec<BlockHash>,
    /// Leading blocks that the GPU had when it was last asked for.
    pub(super) local: usize,
    /// Full blocks already handed to the saves.
    pub(super) filled: usize,
    /// See [`Lookup`].
    pub(super) lookup: Lookup,
    /// What the last [`Answer::Hit`] offered: first position and the run it came from.
    pub(super) offered: Option<(usize, LeasedRun)>,
    /// Steps for which its load has been waiting for room.
    pub(super) steps_without_room: u32,
    /// Since when it waits for a prefetch of its own blocks.
    pub(super) waiting_for_copy: Option<Instant>,
    /// Whether it has got its blocks: it began with the `local` ones, none if vLLM was not to look for any.
    pub(super) begun: bool,
    /// Positions that were prefetched for it and not yet judged used or wasted.
    pub(super) prefetched: Vec<u32>,
}

/// What a lookup says to the scheduler now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// This many blocks beyond the GPU's own can be loaded.
    Hit(usize),
    /// Ask again at the next step.
    Pending,
    /// Ask the sidecar for the blocks from this position on, then ask again.
    Ask { from: usize },
    /// Nothing to load.
    Miss,
}

impl Turn {
    pub(super) fn new(ticket: u64, hashes: Vec<BlockHash>) -> Self {
        Self {
            ticket,
            session: None,
            hashes,
            local: 0,
            filled: 0,
            lookup: Lookup::Idle,
            offered: None,
            steps_without_room: 0,
            waiting_for_copy: None,
            begun: false,
            prefetched: Vec::new(),
        }
    }

    /// Weighs the lookup's state against what the GPU has: `local` blocks there, at most `blocks_max` of use.
    /// A lease that turns out useless is pushed to `released`.
    pub(super) fn answer(
        &mut self,
        local: usize,
        blocks_max: usize,
        (now, patience): (Instant, Duration),
        released: &mut Vec<u64>,
    ) -> Answer {
        let blocks_max = blocks_max.min(self.hashes.len());
        if local >= blocks_max {
            self.give_back(released);
            return Answer::Miss;
        }
        match &self.lookup {
            Lookup::Waiting { since, .. } if now.saturating_duration_since(*since) < patience => {
                Answer::Pending
            }
            Lookup::Waiting { .. } => Answer::Miss,
            Lookup::Nothing { from } if *from == local => Answer::Miss,
            Lookup::Idle | Lookup::Nothing { .. } | Lookup::Absent => Answer::Ask { from: local },
            Lookup::Ready(run) if !run.is_usable(now) || local < run.from || local >= run.end() => {
                self.give_back(released);
                Answer::Ask { from: local }
            }
            Lookup::Ready(run) => Answer::Hit(run.end().min(blocks_max) - local),
        }
    }

    /// Counts the prefetched blocks that it uses: those of the `local` ones. The others stay.
    pub(super) fn take_used(&mut self) -> u64 {
        let (before, local) = (self.prefetched.len(), self.local);
        self.prefetched
            .retain(|position| usize::try_from(*position).is_ok_and(|p| p >= local));
        u64::try_from(before - self.prefetched.len()).unwrap_or(u64::MAX)
    }

    /// Counts the prefetched blocks that it does not use.
    pub(super) fn take_wasted(&mut self) -> u64 {
        u64::try_from(std::mem::take(&mut self.prefetched).len()).unwrap_or(u64::MAX)
    }

    /// Forgets what was found; the lease goes to `released`.
    pub(super) fn give_back(&mut self, released: &mut Vec<u64>) {
        if let Lookup::Ready(run) = std::mem::replace(&mut self.lookup, Lookup::Idle) {
            released.push(run.lease);
        }
    }
}

/// All requests by id.
#[derive(Debug, Default)]
pub(super) struct Turns {
    table: HashMap<String, Turn>,
    by_ticket: HashMap<u64, String>,
    next_ticket: u64,
}

impl Turns {
    /// Enters a request; one of the same id that is still there is replaced and returned.
    pub(super) fn insert(&mut self, request: &str, hashes: Vec<BlockHash>) -> (u64, Option<Turn>) {
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        let before = self
            .table
            .insert(request.to_owned(), Turn::new(ticket, hashes));
        if let Some(before) = &before {
            self.by_ticket.remove(&before.ticket);
        }
        self.by_ticket.insert(ticket, request.to_owned());
        (ticket, before)
    }

    pub(super) fn get_mut(&mut self, request: &str) -> Option<&mut Turn> {
        self.table.get_mut(request)
    }

    pub(super) fn by_ticket_mut(&mut self, ticket: u64) -> Option<&mut Turn> {
        self.table.get_mut(self.by_ticket.get(&ticket)?)
    }

    pub(super) fn remove(&mut self, request: &str) -> Option<Turn> {
        let turn = self.table.remove(request)?;
        self.by_ticket.remove(&turn.ticket);
        Some(turn)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Turn> {
        self.table.values_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(50);

    fn turn(blocks: u8) -> (Turn, Instant) {
        (
            Turn::new(1, (0..blocks).map(|i| BlockHash([i; 32])).collect()),
            Instant::now(),
        )
    }

    fn run(from: usize, slots: u32, expires: Instant) -> Lookup {
        Lookup::Ready(LeasedRun {
            lease: 9,
            from,
            slots: (0..slots).map(SlotId).collect(),
            expires,
        })
    }

    fn ask(turn: &mut Turn, local: usize, max: usize, now: Instant) -> (Answer, Vec<u64>) {
        let mut released = Vec::new();
        (
            turn.answer(local, max, (now, PATIENCE), &mut released),
            released,
        )
    }

    #[test]
    fn waiting_has_an_end() {
        let (mut turn, now) = turn(4);
        turn.lookup = Lookup::Waiting {
            sequence: 1,
            since: now,
            from: 0,
        };
        assert_eq!(ask(&mut turn, 0, 4, now).0, Answer::Pending);
        assert_eq!(ask(&mut turn, 0, 4, now + PATIENCE).0, Answer::Miss);
    }

    #[test]
    fn the_hit_begins_where_the_gpu_ends_and_leaves_a_token_to_compute() {
        let (mut turn, now) = turn(8);
        turn.lookup = run(0, 8, now + Duration::from_secs(30));
        assert_eq!(ask(&mut turn, 3, 7, now).0, Answer::Hit(4));
        assert_eq!(ask(&mut turn, 0, 8, now).0, Answer::Hit(8));
    }

    #[test]
    fn a_hit_that_the_gpu_has_already_gives_its_lease_back() {
        let (mut turn, now) = turn(8);
        turn.lookup = run(0, 8, now + Duration::from_secs(30));
        assert_eq!(ask(&mut turn, 7, 7, now), (Answer::Miss, vec![9]));
        assert_eq!(turn.lookup, Lookup::Idle);
    }

    /// Which is how it is told from one that the sidecar did not answer in time.
    #[test]
    fn a_lookup_that_the_gpu_has_made_needless_is_not_waited_for() {
        let (mut turn, now) = turn(8);
        let waiting = || Lookup::Waiting {
            sequence: 1,
            since: now,
            from: 0,
        };
        turn.lookup = waiting();
        assert_eq!(ask(&mut turn, 7, 7, now).0, Answer::Miss);
        assert_eq!(turn.lookup, Lookup::Idle);
        turn.lookup = waiting();
        assert_eq!(ask(&mut turn, 0, 7, now + PATIENCE).0, Answer::Miss);
        assert_eq!(turn.lookup, waiting());
    }

    #[test]
    fn an_expired_lease_is_asked_for_anew() {
        let (mut turn, now) = turn(8);
        turn.lookup = run(0, 8, now);
        assert_eq!(
            ask(&mut turn, 2, 7, now),
            (Answer::Ask { from: 2 }, vec![9])
        );
    }

    #[test]
    fn a_probe_that_moved_is_asked_for_anew() {
        let (mut turn, now) = turn(8);
        let later = now + Duration::from_secs(30);
        turn.lookup = run(4, 4, later);
        assert_eq!(
            ask(&mut turn, 2, 7, now),
            (Answer::Ask { from: 2 }, vec![9]),
            "the GPU lost blocks"
        );
        turn.lookup = run(0, 3, later);
        assert_eq!(
            ask(&mut turn, 5, 7, now),
            (Answer::Ask { from: 5 }, vec![9]),
            "a gap in the host below the GPU's end"
        );
        turn.lookup = Lookup::Nothing { from: 5 };
        assert_eq!(ask(&mut turn, 5, 7, now).0, Answer::Miss);
        assert_eq!(ask(&mut turn, 6, 7, now).0, Answer::Ask { from: 6 });
        turn.lookup = Lookup::Absent;
        assert_eq!(ask(&mut turn, 5, 7, now).0, Answer::Ask { from: 5 });
    }

    #[test]
    fn a_reused_request_id_is_another_turn() {
        let mut turns = Turns::default();
        let (first, _) = turns.insert("r", vec![]);
        let (second, before) = turns.insert("r", vec![]);
        assert_ne!(first, second);
        assert_eq!(before.unwrap().ticket, first);
        assert!(turns.by_ticket_mut(first).is_none());
        assert!(turns.by_ticket_mut(second).is_some());
    }
}
