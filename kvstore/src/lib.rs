//! Greenroom's host KV store: which blocks lie in which slots of the arena, and who may touch them.
//!
//! One [`Store`] answers for one arena. It is synchronous and has no clock, no I/O and no lock: the daemon's one owner calls
//! it with the time, gets [`Effects`] back and acts on them; the simulator and the model tests run the same code.
//!
//! The way of a block:
//!
//! ```text
//!             reserve               commit
//!   free ───────────────► filling ──────────► committed ◄──► leased, pinned
//!    ▲ ▲                  │     │                │   │
//!    │ └──────────────────┘     │ ends early     │   │ reset while leased
//!    │    abort                 ▼                │   ▼
//!    ├────────────────────── draining ◄──────────┼── (draining)
//!    └───────────────────────────────────────────┘
//!         its copies have ended         evicted, retired, reset
//! ```
//!
//! - Readers find *committed* blocks only; blocks being *filled* are in a map of their own. A block is stored once per
//!   namespace, whoever saves it first.
//! - A read [`Lease`] keeps bytes in place, a [`Reservation`] keeps slots for a writer. Both are an engine's right for a
//!   time. When one ends without its engine saying that the copies have ended (time, lost connection, reset), the slots it
//!   could still *write* drain, and those it could still *read* stay unevictable, until the engine says so late or is gone.
//!   A reservation that has ended is never committed.
//! - Pins only keep eviction away: counted, with a time to live and a budget, and always breakable.
//! - Eviction takes demoted blocks first, then the least recently used call's, within a call suffix before prefix: a block
//!   without all before it is worth nothing. Retired blocks are not queued but freed.
//! - A namespace is everything besides the hash that decides a block's bytes. Resetting it starts a new epoch; a handle of
//!   an older epoch finds nothing.
//!
//! A [`Presence`], which the store writes, shows engines which blocks need not be asked for.
//!
//! [`ArenaFile`] and [`ArenaMap`] are the memory itself: the sidecar creates the file, workers map it, and the store does not
//! touch it. [`Geometry`] and [`slot_offset`] translate between the two worlds.
#![deny(unsafe_code)]

/// Whether assertions that cost a memory access per block are on.
const STRICT: bool = cfg!(any(debug_assertions, feature = "strict"));

mod arena;
mod audit;
mod effects;
mod error;
mod evict;
#[cfg(feature = "faults")]
pub mod faults;
mod ids;
mod index;
mod layout;
mod lease;
mod pins;
mod presence;
mod slots;
mod steps;
mod store;

/// Whether a fault strikes here: a name of `faults::POINTS`. In builds without the feature `faults` this is `false`.
#[cfg(feature = "faults")]
#[macro_export]
macro_rules! fault {
    ($name:literal) => {
        $crate::faults::strikes($name)
    };
}

/// Whether a fault strikes here: never, in a build without the feature `faults`.
#[cfg(not(feature = "faults"))]
#[macro_export]
macro_rules! fault {
    ($name:literal) => {
        false
    };
}

/// Sleeps or waits here if a test says so: a name of `faults::POINTS`. Nothing in builds without the feature `faults`.
#[cfg(feature = "faults")]
#[macro_export]
macro_rules! fault_delay {
    ($name:literal) => {
        $crate::faults::delay($name)
    };
}

/// Nothing, in a build without the feature `faults`.
#[cfg(not(feature = "faults"))]
#[macro_export]
macro_rules! fault_delay {
    ($name:literal) => {};
}

pub use arena::{ArenaFile, ArenaMap, PageSize};
pub use effects::{Counts, Effects, Evicted, Lease, PinOutcome, Reservation};
pub use error::{ArenaError, StoreError};
pub use ids::{
    BlockHash, Epoch, GpuBlock, LeaseId, Namespace, NamespaceId, Owner, PinId, SlotId, u64_from,
    usize_from, usize_from_u64,
};
pub use index::{DigestHasher, DigestMap};
pub use layout::{BLOCK_TOKENS_MAX, Geometry, RANK_BYTES_MAX, RANKS_MAX, SLOT_ALIGN, slot_offset};
pub use lease::Term;
pub use pins::{PIN_TTL_MAX, PINS_MAX};
pub use presence::{Presence, PresenceView};
pub use store::{LEASE_TTL_LIMIT, NAMESPACES_LIMIT, Store, StoreConfig};
