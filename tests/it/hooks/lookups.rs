//! What a request asks the sidecar for, and what it need not ask: asking takes a step of the engine.

use super::*;

/// The first answer to a new request with `local` blocks on the GPU; most of its prompt would be of use.
fn first_answer(engine: &mut Engine, prompt: &[kvstore::BlockHash], local: usize) -> Match {
    let hooks = &mut engine.hooks;
    hooks.turn_started("r", Some("r"), prompt, Instant::now());
    let useful = (local, prompt.len());
    let answer = hooks.match_prefix("r", useful, Holders::default(), Instant::now());
    hooks.turn_ended("r", &[], Instant::now());
    answer
}

#[test]
fn a_prompt_that_was_never_seen_is_not_asked_for() {
    let (_sidecar, mut engine, _) = with_a_saved();
    for id in 2..20 {
        let answer = first_answer(&mut engine, &session(40, id), 0);
        assert_eq!(answer, Match::Miss, "session {id}");
    }
}

#[test]
fn an_agent_whose_kv_is_on_the_gpu_is_not_asked_for() {
    let (_sidecar, mut engine, _) = with_a_saved();
    let next = session(60, 1);
    assert_eq!(first_answer(&mut engine, &next, 40), Match::Miss);
}

#[test]
fn what_is_stored_is_asked_for() {
    let (_sidecar, mut engine, mine) = with_a_saved();
    for local in [0, 1, 39] {
        // The answer may be there already; it is no miss in any case.
        assert_ne!(
            first_answer(&mut engine, &mine, local),
            Match::Miss,
            "{local}"
        );
    }
}

#[test]
fn what_is_no_longer_stored_is_not_asked_for() {
    let (sidecar, mut engine, mine) = with_a_saved();
    // Its reservation is answered: the sidecar has taken in what came before it.
    turn_and_save(&mut engine, &sidecar, "b", &session(40, 2));
    sidecar.delete("/v1/sessions/a");
    until("the session is freed", || {
        sidecar.get("/v1/status")["tiers"]["host"]["slots_used"] == 40
    });
    assert_eq!(first_answer(&mut engine, &mine, 0), Match::Miss);
}

/// A request that no blocks are free for is looked at again with each step.
#[test]
fn what_is_stored_while_a_request_queues_is_asked_for() {
    let (sidecar, mut engine, _) = with_a_saved();
    let chain = session(40, 2);
    let ask = |engine: &mut Engine| {
        engine.step();
        let useful = (0, chain.len());
        let hooks = &mut engine.hooks;
        hooks.match_prefix("r", useful, Holders::default(), Instant::now())
    };
    let now = Instant::now();
    engine.hooks.turn_started("r", Some("r"), &chain, now);
    until("the request is known", || {
        assert_eq!(ask(&mut engine), Match::Miss);
        engine.hooks.knows_session("r")
    });
    assert_eq!(ask(&mut engine), Match::Miss);
    let mut other = Engine::start(&sidecar, "other", 100);
    turn_and_save(&mut other, &sidecar, "b", &chain);
    until("the other engine's blocks are offered", || {
        ask(&mut engine) == Match::Hit(40)
    });
}
