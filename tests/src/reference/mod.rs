//! The reference engine: a small transformer whose KV really goes through the paged pool, so that what comes back from the
//! arena decides what the next token is.
//!
//! [`Engine`] schedules requests as vLLM does and drives the same hooks and copies; [`Resident`] is the same engine with
//! a pool in which nothing is ever evicted and no sidecar. An answer is right if every logit of every token has the
//! bits that the resident engine computes for it.

mod engine;
mod model;
mod resident;

pub use engine::{Answer, End, Engine, EngineOptions, Sample};
pub use model::{BLOCK, Model, VOCABULARY};
pub use resident::Resident;
