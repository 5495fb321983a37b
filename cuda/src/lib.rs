//! Block copies between the arena (host memory that the sidecar owns) and the engine's KV pool (device memory).
//!
//! One [`CopyThread`] per worker owns one [`CopyEngine`] and is the only thread that ever calls it. Callers hand it
//! [`Job`]s, ordered lists of (slot, gpu block) pairs, and collect each job's end exactly once:
//!
//! ```text
//!   submit(job) ─► ranges() ─► queue per kind ─► Pacer ─► sub-batch ─► CopyEngine::submit ─► poll ─► take_finished()
//!                  checked      Demand           at most 2 outstanding per direction
//!                  merged       Prefetch         loads before saves
//!                               Save
//! ```
//!
//! What holds, whatever fails:
//! - **A fenced job touches nothing.** When [`CopyThread::fence`] returns, no copy of those jobs is running or will run,
//!   also if the engine failed or panicked: a dead engine is dropped, which waits for its copies, before any fence returns.
//! - **Every job ends once**, as done, cancelled or failed; a full queue says [`CopyError::Busy`].
//! - **No address comes from a client.** Slots and blocks become addresses in one checked function, [`ranges`], and
//!   engines check every range again against the mapping and the pool.
//! - **An idle copy thread sleeps.** It is woken by calls and, only while copies are outstanding, by a poll timer.
//!
//! The crate knows arenas and ranges; it knows nothing of sessions, hints or protocols. [`HostEngine`] copies with
//! `memcpy` for CPU builds of the inference engine, [`CudaEngine`] with a GPU's copy engines; every engine passes the suite
//! in `conformance` (feature `conformance`).

#![deny(unsafe_code)]

#[cfg(feature = "workbench")]
pub mod bench;
mod cuda;
mod device;
mod engine;
mod host;
mod jobs;
#[cfg(all(test, feature = "models"))]
mod models;
mod owner;
mod ranges;
mod schedule;
mod sync;
#[cfg(test)]
mod testkit;
mod thread;

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;

pub use cuda::{CopyMethod, CudaDevice, CudaEngine, CudaMarker, NoCuda, Place};
#[cfg(feature = "workbench")]
pub use cuda::{GpuMemory, PlainCopy, Workbench};
pub use device::{DevicePool, DeviceRegion};
pub use engine::{
    ArenaId, ComputeMark, ComputeMarker, CopyBatch, CopyEngine, CopyError, CopyKind, CopyRange,
    Direction, JobId, Poll, Ticket,
};
pub use host::{Fault, HostEngine, HostMarker, HostSwitch};
pub use jobs::{JobEnd, Outcome};
pub use ranges::{ArenaShard, ranges};
pub use schedule::CopyLimits;
pub use thread::{CopyThread, Job};
