//! A session comes back: on demand, ahead of its request, in which order, and only as far as it is still the same.

use super::*;

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
    let (sidecar, mut engine, mine) = with_a_saved();
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

/// A request begins before the sidecar has told whose it is: it does not ask for blocks that are not stored.
#[test]
fn what_was_brought_back_is_used_by_a_request_that_did_not_wait_for_an_answer() {
    let (sidecar, mut engine, mine) = with_a_saved();
    evict(&mut engine, &mine);
    sidecar.post("/v1/sessions/a/tool_start", &json!({"tool": "bash"}));
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    until("the session is back", || {
        engine.step();
        engine.pool.leading(&mine) == 40
    });
    engine.settle();
    let used = engine.hooks.figures().prefetch_used;
    let hooks = &mut engine.hooks;
    hooks.turn_started("r", Some("a"), &session(60, 1), Instant::now());
    let found = hooks.match_prefix("r", (40, 59), Holders::default(), Instant::now());
    assert_eq!(found, Match::Miss);
    hooks.swap_in("r", &[]);
    until("its session is known", || hooks.knows_session("r"));
    assert_eq!(hooks.figures().prefetch_used - used, 40);
    hooks.turn_ended("r", &mine, Instant::now());
}

#[test]
fn a_waiting_session_comes_back_when_there_is_room() {
    let (sidecar, mut engine, mine) = with_a_saved();
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
    let (sidecar, mut engine, mine) = with_a_saved();
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
    let (sidecar, mut engine, mine) = with_a_saved();
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
    let (sidecar, mut engine, mine) = with_a_saved();
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

#[test]
fn of_sessions_that_are_due_the_one_with_priority_gets_the_room() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let [_, high] = two_that_do_not_fit(&sidecar, &mut engine);
    // The lower one is due earlier by a hair: its hint comes first.
    prefetch(&sidecar, &[("a", 0.25, 0), ("b", 0.5, 0)]);
    comes_back(&mut engine, &high);
    stays(&mut engine, &high);
}

#[test]
fn a_session_that_is_due_is_not_robbed_by_one_with_priority_that_is_not() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let [mine, later] = two_that_do_not_fit(&sidecar, &mut engine);
    prefetch(&sidecar, &[("b", 1.0, 600_000)]);
    comes_back(&mut engine, &later);
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    comes_back(&mut engine, &mine);
    stays(&mut engine, &mine);
}

/// Hints in one message: (session, priority, milliseconds until it is due).
fn prefetch(sidecar: &Sidecar, hints: &[(&str, f64, u64)]) {
    let actions = hints.iter().map(|(session, priority, eta_ms)| {
        json!({
            "action_id": session, "action_type": "kv.prefetch", "action_version": "1.0",
            "payload": {"target": {"session_id": session}, "priority": priority, "eta_ms": eta_ms},
        })
    });
    let envelope = json!({"protocol_version": "1.0", "message_id": "m", "actions": actions.collect::<serde_json::Value>()});
    sidecar.post("/v1/hints", &envelope);
}

fn comes_back(engine: &mut Engine, chain: &[kvstore::BlockHash]) {
    until("the session is back", || {
        engine.step();
        engine.pool.leading(chain) == chain.len()
    });
}

fn stays(engine: &mut Engine, chain: &[kvstore::BlockHash]) {
    for _ in 0..200 {
        engine.step();
    }
    assert_eq!(engine.pool.leading(chain), chain.len(), "it stays");
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

/// Sessions "a" and "b" of which the pool has room for one, both evicted.
fn two_that_do_not_fit(sidecar: &Sidecar, engine: &mut Engine) -> [Vec<kvstore::BlockHash>; 2] {
    let chains = [session(60, 1), session(60, 2)];
    for (name, mine) in ["a", "b"].into_iter().zip(&chains) {
        turn_and_save(engine, sidecar, name, mine);
    }
    engine.flood(7, 200);
    for chain in &chains {
        assert_eq!(engine.pool.leading(chain), 0, "evicted");
    }
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
    comes_back(&mut engine, &other);
    sidecar.post("/v1/sessions/a/tool_end", &json!({}));
    comes_back(&mut engine, &mine);
    engine.settle();
    // Something moves, and both are looked at again.
    engine.flood(100, 20);
    comes_back(&mut engine, &mine);
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
    comes_back(&mut engine, &mine);
    sidecar.post("/v1/sessions/b/tool_end", &json!({}));
    sidecar.get("/v1/status");
    engine.settle();
    assert!(engine.pool.leading(&other) < 60, "a is spared");
    sidecar.post(
        "/v1/sessions/a/tool_start",
        &json!({"tool": "bash", "eta_ms": 60_000}),
    );
    comes_back(&mut engine, &other);
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
