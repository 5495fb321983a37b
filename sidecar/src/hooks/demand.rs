//! Demand loads: what the host tier can add to a prompt, and the load itself.

use std::time::Instant;

use kvstore::{GpuBlock, SlotId};

use super::jobs::Work;
use super::turns::{Answer, Lookup};
use super::{COPY_PATIENCE, Holders, LOAD_STEPS_MAX, Match, SchedulerHooks};
use crate::engine::frames::{Hashes, ToSidecar};
use crate::planner::budget;

impl SchedulerHooks {
    pub(super) fn weigh(
        &mut self,
        request: &str,
        (local, blocks_max): (usize, usize),
        holders: Holders,
        now: Instant,
    ) -> Match {
        let ready = self.is_ready();
        let Some(turn) = self.turns.get_mut(request) else {
            return Match::Miss;
        };
        turn.local = local;
        self.figures.prefetch_used += turn.take_used();
        let blocks_max = blocks_max.min(turn.hashes.len());
        if local < blocks_max && self.jobs.is_loading(&turn.hashes[local]) {
            let since = *turn.waiting_for_copy.get_or_insert(now);
            if now.saturating_duration_since(since) < COPY_PATIENCE {
                return Match::Pending;
            }
        }
        turn.waiting_for_copy = None;
        self.figures.prefetch_wasted += turn.take_wasted();
        if !ready {
            return Match::Miss;
        }
        let mut released = Vec::new();
        if local < blocks_max && self.connection.stored.lacks(&turn.hashes[local]) {
            // Known without the step that asking takes. What was asked may know better by then, if this request waits for
            // something else.
            if !matches!(turn.lookup, Lookup::Waiting { .. }) {
                turn.give_back(&mut released);
                turn.lookup = Lookup::Absent;
                self.release(&released);
            }
            return Match::Miss;
        }
        let answer = turn.answer(
            local,
            blocks_max,
            (now, self.config.lookup_wait),
            &mut released,
        );
        let matched = match answer {
            // The blocks that are loaded, and one for what is computed after them.
            Answer::Hit(_)
                if turn.steps_without_room < LOAD_STEPS_MAX
                    && !budget::admits_load(blocks_max - local + 1, holders) =>
            {
                turn.steps_without_room += 1;
                Match::Pending
            }
            Answer::Hit(n) => {
                if let Lookup::Ready(run) = &turn.lookup {
                    turn.offered = Some((local, run.clone()));
                }
                Match::Hit(n)
            }
            Answer::Pending => Match::Pending,
            Answer::Miss => {
                // One that is no longer waited for since the GPU has the blocks was not late.
                let overdue = matches!(turn.lookup, Lookup::Waiting { .. });
                self.figures.timeouts += u64::from(overdue);
                self.totals.timeouts += u64::from(overdue);
                Match::Miss
            }
            Answer::Ask { from } => {
                let (ticket, hashes) = (turn.ticket, Hashes(turn.hashes[from..].to_vec()));
                let sent = self.send(&ToSidecar::Lookup {
                    turn: ticket,
                    for_session: false,
                    hashes,
                });
                match (sent, self.turns.get_mut(request)) {
                    (Some(sequence), Some(turn)) => {
                        turn.lookup = Lookup::Waiting {
                            sequence,
                            since: now,
                            from,
                        };
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
        let Some(turn) = self.turns.get_mut(request) else {
            return;
        };
        turn.steps_without_room = 0;
        turn.begun = true;
        let offered = turn.offered.take();
        if gpu_blocks.is_empty() {
            let mut released = Vec::new();
            if !matches!(turn.lookup, Lookup::Idle | Lookup::Ready(_)) {
                let missed = turn.hashes.len().saturating_sub(turn.local);
                self.figures.match_misses += u64::try_from(missed).unwrap_or(u64::MAX);
                turn.lookup = Lookup::Idle;
            }
            turn.give_back(&mut released);
            self.release(&released);
            return;
        }
        self.watch.count(gpu_blocks.len());
        let lookup = std::mem::replace(&mut turn.lookup, Lookup::Idle);
        let run = match (lookup, offered) {
            (Lookup::Ready(run), Some((local, offered))) if run == offered => Some((local, run)),
            (_, offered) => offered,
        };
        let pairs = run.as_ref().map(|(local, run)| {
            (*local..)
                .zip(gpu_blocks)
                .map_while(|(position, block)| Some((run.slot(position)?, *block)))
                .collect::<Vec<_>>()
        });
        let boot = self
            .connection
            .boot
            .filter(|_| pairs.as_ref().is_some_and(|p| p.len() == gpu_blocks.len()));
        let hashes = run.as_ref().map_or(Vec::new(), |(local, _)| {
            turn.hashes[*local..]
                .iter()
                .take(gpu_blocks.len())
                .copied()
                .collect()
        });
        let count = u64::try_from(gpu_blocks.len()).unwrap_or(u64::MAX);
        self.figures.match_hits += count;
        let computed = turn
            .hashes
            .len()
            .saturating_sub(turn.local + gpu_blocks.len());
        self.figures.match_misses += u64::try_from(computed).unwrap_or(u64::MAX);
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
}
