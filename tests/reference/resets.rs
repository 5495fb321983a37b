//! New weights: what was computed with the old ones is never read again, wherever it is when they change.

use greenroom_tests::sidecar::until;

use crate::rig::Rig;

/// New weights while copies hold blocks: the engine's own cache cannot be reset yet, Greenroom's is. vLLM does the same
/// and tells its client to ask again.
fn change_weights_under_copies(rig: &mut Rig) {
    rig.change_weights();
    assert!(!rig.engine.reset(), "blocks are held");
    rig.engine.hooks.reset();
}

#[test]
fn an_agent_in_the_arena_is_computed_with_the_new_weights() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    rig.reset();
    rig.change_weights();
    let answer = rig.turn(&mut agent, 9, 6);
    assert_eq!((answer.local, answer.loaded), (0, 0));
    rig.goes_on();
}

/// A private namespace is one start's: the next start of the same name has other weights at its first reset.
#[test]
fn what_an_engine_saved_after_its_reset_is_not_found_by_the_next_of_its_name() {
    let mut rig = Rig::new(2);
    rig.reset();
    let mut agent = rig.evicted_agent("a");
    let mut rig = rig.with_another_engine();
    rig.reset();
    rig.change_weights();
    assert_eq!(rig.turn(&mut agent, 9, 6).loaded, 0);
    rig.goes_on();
}

#[test]
fn a_load_in_flight_fails_and_is_computed_with_the_new_weights() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    rig.begin_held_load(&mut agent);
    change_weights_under_copies(&mut rig);
    rig.release();
    let answer = rig.run().pop().unwrap();
    assert_eq!(answer.loaded, 0);
    agent.tokens = answer.tokens;
    rig.reset();
    rig.turn(&mut agent, 9, 6);
    rig.goes_on();
}

#[test]
fn a_fetch_in_flight_is_not_published() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    rig.hold();
    rig.tool(&agent);
    until("the fetch is in flight", || {
        rig.step();
        rig.engine.hooks.copies_in_flight()
    });
    change_weights_under_copies(&mut rig);
    rig.release();
    rig.engine.settle();
    assert_eq!(rig.engine.resident(&agent.tokens), []);
    rig.reset();
    assert_eq!(rig.turn(&mut agent, 9, 6).loaded, 0);
    rig.goes_on();
}

#[test]
fn a_save_in_flight_is_not_read() {
    let mut rig = Rig::new(2);
    rig.hold();
    let mut agent = rig.agent("a");
    until("its save is in flight", || {
        rig.step();
        rig.engine.hooks.copies_in_flight()
    });
    change_weights_under_copies(&mut rig);
    rig.release();
    rig.reset();
    let answer = rig.turn(&mut agent, 9, 6);
    assert_eq!((answer.local, answer.loaded), (0, 0));
    rig.goes_on();
}

/// Requests that run when the weights change go on with the new ones, from their first token on.
#[test]
fn an_answer_that_has_begun_goes_on_with_the_new_weights() {
    let mut rig = Rig::new(2);
    let mut agent = rig.agent("a");
    rig.begin(&mut agent, 9, 30);
    until("a part of the answer is there", || {
        rig.step();
        rig.engine.sampled() == 10
    });
    rig.reset();
    rig.change_weights();
    let answer = rig.run().pop().unwrap();
    let first = answer.samples[0].weights;
    let old = answer.samples.iter().filter(|s| s.weights == first);
    assert!((10..30).contains(&old.count()), "both had a part in it");
    rig.goes_on();
}
