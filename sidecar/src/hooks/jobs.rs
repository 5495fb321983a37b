//! Copies in flight: what each one is for and who has reported. A job ends when its last rank has.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use kvstore::{BlockHash, GpuBlock};

use super::saves::SavedBlock;
use super::watch::Fetch;
use crate::engine::frames::CopyClass;
use crate::engine::plan::JobReport;

/// What a job is for, and what it holds until it ends.
#[derive(Debug)]
pub(super) enum Work {
    /// A request waits for these blocks, which the engine holds for it.
    Demand {
        request: String,
        lease: Option<u64>,
        blocks: Vec<GpuBlock>,
        hashes: Vec<BlockHash>,
    },
    /// Blocks that we took for a waiting session.
    Prefetch(Fetch),
    /// Blocks on their way to the arena.
    Save {
        lease: u64,
        expires: Instant,
        blocks: Vec<SavedBlock>,
        fenced: bool,
    },
}

impl Work {
    pub(super) fn kind(&self) -> CopyClass {
        match self {
            Self::Demand { .. } => CopyClass::Demand,
            Self::Prefetch(_) => CopyClass::Prefetch,
            Self::Save { .. } => CopyClass::Save,
        }
    }

    fn loads(&self) -> &[BlockHash] {
        match self {
            Self::Demand { hashes, .. } => hashes,
            Self::Prefetch(fetch) => &fetch.hashes,
            Self::Save { .. } => &[],
        }
    }
}

/// One job.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    /// Cache epoch in which it was planned.
    pub(super) epoch: u64,
    /// Connection whose leases it uses.
    pub(super) connection: u64,
    /// Some rank did not copy everything.
    pub(super) failed: bool,
    /// All ranks' bytes.
    pub(super) bytes: u64,
    /// The slowest rank's time.
    pub(super) micros: u64,
    ranks_left: u32,
}

impl Job {
    pub(super) fn new(work: Work, epoch: u64, connection: u64, ranks: u32) -> Self {
        Self {
            work,
            epoch,
            connection,
            failed: false,
            bytes: 0,
            micros: 0,
            ranks_left: ranks,
        }
    }
}

/// All jobs by id. Ids are never reused within one engine start.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    next: u64,
    table: HashMap<u64, Job>,
    loading: HashSet<BlockHash>,
}

impl Jobs {
    pub(super) fn insert(&mut self, job: Job) -> u64 {
        self.next += 1;
        self.loading.extend(job.work.loads());
        self.table.insert(self.next, job);
        self.next
    }

    /// Counts a rank's report; the job itself when it was the last. Reports of unknown jobs are ignored.
    pub(super) fn rank_done(&mut self, report: &JobReport) -> Option<Job> {
        let job = self.table.get_mut(&report.id)?;
        job.failed |= !report.ok;
        job.bytes = job.bytes.saturating_add(report.bytes);
        job.micros = job.micros.max(report.micros);
        job.ranks_left -= 1;
        if job.ranks_left > 0 {
            return None;
        }
        let job = self.table.remove(&report.id)?;
        for hash in job.work.loads() {
            self.loading.remove(hash);
        }
        Some(job)
    }

    /// Whether a block is on its way to the GPU.
    pub(super) fn is_loading(&self, hash: &BlockHash) -> bool {
        self.loading.contains(hash)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = u64> {
        self.table.keys().copied()
    }

    pub(super) fn saves_mut(&mut self) -> impl Iterator<Item = (u64, &mut Job)> {
        self.table
            .iter_mut()
            .filter(|(_, job)| job.work.kind() == CopyClass::Save)
            .map(|(id, job)| (*id, job))
    }

    pub(super) fn count_saves(&self) -> usize {
        self.table
            .values()
            .filter(|job| job.work.kind() == CopyClass::Save)
            .count()
    }

    /// Whether a job of an earlier connection is still running.
    pub(super) fn any_before(&self, connection: u64) -> bool {
        self.table.values().any(|job| job.connection < connection)
    }

    /// Whether any job holds references of ours on GPU blocks.
    pub(super) fn hold_references(&self) -> bool {
        self.table.values().any(|job| match &job.work {
            Work::Demand { .. } => false,
            Work::Prefetch(_) => true,
            Work::Save { blocks, .. } => blocks.iter().any(|block| block.ours),
        })
    }
}
