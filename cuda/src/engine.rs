//! The contract of a copy engine: what the owner thread calls, and the words both sides use.
//!
//! Owns no memory and no thread. Must never grow anything that only one kind of engine can do.

use std::io;
use std::sync::Arc;

use kvstore::{ArenaMap, GpuBlock, SlotId};

/// Which way the bytes go, seen from the arena ("host").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Arena to KV pool: a swap-in.
    HostToDevice,
    /// KV pool to arena: a swap-out.
    DeviceToHost,
}

/// Why a copy is made, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CopyKind {
    /// A request waits for these blocks.
    Demand,
    /// Nobody waits yet.
    Prefetch,
    /// Keeping filled blocks; below every load.
    Save,
}

impl CopyKind {
    /// All kinds in priority order.
    pub const ALL: [CopyKind; 3] = [CopyKind::Demand, CopyKind::Prefetch, CopyKind::Save];

    /// Which way copies of this kind go.
    pub fn direction(self) -> Direction {
        match self {
            CopyKind::Demand | CopyKind::Prefetch => Direction::HostToDevice,
            CopyKind::Save => Direction::DeviceToHost,
        }
    }
}

/// One job of a [`CopyThread`](crate::CopyThread). Chosen by the scheduler side; unique per engine start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// One attached arena: the boot id of the sidecar that owns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ArenaId(pub u64);

/// A point in the engine's compute work: everything launched before it. Made by a [`ComputeMarker`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ComputeMark(pub u64);

impl ComputeMark {
    /// Nothing to wait for.
    pub const NONE: ComputeMark = ComputeMark(0);
}

/// One contiguous copy. Addresses and sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRange {
    /// Distance from the start of the arena's mapping.
    pub arena_offset: u64,
    /// Device address.
    pub device: u64,
    /// Length, never 0.
    pub bytes: u64,
}

/// What is given to a copy engine at once. Its ranges are unordered among themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyBatch {
    /// Direction of every range.
    pub direction: Direction,
    /// The arena that every range lies in.
    pub arena: ArenaId,
    /// What to copy; not empty.
    pub ranges: Vec<CopyRange>,
    /// No byte is written, and none of the pool is read, before the compute work up to here has finished. A load may read its
    /// slots earlier: they are stable for as long as the job lives.
    pub after: ComputeMark,
}

impl CopyBatch {
    /// Bytes of all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.bytes).sum()
    }
}

/// Names one submitted batch until [`CopyEngine::poll`] has reported its end. Never reused within one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// How a batch stands.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Poll {
    /// Not started, or running.
    Pending,
    /// Every byte has arrived and is visible to whoever reads it after this answer.
    Done,
    /// Ended early: no byte of the batch moves any more, and the destination holds anything.
    Failed(CopyError),
}

/// A way of copying between arenas and one KV pool, driven by one owner thread.
///
/// Every method is called on the owner thread, which also drops the engine. The rules each engine keeps, and the suite in
/// `conformance` checks:
///
/// 1. `submit` only enqueues: it does not wait for copies or compute work. Host engines copy inside `poll`.
/// 2. An error from `submit` means that no byte of the batch has moved or will move. An engine that fails half way through
///    enqueuing returns a ticket and reports the failure from `poll`, after what it enqueued has ended.
/// 3. Every ticket ends: some later `poll` says `Done` or `Failed`, once; polling it again is a programmer error.
///    Tickets may end in any order. After the end no byte of the batch moves.
/// 4. A range outside the attached mapping or the pool is refused by `submit`, whoever built it.
/// 5. Dropping the engine returns only when none of its copies is running or can still start.
/// 6. A [fatal](CopyError::is_fatal) error from any method means that the engine can do nothing any more; the owner drops it.
pub trait CopyEngine: Send {
    /// Short name for logs and figures: `host`, `cuda`.
    fn name(&self) -> &'static str;

    /// Called once, first, on the owner thread: binds what belongs to a thread (a CUDA context, its capture mode).
    fn start(&mut self) -> Result<(), CopyError> {
        Ok(())
    }

    /// Makes an arena usable for copies; a CUDA engine registers the mapping. The engine keeps the mapping alive.
    fn attach(&mut self, id: ArenaId, map: &Arc<ArenaMap>) -> Result<(), CopyError>;

    /// Forgets an arena. Called only when no copy of it is outstanding; an unknown id is fine.
    fn detach(&mut self, id: ArenaId);

    /// Enqueues a batch.
    fn submit(&mut self, batch: &CopyBatch) -> Result<Ticket, CopyError>;

    /// Asks how a batch stands, without waiting for it.
    fn poll(&mut self, ticket: Ticket) -> Poll;
}

/// Makes compute marks. Called on the engine's compute thread, between launches.
pub trait ComputeMarker: Send + Sync {
    /// Marks "everything launched so far" on `stream` (a raw stream handle; engines without streams ignore it). Does not wait
    /// and does not panic.
    ///
    /// Errors: what the driver says, or [`CopyError::Busy`] when the compute work of too many marks has not ended. Nothing may
    /// then be copied that should have waited for the mark.
    fn mark(&self, stream: u64) -> Result<ComputeMark, CopyError>;
}

/// Why a copy, or the thread that makes copies, could not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// The queue is full, or the arena is still being detached: ask again in a later step.
    #[error("copy queue is full, ask again later")]
    Busy,
    /// Never attached, or detached: attach it first, or drop the job.
    #[error("arena {0:?} is not attached")]
    UnknownArena(ArenaId),
    /// The arena is attached and in use already.
    #[error("arena {0:?} is attached already")]
    AlreadyAttached(ArenaId),
    /// Arenas of dead sidecars pile up: wait until their jobs have ended.
    #[error("{limit} arenas are attached already")]
    TooManyArenas {
        /// How many may be attached at once.
        limit: usize,
    },
    /// The mapping names a slot that the arena does not have: refuse the job.
    #[error("slot {} is outside the arena's {slots} slots", slot.0)]
    SlotOutOfRange {
        /// The slot asked for.
        slot: SlotId,
        /// Slots of the arena.
        slots: u64,
    },
    /// The mapping names a block that the pool does not have: refuse the job.
    #[error("gpu block {} is outside the pool's {blocks} blocks", block.0)]
    BlockOutOfRange {
        /// The block asked for.
        block: GpuBlock,
        /// Blocks of the pool.
        blocks: u32,
    },
    /// A range lies outside the arena's mapping or the pool: refuse the batch.
    #[error("a copy of {} bytes lies outside the arena or the pool", range.bytes)]
    RangeOutside {
        /// The range asked for.
        range: CopyRange,
    },
    /// A live job has this id.
    #[error("job {} is in flight already", .0.0)]
    DuplicateJob(JobId),
    /// The pool, the shard or the limits contradict themselves; the text names the field.
    #[error("bad copy configuration: {0}")]
    BadConfig(&'static str),
    /// The driver refused or failed this one copy; others may work. Treat the blocks as not copied.
    #[error("{operation} failed with code {code}")]
    Driver {
        /// The driver call.
        operation: &'static str,
        /// The driver's own error number.
        code: i32,
    },
    /// The driver no longer tells what runs, or has lost the context: as [`EngineDead`](Self::EngineDead), with the reason.
    #[error("{operation} failed with code {code}, and CUDA copies cannot go on in this process")]
    DeviceLost {
        /// The driver call.
        operation: &'static str,
        /// The driver's own error number.
        code: i32,
    },
    /// The system gave no thread.
    #[error("could not start the copy thread: {0}")]
    NoThread(io::ErrorKind),
    /// The engine failed for good or the copy thread panicked: nothing is copied any more, do without the cache.
    #[error("the copy engine is dead")]
    EngineDead,
}

impl CopyError {
    /// Whether the engine that says so can do nothing any more.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::EngineDead | Self::DeviceLost { .. })
    }
}
