//! One input for each thing that the engine protocol can say, and some that it must refuse.

use greenroom_tests::engine::chain;
use serde::Serialize;
use sidecar::engine::frames::{
    CopyClass, CopySample, Figures, HEADER_BYTES, Hashes, Hello, Hook, HookSample, Residence, Role,
    SessionNews, ToEngine, ToSidecar, WantOutcome, Wish, encode,
};
use sidecar::engine::plan::{JobReport, PlannedJob, Report, StepPlan};

use super::Inputs;

fn hashes(count: u32) -> Hashes {
    Hashes(chain(1..=count))
}

fn named(inputs: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> Inputs {
    let inputs = inputs.into_iter();
    inputs
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .collect()
}

fn frame(message: &impl Serialize) -> Vec<u8> {
    encode(7, message).unwrap()
}

/// Frames in both directions.
pub(super) fn frames() -> Inputs {
    let mut all = named(to_sidecar().map(|(name, message)| (name, frame(&message))));
    all.extend(named(
        to_engine().map(|(name, message)| (name, frame(&message))),
    ));
    all.extend(named(refused()));
    all
}

fn hello(role: Role) -> ToSidecar {
    ToSidecar::Hello(Hello {
        role,
        engine: "engine-1".into(),
        rank_bytes: 1 << 20,
        ranks: 2,
        block_tokens: 16,
        gpu_blocks: 400,
    })
}

fn outcome(outcome: WantOutcome, pairs: &[(u32, u32)]) -> ToSidecar {
    ToSidecar::Outcome {
        session: 3,
        want: 9,
        outcome,
        blocks: 2,
        pairs: pairs.to_vec(),
    }
}

fn figures() -> Figures {
    let sample = |kind| CopySample {
        kind,
        ok: kind != CopyClass::Save,
        bytes: 3 << 20,
        micros: 517,
    };
    let timed = |hook| HookSample { hook, micros: 31 };
    Figures {
        gpu_free: 200,
        copies: [CopyClass::Demand, CopyClass::Prefetch, CopyClass::Save]
            .map(sample)
            .to_vec(),
        hooks: [
            Hook::TurnStarted,
            Hook::MatchPrefix,
            Hook::Plan,
            Hook::CopiesDone,
            Hook::TurnEnded,
        ]
        .map(timed)
        .to_vec(),
        timeouts: 1,
        fenced: 2,
        match_hits: 3,
        match_misses: 4,
        prefetch_used: 5,
        prefetch_wasted: 6,
        prefetch_late: 7,
        prefetch_cancelled: u64::MAX,
    }
}

fn news() -> ToSidecar {
    let residences = [
        Residence::Hold,
        Residence::Shadow,
        Residence::Host,
        Residence::Loading,
        Residence::Ready,
    ];
    let news = (1..).zip(residences);
    let news = news.map(|(session, residence)| SessionNews {
        session,
        residence,
        gpu_blocks: 40,
    });
    ToSidecar::News(news.collect())
}

fn to_sidecar() -> impl Iterator<Item = (&'static str, ToSidecar)> {
    let turn = |identity: Option<&str>, blocks| ToSidecar::TurnStarted {
        turn: 5,
        request: "cmpl-1".into(),
        identity: identity.map(str::to_owned),
        hashes: hashes(blocks),
    };
    let lookup = |for_session| ToSidecar::Lookup {
        turn: 5,
        for_session,
        hashes: hashes(3),
    };
    let settle = |commit| ToSidecar::Settle { lease: 11, commit };
    let ended = ToSidecar::TurnEnded {
        turn: 5,
        hashes: hashes(4),
    };
    let hints = ToSidecar::Hints {
        json: r#"{"protocol_version":"1.0","message_id":"m","actions":[]}"#.into(),
    };
    [
        ("hello_scheduler", hello(Role::Scheduler)),
        ("hello_worker", hello(Role::Worker { rank: 1 })),
        ("open_namespace", ToSidecar::OpenNamespace { id: [7; 32] }),
        ("turn_started", turn(Some("agent-7"), 2)),
        ("turn_started_anonymous", turn(None, 0)),
        ("turn_started_long", turn(Some("agent-7"), 40)),
        ("lookup_request", lookup(false)),
        ("lookup_session", lookup(true)),
        ("reserve", ToSidecar::Reserve { hashes: hashes(5) }),
        ("settle_commit", settle(true)),
        ("settle_abort", settle(false)),
        ("release", ToSidecar::Release { lease: u64::MAX }),
        ("turn_ended", ended),
        ("hints", hints),
        (
            "outcome_accepted",
            outcome(WantOutcome::Accepted, &[(1, 2), (3, 4)]),
        ),
        (
            "outcome_clipped",
            outcome(WantOutcome::Clipped, &[(u32::MAX, 0)]),
        ),
        ("outcome_deferred", outcome(WantOutcome::Deferred, &[])),
        ("outcome_missing", outcome(WantOutcome::Missing, &[])),
        ("news", news()),
        ("news_none", ToSidecar::News(Vec::new())),
        ("figures", ToSidecar::Figures(Box::new(figures()))),
        ("figures_zero", ToSidecar::Figures(Box::default())),
        ("reset", ToSidecar::Reset),
        ("fenced", ToSidecar::Fenced),
        ("arena_ready", ToSidecar::ArenaReady),
    ]
    .into_iter()
}

fn to_engine() -> impl Iterator<Item = (&'static str, ToEngine)> {
    let found = |for_session, lease: Option<u64>, slots: &[u32]| ToEngine::Match {
        turn: 5,
        for_session,
        session: 3,
        lease,
        slots: slots.to_vec(),
        ttl_ms: 30_000,
    };
    let reserved = |lease, slots: &[(u32, u32)]| ToEngine::Reserved {
        lease,
        slots: slots.to_vec(),
        ttl_ms: 30_000,
    };
    let want = |wish, lease: Option<u64>, slots: &[u32]| ToEngine::Want {
        session: 3,
        want: 9,
        wish,
        priority: -2500,
        expected_ms: lease.map(|_| 250),
        hold_ms: 60_000,
        hashes: hashes(3),
        lease,
        slots: slots.to_vec(),
        ttl_ms: 30_000,
    };
    let welcome = ToEngine::Welcome {
        boot: 0x1234_5678_9abc_def0,
        file_bytes: 8 << 30,
        slot_bytes: 2 << 20,
    };
    let refused = ToEngine::Refused {
        reason: "rank 1 of engine-1 is connected already".into(),
    };
    [
        ("welcome", welcome),
        ("refused", refused),
        ("namespace_open", ToEngine::NamespaceOpen),
        ("workers_ready", ToEngine::Workers { ready: true }),
        ("workers_lost", ToEngine::Workers { ready: false }),
        ("match_request", found(false, Some(11), &[4, 5, 6])),
        ("match_session", found(true, Some(12), &[u32::MAX])),
        ("match_nothing", found(false, None, &[])),
        ("reserved", reserved(Some(13), &[(0, 7), (2, 8)])),
        ("reserved_nothing", reserved(None, &[])),
        ("want_nothing", want(Wish::Nothing, None, &[])),
        ("want_keep", want(Wish::Keep, None, &[])),
        ("want_when_room", want(Wish::WhenRoom, None, &[])),
        ("want_now", want(Wish::Now, Some(14), &[1, 2, 3])),
    ]
    .into_iter()
}

/// Good frames with one thing wrong.
fn refused() -> [(&'static str, Vec<u8>); 7] {
    let good = frame(&ToSidecar::Release { lease: 300 });
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = good.clone();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let mut trailing = good.clone();
    trailing.push(0);
    let mut padded = good.clone();
    // 300 in three bytes instead of two.
    padded.splice(HEADER_BYTES + 1.., [0xac, 0x82, 0x00]);
    [
        ("bad_magic", with(0, b"HTTP")),
        ("bad_version", with(4, &[9, 0])),
        ("bad_length", with(8, &u32::MAX.to_le_bytes())),
        ("bad_message", with(HEADER_BYTES, &[0xff])),
        ("bad_end_missing", good[..good.len() - 1].to_vec()),
        ("bad_end_trailing", trailing),
        ("long_number", padded),
    ]
}

/// Plans and reports.
pub(super) fn plans() -> Inputs {
    let mut all = named(steps().map(|(name, plan)| (name, plan.encode().unwrap())));
    all.extend(named(
        reports().map(|(name, report)| (name, report.encode().unwrap())),
    ));
    all
}

fn job(kind: CopyClass, pairs: impl IntoIterator<Item = (u32, u32)>) -> PlannedJob {
    PlannedJob {
        id: 21,
        kind,
        boot: 0x1234_5678_9abc_def0,
        pairs: pairs.into_iter().collect(),
    }
}

fn steps() -> impl Iterator<Item = (&'static str, StepPlan)> {
    let loads = |loads: Vec<PlannedJob>| StepPlan {
        loads,
        ..StepPlan::default()
    };
    let saves = |saves: Vec<PlannedJob>| StepPlan {
        saves,
        ..StepPlan::default()
    };
    let fence = StepPlan {
        fence: vec![21, 22],
        ..StepPlan::default()
    };
    let cancel = StepPlan {
        cancel: vec![u64::MAX],
        ..StepPlan::default()
    };
    let everything = StepPlan {
        fence: vec![1],
        cancel: vec![2, 3],
        loads: vec![
            job(CopyClass::Demand, [(0, 1)]),
            job(CopyClass::Prefetch, [(2, 3)]),
        ],
        saves: vec![job(CopyClass::Save, [(4, 5), (6, 7)])],
    };
    let demand = |pairs: Vec<(u32, u32)>| loads(vec![job(CopyClass::Demand, pairs)]);
    [
        ("plan_nothing", StepPlan::default()),
        ("plan_demand", demand(vec![(3, 5)])),
        ("plan_run", demand((0..16).map(|n| (n + 8, n)).collect())),
        (
            "plan_backwards",
            demand((0..16).map(|n| (n + 8, 15 - n)).collect()),
        ),
        ("plan_last", demand(vec![(63, 15)])),
        ("plan_slot_outside", demand(vec![(0, 0), (64, 1)])),
        ("plan_block_outside", demand(vec![(0, 0), (1, 16)])),
        ("plan_far_outside", demand(vec![(u32::MAX, u32::MAX)])),
        ("plan_twice_the_same", demand(vec![(1, 1), (1, 1)])),
        ("plan_no_pairs", demand(vec![])),
        (
            "plan_prefetch",
            loads(vec![job(CopyClass::Prefetch, (0..8).map(|n| (2 * n, n)))]),
        ),
        ("plan_save", saves(vec![job(CopyClass::Save, [(9, 9)])])),
        (
            "plan_saves",
            saves(vec![
                job(CopyClass::Save, [(9, 9)]),
                job(CopyClass::Save, []),
            ]),
        ),
        ("plan_fence", fence),
        ("plan_cancel", cancel),
        ("plan_everything", everything),
    ]
    .into_iter()
}

fn reports() -> impl Iterator<Item = (&'static str, Report)> {
    let ended = |ok, bytes| JobReport {
        id: 21,
        ok,
        bytes,
        micros: 900,
    };
    let report = |rank, ended: &[JobReport]| Report {
        rank,
        ended: ended.to_vec(),
    };
    [
        ("report_nothing", report(0, &[])),
        ("report_done", report(1, &[ended(true, 3 << 20)])),
        ("report_failed", report(0, &[ended(false, 0)])),
        (
            "report_several",
            report(u32::MAX, &[ended(true, u64::MAX), ended(false, 1)]),
        ),
    ]
    .into_iter()
}
