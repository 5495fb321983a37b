//! The middle of it all: a simulated engine on the real hooks, protocol, store and copies.

use std::time::Instant;

use greenroom_tests::engine::{Engine, Options, chain};
use greenroom_tests::sidecar::{Sidecar, until};
use serde_json::json;
use sidecar::hooks::{GpuPool, Holders, LOAD_STEPS_MAX, Match, Prefetch, StepMode};

const MEMORY: &str = "4MiB";
/// Blocks of a session: more than holds may protect in a pool of 100.
const BLOCKS: u64 = 40;

/// Steps until a session is in the arena in full.
fn saved(engine: &mut Engine, sidecar: &Sidecar, name: &str, blocks: u64) {
    until("the session is saved", || {
        engine.step();
        sidecar.get(&format!("/v1/sessions/{name}"))["blocks"]["host"] == blocks
    });
}

/// A turn of a session that is in the arena in full when this returns.
fn turn_and_save(engine: &mut Engine, sidecar: &Sidecar, name: &str, chain: &[kvstore::BlockHash]) {
    engine.turn(Some(name), chain);
    saved(engine, sidecar, name, chain.len() as u64);
}

/// Other traffic until nothing of a session is left in the pool: after one flood, holds may have kept some of it.
fn evict(engine: &mut Engine, chain: &[kvstore::BlockHash]) {
    for round in 0..100 {
        engine.flood(7 ^ (round << 24), 200);
        if engine.pool.leading(chain) == 0 {
            return;
        }
    }
    panic!("100 floods did not evict the session");
}

/// Returns when the engine has taken in whatever the sidecar has sent it by now: answers do not overtake wants.
fn hear(engine: &mut Engine) {
    let hooks = &mut engine.hooks;
    hooks.turn_started("probe", None, &session(2, 99), Instant::now());
    until("the probe is answered", || {
        let found = hooks.match_prefix("probe", (0, 1), Holders::default(), Instant::now());
        found != Match::Pending
    });
    hooks.turn_ended("probe", &[], Instant::now());
}

/// What a client gets that waits for the engine's answer.
fn while_stepping<T: Send>(engine: &mut Engine, ask: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let asking = scope.spawn(ask);
        until("the client is answered", || {
            engine.step();
            asking.is_finished()
        });
        asking.join().unwrap()
    })
}

fn session(blocks: u32, id: u32) -> Vec<kvstore::BlockHash> {
    chain((0..blocks).map(|i| id << 20 | i))
}

#[test]
fn an_evicted_session_is_loaded_on_demand() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    let first = engine.turn(Some("a"), &mine);
    assert_eq!((first.local, first.loaded, first.computed), (0, 0, 40));
    engine.settle();
    let again = engine.turn(Some("a"), &mine);
    assert_eq!((again.local, again.loaded), (39, 0), "still on the GPU");
    engine.settle();
    evict(&mut engine, &mine);
    let back = engine.turn(Some("a"), &mine);
    assert_eq!(back.local + back.loaded, 39, "{back:?}");
    assert!(back.loaded > 0, "{back:?}");
}

#[test]
fn a_tool_end_brings_the_session_back_before_its_request() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    evict(&mut engine, &mine);
    assert_eq!(engine.pool.leading(&mine), 0);
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    until("the session is back", || {
        engine.step();
        engine.pool.leading(&mine) == 40
    });
    until("the session is said to be ready", || {
        engine.step();
        let view = sidecar.get("/v1/sessions/a");
        view["state"] == "ready" && view["blocks"]["gpu"] == 40
    });
    let turn = engine.turn(Some("a"), &mine);
    assert_eq!((turn.local, turn.loaded), (39, 0));
}

#[test]
fn a_waiting_session_comes_back_when_there_is_room() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    evict(&mut engine, &mine);
    engine.reserve = 80;
    sidecar.post(
        "/v1/sessions/a/tool_start",
        &json!({"tool": "bash", "eta_ms": 60_000}),
    );
    until("the want has arrived", || {
        engine.step();
        engine.hooks.figures().waiting > 0
    });
    engine.settle();
    assert!(engine.pool.leading(&mine) < 40, "the reserve is respected");
    engine.reserve = 0;
    until("the session is back", || {
        engine.step();
        engine.pool.leading(&mine) == 40
    });
}

#[test]
fn a_person_is_not_waited_for_with_blocks() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    evict(&mut engine, &mine);
    sidecar.post(
        "/v1/sessions/a/tool_start",
        &json!({"tool": "AskUserQuestion"}),
    );
    sidecar.get("/v1/status");
    engine.settle();
    for _ in 0..100 {
        engine.step();
    }
    assert_eq!(engine.pool.leading(&mine), 0);
    until("it is said to be gone", || {
        engine.flood(8, 20);
        let view = sidecar.get("/v1/sessions/a");
        view["state"] == "host" && view["blocks"]["gpu"] == 0
    });
}

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
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
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
fn sessions_that_exceed_the_pool_are_deferred_or_clipped_and_nothing_hangs() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 64);
    for id in 1..=4 {
        engine.turn(Some(&format!("s{id}")), &session(30, id));
        saved(&mut engine, &sidecar, &format!("s{id}"), 30);
    }
    engine.flood(9, 200);
    // Saves under way would take room, and even the first would be clipped.
    engine.settle();
    let outcomes: Vec<serde_json::Value> = while_stepping(&mut engine, || {
        (1..=4)
            .map(|id| sidecar.prefetch(&format!("s{id}"), &format!("m{id}"))["outcome"].clone())
            .collect()
    });
    assert_eq!(outcomes[0], "accepted", "{outcomes:?}");
    assert!(
        outcomes[2..]
            .iter()
            .all(|o| o == "deferred" || o == "clipped"),
        "{outcomes:?}"
    );
    engine.settle();
    let fitting = (1..=4)
        .filter(|id| engine.pool.leading(&session(30, *id)) == 30)
        .count();
    let free: Vec<String> = engine
        .pool
        .free_list(64)
        .iter()
        .map(|hash| {
            (1..=4)
                .find_map(|id| {
                    let at = session(30, id).iter().position(|h| Some(*h) == *hash)?;
                    Some(format!("s{id}.{at}"))
                })
                .unwrap_or_else(|| "-".to_owned())
        })
        .collect();
    assert_eq!(
        fitting, 2,
        "what fits is there, and stays: {outcomes:?} {free:?}"
    );
    // The one that came first goes on: the next in line takes its place.
    engine.turn(Some("s1"), &session(31, 1));
    engine.settle();
}

#[test]
fn an_aborted_load_and_retired_sessions_leave_nothing_behind() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
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

/// A want with another chain arrives while a chunk of the old one is being copied: slots belong to their own chain.
#[test]
fn a_session_may_diverge_inside_the_chunk_that_is_being_loaded() {
    a_session_diverges_while_it_is_being_loaded(5);
}

#[test]
fn a_session_may_diverge_behind_the_chunk_that_is_being_loaded() {
    a_session_diverges_while_it_is_being_loaded(20);
}

fn a_session_diverges_while_it_is_being_loaded(shared: u32) {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    evict(&mut engine, &mine);
    engine.reserve = 90;
    engine.switch.hold();
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    until("a chunk is in flight", || {
        engine.step();
        engine.hooks.copies_in_flight()
    });
    // The user edits history: another prompt, given up at once.
    let other = chain((0..40u32).map(|i| if i < shared { 1 << 20 | i } else { 9 << 20 | i }));
    engine
        .hooks
        .turn_started("r", Some("a"), &other, std::time::Instant::now());
    engine.hooks.turn_ended("r", &[], std::time::Instant::now());
    until("the turn is counted", || {
        engine.step();
        let view = sidecar.get("/v1/sessions/a");
        view["turns"] == 2 && view["state"] != "active"
    });
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    for _ in 0..50 {
        engine.step();
        sidecar.get("/v1/status");
    }
    engine.switch.release();
    engine.reserve = 0;
    for _ in 0..50 {
        engine.step();
        sidecar.get("/v1/status");
    }
    // Every block that is found is compared with the bytes of its hash.
    let turn = engine.turn(Some("b"), &other);
    assert!(turn.local + turn.loaded <= shared as usize, "{turn:?}");
}

/// The same through hints that name blocks.
#[test]
fn two_chains_with_one_last_block_are_two_sessions() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    evict(&mut engine, &mine);
    engine.reserve = 90;
    engine.switch.hold();
    let hex = |chain: &[kvstore::BlockHash]| -> Vec<String> {
        chain
            .iter()
            .map(|h| h.0.iter().map(|b| format!("{b:02x}")).collect())
            .collect()
    };
    let hint = |id: &str, chain: &[kvstore::BlockHash]| {
        sidecar.post(
            "/v1/hints",
            &json!({"protocol_version": "1.0", "message_id": id, "actions": [
            {"action_id": "1", "action_type": "kv.prefetch", "action_version": "1.0",
             "payload": {"target": {"block_hashes": hex(chain)}}}]}),
        );
    };
    hint("one", &mine);
    until("a chunk is in flight", || {
        engine.step();
        engine.hooks.copies_in_flight()
    });
    hint("two", &mine[39..]);
    for _ in 0..50 {
        engine.step();
        sidecar.get("/v1/status");
    }
    engine.switch.release();
    engine.reserve = 0;
    for _ in 0..50 {
        engine.step();
        sidecar.get("/v1/status");
    }
    hint("three", &mine);
    until("all is there", || {
        engine.step();
        engine.pool.leading(&mine) == 40
    });
    let turn = engine.turn(Some("x"), &session(41, 1));
    assert_eq!((turn.local, turn.computed), (40, 1));
}

/// A want that was pushed before a reset is received after it: its lease is of the old epoch.
#[test]
fn a_want_that_crosses_a_reset_is_not_believed() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
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
fn of_sessions_that_are_due_the_one_with_priority_comes_first() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let (low, high) = (session(40, 1), session(40, 2));
    for (name, chain) in [("low", &low), ("high", &high)] {
        turn_and_save(&mut engine, &sidecar, name, chain);
        sidecar.post(
            &format!("/v1/sessions/{name}/tool_start"),
            &json!({"tool": "bash", "eta_ms": 600_000}),
        );
    }
    engine.reserve = 100;
    engine.flood(7, 200);
    engine.reserve = 0;
    // Nothing may come back before both hints are there.
    engine.mode = StepMode::Paused;
    let prefetch = |name: &str, priority: f64| {
        json!({
            "action_id": name, "action_type": "kv.prefetch", "action_version": "1.0",
            "payload": {"target": {"session_id": name}, "priority": priority},
        })
    };
    let actions = [prefetch("low", 0.25), prefetch("high", 0.5)];
    let envelope = json!({"protocol_version": "1.0", "message_id": "m", "actions": actions});
    sidecar.post("/v1/hints", &envelope);
    hear(&mut engine);
    engine.step();
    assert_eq!(
        (engine.pool.leading(&low), engine.pool.leading(&high)),
        (0, 0)
    );
    engine.mode = StepMode::Busy;
    until("the first is back", || {
        engine.step();
        engine.pool.leading(&high) == 40 || engine.pool.leading(&low) == 40
    });
    assert!(engine.pool.leading(&low) < 40, "the one with priority");
}

#[test]
fn of_sessions_that_wait_for_a_tool_the_one_expected_first_comes_first() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let [late, soon] = two_that_do_not_fit(&sidecar, &mut engine);
    // Nothing may come back before both are known to wait.
    engine.mode = StepMode::Paused;
    for (name, eta_ms) in [("a", 600_000), ("b", 300_000)] {
        sidecar.post(
            &format!("/v1/sessions/{name}/tool_start"),
            &json!({"tool": "bash", "eta_ms": eta_ms}),
        );
    }
    hear(&mut engine);
    engine.mode = StepMode::Busy;
    until("one is back", || {
        engine.step();
        engine.pool.leading(&late) == 60 || engine.pool.leading(&soon) == 60
    });
    assert_eq!(engine.pool.leading(&soon), 60, "the one expected first");
}

/// Nothing is brought back here: what is left of a session is what was kept.
fn left_after_other_traffic(hold_ratio: f64) -> usize {
    let sidecar = Sidecar::start(MEMORY);
    let options = Options {
        prefetch: Prefetch::Off,
        hold_ratio,
        ..Options::default()
    };
    let mut engine = Engine::connect(sidecar.socket(), "e", 100, options);
    let mine = session(20, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    engine.flood(7, 200);
    engine.pool.leading(&mine)
}

#[test]
fn a_session_that_is_held_outlives_other_traffic() {
    assert_eq!(left_after_other_traffic(0.3), 20);
}

#[test]
fn holds_are_bounded_by_their_share_of_the_pool() {
    assert_eq!(left_after_other_traffic(0.1), 0, "20 blocks are not 10");
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

/// A request of session "a" that a hit waits for, and its holders: no seat is free.
fn kept_waiting(sidecar: &Sidecar, engine: &mut Engine) -> Holders {
    let mine = session(40, 1);
    turn_and_save(engine, sidecar, "a", &mine);
    evict(engine, &mine);
    engine.settle();
    engine
        .hooks
        .turn_started("r", Some("a"), &mine, Instant::now());
    Holders {
        count: 1,
        seats: 1,
        missing: 0,
        free: 100,
    }
}

#[test]
fn a_load_waits_for_room_and_not_for_ever() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let holders = kept_waiting(&sidecar, &mut engine);
    let mut asked = 0;
    until("the load may start", || {
        engine.step();
        asked += 1;
        let found = engine
            .hooks
            .match_prefix("r", (0, 39), holders, Instant::now());
        found == Match::Hit(39)
    });
    assert!(asked > LOAD_STEPS_MAX, "{asked} steps");
}

#[test]
fn a_lease_that_ends_while_its_request_waits_is_not_used() {
    let sidecar = Sidecar::start_with(MEMORY, "lease_ttl = \"1s\"\n");
    let mut engine = Engine::start(&sidecar, "e", 100);
    let holders = kept_waiting(&sidecar, &mut engine);
    let ask = |engine: &mut Engine, holders| {
        engine.step();
        engine
            .hooks
            .match_prefix("r", (0, 39), holders, Instant::now())
    };
    let leased = || sidecar.get("/v1/status")["tiers"]["host"]["slots_leased"].clone();
    until("the lease is there", || {
        assert_eq!(ask(&mut engine, holders), Match::Pending);
        leased() == BLOCKS
    });
    until("the lease has ended", || {
        sidecar
            .text("/metrics")
            .contains("greenroom_expired_leases_total 1\n")
    });
    assert_eq!(leased(), BLOCKS, "the engine may still copy");
    let found = ask(&mut engine, Holders::default());
    assert_eq!(found, Match::Pending, "it is asked for anew");
    until("another lease is there", || {
        ask(&mut engine, Holders::default()) == Match::Hit(39)
    });
}

#[test]
fn what_arrives_while_the_engine_is_paused_is_done_when_it_goes_on() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
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

/// Blocks that a step of a busy engine may name: what it looks at, what it holds, one chunk, two save jobs.
const TOUCHED_MAX: usize = 2000;

#[test]
fn a_long_session_comes_back_in_steps_of_bounded_work() {
    let sidecar = Sidecar::start("64MiB");
    let mut engine = Engine::start(&sidecar, "e", 2000);
    let mine = session(1500, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    sidecar.post(
        "/v1/sessions/a/tool_start",
        &json!({"tool": "bash", "eta_ms": 600_000}),
    );
    engine.reserve = 2000;
    engine.flood(7, 2500);
    engine.settle();
    engine.reserve = 0;
    assert!(engine.pool.leading(&mine) < 1500);
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    let mut most = 0;
    until("the session is back", || {
        engine.pool.take_touched();
        engine.step();
        most = most.max(engine.pool.take_touched());
        engine.pool.leading(&mine) == 1500
    });
    assert!(most <= TOUCHED_MAX, "{most} blocks in one step");
    until("it is in order", || {
        engine.step();
        !engine.hooks.pending(false)
    });
    let free = engine.pool.free_list(2000).into_iter().flatten();
    let order: Vec<_> = free.filter(|hash| mine.contains(hash)).collect();
    assert!(
        order.iter().eq(mine.iter().rev()),
        "its end would be evicted first"
    );
}

#[test]
fn a_session_that_only_was_held_is_said_to_be_gone_when_it_is() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    let mut seed = 7;
    until("the hold is over and its blocks are gone", || {
        seed += 1;
        engine.flood(seed, 20);
        sidecar.get("/v1/sessions/a")["state"] == "host"
    });
    let left = engine.pool.leading(&mine);
    assert!(left < 40);
    engine.settle();
    assert_eq!(engine.pool.leading(&mine), left, "nobody brings it back");
}

/// Sessions "a" and "b" of which the pool has room for one, both evicted.
fn two_that_do_not_fit(sidecar: &Sidecar, engine: &mut Engine) -> [Vec<kvstore::BlockHash>; 2] {
    let chains = [session(60, 1), session(60, 2)];
    for (name, mine) in ["a", "b"].into_iter().zip(&chains) {
        turn_and_save(engine, sidecar, name, mine);
    }
    engine.flood(7, 200);
    chains
}

#[test]
fn a_session_that_is_due_is_not_robbed_by_one_that_is_overdue() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let [mine, other] = two_that_do_not_fit(&sidecar, &mut engine);
    sidecar.post(
        "/v1/sessions/b/tool_start",
        &json!({"tool": "bash", "eta_ms": 1}),
    );
    until("b, which is overdue, is back", || {
        engine.step();
        engine.pool.leading(&other) == 60
    });
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    until("a, which is due, is back", || {
        engine.step();
        engine.pool.leading(&mine) == 60
    });
    engine.settle();
    // Something moves, and both are looked at again.
    engine.flood(100, 20);
    until("a is there again", || {
        engine.step();
        engine.pool.leading(&mine) == 60
    });
    engine.settle();
    let fetched = engine.hooks.figures().prefetch_blocks;
    for _ in 0..1000 {
        engine.step();
    }
    let again = engine.hooks.figures().prefetch_blocks - fetched;
    // b may still get what fits beside a, once.
    assert!(again <= 40, "{again} blocks fetched anew: ping-pong");
    assert_eq!(engine.pool.leading(&mine), 60);
}

#[test]
fn a_session_that_waits_for_a_tool_again_makes_room_for_one_that_is_due() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let [mine, other] = two_that_do_not_fit(&sidecar, &mut engine);
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    until("a is back", || {
        engine.step();
        engine.pool.leading(&mine) == 60
    });
    sidecar.post("/v1/sessions/b/tool_end", &json!({}));
    sidecar.get("/v1/status");
    engine.settle();
    assert!(engine.pool.leading(&other) < 60, "a is spared");
    sidecar.post(
        "/v1/sessions/a/tool_start",
        &json!({"tool": "bash", "eta_ms": 60_000}),
    );
    until("b is back", || {
        engine.step();
        engine.pool.leading(&other) == 60
    });
}

#[test]
fn without_prefetch_a_hint_is_answered_by_the_engine() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start_without_prefetch(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    evict(&mut engine, &mine);
    let answer = while_stepping(&mut engine, || sidecar.prefetch("a", "m"));
    assert_eq!(answer["outcome"], "deferred", "{answer}");
    assert!(!answer.to_string().contains("not answered"), "{answer}");
    assert_eq!(engine.pool.leading(&mine), 0);
}

/// Of a reserve that stays high, neither saves nor the fetches that wait for them may hang.
#[test]
fn what_is_saved_under_a_high_reserve_is_saved_in_parts() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    evict(&mut engine, &mine);
    engine.settle();
    engine.turn(Some("b"), &session(40, 2));
    engine.reserve = 90;
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    saved(&mut engine, &sidecar, "b", BLOCKS);
    until("what there is room for is back", || {
        engine.step();
        engine.pool.leading(&mine) > 0
    });
}

#[test]
fn a_fetch_does_not_evict_what_is_still_to_be_saved() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(60, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    evict(&mut engine, &mine);
    engine.settle();
    engine.switch.hold();
    // Two jobs there may be at a time; what comes after them waits in the queue.
    engine.turn(Some("b"), &session(30, 2));
    engine.turn(Some("c"), &session(30, 3));
    let unsaved = session(30, 4);
    engine.turn(Some("d"), &unsaved);
    while_stepping(&mut engine, || sidecar.prefetch("a", "m"));
    assert_eq!(engine.pool.leading(&unsaved), 30);
    engine.switch.release();
    saved(&mut engine, &sidecar, "d", 30);
    until("the session is back", || {
        engine.step();
        engine.pool.leading(&mine) == 60
    });
}
