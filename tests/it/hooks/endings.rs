//! What ends early: sidecars, engines, caches, requests and sessions.

use super::*;

#[test]
fn a_restarted_sidecar_is_found_again() {
    let mut sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    sidecar.stop();
    until("the loss is noticed", || {
        engine.step();
        !engine.hooks.figures().ready
    });
    evict(&mut engine, &mine);
    let alone = engine.turn(Some("a"), &mine);
    assert_eq!(alone.loaded, 0, "a dead sidecar is a miss");
    sidecar.restart(MEMORY);
    engine.until_ready();
    let mine = session(40, 2);
    turn_and_save(&mut engine, &sidecar, "b", &mine);
    engine.flood(8, 200);
    assert!(engine.turn(Some("b"), &mine).loaded > 0, "hits resume");
}

#[test]
fn another_engine_of_the_same_weights_hits_what_a_dead_one_left() {
    let sidecar = Sidecar::start(MEMORY);
    let mine = session(40, 1);
    {
        let mut engine = Engine::start(&sidecar, "first", 100);
        turn_and_save(&mut engine, &sidecar, "a", &mine);
    }
    let mut other = Engine::start(&sidecar, "second", 100);
    let turn = other.turn(Some("a"), &mine);
    assert_eq!((turn.local, turn.loaded), (0, 39));
    let mut stranger = Engine::start_in(&sidecar, "third", 100, b"other weights");
    assert_eq!(stranger.turn(Some("x"), &mine).loaded, 0);
}

#[test]
fn a_reset_means_it() {
    let (_sidecar, mut engine, mine) = with_a_saved();
    assert!(engine.pool.reset());
    engine.hooks.reset();
    engine.settle();
    assert_eq!(engine.turn(Some("a"), &mine).computed, 40);
}

/// Weights may be updated before anybody has asked for anything: what was saved for the files on disk is of others.
#[test]
fn a_reset_before_the_first_request_means_it_too() {
    let sidecar = Sidecar::start(MEMORY);
    let mine = session(40, 1);
    let mut engine = Engine::start(&sidecar, "before", 100);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    drop(engine);
    let options = Options {
        reset: true,
        ..Options::default()
    };
    let mut engine = Engine::connect(sidecar.socket(), "after", 100, options);
    assert_eq!(engine.turn(Some("a"), &mine).computed, 40);
}

/// The next start of the same engine may have other weights at its first reset.
#[test]
fn what_was_saved_after_a_reset_ends_with_its_engine() {
    let sidecar = Sidecar::start(MEMORY);
    let mine = session(40, 1);
    for _ in 0..2 {
        let mut engine = Engine::start(&sidecar, "e", 100);
        engine.hooks.reset();
        assert_eq!(engine.turn(Some("a"), &mine).loaded, 0);
        saved(&mut engine, &sidecar, "a", BLOCKS);
    }
}

#[test]
fn an_aborted_load_and_retired_sessions_leave_nothing_behind() {
    let (sidecar, mut engine, mine) = with_a_saved();
    evict(&mut engine, &mine);
    assert!(engine.aborted_turn("a", &mine));
    engine.settle();
    until("no lease is left", || {
        sidecar.get("/v1/status")["tiers"]["host"]["slots_leased"] == 0
    });
    assert!(
        sidecar.get("/v1/sessions/a")["blocks"]["host"]
            .as_u64()
            .unwrap()
            > 0
    );
    sidecar.delete("/v1/sessions/a");
    assert_eq!(engine.turn(Some("a"), &mine).loaded, 0);
}

/// A want that was pushed before a reset is received after it: its lease is of the old epoch.
#[test]
fn a_want_that_crosses_a_reset_is_not_believed() {
    let (sidecar, mut engine, mine) = with_a_saved();
    evict(&mut engine, &mine);
    engine.settle();
    assert_eq!(engine.pool.leading(&mine), 0);
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    // The engine is in a long step: nothing of it has been taken in when the weights change.
    sidecar.get("/v1/status");
    assert!(engine.pool.reset());
    engine.hooks.reset();
    for _ in 0..50 {
        engine.step();
        sidecar.get("/v1/status");
    }
    assert_eq!(
        engine.pool.leading(&mine),
        0,
        "old KV is in the cache after the reset"
    );
}

#[test]
fn what_a_retired_session_alone_had_is_freed_on_the_gpu_too() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    let other = chain((0..40).map(|i| if i < 10 { 1 << 20 | i } else { 2 << 20 | i }));
    for (name, blocks) in [("a", &mine), ("b", &other)] {
        turn_and_save(&mut engine, &sidecar, name, blocks);
    }
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    engine.settle();
    sidecar.delete("/v1/sessions/a");
    until("its own blocks are gone", || {
        engine.step();
        engine.pool.leading(&mine) == 10
    });
    let next = engine.pool.free_list(30);
    assert_eq!(next, [None; 30], "and are handed out first");
    assert_eq!(engine.pool.leading(&other), 40);
}

#[test]
fn what_arrives_while_the_engine_is_paused_is_done_when_it_goes_on() {
    let (sidecar, mut engine, mine) = with_a_saved();
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    engine.reserve = 100;
    engine.flood(7, 200);
    engine.settle();
    engine.reserve = 0;
    let before = engine.pool.leading(&mine);
    assert!(before < 40);
    engine.mode = StepMode::Paused;
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    let waits = |hooks: &mut sidecar::hooks::SchedulerHooks| {
        assert!(!hooks.pending(true), "a pause has an end");
        hooks.pending(false)
    };
    until("the want has arrived", || waits(&mut engine.hooks));
    engine.step();
    assert_eq!(
        engine.pool.leading(&mine),
        before,
        "a paused engine starts nothing"
    );
    assert!(waits(&mut engine.hooks), "it is not forgotten either");
    engine.mode = StepMode::Idle;
    until("the session is back", || {
        engine.step();
        engine.pool.leading(&mine) == 40
    });
}
