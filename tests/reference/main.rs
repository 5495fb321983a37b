//! The reference engine beside a real sidecar: what its answers are after swaps, on one rank and on two, after every fault.
//!
//! `GREENROOM_SEED=n` replays the random run's events; `GREENROOM_TURNS=n` changes its length.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod answers;
mod faults;
mod random;
mod ranks;
mod resets;
mod rig;
