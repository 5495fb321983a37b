//! The engine protocol, both ends: frames over a Unix socket, a descriptor passed with the welcome.
//!
//! Both ends live here so that they cannot drift. The server end ([`server`]) is asynchronous and belongs to the daemon;
//! the client end ([`client`]) is blocking threads inside the engine's processes and never makes its caller wait.

pub mod client;
pub mod frames;
pub mod plan;
#[cfg(feature = "server")]
pub mod server;
pub mod socket;

/// A number that no other start has, of a sidecar or of an engine; never 0.
pub(crate) fn start_id() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // `RandomState` is keyed from the system's randomness.
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish().max(1)
}
