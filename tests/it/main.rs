//! Tests across the crates: the HTTP API over real connections, the scheduler hooks against a real sidecar.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod api;
mod corpus;
mod engine_socket;
mod hooks;
mod no_syscall;
mod security;

/// Not a test of its own: see `greenroom_tests::child`.
#[test]
fn child_greenroom() {
    greenroom_tests::child::greenroom_if_told();
}
