//! The JSON of the API, as types: what clients send and what they get back. The only place where wire names are written.
//!
//! Checks nothing but form; [`super::parse`] turns these into commands.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use kvstore::BlockHash;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use utoipa::ToSchema;

mod answers;

pub use answers::*;

/// Most actions in one hint envelope.
pub const ACTIONS_MAX: usize = 1024;

/// Most block hashes in one target.
pub const TARGET_BLOCKS_MAX: usize = 32_768;

/// Most entries in one list of a BatchAgent call.
pub const COMPAT_ENTRIES_MAX: usize = 4096;

/// A list of which at most `MAX` entries are kept; the rest is counted only, so that a huge list costs no memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capped<T, const MAX: usize> {
    /// The first `MAX` entries.
    pub kept: Vec<T>,
    /// How many entries were sent.
    pub sent: usize,
}

impl<T, const MAX: usize> Default for Capped<T, MAX> {
    fn default() -> Self {
        Self {
            kept: Vec::new(),
            sent: 0,
        }
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Capped<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T, const MAX: usize>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Entries<T, MAX> {
            type Value = Capped<T, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
                let mut list = Capped::default();
                while list.sent < MAX {
                    match entries.next_element()? {
                        Some(entry) => list.kept.push(entry),
                        None => return Ok(list),
                    }
                    list.sent += 1;
                }
                while entries.next_element::<IgnoredAny>()?.is_some() {
                    list.sent += 1;
                }
                Ok(list)
            }
        }

        deserializer.deserialize_seq(Entries(PhantomData))
    }
}

/// A `T` that is written as a JSON object: serde alone would take a list of the fields' values too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(fields))
            }
        }

        deserializer.deserialize_map(Fields(PhantomData)).map(Self)
    }
}

/// A block hash in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HexHash(pub BlockHash);

impl<'de> Deserialize<'de> for HexHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Hex;

        impl Visitor<'_> for Hex {
            type Value = HexHash;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a block hash of 64 hexadecimal digits")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<HexHash, E> {
                from_hex(text).ok_or_else(|| E::custom("a block hash has 64 hexadecimal digits"))
            }
        }

        deserializer.deserialize_str(Hex)
    }
}

fn from_hex(text: &str) -> Option<HexHash> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut hash = [0_u8; 32];
    for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |c: u8| {
            char::from(c)
                .to_digit(16)
                .and_then(|d| u8::try_from(d).ok())
        };
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(HexHash(BlockHash(hash)))
}

/// Body of `POST /v1/sessions/{id}/tool_start`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ToolStartBody {
    /// Tool name as the harness calls it, e.g. `bash`; 1 to 128 bytes.
    pub tool: String,
    /// Names one of several parallel calls; 1 to 256 bytes.
    pub call_id: Option<String>,
    /// Free text, e.g. the command line; the first 1024 bytes are kept, none are logged.
    pub detail: Option<String>,
    /// The client's estimate of the time until the tool returns, 0 to 7 days.
    pub eta_ms: Option<f64>,
}

/// Body of `POST /v1/sessions/{id}/tool_progress`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ToolProgressBody {
    /// Which call; the only one if absent.
    pub call_id: Option<String>,
    /// Share of the work done, 0 to 1.
    pub fraction: Option<f64>,
    /// Time until the tool returns, 0 to 7 days.
    pub eta_ms: Option<f64>,
}

/// Body of `POST /v1/sessions/{id}/tool_end`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ToolEndBody {
    /// Which call; the only one if absent.
    pub call_id: Option<String>,
    /// Whether the tool succeeded.
    pub ok: Option<bool>,
}

/// Body of `POST /v1/hints`: vLLM's `KvHintsEnvelope`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EnvelopeBody<'a> {
    /// `1.0` (or `1`).
    pub protocol_version: String,
    /// Idempotence key: a repeated message gets its first answer again; 1 to 256 bytes.
    pub message_id: String,
    /// At most 1024. Kept as text here: a malformed one must not spoil the others.
    #[serde(borrow)]
    #[schema(value_type = Vec<ActionSchema>)]
    pub actions: Capped<&'a RawValue, ACTIONS_MAX>,
}

/// One action of an envelope, its payload still as text.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionBody<'a> {
    /// Unique within the envelope; 1 to 256 bytes.
    #[serde(borrow)]
    pub action_id: Cow<'a, str>,
    /// See [`ActionSchema`].
    #[serde(borrow)]
    pub action_type: Cow<'a, str>,
    /// `1.0`.
    #[serde(borrow)]
    pub action_version: Cow<'a, str>,
    /// See [`PayloadBody`].
    #[serde(borrow)]
    pub payload: &'a RawValue,
}

/// One action of a hint envelope.
#[derive(Debug, ToSchema)]
#[schema(as = Action)]
pub struct ActionSchema {
    /// Unique within the envelope; 1 to 256 bytes.
    pub action_id: String,
    /// `kv.prefetch`, `kv.pin`, `kv.unpin`, `kv.retain` or `kv.demote`.
    pub action_type: String,
    /// `1.0`.
    pub action_version: String,
    /// What to do it to, and how.
    pub payload: PayloadBody,
}

/// What an action says.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PayloadBody {
    /// What the action is aimed at.
    #[schema(value_type = TargetBody)]
    pub target: Object<TargetBody>,
    /// How long, more than 0 and at most 24 hours.
    pub ttl_ms: Option<f64>,
    /// Order among prefetches that compete for room, higher first; -1000000 to 1000000.
    pub priority: Option<f64>,
    /// Expected time until the KV is needed, 0 to 7 days.
    pub eta_ms: Option<f64>,
    /// Where the KV should be: `gpu` for `kv.prefetch`, `host` for the others. May be left out.
    pub tier: Option<String>,
}

/// Exactly one of the three.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TargetBody {
    /// A session by name.
    pub session_id: Option<String>,
    /// The session of a request that an engine has seen.
    pub request_id: Option<String>,
    /// A chain of vLLM's block hashes from token 0, each of 64 hexadecimal digits; at most 32768.
    #[schema(value_type = Option<Vec<String>>)]
    pub block_hashes: Option<Capped<HexHash, TARGET_BLOCKS_MAX>>,
}

/// Block ids in a BatchAgent call: a pair (slot, GPU block) or one id. Checked for form and then left aside.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum BlockIds {
    /// `[cpu, gpu]`.
    Pair([u32; 2]),
    /// A single id.
    One(u32),
}

/// A list of block ids in a BatchAgent call.
pub type BlockList = Capped<BlockIds, COMPAT_ENTRIES_MAX>;

/// Body of `POST /internal/prefetch`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompatPrefetchBody {
    /// BatchAgent's hints; at most 4096.
    #[serde(default)]
    #[schema(value_type = Vec<CompatHintBody>)]
    pub hints: Capped<Object<CompatHintBody>, COMPAT_ENTRIES_MAX>,
    /// Further keys; at most 4096.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub kv_keys: Capped<String, COMPAT_ENTRIES_MAX>,
    /// Accepted and left aside: Greenroom chooses the blocks itself.
    #[schema(value_type = Option<Vec<BlockIds>>)]
    pub block_ids: Option<BlockList>,
    /// Accepted and left aside, as `block_ids`.
    #[schema(value_type = Option<Vec<BlockIds>>)]
    pub blocks: Option<BlockList>,
}

/// BatchAgent's `PrefetchHint`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompatHintBody {
    /// The job, which names the session.
    pub job_id: String,
    /// The key under which the answer is given.
    pub kv_key: String,
    /// BatchAgent derives it from `eta_seconds`. Of jobs that are due the higher comes first; before, the nearer one does.
    pub priority: Option<f64>,
    /// Expected time until use, 0 to 7 days.
    pub eta_seconds: Option<f64>,
    /// Accepted and left aside.
    #[schema(value_type = Option<Vec<BlockIds>>)]
    pub block_ids: Option<BlockList>,
    /// Accepted and left aside.
    #[schema(value_type = Option<Vec<BlockIds>>)]
    pub blocks: Option<BlockList>,
}

/// Body of `POST /internal/pin_blocks`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompatPinBody {
    /// Keys to pin; at most 4096.
    #[schema(value_type = Vec<String>)]
    pub kv_keys: Capped<String, COMPAT_ENTRIES_MAX>,
    /// Accepted and left aside.
    #[schema(value_type = Option<Vec<BlockIds>>)]
    pub block_ids: Option<BlockList>,
    /// Accepted and left aside.
    #[schema(value_type = Option<Vec<BlockIds>>)]
    pub blocks: Option<BlockList>,
}
