//! What a client can ask of the sidecar: the commands that the API sends to the actor, and the actor's answers.
//!
//! These types know nothing of HTTP; `api::wire` turns JSON into them and back. Every command is answered exactly once.

use std::time::Duration;

use kvstore::BlockHash;

/// A client's name for an agent run or conversation; 1 to [`SESSION_NAME_MAX`] bytes, no control characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionName(String);

/// Longest session name in bytes.
pub const SESSION_NAME_MAX: usize = 256;

impl SessionName {
    /// Checks a client's spelling.
    ///
    /// # Errors
    /// [`BadSessionName`] if it is empty, too long or holds a control character.
    pub fn new(name: &str) -> Result<Self, BadSessionName> {
        if name.is_empty() || name.len() > SESSION_NAME_MAX || name.chars().any(char::is_control) {
            return Err(BadSessionName);
        }
        Ok(Self(name.to_owned()))
    }

    /// The name as the client wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A session name that cannot be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a session name has 1 to {SESSION_NAME_MAX} bytes and no control characters")]
pub struct BadSessionName;

/// A tool call began.
#[derive(Clone, Debug)]
pub struct ToolStart {
    /// Tool name as the harness calls it, e.g. `bash`.
    pub tool: String,
    /// Names one of several parallel calls.
    pub call_id: Option<String>,
    /// Free text (a command line); never logged.
    pub detail: Option<String>,
    /// The client's own estimate of the time until the tool returns.
    pub eta: Option<Duration>,
}

/// News of a running tool call.
#[derive(Clone, Debug)]
pub struct ToolProgress {
    /// Which call; the only one if absent.
    pub call_id: Option<String>,
    /// Share of the work done, 0 to 1.
    pub fraction: Option<f64>,
    /// Time until the tool returns.
    pub eta: Option<Duration>,
}

/// A tool call ended.
#[derive(Clone, Debug)]
pub struct ToolEnd {
    /// Which call; the only one if absent.
    pub call_id: Option<String>,
    /// Whether the tool succeeded; kept for the statistics only.
    pub ok: Option<bool>,
}

/// What an action of a hint envelope is aimed at.
#[derive(Clone, Debug)]
pub enum Target {
    /// A session by name.
    Session(SessionName),
    /// The session of a request that an engine has seen, by the request's id.
    Request(String),
    /// A chain of blocks from token 0.
    Blocks(Vec<BlockHash>),
}

/// What a hint asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HintVerb {
    /// Bring the KV back to the GPU now.
    Prefetch,
    /// Do not evict from the host until the TTL ends.
    Pin,
    /// Take pins back.
    Unpin,
    /// Will be used again: refresh its recency, keep the session.
    Retain,
    /// Evict first.
    Demote,
}

/// One action of a hint envelope, already checked for form.
#[derive(Clone, Debug)]
pub struct HintAction {
    /// Given back with the outcome.
    pub action_id: String,
    /// What to do.
    pub verb: HintVerb,
    /// To what.
    pub target: Target,
    /// How long (pin); a default applies if absent.
    pub ttl: Option<Duration>,
    /// Order among prefetches that compete for room, higher first; in thousandths.
    pub priority: i32,
    /// Expected time until the KV is needed.
    pub eta: Option<Duration>,
}

/// A hint envelope: the well-formed actions; the malformed ones never reach the actor.
#[derive(Clone, Debug)]
pub struct HintEnvelope {
    /// Idempotence key: a repeated message gets its first answer again.
    pub message_id: String,
    /// In the client's order.
    pub actions: Vec<HintAction>,
}

/// What became of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Done or under way in full.
    Accepted,
    /// Done in part: budget or capacity.
    Clipped,
    /// Will be done when there is room.
    Deferred,
    /// Malformed or not allowed.
    Rejected,
    /// Target unknown.
    Missing,
}

impl Outcome {
    /// The word of the API and of the metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Clipped => "clipped",
            Self::Deferred => "deferred",
            Self::Rejected => "rejected",
            Self::Missing => "missing",
        }
    }
}

/// The answer to one action.
#[derive(Clone, Debug)]
pub struct ActionResult {
    /// As in the action.
    pub action_id: String,
    /// What became of it.
    pub outcome: Outcome,
    /// Why, for a person; empty if there is nothing to add.
    pub detail: String,
    /// Blocks concerned, if any.
    pub blocks: Option<u64>,
}

/// Where a session's KV is, as `GET /v1/sessions` shows it.
#[derive(Clone, Debug)]
pub struct SessionView {
    /// The client's name for it.
    pub name: String,
    /// `new` (known to no engine yet), `active`, `hold`, `shadow`, `host`, `loading`, `ready`, `dropped`.
    pub state: &'static str,
    /// Tokens of its last turn in full blocks.
    pub tokens: u64,
    /// Blocks readable on the GPU when the engine last looked.
    pub gpu_blocks: u64,
    /// Blocks resident in the host tier.
    pub host_blocks: u64,
    /// Of those, pinned.
    pub pinned_blocks: u64,
    /// Name of the running tool, if any.
    pub tool: Option<String>,
    /// Milliseconds until it is expected back; negative when overdue.
    pub expected_return_ms: Option<i64>,
    /// The engine that served its last turn.
    pub engine: Option<String>,
    /// Turns so far.
    pub turns: u64,
}

/// One connected engine, as `GET /v1/status` shows it.
#[derive(Clone, Debug)]
pub struct EngineView {
    /// The engine's own id.
    pub id: String,
    /// Workers connected, of `ranks`.
    pub workers: u32,
    /// Ranks that share a slot.
    pub ranks: u32,
    /// GPU blocks in the pool, and free ones when it last reported.
    pub gpu_blocks_total: u64,
    /// See `gpu_blocks_total`.
    pub gpu_blocks_free: u64,
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// Tokens of one block.
    pub block_tokens: u32,
}

/// `GET /v1/status`.
#[derive(Clone, Debug)]
pub struct StatusView {
    /// Identifies this start of the sidecar.
    pub boot_id: String,
    /// Bytes of the arena.
    pub arena_bytes: u64,
    /// Slots by state: total (0 until the first engine fixes the slot size), committed + filling, pinned, leased, draining.
    pub slots_total: u64,
    /// Slots that hold or receive content.
    pub slots_used: u64,
    /// Slots under at least one pin.
    pub slots_pinned: u64,
    /// Slots under at least one lease.
    pub slots_leased: u64,
    /// Slots whose copies have not been proved to have ended.
    pub slots_draining: u64,
    /// Connected engines.
    pub engines: Vec<EngineView>,
    /// Sessions per state name.
    pub sessions: Vec<(&'static str, u64)>,
}

/// The KV keys of BatchAgent's `POST /internal/prefetch` and `/internal/pin_blocks`, in one form.
#[derive(Clone, Debug)]
pub struct CompatItem {
    /// The key to answer under.
    pub kv_key: String,
    /// The session it names, if the payload names one (`job_id`).
    pub session: Option<SessionName>,
    /// Order among prefetches, as in [`HintAction`].
    pub priority: i32,
    /// Expected time until use.
    pub eta: Option<Duration>,
}

/// BatchAgent's answer for one key: block pairs (slot, GPU block) that are or will be on the GPU, or nothing known.
#[derive(Clone, Debug)]
pub struct CompatResult {
    /// As in the item.
    pub kv_key: String,
    /// `Missing` when the key or session is unknown.
    pub outcome: Outcome,
    /// (slot, GPU block) pairs of the swap-in mapping, where one was made.
    pub pairs: Vec<(u32, u32)>,
}

/// Why the actor could not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The command queue is full; try again.
    #[error("the sidecar is busy; try again in a moment")]
    Busy,
    /// The sidecar is shutting down.
    #[error("the sidecar is shutting down")]
    Draining,
    /// No such session.
    #[error("no session of that name")]
    UnknownSession,
    /// Too many sessions that are in use.
    #[error("the limit of sessions in use is reached")]
    TooManySessions,
    /// No running tool call of that id.
    #[error("no running tool call of that call_id")]
    UnknownCall,
    /// Too many parallel tool calls in one session.
    #[error("the limit of parallel tool calls of a session is reached")]
    TooManyCalls,
}
