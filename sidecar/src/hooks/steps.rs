//! One step's work on the engine's pool: saves and fetches shipped as jobs, ended jobs committed, published or dropped.

use std::time::{Duration, Instant};

use kvstore::{BlockHash, GpuBlock, SlotId};

use super::jobs::{Job, Work};
use super::saves::{self, Shipment};
use super::turns::LEASE_MARGIN;
use super::watch::{CopyOutcome, Fetch, Findings};
use super::{
    BUSY_STEP_BLOCKS, GpuPool, IDLE_STEP_BLOCKS, Published, SchedulerHooks, StepMode, chunk_blocks,
    push_bounded,
};
use crate::engine::frames::{CopyClass, CopySample, Hashes, PAIRS_MAX, ToSidecar};
use crate::engine::plan::PlannedJob;

/// For the way of a message to the sidecar, which also began to count that much earlier.
const SETTLE_MARGIN: Duration = Duration::from_millis(100);

impl SchedulerHooks {
    /// Looks after the blocks of running saves before anything computes.
    pub(super) fn recheck_saves(&mut self, pool: &mut dyn GpuPool) {
        if kvstore::fault!("hooks::recheck_saves::skip") {
            return;
        }
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

    /// Starts what has been granted, asks for more. Returns the blocks that it has looked at.
    pub(super) fn ship_saves(
        &mut self,
        reserve: usize,
        pool: &mut dyn GpuPool,
        now: Instant,
    ) -> usize {
        let mut looked = 0;
        let chunk = chunk_blocks(self.config.rank_bytes);
        while self.jobs.count_saves() < saves::OUTSTANDING_MAX {
            let Some(grant) = self.saves.pop_grant() else {
                break;
            };
            if now + LEASE_MARGIN >= grant.expires {
                self.abort(grant.lease);
                self.saves.push(
                    &grant
                        .entries
                        .iter()
                        .map(|(hash, _)| *hash)
                        .collect::<Vec<_>>(),
                );
                continue;
            }
            let room = pool.free().saturating_sub(reserve);
            looked += grant.entries.len();
            match saves::prepare(&grant, pool, room) {
                Shipment::Ready(blocks) => {
                    let pairs: Vec<_> = grant
                        .entries
                        .iter()
                        .zip(&blocks)
                        .map(|((_, slot), b)| (*slot, b.block))
                        .collect();
                    let boot = self.connection.boot.unwrap_or(0);
                    self.totals.saved_blocks += u64::try_from(blocks.len()).unwrap_or(u64::MAX);
                    self.ship(
                        Work::Save {
                            lease: grant.lease,
                            expires: grant.expires,
                            blocks,
                            fenced: false,
                        },
                        boot,
                        &pairs,
                    );
                }
                Shipment::TooMany(0) => {
                    self.saves.unpop_grant(grant);
                    break;
                }
                Shipment::TooMany(fit) => {
                    self.abort(grant.lease);
                    self.saves.again_in_parts(grant, fit);
                }
                Shipment::Gone(there) => {
                    self.abort(grant.lease);
                    self.saves.push(&there);
                }
            }
        }
        let room = || pool.free().saturating_sub(reserve);
        while let Some(hashes) = self.saves.next_batch(chunk, room) {
            match self.send(&ToSidecar::Reserve {
                hashes: Hashes(hashes.clone()),
            }) {
                Some(sequence) => self.saves.asked(sequence, hashes),
                None => {
                    self.saves.push(&hashes);
                    break;
                }
            }
        }
        looked
    }

    /// Evicts some of what retired sessions have left on the GPU. Returns the blocks that it has looked at.
    pub(super) fn evict_retired(&mut self, mode: StepMode, pool: &mut dyn GpuPool) -> usize {
        let most = match mode {
            StepMode::Idle => IDLE_STEP_BLOCKS,
            StepMode::Busy | StepMode::Paused => BUSY_STEP_BLOCKS,
        };
        let some: Vec<BlockHash> = self.retired.drain(..most.min(self.retired.len())).collect();
        if !some.is_empty() {
            super::pool::evict(pool, &some);
        }
        some.len()
    }

    /// Carries out what the watch found.
    pub(super) fn act(&mut self, findings: Findings) {
        self.release(&findings.released);
        for (session, hashes, from) in findings.ask {
            let lookup = ToSidecar::Lookup {
                turn: session,
                for_session: true,
                hashes: Hashes(hashes),
            };
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
            let pairs: Vec<_> = fetch
                .slots
                .iter()
                .copied()
                .zip(fetch.blocks.iter().copied())
                .collect();
            let boot = self.connection.boot.unwrap_or(0);
            self.watch.count(pairs.len());
            self.totals.prefetch_blocks += u64::try_from(pairs.len()).unwrap_or(u64::MAX);
            self.ship(Work::Prefetch(fetch), boot, &pairs);
        }
    }

    /// Enters a job and puts it into the next plan.
    pub(super) fn ship(&mut self, work: Work, boot: u64, pairs: &[(SlotId, GpuBlock)]) {
        let kind = work.kind();
        let id = self.jobs.insert(Job::new(
            work,
            self.epoch,
            self.connection.number,
            self.config.ranks,
        ));
        let pairs = pairs
            .iter()
            .map(|(slot, block)| (slot.0, block.0))
            .collect();
        let job = PlannedJob {
            id,
            kind,
            boot,
            pairs,
        };
        match kind {
            CopyClass::Save => self.next.saves.push(job),
            _ => self.next.loads.push(job),
        }
    }

    /// All ranks have reported: commit or drop, publish or free. Returns the request that waited for it.
    pub(super) fn finish(
        &mut self,
        job: Job,
        pool: &mut dyn GpuPool,
        now: Instant,
    ) -> Option<String> {
        let (kind, current) = (job.work.kind(), job.epoch == self.epoch);
        let same = job.connection == self.connection.number;
        let good = !job.failed && current;
        push_bounded(
            &mut self.figures.copies,
            CopySample {
                kind,
                ok: !job.failed,
                bytes: job.bytes,
                micros: job.micros,
            },
        );
        self.totals.failed += u64::from(job.failed && current);
        match job.work {
            Work::Demand {
                request,
                lease,
                blocks,
                hashes,
            } => {
                if !job.failed && !current {
                    // The bytes are old and the request still waits: fail the load, so that it is recomputed.
                    let pairs: Vec<_> = blocks.iter().map(|block| (SlotId(0), *block)).collect();
                    self.ship(
                        Work::Demand {
                            request,
                            lease,
                            blocks,
                            hashes,
                        },
                        0,
                        &pairs,
                    );
                    return None;
                }
                self.release(lease.filter(|_| same).as_slice());
                Some(request)
            }
            Work::Prefetch(fetch) => {
                let outcome = if good {
                    CopyOutcome::Published
                } else {
                    CopyOutcome::Lost
                };
                let released = self.finish_fetch(&fetch, outcome, pool);
                if same {
                    self.release(&released);
                }
                None
            }
            Work::Save {
                lease,
                expires,
                blocks,
                ..
            } => {
                saves::finish(&blocks, pool);
                if !same {
                    return None;
                }
                // A save is copied after the step that it was shipped with, and that may take longer than a lease lasts.
                let late = good && now + SETTLE_MARGIN >= expires;
                let commit = good && !late;
                let sent = self.send(&ToSidecar::Settle { lease, commit });
                let hashes: Vec<BlockHash> = blocks.iter().map(|block| block.hash).collect();
                if late {
                    self.saves.push(&hashes);
                } else if let Some(sequence) = sent.filter(|_| commit) {
                    self.connection.stored.committed(sequence, hashes);
                }
                None
            }
        }
    }

    /// Returns leases to give back.
    fn finish_fetch(
        &mut self,
        fetch: &Fetch,
        outcome: CopyOutcome,
        pool: &mut dyn GpuPool,
    ) -> Vec<u64> {
        if outcome == CopyOutcome::Published {
            let entries = fetch.blocks.iter().zip(&fetch.hashes).zip(&fetch.positions);
            let entries: Vec<Published> = entries
                .map(|((block, hash), position)| Published {
                    block: *block,
                    hash: *hash,
                    position: *position,
                })
                .collect();
            pool.publish(&entries);
        } else {
            self.figures.prefetch_cancelled +=
                u64::try_from(fetch.blocks.len()).unwrap_or(u64::MAX);
        }
        let mut blocks = fetch.blocks.clone();
        blocks.reverse();
        pool.release(&blocks);
        self.watch.fetched(fetch, outcome)
    }
}
