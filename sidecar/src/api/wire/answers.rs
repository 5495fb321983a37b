//! What clients get back.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::commands::{ActionResult, CompatResult, EngineView, Outcome, SessionView, StatusView};

/// Answer to `POST /v1/hints`.
#[derive(Debug, Serialize, ToSchema)]
pub struct EnvelopeAnswer {
    /// As in the request.
    pub message_id: String,
    /// One per action, in the request's order.
    pub results: Vec<ResultBody>,
}

/// What became of one action.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResultBody {
    /// As in the action; empty if the action had none that could be read.
    pub action_id: String,
    /// `accepted`, `clipped`, `deferred`, `rejected` or `missing`.
    pub outcome: &'static str,
    /// Why, for a person.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    pub detail: String,
    /// Blocks concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<u64>,
}

impl From<ActionResult> for ResultBody {
    fn from(result: ActionResult) -> Self {
        Self {
            action_id: result.action_id,
            outcome: result.outcome.as_str(),
            detail: result.detail,
            blocks: result.blocks,
        }
    }
}

/// What became of one entry of a BatchAgent call.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompatOutcome {
    /// As in the request.
    pub kv_key: String,
    /// As in `POST /v1/hints`.
    pub outcome: &'static str,
}

/// Answer to `POST /internal/prefetch`, in BatchAgent's shape with `results` added.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompatPrefetchAnswer {
    /// Always true; errors have the shape of all errors.
    pub ok: bool,
    /// Per key the (slot, GPU block) pairs of the swap-in mapping; empty if nothing had to be copied or the copy has to wait for room.
    pub prefetched: BTreeMap<String, Vec<(u32, u32)>>,
    /// Keys of the entries that named nothing known, once per entry.
    pub missing: Vec<String>,
    /// Per entry, in the request's order.
    pub results: Vec<CompatOutcome>,
}

/// Answer to `POST /internal/pin_blocks`, in BatchAgent's shape with `results` added.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompatPinAnswer {
    /// Always true; errors have the shape of all errors.
    pub ok: bool,
    /// Per key the GPU blocks known to hold it.
    pub pinned: BTreeMap<String, Vec<u32>>,
    /// Keys of the entries that named nothing known, once per entry.
    pub missing: Vec<String>,
    /// Per entry, in the request's order.
    pub results: Vec<CompatOutcome>,
}

/// The parts that both answers to BatchAgent are made of.
#[derive(Debug, Default)]
pub struct CompatParts {
    /// Pairs per key that is known.
    pub pairs: BTreeMap<String, Vec<(u32, u32)>>,
    /// Keys of the entries that named nothing known, or were refused.
    pub missing: Vec<String>,
    /// Per entry.
    pub results: Vec<CompatOutcome>,
}

impl CompatParts {
    /// Sorts the actor's answers by key. BatchAgent sends one key for all its agents, so pairs of equal keys are put together.
    pub fn from_results(answers: Vec<CompatResult>) -> Self {
        let mut parts = Self::default();
        for answer in answers {
            parts.results.push(CompatOutcome {
                kv_key: answer.kv_key.clone(),
                outcome: answer.outcome.as_str(),
            });
            match answer.outcome {
                Outcome::Missing | Outcome::Rejected => parts.missing.push(answer.kv_key),
                Outcome::Accepted | Outcome::Clipped | Outcome::Deferred => {
                    let pairs = parts.pairs.entry(answer.kv_key).or_default();
                    pairs.extend(answer.pairs);
                }
            }
        }
        parts
    }
}

/// Answer to `GET /healthz`.
#[derive(Debug, Serialize, ToSchema)]
pub struct HealthAnswer {
    /// `ok`.
    pub status: &'static str,
    /// Version of the sidecar.
    pub version: &'static str,
    /// Identifies this start of the sidecar.
    pub boot_id: String,
    /// Connected engines.
    pub engines: usize,
}

/// Answer to a tool event.
#[derive(Debug, Serialize, ToSchema)]
pub struct ToolAnswer {
    /// Always true; errors have the shape of all errors.
    pub ok: bool,
}

/// Answer to `DELETE /v1/sessions/{id}`.
#[derive(Debug, Serialize, ToSchema)]
pub struct RetireAnswer {
    /// The session.
    pub id: String,
    /// Blocks that were freed at once; blocks that another session or a running copy uses follow when they are let go.
    pub freed_blocks: u64,
}

/// Answer to `DELETE /v1/pins`.
#[derive(Debug, Serialize, ToSchema)]
pub struct BreakPinsAnswer {
    /// Pins that were in force. Their blocks stay until they are evicted.
    pub broken_pins: u64,
}

/// Answer to `GET /v1/sessions`.
#[derive(Debug, Serialize, ToSchema)]
pub struct SessionsAnswer {
    /// All known sessions.
    pub sessions: Vec<SessionBody>,
}

/// A session.
#[derive(Debug, Serialize, ToSchema)]
pub struct SessionBody {
    /// Its name.
    pub id: String,
    /// `new` (known to no engine yet), `active`, `hold`, `shadow`, `host`, `loading`, `ready` or `dropped`.
    pub state: &'static str,
    /// Tokens of its last turn in full blocks.
    pub tokens: u64,
    /// Where its blocks are.
    pub blocks: BlocksBody,
    /// Name of the running tool.
    pub tool: Option<String>,
    /// Milliseconds until it is expected back; negative when overdue.
    pub expected_return_ms: Option<i64>,
    /// The engine that served its last turn.
    pub engine: Option<String>,
    /// Turns so far.
    pub turns: u64,
}

/// Where a session's blocks are.
#[derive(Debug, Serialize, ToSchema)]
pub struct BlocksBody {
    /// Readable on the GPU when the engine last looked.
    pub gpu: u64,
    /// Resident in the host tier.
    pub host: u64,
    /// Of those, pinned.
    pub pinned: u64,
}

impl From<SessionView> for SessionBody {
    fn from(view: SessionView) -> Self {
        Self {
            id: view.name,
            state: view.state,
            tokens: view.tokens,
            blocks: BlocksBody {
                gpu: view.gpu_blocks,
                host: view.host_blocks,
                pinned: view.pinned_blocks,
            },
            tool: view.tool,
            expected_return_ms: view.expected_return_ms,
            engine: view.engine,
            turns: view.turns,
        }
    }
}

/// Answer to `GET /v1/status`.
#[derive(Debug, Serialize, ToSchema)]
pub struct StatusAnswer {
    /// Version of the sidecar.
    pub version: &'static str,
    /// Identifies this start of the sidecar.
    pub boot_id: String,
    /// Where KV can be.
    pub tiers: TiersBody,
    /// Connected engines.
    pub engines: Vec<EngineBody>,
    /// Sessions per state.
    pub sessions: BTreeMap<&'static str, u64>,
    /// Every counter of `GET /metrics`, under the name and labels that it has there.
    pub counters: BTreeMap<String, u64>,
}

/// Where KV can be.
#[derive(Debug, Serialize, ToSchema)]
pub struct TiersBody {
    /// The arena.
    pub host: HostTierBody,
}

/// The arena. All slot counts are 0 until the first engine fixes the size of a slot.
#[derive(Debug, Serialize, ToSchema)]
pub struct HostTierBody {
    /// Size in bytes.
    pub arena_bytes: u64,
    /// All slots.
    pub slots_total: u64,
    /// Slots that hold or receive content.
    pub slots_used: u64,
    /// Slots under at least one pin.
    pub slots_pinned: u64,
    /// Slots under at least one lease.
    pub slots_leased: u64,
    /// Slots whose copies have not been proved to have ended.
    pub slots_draining: u64,
}

/// A connected engine.
#[derive(Debug, Serialize, ToSchema)]
pub struct EngineBody {
    /// Its own id.
    pub id: String,
    /// Workers connected.
    pub workers: u32,
    /// Workers there will be: each has its part of every slot.
    pub ranks: u32,
    /// Blocks of its KV pool.
    pub gpu_blocks_total: u64,
    /// Of those, free when it last reported.
    pub gpu_blocks_free: u64,
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// Tokens of one block.
    pub block_tokens: u32,
}

impl From<EngineView> for EngineBody {
    fn from(view: EngineView) -> Self {
        Self {
            id: view.id,
            workers: view.workers,
            ranks: view.ranks,
            gpu_blocks_total: view.gpu_blocks_total,
            gpu_blocks_free: view.gpu_blocks_free,
            slot_bytes: view.slot_bytes,
            block_tokens: view.block_tokens,
        }
    }
}

impl StatusAnswer {
    /// The actor's view with the counters beside it.
    pub fn new(view: StatusView, counters: BTreeMap<String, u64>) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            boot_id: view.boot_id,
            tiers: TiersBody {
                host: HostTierBody {
                    arena_bytes: view.arena_bytes,
                    slots_total: view.slots_total,
                    slots_used: view.slots_used,
                    slots_pinned: view.slots_pinned,
                    slots_leased: view.slots_leased,
                    slots_draining: view.slots_draining,
                },
            },
            engines: view.engines.into_iter().map(EngineBody::from).collect(),
            sessions: view.sessions.into_iter().collect(),
            counters,
        }
    }
}
