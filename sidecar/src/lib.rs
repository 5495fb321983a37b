//! The Greenroom sidecar as a library.
//!
//! * [`engine`]: the protocol between an engine's processes and the sidecar, both ends.
//! * [`hooks`]: what an engine's scheduler calls; all decisions about the engine's own pool are made here.
//! * [`planner`]: pure policy: sessions, tool durations, the reserve rule.
//! * with feature `server` (default) the daemon: `actor` owns the store and the sessions, `api` is HTTP at the edge,
//!   `server` ties them together, `cli` is the `greenroom` command.
//!
//! The sidecar never touches a GPU and never maps the arena it hands out.
#![forbid(unsafe_code)]

pub mod engine;
mod faults;
pub mod hooks;
pub mod planner;
mod sync;

#[cfg(feature = "server")]
pub mod actor;
#[cfg(feature = "server")]
pub mod api;
#[cfg(feature = "server")]
pub mod cli;
#[cfg(feature = "server")]
pub mod commands;
#[cfg(feature = "server")]
pub mod config;
#[cfg(feature = "server")]
pub mod measure;
#[cfg(feature = "server")]
pub mod metrics;
#[cfg(feature = "server")]
mod seldom;
#[cfg(feature = "server")]
pub mod server;
