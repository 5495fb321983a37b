//! What to keep, what to bring back and when. Pure: no clock, no I/O, no store, no CUDA.
//!
//! [`sessions`] knows who waits for what, and turns that into one [`Want`](sessions::Want) per session; [`durations`]
//! learns how long tools take; [`budget`] is the rule that decides, inside the engine, whether a chunk of blocks may be
//! fetched now. The daemon, the hooks and the model tests run the same code.

pub mod budget;
pub mod durations;
#[cfg(feature = "server")]
pub mod sessions;
