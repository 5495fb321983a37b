//! Answers after swaps have the bits of answers whose KV never left.

use std::path::PathBuf;

use greenroom_tests::reference::{BLOCK, Engine, EngineOptions};
use greenroom_tests::sidecar::until;

use crate::rig::{Agent, PROMPT, Rig};

/// An engine on its own.
fn alone(ranks: u32) -> Engine {
    Engine::start(EngineOptions {
        name: "alone".to_owned(),
        socket: PathBuf::from("/nonexistent/greenroom.sock"),
        blocks: 64,
        ranks,
        weights: 7,
    })
}

/// What all the other tests stand on: how a token was computed does not show in its logits.
#[test]
fn a_prompt_at_once_and_token_by_token_are_the_same() {
    let prompt: Vec<u32> = (0..3 * BLOCK as u32 + 1).map(|i| i * 29 % 64).collect();
    let answer = alone(2).turn(None, &prompt, 12);
    let mut other = alone(2);
    for end in 1..answer.tokens.len() {
        let one = other.turn(None, &answer.tokens[..end], 1);
        if let Some(at) = end.checked_sub(prompt.len()) {
            assert_eq!(one.samples[0].logits, answer.samples[at].logits, "at {end}");
        }
    }
}

#[test]
fn two_ranks_compute_the_model_of_one() {
    let prompt: Vec<u32> = (0..40).map(|i| i * 13 % 64).collect();
    let (one, two) = (
        alone(1).turn(None, &prompt, 4),
        alone(2).turn(None, &prompt, 4),
    );
    let logits = one.samples[0].logits.iter().zip(&two.samples[0].logits);
    let apart = logits.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-4, "{apart}");
}

/// The comparison sees what it is there to see.
#[test]
fn a_wrong_byte_of_one_rank_is_seen_in_the_answer() {
    let mut rig = Rig::new(2);
    let agent = rig.agent("a");
    let first = rig.engine.resident(&agent.tokens)[0];
    let memory = &rig.engine.workers[1].memory;
    let mut byte = [0];
    memory.read(first, 1, 2, &mut byte);
    memory.write(first, 1, 2, &[!byte[0]]);
    let answer = rig.engine.turn(Some("a"), &agent.tokens, 1);
    assert!(rig.resident.difference(&answer).is_some());
}

#[test]
fn on_one_rank_an_agent_that_comes_and_goes_gets_the_answers_of_one_that_stays() {
    an_agent_comes_and_goes(1);
}

#[test]
fn on_two_ranks_an_agent_that_comes_and_goes_gets_the_answers_of_one_that_stays() {
    an_agent_comes_and_goes(2);
}

fn an_agent_comes_and_goes(ranks: u32) {
    let mut rig = Rig::new(ranks);
    let mut agent = Agent::new("a");
    rig.turn(&mut agent, PROMPT, 6);
    for new in [1, 8, 15, 9] {
        rig.save(&agent);
        rig.evict(&agent);
        let blocks = agent.blocks();
        let answer = rig.turn(&mut agent, new, 5);
        assert_eq!((answer.local, answer.loaded), (0, blocks), "on demand");
        rig.save(&agent);
        rig.evict(&agent);
        let blocks = agent.blocks();
        rig.tool(&agent);
        until("the agent is back", || {
            rig.step();
            rig.engine.resident(&agent.tokens).len() == blocks
        });
        let answer = rig.turn(&mut agent, new, 7);
        assert_eq!((answer.local, answer.loaded), (blocks, 0), "ahead of it");
    }
    let figures = rig.engine.hooks.figures();
    assert!(figures.demand_blocks > 0 && figures.prefetch_used > 0);
    rig.nothing_is_left();
}

#[test]
fn what_is_left_in_the_pool_and_what_is_loaded_fit_together() {
    let mut rig = Rig::new(2);
    let mut agent = rig.agent("a");
    rig.save(&agent);
    let blocks = agent.blocks();
    // The pool gives its blocks away one by one, the last of the agent's first.
    until("a part of the agent is gone", || {
        let others = rig.words(4 * BLOCK);
        rig.engine.turn(None, &others, 1);
        rig.engine.resident(&agent.tokens).len() < blocks
    });
    let left = rig.engine.resident(&agent.tokens).len();
    assert!(left > 0);
    let answer = rig.turn(&mut agent, 9, 6);
    assert_eq!((answer.local, answer.loaded), (left, blocks - left));
    rig.nothing_is_left();
}

/// More requests than the pool can hold to their ends.
#[test]
fn requests_that_lose_their_blocks_in_the_middle_are_answered_the_same() {
    let mut rig = Rig::new(2);
    let mut agents: Vec<Agent> = (0..4).map(|i| Agent::new(&format!("agent-{i}"))).collect();
    for agent in &mut agents {
        rig.begin(agent, 12 * BLOCK, 60);
    }
    let answers = rig.run();
    assert!(rig.engine.preemptions > 0);
    assert!(answers.iter().all(|answer| answer.samples.len() == 60));
    rig.nothing_is_left();
}
