//! The CUDA engine on the stand-in driver: real foreign calls, made-up GPU.
//!
//! One driver serves all tests of a process, so each test takes it for itself ([`rig::take`]).
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::print_stdout, reason = "seeds are printed")]

mod capture;
mod conformance;
mod faults;
mod late;
mod matrix;
mod probe;
mod rig;
