//! The engine protocol, both ends: frames over a Unix socket, the arena's descriptor passed with the welcome.
//!
//! Both ends live here so that they cannot drift. The server end ([`server`]) is asynchronous and belongs to the daemon;
//! the client end ([`client`]) is blocking threads inside the engine's processes and never makes its caller wait.

pub mod client;
pub mod frames;
pub mod plan;
#[cfg(feature = "server")]
pub mod server;
pub mod socket;
