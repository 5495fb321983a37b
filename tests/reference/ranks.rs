//! Two ranks share each slot: it is read when both have written it, and a load is over when both have read.

use greenroom_tests::sidecar::until;

use crate::rig::{Agent, PROMPT, Rig};

/// Steps until the first rank's copies have ended and been reported while the second's are held.
fn until_the_first_rank_is_done(rig: &mut Rig) {
    until("one rank is done and the other is not", || {
        rig.step();
        let [first, second] = [0, 1].map(|rank| rig.engine.workers[rank].in_flight());
        first == 0 && second > 0
    });
    // Its report is taken with the next step.
    rig.step();
}

#[test]
fn a_slot_that_one_rank_has_written_is_not_readable() {
    let mut rig = Rig::new(2);
    rig.engine.workers[1].switch.hold();
    let mut agent = Agent::new("a");
    rig.turn(&mut agent, PROMPT, 6);
    until_the_first_rank_is_done(&mut rig);
    let answer = rig.elsewhere("second", &agent.tokens);
    assert_eq!((answer.loaded, rig.in_arena(&agent)), (0, 0));
    rig.release();
    rig.save(&agent);
    let answer = rig.elsewhere("third", &agent.tokens);
    assert_eq!(answer.loaded, agent.blocks(), "both shards are there");
    rig.goes_on();
}

#[test]
fn a_load_is_over_when_both_ranks_have_read() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    rig.engine.workers[1].switch.hold();
    rig.begin(&mut agent, 9, 6);
    until_the_first_rank_is_done(&mut rig);
    assert!(rig.engine.is_loading());
    rig.release();
    assert!(rig.run()[0].loaded > 0);
    rig.goes_on();
}

#[test]
fn a_fetch_is_published_when_both_ranks_have_read() {
    let mut rig = Rig::new(2);
    let mut agent = rig.evicted_agent("a");
    rig.engine.workers[1].switch.hold();
    rig.tool(&agent);
    until_the_first_rank_is_done(&mut rig);
    assert_eq!(rig.engine.resident(&agent.tokens), []);
    rig.release();
    rig.engine.settle();
    let answer = rig.turn(&mut agent, 9, 6);
    assert!(answer.local > 0);
    rig.goes_on();
}
