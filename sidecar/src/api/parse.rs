//! From the bytes of a request to commands for the actor, and from the actor's answers back to the order of the request.
//!
//! Pure: no clock, no I/O. Whatever the bytes are, the answer is either commands or an error that names the field. A malformed action
//! inside a well-formed envelope becomes a `rejected` result and leaves the others alone.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde::Deserialize;

use super::error::ApiError;
use super::wire::{
    ACTIONS_MAX, ActionBody, COMPAT_ENTRIES_MAX, Capped, CompatPinBody, CompatPrefetchBody,
    EnvelopeAnswer, EnvelopeBody, Object, PayloadBody, ResultBody, TARGET_BLOCKS_MAX, TargetBody,
    ToolEndBody, ToolProgressBody, ToolStartBody,
};
use crate::commands::{
    ActionResult, CompatItem, HintAction, HintEnvelope, HintVerb, Outcome, SessionName, Target,
    ToolEnd, ToolProgress, ToolStart,
};

/// Versions of the envelope that are understood; they mean the same.
pub const PROTOCOL_VERSIONS: [&str; 2] = ["1.0", "1"];

/// The version of an action that is understood.
pub const ACTION_VERSION: &str = "1.0";

/// Longest id (message, action, tool call) in bytes.
pub const ID_MAX: usize = 256;

/// Longest request id in bytes.
pub const REQUEST_ID_MAX: usize = 512;

/// Longest tool name in bytes.
pub const TOOL_NAME_MAX: usize = 128;

/// Bytes of a tool call's free text that are kept.
pub const DETAIL_KEPT: usize = 1024;

/// Longest pin.
pub const TTL_MAX: Duration = Duration::from_secs(24 * 3600);

/// Longest estimate of a wait.
pub const ETA_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Largest priority, either way.
pub const PRIORITY_MAX: f64 = 1e6;

/// Bytes of an error text: it may quote the client's own words, of any length.
const MESSAGE_MAX: usize = 400;

/// Bytes of the field's path in an error text.
const PATH_MAX: usize = 160;

/// Why a value cannot be used: the field's path and the rule it breaks.
struct Fault(String);

impl Fault {
    fn new(field: &str, rule: impl std::fmt::Display) -> Self {
        Self(shortened(&format!("{field}: {rule}"), MESSAGE_MAX).into_owned())
    }
}

impl From<Fault> for ApiError {
    fn from(fault: Fault) -> Self {
        Self::Malformed(fault.0)
    }
}

/// The first `bytes` bytes of a text, cut where a character ends.
fn shortened(text: &str, bytes: usize) -> Cow<'_, str> {
    if text.len() <= bytes {
        return Cow::Borrowed(text);
    }
    Cow::Owned(format!("{}…", &text[..text.floor_char_boundary(bytes)]))
}

fn decode<'de, T: Deserialize<'de>>(field: &str, text: &'de str) -> Result<T, Fault> {
    let mut json = serde_json::Deserializer::from_str(text);
    let value: Result<Object<T>, _> = serde_path_to_error::deserialize(&mut json);
    let Object(value) = value.map_err(|error| {
        let path = error.path().to_string();
        let path = shortened(&path, PATH_MAX);
        let path = match (field, &*path) {
            ("", "." | "?") => "body".to_owned(),
            ("", inner) => inner.to_owned(),
            (outer, "." | "?") => outer.to_owned(),
            (outer, inner) => format!("{outer}.{inner}"),
        };
        Fault::new(&path, error.inner())
    })?;
    json.end().map_err(|error| Fault::new("body", error))?;
    Ok(value)
}

fn body<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, Fault> {
    decode("", utf8(bytes)?)
}

/// As [`body`], where nothing at all means that every field is left out.
fn optional_body<T: Default + for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, Fault> {
    if bytes.trim_ascii().is_empty() {
        return Ok(T::default());
    }
    body(bytes)
}

fn utf8(bytes: &[u8]) -> Result<&str, Fault> {
    std::str::from_utf8(bytes).map_err(|_| Fault::new("body", "is not UTF-8 text"))
}

fn id(field: &str, text: &str, bytes_max: usize) -> Result<String, Fault> {
    let printable = !text.chars().any(char::is_control);
    if text.is_empty() || text.len() > bytes_max || !printable {
        let rule = format!("must have 1 to {bytes_max} bytes and no control characters");
        return Err(Fault::new(field, rule));
    }
    Ok(text.to_owned())
}

fn optional_id(field: &str, text: Option<&str>) -> Result<Option<String>, Fault> {
    text.map(|text| id(field, text, ID_MAX)).transpose()
}

fn session(field: &str, name: &str) -> Result<SessionName, Fault> {
    SessionName::new(name).map_err(|error| Fault::new(field, error))
}

/// Milliseconds from 0 to [`ETA_MAX`].
fn eta(field: &str, ms: Option<f64>) -> Result<Option<Duration>, Fault> {
    let rule = "must lie between 0 and 604800000 (7 days)";
    ms.map(|ms| millis(ms, ETA_MAX).ok_or_else(|| Fault::new(field, rule)))
        .transpose()
}

fn ttl(field: &str, ms: Option<f64>) -> Result<Option<Duration>, Fault> {
    let rule = "must be more than 0 and at most 86400000 (24 hours)";
    ms.map(|ms| {
        let ttl = millis(ms, TTL_MAX).filter(|ttl| !ttl.is_zero());
        ttl.ok_or_else(|| Fault::new(field, rule))
    })
    .transpose()
}

/// None for what is negative, not a number or longer than `longest`.
fn millis(ms: f64, longest: Duration) -> Option<Duration> {
    let duration = Duration::try_from_secs_f64(ms / 1000.0).ok()?;
    (duration <= longest).then_some(duration)
}

/// In thousandths: finer differences are not told apart.
fn priority(field: &str, value: Option<f64>) -> Result<i32, Fault> {
    let value = value.unwrap_or(0.0);
    if !(-PRIORITY_MAX..=PRIORITY_MAX).contains(&value) {
        return Err(Fault::new(field, "must lie between -1000000 and 1000000"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "at most a thousand million either way"
    )]
    let thousandths = (value * 1000.0).round() as i32;
    Ok(thousandths)
}

fn whole<T, const MAX: usize>(
    field: &'static str,
    list: Capped<T, MAX>,
) -> Result<Vec<T>, ApiError> {
    if list.sent > MAX {
        return Err(ApiError::TooMany {
            field,
            sent: list.sent,
            limit: MAX,
        });
    }
    Ok(list.kept)
}

/// The session that a path names.
///
/// # Errors
/// [`ApiError::Malformed`].
pub fn session_id(name: &str) -> Result<SessionName, ApiError> {
    Ok(session("session id in the path", name)?)
}

/// Body of `tool_start`.
///
/// # Errors
/// [`ApiError::Malformed`].
pub fn tool_start(bytes: &[u8]) -> Result<ToolStart, ApiError> {
    let sent: ToolStartBody = body(bytes)?;
    let detail = sent.detail.map(|mut text| {
        text.truncate(text.floor_char_boundary(DETAIL_KEPT));
        text
    });
    Ok(ToolStart {
        tool: id("tool", &sent.tool, TOOL_NAME_MAX)?,
        call_id: optional_id("call_id", sent.call_id.as_deref())?,
        detail,
        eta: eta("eta_ms", sent.eta_ms)?,
    })
}

/// Body of `tool_progress`; may be empty.
///
/// # Errors
/// [`ApiError::Malformed`].
pub fn tool_progress(bytes: &[u8]) -> Result<ToolProgress, ApiError> {
    let sent: ToolProgressBody = optional_body(bytes)?;
    if let Some(fraction) = sent.fraction
        && !(0.0..=1.0).contains(&fraction)
    {
        return Err(Fault::new("fraction", "must lie between 0 and 1").into());
    }
    Ok(ToolProgress {
        call_id: optional_id("call_id", sent.call_id.as_deref())?,
        fraction: sent.fraction,
        eta: eta("eta_ms", sent.eta_ms)?,
    })
}

/// Body of `tool_end`; may be empty.
///
/// # Errors
/// [`ApiError::Malformed`].
pub fn tool_end(bytes: &[u8]) -> Result<ToolEnd, ApiError> {
    let sent: ToolEndBody = optional_body(bytes)?;
    Ok(ToolEnd {
        call_id: optional_id("call_id", sent.call_id.as_deref())?,
        ok: sent.ok,
    })
}

/// A hint envelope: what the actor gets, and what is needed to put its answers in the client's order.
#[derive(Debug)]
pub struct Envelope {
    /// The well-formed actions.
    pub command: HintEnvelope,
    /// One entry per action that the client sent.
    pub entries: Vec<Entry>,
}

/// What happened to one action on the way in.
#[derive(Debug)]
pub enum Entry {
    /// It is part of the command, under this action id.
    Sent(String),
    /// It was malformed.
    Refused {
        /// Its verb, if that much was understood.
        verb: Option<HintVerb>,
        /// The answer to it.
        result: ActionResult,
    },
}

/// Body of `POST /v1/hints`.
///
/// # Errors
/// [`ApiError::Malformed`], [`ApiError::Version`], [`ApiError::TooMany`]; malformed actions are no error.
pub fn envelope(bytes: &[u8]) -> Result<Envelope, ApiError> {
    let sent: EnvelopeBody<'_> = body(bytes)?;
    if !PROTOCOL_VERSIONS.contains(&sent.protocol_version.as_str()) {
        let version = shortened(&sent.protocol_version, ID_MAX).into_owned();
        return Err(ApiError::Version(version));
    }
    let message_id = id("message_id", &sent.message_id, ID_MAX)?;
    let raw_actions = whole::<_, ACTIONS_MAX>("actions", sent.actions)?;
    let mut seen = HashSet::new();
    let (mut actions, mut entries) = (Vec::new(), Vec::with_capacity(raw_actions.len()));
    for (position, raw) in raw_actions.into_iter().enumerate() {
        let field = format!("actions[{position}]");
        match action(&field, raw.get(), &mut seen) {
            Ok(action) => {
                entries.push(Entry::Sent(action.action_id.clone()));
                actions.push(action);
            }
            Err(refusal) => entries.push(Entry::Refused {
                verb: refusal.verb,
                result: ActionResult {
                    action_id: refusal.action_id,
                    outcome: Outcome::Rejected,
                    detail: refusal.fault.0,
                    blocks: None,
                },
            }),
        }
    }
    Ok(Envelope {
        command: HintEnvelope {
            message_id,
            actions,
        },
        entries,
    })
}

/// The answer to an envelope, in the order of its actions. The actor answers a repeated `message_id` with its first answer, which may
/// lack actions if the client has put others under the same id; those are refused.
pub fn envelope_answer(
    message_id: String,
    entries: Vec<Entry>,
    answers: Vec<ActionResult>,
) -> EnvelopeAnswer {
    let by_id = answers.into_iter().map(|a| (a.action_id.clone(), a));
    let mut by_id: HashMap<String, ActionResult> = by_id.collect();
    let results = entries.into_iter().map(|entry| match entry {
        Entry::Refused { result, .. } => ResultBody::from(result),
        Entry::Sent(action_id) => match by_id.remove(&action_id) {
            Some(answer) => ResultBody::from(answer),
            None => ResultBody::from(ActionResult {
                action_id,
                outcome: Outcome::Rejected,
                detail: "message_id was used before, for other actions".to_owned(),
                blocks: None,
            }),
        },
    });
    EnvelopeAnswer {
        message_id,
        results: results.collect(),
    }
}

/// A malformed action: as much of it as was understood.
struct Refusal {
    action_id: String,
    verb: Option<HintVerb>,
    fault: Fault,
}

fn action(field: &str, raw: &str, seen: &mut HashSet<String>) -> Result<HintAction, Refusal> {
    let head: ActionBody<'_> = decode(field, raw).map_err(|fault| Refusal {
        action_id: readable_action_id(raw),
        verb: None,
        fault,
    })?;
    let known_verb = verb(&head.action_type);
    let action_id = id(&format!("{field}.action_id"), &head.action_id, ID_MAX);
    let refusal = |fault| Refusal {
        action_id: readable_id(&head.action_id),
        verb: known_verb,
        fault,
    };
    let action_id = action_id.map_err(refusal)?;
    if seen.contains(&action_id) {
        let rule = "is used twice in this envelope; the first one counts";
        return Err(refusal(Fault::new(&format!("{field}.action_id"), rule)));
    }
    let Some(verb) = known_verb else {
        let rule = "must be kv.prefetch, kv.pin, kv.unpin, kv.retain or kv.demote";
        return Err(refusal(Fault::new(&format!("{field}.action_type"), rule)));
    };
    if head.action_version != ACTION_VERSION {
        let rule = "only 1.0 is supported";
        return Err(refusal(Fault::new(
            &format!("{field}.action_version"),
            rule,
        )));
    }
    let inner = format!("{field}.payload");
    let payload: PayloadBody = decode(&inner, head.payload.get()).map_err(refusal)?;
    let mut action = checked(&inner, verb, payload).map_err(refusal)?;
    seen.insert(action_id.clone());
    action.action_id = action_id;
    Ok(action)
}

fn checked(field: &str, verb: HintVerb, payload: PayloadBody) -> Result<HintAction, Fault> {
    let inner = |name: &str| format!("{field}.{name}");
    let home = match verb {
        HintVerb::Prefetch => "gpu",
        HintVerb::Pin | HintVerb::Unpin | HintVerb::Retain | HintVerb::Demote => "host",
    };
    if payload.tier.is_some_and(|tier| tier != home) {
        let rule = format!("this action is about the tier `{home}`");
        return Err(Fault::new(&inner("tier"), rule));
    }
    Ok(HintAction {
        action_id: String::new(),
        verb,
        target: target(&inner("target"), payload.target.0)?,
        ttl: ttl(&inner("ttl_ms"), payload.ttl_ms)?,
        priority: priority(&inner("priority"), payload.priority)?,
        eta: eta(&inner("eta_ms"), payload.eta_ms)?,
    })
}

fn target(field: &str, sent: TargetBody) -> Result<Target, Fault> {
    match (sent.session_id, sent.request_id, sent.block_hashes) {
        (Some(name), None, None) => {
            session(&format!("{field}.session_id"), &name).map(Target::Session)
        }
        (None, Some(name), None) => {
            id(&format!("{field}.request_id"), &name, REQUEST_ID_MAX).map(Target::Request)
        }
        (None, None, Some(hashes)) => {
            if hashes.sent == 0 || hashes.sent > TARGET_BLOCKS_MAX {
                let rule = format!("must have 1 to {TARGET_BLOCKS_MAX} entries");
                return Err(Fault::new(&format!("{field}.block_hashes"), rule));
            }
            Ok(Target::Blocks(
                hashes.kept.into_iter().map(|h| h.0).collect(),
            ))
        }
        _ => {
            let rule = "must have exactly one of session_id, request_id and block_hashes";
            Err(Fault::new(field, rule))
        }
    }
}

fn verb(action_type: &str) -> Option<HintVerb> {
    Some(match action_type {
        "kv.prefetch" => HintVerb::Prefetch,
        "kv.pin" => HintVerb::Pin,
        "kv.unpin" => HintVerb::Unpin,
        "kv.retain" => HintVerb::Retain,
        "kv.demote" => HintVerb::Demote,
        _ => return None,
    })
}

/// What of a bad action id can be given back: nothing of one that is too long to repeat.
fn readable_id(sent: &str) -> String {
    if sent.len() > ID_MAX {
        return String::new();
    }
    sent.to_owned()
}

fn readable_action_id(raw: &str) -> String {
    #[derive(Deserialize)]
    struct OnlyId<'a> {
        #[serde(borrow)]
        action_id: Cow<'a, str>,
    }
    let found: Result<OnlyId<'_>, _> = serde_json::from_str(raw);
    found.map_or_else(|_| String::new(), |only| readable_id(&only.action_id))
}

/// Body of `POST /internal/prefetch`.
///
/// # Errors
/// [`ApiError::Malformed`], [`ApiError::TooMany`].
pub fn compat_prefetch(bytes: &[u8]) -> Result<Vec<CompatItem>, ApiError> {
    let sent: CompatPrefetchBody = body(bytes)?;
    let hints = whole::<_, COMPAT_ENTRIES_MAX>("hints", sent.hints)?;
    let keys = whole::<_, COMPAT_ENTRIES_MAX>("kv_keys", sent.kv_keys)?;
    let mut items = Vec::with_capacity(hints.len() + keys.len());
    for (position, Object(hint)) in hints.into_iter().enumerate() {
        let field = |name: &str| format!("hints[{position}].{name}");
        let priority = priority(&field("priority"), hint.priority)?;
        let eta_field = field("eta_seconds");
        let eta = match hint.eta_seconds.map(|s| millis(s * 1000.0, ETA_MAX)) {
            Some(None) => {
                let rule = "must lie between 0 and 604800 (7 days)";
                return Err(Fault::new(&eta_field, rule).into());
            }
            Some(known) => known,
            None => None,
        };
        items.push(CompatItem {
            kv_key: id(&field("kv_key"), &hint.kv_key, ID_MAX)?,
            session: Some(session(&field("job_id"), &hint.job_id)?),
            priority,
            eta,
        });
    }
    items.extend(compat_keys(keys)?);
    Ok(items)
}

/// Body of `POST /internal/pin_blocks`.
///
/// # Errors
/// [`ApiError::Malformed`], [`ApiError::TooMany`].
pub fn compat_pin(bytes: &[u8]) -> Result<Vec<CompatItem>, ApiError> {
    let sent: CompatPinBody = body(bytes)?;
    let keys = whole::<_, COMPAT_ENTRIES_MAX>("kv_keys", sent.kv_keys)?;
    Ok(compat_keys(keys)?)
}

fn compat_keys(keys: Vec<String>) -> Result<Vec<CompatItem>, Fault> {
    let item = |(position, key): (usize, String)| {
        Ok(CompatItem {
            kv_key: id(&format!("kv_keys[{position}]"), &key, ID_MAX)?,
            session: None,
            priority: 0,
            eta: None,
        })
    };
    keys.into_iter().enumerate().map(item).collect()
}

#[cfg(test)]
mod tests;
