//! The empty answer of the `plan` hook: no system call. The kernel itself is the witness: it kills the thread at the
//! first one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use greenroom_tests::engine::{Engine, chain};
use greenroom_tests::sidecar::{Sidecar, until};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::json;
use sidecar::hooks::{Step, StepMode};

const PLANS: u32 = 1_000_000;
const SESSIONS: u32 = 3;

/// What the thread under watch has reached.
#[derive(Default)]
struct Progress {
    thread: AtomicU32,
    planned: AtomicU32,
    go_on: AtomicBool,
    survived: AtomicBool,
}

#[test]
fn empty_plans_make_no_system_call() {
    let sidecar = Arc::new(Sidecar::start("4MiB"));
    let progress = Arc::new(Progress::default());
    let (theirs, at) = (sidecar.clone(), progress.clone());
    // Never joined: the kernel ends it.
    let _thread = std::thread::spawn(move || plan_without_system_calls(&theirs, &at));
    let dead = || {
        let thread = progress.thread.load(Ordering::SeqCst);
        thread != 0 && !Path::new(&format!("/proc/self/task/{thread}")).exists()
    };
    let planned = || progress.planned.load(Ordering::SeqCst);
    until("all plans are made", || planned() == PLANS || dead());
    assert_eq!(
        planned(),
        PLANS,
        "the next plan made a system call, or was not empty"
    );
    // The control: one system call, and the thread is gone.
    progress.go_on.store(true, Ordering::SeqCst);
    until("the thread is killed", dead);
    assert!(
        !progress.survived.load(Ordering::SeqCst),
        "the filter was never on"
    );
}

fn plan_without_system_calls(sidecar: &Sidecar, progress: &Progress) {
    let mut engine = Engine::start(sidecar, "e", 100);
    for id in 0..SESSIONS {
        let name = format!("s{id}");
        engine.turn(Some(&name), &chain((0..20).map(|i| id << 20 | i)));
        let tool = json!({"tool": "bash", "eta_ms": 60_000});
        sidecar.post(&format!("/v1/sessions/{name}/tool_start"), &tool);
    }
    until("all sessions wait", || {
        engine.step();
        engine.hooks.figures().waiting == u64::from(SESSIONS)
    });
    until("everything is saved and said", || {
        engine.step();
        let saved = engine.hooks.figures().saved_blocks == u64::from(SESSIONS) * 20;
        saved && !engine.hooks.pending(false)
    });
    let step = Step {
        reserve: 0,
        handed_out: 0,
        mode: StepMode::Busy,
    };
    let thread = rustix::thread::gettid().as_raw_nonzero().get();
    progress
        .thread
        .store(thread.unsigned_abs(), Ordering::SeqCst);
    let now = Instant::now();
    let nothing_is_allowed: BpfProgram = SeccompFilter::new(
        BTreeMap::new(),
        SeccompAction::KillThread,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into().unwrap(),
    )
    .unwrap()
    .try_into()
    .unwrap();
    seccompiler::apply_filter(&nothing_is_allowed).unwrap();
    for planned in 1..=PLANS {
        if engine.hooks.plan(step, &mut engine.pool, now).is_some() {
            // Not empty: nothing is proved, and the test sees that not all were made. Ending is a system call too.
            return;
        }
        progress.planned.store(planned, Ordering::SeqCst);
    }
    while !progress.go_on.load(Ordering::SeqCst) {
        std::hint::spin_loop();
    }
    let parent = rustix::process::getppid();
    progress.survived.store(parent.is_some(), Ordering::SeqCst);
}
