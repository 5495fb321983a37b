//! What the scheduler side tells the workers each step, and what they report back. Opaque bytes to Python.

use serde::{Deserialize, Serialize};

use super::frames::{CopyClass, FrameError, decode};

/// One copy job: an ordered mapping between slots and GPU blocks, executed as one batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedJob {
    /// Unique within one engine start.
    pub id: u64,
    /// What kind of copy.
    pub kind: CopyClass,
    /// Boot id of the sidecar whose arena the slots belong to.
    pub boot: u64,
    /// (slot, GPU block); loads copy from the slot, saves to it.
    pub pairs: Vec<(u32, u32)>,
}

/// Work for one engine step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepPlan {
    /// Jobs whose copies must have ended before this step computes: their blocks have been given away.
    pub fence: Vec<u64>,
    /// Jobs to give up; each still ends, as cancelled.
    pub cancel: Vec<u64>,
    /// Demand loads and prefetches, started before the step computes.
    pub loads: Vec<PlannedJob>,
    /// Saves, started after the step has computed.
    pub saves: Vec<PlannedJob>,
}

impl StepPlan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.fence.is_empty()
            && self.cancel.is_empty()
            && self.loads.is_empty()
            && self.saves.is_empty()
    }

    /// As bytes for the worker.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] is possible in principle only.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        postcard::to_stdvec(self).map_err(|_| FrameError::Malformed)
    }

    /// From the scheduler side's bytes.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] if they are not a plan.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        decode(bytes)
    }
}

/// How one rank's part of a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobReport {
    /// The job.
    pub id: u64,
    /// Every byte was copied.
    pub ok: bool,
    /// Bytes copied by this rank.
    pub bytes: u64,
    /// From submission to completion.
    pub micros: u64,
}

/// What one rank reports after a step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The reporting rank.
    pub rank: u32,
    /// Jobs whose copies have all ended.
    pub ended: Vec<JobReport>,
}

impl Report {
    /// As bytes for the scheduler side.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] is possible in principle only.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        postcard::to_stdvec(self).map_err(|_| FrameError::Malformed)
    }

    /// From a worker's bytes.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] if they are not a report.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        decode(bytes)
    }
}
