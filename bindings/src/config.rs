//! What Python says about the engine, checked: the attributes of `greenroom.vllm.settings.EngineConfig`.

use std::path::PathBuf;
use std::time::Duration;

use cuda::CopyMethod;
use pyo3::prelude::*;
use sidecar::engine::frames::{Hello, Role};
use sidecar::hooks::{HooksConfig, Prefetch};

/// One engine and its connection to the sidecar, as both roles of the connector know it.
#[derive(FromPyObject)]
pub(crate) struct EngineConfig {
    /// The sidecar's engine socket.
    socket: PathBuf,
    /// The engine's own id, the same in its scheduler and workers.
    engine_id: String,
    /// Bytes of one block on one rank.
    pub(crate) rank_bytes: u64,
    /// Tensor-parallel ranks.
    ranks: u32,
    /// Tokens of one block.
    block_tokens: u32,
    /// Blocks in the engine's pool.
    pub(crate) gpu_blocks: u32,
    /// Milliseconds that a request may wait for a lookup's answer.
    lookup_wait_ms: u64,
    /// Share of the pool that holds may protect.
    gpu_hold_ratio: f64,
    /// Whether waiting sessions are brought back.
    prefetch: bool,
    /// How copies are put to a CUDA driver.
    copy_method: String,
    /// KiB that copies go in; `None`: what suits the link.
    copy_sub_batch_kib: Option<u64>,
}

/// A worker's KV memory: the attributes of `greenroom.vllm.settings.KvMemory`.
#[derive(FromPyObject)]
pub(crate) struct KvMemory {
    /// The CUDA device that it is on; `None`: in host memory.
    pub(crate) cuda_device: Option<u32>,
    /// (Address of block 0, stride, bytes of a block) of each region.
    pub(crate) regions: Vec<(u64, u64, u64)>,
    /// What keeps it allocated.
    pub(crate) owner: Py<PyAny>,
}

impl EngineConfig {
    /// Where a worker of this engine connects, and what it says first.
    pub(crate) fn worker_hello(&self, rank: u32) -> (PathBuf, Hello) {
        let hello = Hello {
            role: Role::Worker { rank },
            engine: self.engine_id.clone(),
            rank_bytes: self.rank_bytes,
            ranks: self.ranks,
            block_tokens: self.block_tokens,
            gpu_blocks: self.gpu_blocks,
        };
        (self.socket.clone(), hello)
    }

    /// How copies are put to a CUDA driver; `None`: there is no such way.
    pub(crate) fn copy_method(&self) -> Option<CopyMethod> {
        match self.copy_method.as_str() {
            "auto" => Some(CopyMethod::Auto),
            "single" => Some(CopyMethod::Single),
            "batch" => Some(CopyMethod::Batch),
            "rows" => Some(CopyMethod::Rows),
            _ => None,
        }
    }

    /// Bytes that copies go in, where that has been said.
    pub(crate) fn copy_sub_batch(&self) -> Option<u64> {
        self.copy_sub_batch_kib
            .map(|size| size.saturating_mul(1024))
    }

    /// The configuration of the scheduler's hooks.
    pub(crate) fn into_hooks(self) -> HooksConfig {
        HooksConfig {
            socket: self.socket,
            engine: self.engine_id,
            rank_bytes: self.rank_bytes,
            ranks: self.ranks,
            block_tokens: self.block_tokens,
            gpu_blocks: self.gpu_blocks,
            lookup_wait: Duration::from_millis(self.lookup_wait_ms),
            hold_ratio: self.gpu_hold_ratio,
            prefetch: if self.prefetch {
                Prefetch::On
            } else {
                Prefetch::Off
            },
        }
    }
}
