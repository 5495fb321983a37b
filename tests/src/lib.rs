//! What the tests share: a sidecar in this process, and two engines on the real hooks, links, protocol, store and copies:
//! [`engine`], whose KV are checkable bytes, and [`reference`], whose KV decide its answers.
//!
//! The first makes its model up: the bytes of a block follow from its hash, so that a block with wrong bytes is seen at
//! once.
#![deny(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    reason = "test support: a panic is how a test fails"
)]
#![allow(missing_docs, reason = "not a library for others")]

pub mod child;
pub mod engine;
pub mod fuzz;
pub mod pool;
pub mod random;
pub mod reference;
pub mod sidecar;
pub mod worker;
