//! Placeholder until its part lands.
mod hooks;
