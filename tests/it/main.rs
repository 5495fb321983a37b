//! Tests across the crates: the HTTP API over real connections, the scheduler hooks against a real sidecar.

mod api;
mod engine_socket;
mod hooks;
