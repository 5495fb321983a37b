//! What is done with bytes that anybody may have sent: one function for each place where such bytes come in.
//!
//! The fuzzer (`tests/fuzz`, `make fuzz`) and the corpus test (`it`) call the same functions. Each returns for whatever it
//! is given; a panic is a finding: in the code under test, or an assertion here about what was accepted.
#![allow(
    unsafe_code,
    reason = "addresses for the arithmetic of copies, which are never copied to"
)]

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cuda::{ArenaShard, DevicePool, DeviceRegion};
use kvstore::{ArenaFile, ArenaMap, GpuBlock, PageSize, SlotId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sidecar::api::error::ApiError;
use sidecar::api::parse::{self, Entry};
use sidecar::api::wire::{ACTIONS_MAX, COMPAT_ENTRIES_MAX, TARGET_BLOCKS_MAX};
use sidecar::commands::{
    ActionResult, CompatItem, HintAction, Outcome, SESSION_NAME_MAX, SessionName, Target,
};
use sidecar::config::memory::{Cgroup, Memory};
use sidecar::config::{
    Config, DRAIN_TIMEOUT_MAX, LEASE_TTL_MAX, Listen, MEMORY_MIN, Machine, SESSIONS_MAX, Settings,
    Size, Span,
};
use sidecar::engine::frames::{
    BODY_MAX, HEADER_BYTES, Header, ToEngine, ToSidecar, decode, encode,
};
use sidecar::engine::plan::{Report, StepPlan};

/// Bytes of the longest error text that a client is sent.
const ERROR_TEXT_MAX: usize = 512;

/// A place where bytes come in: its name, which is also the corpus's folder, and what is done with them.
pub type Input = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Input; 5] = [
    ("frames", frames),
    ("plan", plan),
    ("bodies", bodies),
    ("config", config),
    ("machine", machine),
];

/// A frame from the engine socket, in either direction. The body is tried even where the header does not fit it.
pub fn frames(bytes: &[u8]) {
    let Some((head, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let sequence = match Header::parse(head) {
        Ok((body_bytes, sequence)) => {
            assert!(body_bytes <= BODY_MAX);
            sequence
        }
        Err(_) => 0,
    };
    message::<ToSidecar>(sequence, body);
    message::<ToEngine>(sequence, body);
}

/// What decodes is sent on as a frame that says the same.
fn message<T>(sequence: u64, body: &[u8])
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Ok(message) = decode::<T>(body) else {
        return;
    };
    let frame = encode(sequence, &message).expect("what came in a body fits into one");
    let (head, again) = frame.split_first_chunk::<HEADER_BYTES>().unwrap();
    assert_eq!(Header::parse(head), Ok((again.len(), sequence)));
    assert!(
        again.len() <= body.len(),
        "our own encoding is the shortest"
    );
    assert_eq!(decode::<T>(again), Ok(message));
}

/// A step's plan on its way to a worker, or the worker's report on its way back.
pub fn plan(bytes: &[u8]) {
    static PAPER: OnceLock<(DevicePool, ArenaShard)> = OnceLock::new();
    if let Ok(report) = Report::decode(bytes) {
        assert_eq!(Report::decode(&report.encode().unwrap()), Ok(report));
    }
    let Ok(plan) = StepPlan::decode(bytes) else {
        return;
    };
    let (pool, shard) = PAPER.get_or_init(on_paper);
    for job in plan.loads.iter().chain(&plan.saves) {
        let pairs = job.pairs.iter();
        let pairs: Vec<_> = pairs
            .map(|&(slot, block)| (SlotId(slot), GpuBlock(block)))
            .collect();
        for range in cuda::ranges(pool, shard, &pairs).into_iter().flatten() {
            let end = range.arena_offset.checked_add(range.bytes).unwrap();
            assert!(range.bytes > 0 && end <= shard.map.bytes(), "{range:?}");
            assert!(pool.contains(range.device, range.bytes), "{range:?}");
        }
    }
    assert_eq!(StepPlan::decode(&plan.encode().unwrap()), Ok(plan));
}

/// A pool of 16 blocks in three regions that nobody copies to, and an arena of 64 slots that fits it.
fn on_paper() -> (DevicePool, ArenaShard) {
    const BYTES: u64 = 512;
    let regions = (1..=3).map(|layer| DeviceRegion {
        base: layer << 32,
        block_stride: BYTES,
        block_bytes: BYTES,
    });
    // SAFETY: given to no engine, so the addresses are only numbers.
    let pool = unsafe { DevicePool::new(regions.collect(), 16) }.unwrap();
    let slot_bytes = pool.rank_bytes();
    let file = ArenaFile::create(64 * slot_bytes, PageSize::Base4K).unwrap();
    let map = ArenaMap::map(file.fd().try_clone_to_owned().unwrap(), file.bytes());
    let shard = ArenaShard {
        map: Arc::new(map.unwrap()),
        slot_bytes,
        rank_offset: 0,
    };
    (pool, shard)
}

/// A body of the HTTP API, tried with every call; and a session's name from a path.
pub fn bodies(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Some(name) = taken(parse::session_id(text))
    {
        assert_eq!(name.as_str(), text);
    }
    if let Some(start) = taken(parse::tool_start(bytes)) {
        short(&start.tool, parse::TOOL_NAME_MAX);
        start.call_id.iter().for_each(|id| short(id, parse::ID_MAX));
        assert!(start.detail.is_none_or(|d| d.len() <= parse::DETAIL_KEPT));
        at_most(start.eta, parse::ETA_MAX);
    }
    if let Some(progress) = taken(parse::tool_progress(bytes)) {
        progress
            .call_id
            .iter()
            .for_each(|id| short(id, parse::ID_MAX));
        assert!(progress.fraction.is_none_or(|f| (0.0..=1.0).contains(&f)));
        at_most(progress.eta, parse::ETA_MAX);
    }
    if let Some(end) = taken(parse::tool_end(bytes)) {
        end.call_id.iter().for_each(|id| short(id, parse::ID_MAX));
    }
    for parse in [parse::compat_prefetch, parse::compat_pin] {
        if let Some(items) = taken(parse(bytes)) {
            assert!(items.len() <= 2 * COMPAT_ENTRIES_MAX);
            items.iter().for_each(compat_item);
        }
    }
    if let Some(envelope) = taken(parse::envelope(bytes)) {
        hints(envelope);
    }
}

fn taken<T>(parsed: Result<T, ApiError>) -> Option<T> {
    match parsed {
        Ok(value) => Some(value),
        Err(error) => {
            assert!(error.to_string().len() <= ERROR_TEXT_MAX, "{error}");
            assert!(error.code().1.is_client_error(), "{error}");
            None
        }
    }
}

fn short(id: &str, bytes_max: usize) {
    assert!((1..=bytes_max).contains(&id.len()), "{id:?}");
    assert!(!id.contains(char::is_control), "{id:?}");
}

fn at_most(duration: Option<Duration>, longest: Duration) {
    assert!(duration.is_none_or(|duration| duration <= longest));
}

fn session(name: &SessionName) {
    short(name.as_str(), SESSION_NAME_MAX);
}

fn compat_item(item: &CompatItem) {
    short(&item.kv_key, parse::ID_MAX);
    item.session.iter().for_each(session);
    priority(item.priority);
    at_most(item.eta, parse::ETA_MAX);
}

fn priority(thousandths: i32) {
    assert!(f64::from(thousandths).abs() <= parse::PRIORITY_MAX * 1000.0);
}

fn hint(action: &HintAction) {
    short(&action.action_id, parse::ID_MAX);
    assert!(action.ttl.is_none_or(|ttl| !ttl.is_zero()));
    at_most(action.ttl, parse::TTL_MAX);
    at_most(action.eta, parse::ETA_MAX);
    priority(action.priority);
    match &action.target {
        Target::Session(name) => session(name),
        Target::Request(id) => short(id, parse::REQUEST_ID_MAX),
        Target::Blocks(hashes) => assert!((1..=TARGET_BLOCKS_MAX).contains(&hashes.len())),
    }
}

/// Every action that was sent gets one answer, in its place, and those that reach the actor are told apart by their ids.
fn hints(envelope: parse::Envelope) {
    let parse::Envelope { command, entries } = envelope;
    short(&command.message_id, parse::ID_MAX);
    command.actions.iter().for_each(hint);
    assert!(entries.len() <= ACTIONS_MAX);
    let sent = entries.iter().filter_map(|entry| match entry {
        Entry::Sent(id) => Some(id.clone()),
        Entry::Refused { result, .. } => {
            assert!(result.detail.len() <= ERROR_TEXT_MAX, "{}", result.detail);
            assert!(result.action_id.len() <= parse::ID_MAX);
            None
        }
    });
    let sent: Vec<String> = sent.collect();
    let ids: Vec<&str> = command
        .actions
        .iter()
        .map(|a| a.action_id.as_str())
        .collect();
    assert_eq!(sent, ids);
    assert_eq!(sent.iter().collect::<HashSet<_>>().len(), sent.len());
    let answers = sent.into_iter().map(|action_id| ActionResult {
        action_id,
        outcome: Outcome::Accepted,
        detail: String::new(),
        blocks: None,
    });
    let (count, accepted) = (entries.len(), command.actions.len());
    let answer = parse::envelope_answer(command.message_id, entries, answers.collect());
    assert_eq!(answer.results.len(), count);
    let done = answer.results.iter().filter(|r| r.outcome == "accepted");
    assert_eq!(done.count(), accepted);
}

/// A configuration file, and the same text as each of the values that can also be given as flags.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(size) = text.parse::<Size>() {
        assert_eq!(size.to_string().parse(), Ok(size));
    }
    if let Ok(span) = text.parse::<Span>() {
        assert_eq!(String::from(span).parse(), Ok(span));
    }
    if let Ok(listen) = text.parse::<Listen>() {
        assert_eq!(String::from(listen).parse(), Ok(listen));
    }
    let Ok(settings) = toml::from_str::<Settings>(text) else {
        return;
    };
    let written = toml::to_string(&settings).expect("settings can be written down");
    let again: Settings = toml::from_str(&written).expect("what was written can be read");
    // As text: a share that is no number is not equal to itself.
    assert_eq!(toml::to_string(&again).unwrap(), written);
    for memory in memories() {
        resolve(settings.clone(), memory);
    }
}

/// Machines with much memory, none, a tight control group, and figures that make no sense.
fn memories() -> [Memory; 4] {
    let plain = |machine_free, huge_free| Memory {
        machine_free,
        cgroup: None,
        huge_total: huge_free,
        huge_free,
    };
    let group = Cgroup {
        folder: PathBuf::from("/"),
        limit: 1 << 30,
        free: 3 << 20,
    };
    let tight = Memory {
        cgroup: Some(group),
        ..plain(64 << 30, 4 << 20)
    };
    [
        plain(64 << 30, 1 << 30),
        plain(0, 0),
        tight,
        plain(u64::MAX, u64::MAX),
    ]
}

fn resolve(settings: Settings, memory: Memory) {
    let machine = Machine {
        memory,
        socket: PathBuf::from("/run/greenroom.sock"),
    };
    let config = match Config::resolve(settings, &machine) {
        Ok(config) => config,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let free = match config.page_size {
        PageSize::Base4K => machine.memory.free(),
        PageSize::Huge2M => machine.memory.huge_free,
    };
    assert!((MEMORY_MIN..=free).contains(&config.memory), "{config:?}");
    assert!(config.memory.is_multiple_of(config.page_size.bytes()));
    assert!((0.0..=1.0).contains(&config.pin_budget), "{config:?}");
    let lease = Duration::from_secs(1)..=LEASE_TTL_MAX;
    assert!(lease.contains(&config.lease_ttl), "{config:?}");
    assert!(config.drain_timeout <= DRAIN_TIMEOUT_MAX, "{config:?}");
    assert!(
        (1..=SESSIONS_MAX).contains(&config.sessions_max),
        "{config:?}"
    );
    let open = config.listen.is_some_and(|at| !at.ip().is_loopback());
    assert!(!open || config.token_file.is_some(), "{config:?}");
}

/// The kernel's figures about memory, as files: `/proc/meminfo`, `/proc/self/cgroup`, and a control group's limit, use and
/// statistics (of version 2 and of version 1), divided by zero bytes.
pub fn machine(bytes: &[u8]) {
    thread_local! {
        static ROOT: tempfile::TempDir = tempfile::tempdir_in("/dev/shm").unwrap();
    }
    const FILES: [&[&str]; 5] = [
        &["proc/meminfo"],
        &["proc/self/cgroup"],
        &[
            "sys/fs/cgroup/memory.max",
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
        ],
        &[
            "sys/fs/cgroup/memory.current",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
        ],
        &[
            "sys/fs/cgroup/memory.stat",
            "sys/fs/cgroup/memory/memory.stat",
        ],
    ];
    let mut parts = bytes.split(|byte| *byte == 0);
    let memory = ROOT.with(|root| {
        for paths in FILES {
            let part = parts.next().unwrap_or_default();
            for path in paths {
                let path = root.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, part).unwrap();
            }
        }
        Memory::read(root.path())
    });
    let Ok(memory) = memory else { return };
    assert!(memory.free() <= memory.machine_free);
    if let Some(group) = &memory.cgroup {
        assert!(memory.free() <= group.free && group.free <= group.limit);
    }
    assert!(memory.limited_by().starts_with("the "));
    resolve(Settings::default(), memory);
}
