//! The CUDA engine on a GPU. Where there is none each test says so and passes, unless `REQUIRE_GPU=1` is set.
//!
//! Compute work is held on the default stream, which all tests share: one of them runs at a time.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "seeds, and why nothing was tested"
)]

mod capture;
mod conformance;
mod late;
mod layouts;
mod rig;
