//! Placeholder until its part lands.
pub mod commands;
