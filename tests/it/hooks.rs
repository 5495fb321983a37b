//! The middle of it all: a simulated engine on the real hooks, protocol, store and copies.

use greenroom_tests::engine::{Engine, chain};
use greenroom_tests::sidecar::{Sidecar, until};
use serde_json::json;

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
    engine.flood(7, 200);
    let back = engine.turn(Some("a"), &mine);
    assert_eq!(back.local + back.loaded, 39, "{back:?}");
    assert!(back.loaded > 0, "{back:?}");
}

#[test]
fn a_tool_end_brings_the_session_back_before_its_request() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    engine.turn(Some("a"), &mine);
    saved(&mut engine, &sidecar, "a", BLOCKS);
    engine.flood(7, 200);
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
    engine.turn(Some("a"), &mine);
    saved(&mut engine, &sidecar, "a", BLOCKS);
    engine.flood(7, 200);
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
    engine.turn(Some("a"), &mine);
    saved(&mut engine, &sidecar, "a", BLOCKS);
    engine.flood(7, 200);
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
}

#[test]
fn a_restarted_sidecar_is_found_again() {
    let mut sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    engine.turn(Some("a"), &mine);
    saved(&mut engine, &sidecar, "a", BLOCKS);
    sidecar.stop();
    until("the loss is noticed", || {
        engine.step();
        !engine.hooks.figures().ready
    });
    engine.flood(7, 200);
    let alone = engine.turn(Some("a"), &mine);
    assert_eq!(alone.loaded, 0, "a dead sidecar is a miss");
    sidecar.restart(MEMORY);
    engine.until_ready();
    let mine = session(40, 2);
    engine.turn(Some("b"), &mine);
    saved(&mut engine, &sidecar, "b", BLOCKS);
    engine.flood(8, 200);
    assert!(engine.turn(Some("b"), &mine).loaded > 0, "hits resume");
}

#[test]
fn another_engine_of_the_same_weights_hits_what_a_dead_one_left() {
    let sidecar = Sidecar::start(MEMORY);
    let mine = session(40, 1);
    {
        let mut engine = Engine::start(&sidecar, "first", 100);
        engine.turn(Some("a"), &mine);
        saved(&mut engine, &sidecar, "a", BLOCKS);
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
    engine.turn(Some("a"), &mine);
    saved(&mut engine, &sidecar, "a", BLOCKS);
    assert!(engine.pool.reset());
    engine.hooks.reset();
    engine.settle();
    assert_eq!(engine.turn(Some("a"), &mine).computed, 40);
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
    let outcomes: Vec<String> = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            (1..=4)
                .map(|id| sidecar.prefetch(&format!("s{id}"), &format!("m{id}")))
                .collect()
        });
        until("every hint is answered", || {
            engine.step();
            asking.is_finished()
        });
        asking.join().unwrap()
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
    assert_eq!(fitting, 2, "what fits is there, and stays");
    // The one that came first goes on: the next in line takes its place.
    engine.turn(Some("s1"), &session(31, 1));
    engine.settle();
}

#[test]
fn an_aborted_load_and_retired_sessions_leave_nothing_behind() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    engine.turn(Some("a"), &mine);
    saved(&mut engine, &sidecar, "a", BLOCKS);
    engine.flood(7, 200);
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
fn a_session_may_diverge_while_it_is_being_loaded() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    engine.turn(Some("a"), &mine);
    saved(&mut engine, &sidecar, "a", BLOCKS);
    engine.flood(7, 200);
    engine.reserve = 90;
    engine.switch.hold();
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    until("a chunk is in flight", || {
        engine.step();
        engine.hooks.copies_in_flight()
    });
    // The user edits history: another prompt, given up at once.
    let other = chain((0..40u32).map(|i| if i < 5 { 1 << 20 | i } else { 9 << 20 | i }));
    assert_eq!(other[..5], mine[..5]);
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
    assert!(turn.local + turn.loaded <= 5, "{turn:?}");
}

/// The same through hints that name blocks.
#[test]
fn two_chains_with_one_last_block_are_two_sessions() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    engine.turn(Some("a"), &mine);
    saved(&mut engine, &sidecar, "a", BLOCKS);
    engine.flood(7, 200);
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
    engine.turn(Some("a"), &mine);
    saved(&mut engine, &sidecar, "a", BLOCKS);
    engine.flood(7, 200);
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
