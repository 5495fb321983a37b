//! Copies that are late or fail, processes that die, clients that leave: answers stay right and nothing is lost or kept.

use cuda::Fault;
use greenroom_tests::reference::End;
use greenroom_tests::sidecar::until;

use crate::rig::{Agent, MEMORY, PROMPT, Rig, STRANGERS};

#[test]
fn a_load_that_is_held_delays_its_own_request_only() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    let held = rig.begin_held_load(&mut agent);
    let other = rig.begin(&mut Agent::new("b"), 20, 8);
    until("the other is answered", || {
        rig.step();
        !rig.engine.answers.is_empty()
    });
    assert_eq!(rig.engine.answers[0].request, other);
    assert!(rig.engine.is_loading());
    rig.release();
    let answers = rig.run();
    assert_eq!(answers[1].request, held);
    assert!(answers[1].loaded > 0);
    rig.goes_on();
}

#[test]
fn copies_that_arrive_one_by_one_and_turned_around_change_nothing() {
    let mut rig = Rig::new(2);
    rig.engine.workers[0].switch.newest_first();
    let mut agent = rig.evicted_agent("a");
    rig.begin_held_load(&mut agent);
    until("the load has ended", || {
        rig.engine.workers.iter().for_each(|w| w.switch.step());
        rig.step();
        !rig.engine.is_loading()
    });
    assert!(rig.run()[0].loaded > 0);
    rig.release();
    rig.goes_on();
}

/// Makes the next copy of a rank fail, half done.
fn fail_next(rig: &Rig, rank: usize) {
    rig.engine.workers[rank].switch.inject(Fault::CopyFails, 1);
}

#[test]
fn a_load_that_fails_on_one_rank_is_computed_again() {
    for rank in [0, 1] {
        let mut rig = Rig::new(2);
        let mut agent = rig.evicted_agent("a");
        fail_next(&rig, rank);
        let answer = rig.turn(&mut agent, 9, 6);
        assert_eq!((answer.local, answer.loaded), (0, 0));
        assert_eq!(rig.engine.hooks.figures().failed, 1);
        rig.goes_on();
    }
}

#[test]
fn a_fetch_that_fails_is_not_published() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    fail_next(&rig, 1);
    rig.tool(&agent);
    until("the fetch has failed", || {
        rig.step();
        rig.engine.hooks.figures().failed == 1
    });
    assert_eq!(rig.engine.resident(&agent.tokens), []);
    rig.turn(&mut agent, 9, 6);
    rig.goes_on();
}

#[test]
fn a_save_that_fails_is_never_read() {
    let mut rig = Rig::new(2);
    fail_next(&rig, 1);
    let mut agent = rig.agent("a");
    until("a save has failed", || {
        rig.step();
        rig.engine.hooks.figures().failed == 1
    });
    rig.engine.settle();
    assert!(rig.in_arena(&agent) < agent.blocks());
    rig.evict(&agent);
    rig.turn(&mut agent, 9, 6);
    rig.goes_on();
}

#[test]
fn a_client_that_hangs_up_during_its_load_leaves_nothing() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    let request = rig.begin_held_load(&mut agent);
    rig.engine.abort(&request);
    assert_eq!(rig.engine.answers.pop().unwrap().end, End::Aborted);
    // Its blocks are written to until the load has ended: others must not have them.
    let other = rig.begin(&mut Agent::new("b"), PROMPT, 6);
    until("the other is answered", || {
        rig.step();
        !rig.engine.answers.is_empty()
    });
    rig.release();
    assert_eq!(rig.run()[0].request, other);
    rig.nothing_is_left();
    assert!(rig.turn(&mut agent, 1, 6).loaded > 0);
    rig.goes_on();
}

#[test]
fn a_sidecar_that_dies_during_a_load_and_stays_away_is_not_missed() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    rig.begin_held_load(&mut agent);
    rig.sidecar.kill();
    until("the loss is noticed", || {
        rig.step();
        !rig.engine.hooks.figures().ready
    });
    rig.release();
    agent.tokens = rig.run().pop().unwrap().tokens;
    for _ in 0..STRANGERS {
        rig.stranger();
    }
    let answer = rig.turn(&mut agent, 9, 6);
    assert_eq!((answer.local, answer.loaded), (0, 0), "all is computed");
    rig.sidecar.restart(MEMORY);
    rig.engine.until_ready();
    rig.goes_on();
}

#[test]
fn a_sidecar_that_dies_during_copies_and_is_back_before_they_end_reads_none_of_them() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    rig.begin_held_load(&mut agent);
    let other = rig.begin(&mut Agent::new("b"), PROMPT, 6);
    until("the other is answered, and its save is in flight", || {
        rig.step();
        !rig.engine.answers.is_empty() && rig.engine.workers[0].in_flight() > 1
    });
    rig.sidecar.kill();
    rig.sidecar.restart(MEMORY);
    rig.engine.until_ready();
    rig.release();
    let answers = rig.run();
    assert_eq!(answers.len(), 2);
    assert!(answers.iter().any(|answer| answer.request == other));
    // What another engine finds of them has been saved since.
    for (answer, name) in answers.iter().zip(["second", "third"]) {
        rig.elsewhere(name, &answer.tokens);
    }
    rig.goes_on();
}

/// vLLM ends an engine that has lost a worker; whoever runs it starts another.
#[test]
fn a_worker_that_dies_during_a_save_commits_nothing_and_its_engine_is_replaced() {
    let mut rig = Rig::new(2);
    let before = rig.evicted_agent("before");
    rig.hold();
    let agent = rig.agent("a");
    until("its save is in flight on both ranks", || {
        rig.step();
        rig.engine.workers.iter().all(|w| w.in_flight() > 0)
    });
    rig.engine.workers.kill(1);
    rig.release();
    until("the loss is noticed", || {
        rig.step();
        !rig.engine.hooks.figures().ready && rig.engine.workers[0].in_flight() == 0
    });
    assert_eq!(rig.in_arena(&agent), 0, "one rank has written its half");
    let mut rig = rig.with_another_engine();
    // What was whole is there, what was not is computed.
    for mut agent in [before, agent] {
        let there = rig.in_arena(&agent);
        let answer = rig.turn(&mut agent, 9, 6);
        assert_eq!(answer.loaded > 0, there > 0);
        assert_eq!(agent.name == "before", there > 0);
    }
    rig.goes_on();
}

#[test]
fn a_worker_that_dies_during_a_load_takes_nothing_with_it() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    rig.begin_held_load(&mut agent);
    rig.engine.workers.kill(0);
    rig.release();
    until("the loss is noticed", || {
        rig.step();
        !rig.engine.hooks.figures().ready
    });
    assert!(
        rig.engine.is_loading(),
        "the rank that died reports nothing"
    );
    let mut rig = rig.with_another_engine();
    assert!(rig.turn(&mut agent, 1, 6).loaded > 0);
    rig.goes_on();
}
