//! Room: what is held, pinned, saved and brought back within it, and what waits for it.

use super::*;

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
fn pins_last_until_an_operator_breaks_them() {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    turn_and_save(&mut engine, &sidecar, "a", &session(40, 1));
    let pinned = || {
        let status = sidecar.get("/v1/status");
        let view = sidecar.get("/v1/sessions/a");
        [
            status["tiers"]["host"]["slots_pinned"].clone(),
            view["blocks"]["pinned"].clone(),
        ]
    };
    assert_eq!(sidecar.hint("kv.pin", "a", "pin")["outcome"], "accepted");
    assert_eq!(pinned(), [40, 40]);
    assert_eq!(sidecar.delete("/v1/pins")["broken_pins"], 1);
    assert_eq!(pinned(), [0, 0]);
    assert_eq!(sidecar.delete("/v1/pins")["broken_pins"], 0);
    assert_eq!(sidecar.hint("kv.unpin", "a", "unpin")["outcome"], "missing");
}

/// Returns when no copy is in flight or asked for.
fn nothing_is_left_to_save(sidecar: &Sidecar, engine: &mut Engine) {
    until("nothing is left to save", || {
        engine.settle();
        let before = engine.hooks.figures().saved_blocks;
        // What was asked for is granted when this returns, and is shipped at once.
        hear(engine);
        engine.settle();
        let status = sidecar.get("/v1/status");
        engine.hooks.figures().saved_blocks == before
            && status["tiers"]["host"]["slots_leased"] == 0
    });
}

/// A request of session "a" that a hit waits for, and its holders: no seat is free.
fn kept_waiting(sidecar: &Sidecar, engine: &mut Engine) -> Holders {
    let mine = session(40, 1);
    turn_and_save(engine, sidecar, "a", &mine);
    evict(engine, &mine);
    nothing_is_left_to_save(sidecar, engine);
    engine
        .hooks
        .turn_started("r", Some("a"), &mine, Instant::now());
    Holders {
        count: 1,
        seats: 1,
        missing: 0,
        growth: 0,
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
        sidecar.metric("greenroom_expired_leases_total") == 1
    });
    assert_eq!(leased(), BLOCKS, "the engine may still copy");
    let found = ask(&mut engine, Holders::default());
    assert_eq!(found, Match::Pending, "it is asked for anew");
    until("another lease is there", || {
        ask(&mut engine, Holders::default()) == Match::Hit(39)
    });
}

#[test]
fn what_was_saved_too_late_is_saved_again() {
    let sidecar = Sidecar::start_with(MEMORY, "lease_ttl = \"1s\"\n");
    let mut engine = Engine::start(&sidecar, "e", 100);
    engine.turn(Some("a"), &session(40, 1));
    let mut shipped = false;
    until("the save is on its way", || {
        engine.step_beside(|plan| {
            shipped = !plan.saves.is_empty();
            if shipped {
                until("its reservation has ended", || {
                    sidecar.metric("greenroom_expired_leases_total") == 1
                });
            }
        });
        shipped
    });
    saved(&mut engine, &sidecar, "a", BLOCKS);
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
    let (sidecar, mut engine, mine) = with_a_saved();
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

/// Of a reserve that stays high, neither saves nor the fetches that wait for them may hang.
#[test]
fn what_is_saved_under_a_high_reserve_is_saved_in_parts() {
    let (sidecar, mut engine, mine) = with_a_saved();
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
fn what_was_saved_in_parts_is_saved_whole_when_there_is_room_again() {
    let sidecar = Sidecar::start(MEMORY);
    // Smaller than what is saved at once elsewhere.
    let mut engine = Engine::start(&sidecar, "e", 100);
    engine.reserve = 98;
    turn_and_save(&mut engine, &sidecar, "a", &session(20, 1));
    engine.reserve = 0;
    engine.turn(Some("b"), &session(40, 2));
    let (mut before, mut most) = (engine.hooks.figures().saved_blocks, 0);
    until("the session is saved", || {
        engine.step();
        let saved = engine.hooks.figures().saved_blocks;
        most = most.max(saved - before);
        before = saved;
        !engine.hooks.pending(false) && saved == 60
    });
    assert!(most >= 20, "at most {most} blocks at once");
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

/// Most blocks of one chunk, where blocks are as small as here.
const CHUNK_BLOCKS: usize = 64;

/// A step, and the blocks of the fetch that it ships: one at most, and none while another is in flight.
fn step_of_fetches(engine: &mut Engine) -> usize {
    let in_flight = engine.hooks.copies_in_flight();
    engine.step();
    let plan = &engine.plan;
    assert!(plan.saves.is_empty(), "what is in flight is a fetch");
    let blocks: Vec<usize> = plan.loads.iter().map(|job| job.pairs.len()).collect();
    let most = usize::from(!in_flight);
    assert!(blocks.len() <= most, "{blocks:?}, in flight: {in_flight}");
    assert!(plan.loads.iter().all(|job| job.kind == CopyClass::Prefetch));
    blocks.into_iter().sum()
}

/// A request that runs finds at most one chunk of a fetch between it and what it needs the link, or the blocks, for: a step
/// ships one fetch at most, of a chunk at most, whoever waits for how much, and none before every rank has reported the end
/// of the one before.
#[test]
fn a_running_request_waits_for_one_chunk_at_most() {
    let sidecar = Sidecar::start("16MiB");
    let options = Options {
        // Other traffic takes the whole pool.
        hold_ratio: 0.0,
        ..Options::default()
    };
    let mut engine = Engine::connect(sidecar.socket(), "e", 2000, options);
    let waiting = [1, 2, 3].map(|id| session(500, id));
    let name = |id: usize| format!("s{id}");
    for (id, chain) in waiting.iter().enumerate() {
        turn_and_save(&mut engine, &sidecar, &name(id), chain);
    }
    engine.flood(7, 2500);
    assert!(waiting.iter().all(|chain| engine.pool.leading(chain) == 0));
    nothing_is_left_to_save(&sidecar, &mut engine);
    let runs = engine.pool.take_to_compute(100).unwrap();
    engine.reserve = 50;
    engine.switch.hold();
    for id in 0..waiting.len() {
        let path = format!("/v1/sessions/{}", name(id));
        sidecar.post(&format!("{path}/tool_start"), &json!({"tool": "bash"}));
        sidecar.post(&format!("{path}/tool_end"), &json!({}));
    }
    let mut fetched = 0;
    until("the first chunk is shipped", || {
        fetched = step_of_fetches(&mut engine);
        fetched > 0
    });
    assert_eq!(fetched, CHUNK_BLOCKS);
    for _ in 0..100 {
        assert_eq!(step_of_fetches(&mut engine), 0, "one is in flight");
    }
    engine.switch.release();
    until("all are back", || {
        let blocks = step_of_fetches(&mut engine);
        assert!(blocks <= CHUNK_BLOCKS, "{blocks} blocks at once");
        fetched += blocks;
        waiting
            .iter()
            .all(|chain| engine.pool.leading(chain) == 500)
    });
    assert_eq!(fetched, 3 * 500);
    engine.pool.release(&runs);
}

#[test]
fn a_session_that_the_arena_has_dropped_is_counted_as_such() {
    let (sidecar, mut engine, _) = with_a_saved();
    let mut seed = 7;
    until("nothing of it is left", || {
        seed += 1;
        engine.flood(seed, 90);
        engine.settle();
        sidecar.get("/v1/sessions/a")["state"] == "dropped"
    });
    let status = sidecar.get("/v1/status");
    let dropped = status["sessions"]["dropped"].as_u64().unwrap();
    assert!(dropped >= 1, "{status}");
    assert_eq!(
        sidecar.metric("greenroom_sessions{state=\"dropped\"}"),
        dropped
    );
}
