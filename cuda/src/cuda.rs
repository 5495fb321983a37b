//! The CUDA engine: block copies by the GPU's copy engines, between the registered arena and vLLM's pool.
//!
//! ```text
//!   probe ─► CudaDevice ─► CudaEngine ─ attach ─► registered: touch, register in pieces
//!                              │
//!                              ├─ submit ─► ranges cut at pieces ─► wait for the mark ─► methods ─► stream ─► event
//!                              └─ poll ───► event passed?                 ▲
//!   vLLM's thread: CudaMarker ─ event on vLLM's stream ───────────────────┘
//! ```
//!
//! It works in the context that torch uses and makes none of its own, on two streams per direction: the GPU has one copy
//! engine for each, which knows no priorities and leaves a stream only when that has run empty. Nothing is linked: a machine
//! without a driver gets [`NoCuda`], which says why. Every driver call is in `driver`, but for those of `workbench`, which
//! measuring and tests need; `table` has what is called.

mod codes;
mod driver;
mod engine;
mod marker;
mod methods;
mod place;
mod probe;
mod registered;
mod table;
#[cfg(feature = "workbench")]
mod workbench;

pub use engine::CudaEngine;
pub use marker::CudaMarker;
pub use methods::CopyMethod;
pub use place::Place;
pub use probe::{CudaDevice, NoCuda};
#[cfg(feature = "workbench")]
pub use workbench::{GpuMemory, PlainCopy, Workbench};
