//! What the process tests share: a sidecar in this process, and a simulated engine whose KV are checkable bytes.
//!
//! The engine drives the real hooks, link, protocol, store and copy thread; only the model is made up: the bytes of a
//! block follow from its hash, so that a block with wrong bytes is seen at once.
#![deny(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    reason = "test support: a panic is how a test fails"
)]
#![allow(missing_docs, reason = "not a library for others")]

pub mod engine;
pub mod pool;
pub mod random;
pub mod sidecar;
pub mod worker;
