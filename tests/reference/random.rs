//! Random agents and accidents from one seed. Each round draws from a seed of its own, so that a replay meets the same
//! accidents in the same rounds; how far a copy has come by then is the machine's business.

use std::collections::BTreeMap;

use cuda::Fault;
use greenroom_tests::random::{Random, from_environment, seed};
use greenroom_tests::reference::{Answer, BLOCK, End};
use greenroom_tests::sidecar::until;
use serde_json::json;

use crate::rig::{Agent, MEMORY, Rig};

const TURNS: u64 = 200;
const AGENTS: usize = 10;
/// Requests under way, at most: drawn anew now and then, busy times follow quiet ones.
const AT_ONCE_MAX: usize = 8;
const TIDE_ROUNDS: usize = 50;
/// Tokens after which an agent is done and another comes.
const TOKENS_MAX: usize = 40 * BLOCK;
/// System prompts that several agents begin with, and their tokens.
const SHARED: usize = 3;
const SHARED_TOKENS: usize = 5 * BLOCK + 4;
/// Rounds that a tool, a held copy or a dead sidecar takes, at most.
const ROUNDS_MAX: usize = 30;

/// Rounds from one of these accidents to the next.
const SIDECAR_DIES_EVERY: usize = 311;
const WORKER_DIES_EVERY: usize = 613;
const RESET_EVERY: usize = 457;

/// A run goes on until it has met all of these: it would prove nothing about the others.
const EXPECTED: [&str; 11] = [
    "aborted",
    "complete",
    "failing copy",
    "fetched and used",
    "held copies",
    "loaded",
    "new weights",
    "preempted",
    "reset",
    "sidecar killed",
    "worker killed",
];

struct World {
    rig: Rig,
    seed: u64,
    /// Of this round.
    random: Random,
    agents: Vec<Member>,
    shared: Vec<Vec<u32>>,
    at_once: usize,
    born: usize,
    round: usize,
    /// When copies go on.
    release: Option<usize>,
    /// When the sidecar is there again.
    sidecar_returns: Option<usize>,
    met: BTreeMap<&'static str, u64>,
}

struct Member {
    agent: Agent,
    request: Option<String>,
    /// When its tool ends.
    tool_ends: Option<usize>,
}

impl World {
    fn new(seed: u64, ranks: u32) -> Self {
        let mut this = Self {
            rig: Rig::new(ranks),
            seed,
            random: Random::new(seed),
            agents: Vec::new(),
            shared: Vec::new(),
            at_once: 0,
            born: 0,
            round: 0,
            release: None,
            sidecar_returns: None,
            met: BTreeMap::new(),
        };
        this.shared = (0..SHARED).map(|_| this.rig.words(SHARED_TOKENS)).collect();
        this.agents = (0..AGENTS).map(|_| this.member()).collect();
        this
    }

    fn member(&mut self) -> Member {
        self.born += 1;
        let mut agent = Agent::new(&format!("agent-{}", self.born));
        if !self.random.one_in(3) {
            agent.tokens.clone_from(self.random.pick(&self.shared));
        }
        Member {
            agent,
            request: None,
            tool_ends: None,
        }
    }

    fn meet(&mut self, what: &'static str) {
        *self.met.entry(what).or_default() += 1;
    }

    fn rank(&mut self) -> usize {
        self.random.below(self.rig.engine.workers.iter().count())
    }

    fn soon(&mut self) -> usize {
        self.round + 1 + self.random.below(ROUNDS_MAX)
    }

    /// What is due, perhaps an accident, perhaps a request; then a step.
    fn round(mut self) -> Self {
        self.round += 1;
        let seed = self.seed.wrapping_add(self.round as u64);
        self.random = Random::new(Random::new(seed).number());
        if self.round % TIDE_ROUNDS == 1 {
            self.at_once = 1 + self.random.below(AT_ONCE_MAX);
        }
        self.end_what_is_over();
        if self.random.one_in(60) {
            self.hold();
        }
        if self.random.one_in(60) {
            self.fail_a_copy();
        }
        if self.round.is_multiple_of(SIDECAR_DIES_EVERY) {
            self.kill_the_sidecar();
        }
        if self.round.is_multiple_of(RESET_EVERY) {
            self.reset();
        }
        if self.round.is_multiple_of(WORKER_DIES_EVERY) && self.sidecar_returns.is_none() {
            self = self.kill_a_worker();
        }
        if self.random.one_in(120) {
            self.abort();
        }
        self.begin_a_turn();
        self.rig.step();
        self.take_answers();
        self
    }

    fn end_what_is_over(&mut self) {
        let over = |at: &mut Option<usize>, round| at.take_if(|at| *at <= round).is_some();
        if over(&mut self.release, self.round) {
            self.rig.release();
        }
        if over(&mut self.sidecar_returns, self.round) {
            self.rig.sidecar.restart(MEMORY);
            self.rig.engine.until_ready();
            self.take_answers();
        }
        for member in &mut self.agents {
            if over(&mut member.tool_ends, self.round) {
                let path = format!("/v1/sessions/{}/tool_end", member.agent.name);
                self.rig.sidecar.advise(&path, &json!({}));
            }
        }
    }

    /// Copies of one rank or of all of them are late.
    fn hold(&mut self) {
        self.meet("held copies");
        let (one, all) = (self.rank(), self.random.one_in(2));
        for (rank, worker) in self.rig.engine.workers.iter().enumerate() {
            if all || rank == one {
                worker.switch.hold();
            }
        }
        self.release = Some(self.soon());
    }

    fn fail_a_copy(&mut self) {
        self.meet("failing copy");
        let rank = self.rank();
        let switch = &self.rig.engine.workers[rank].switch;
        switch.inject(Fault::CopyFails, 1);
    }

    fn kill_the_sidecar(&mut self) {
        self.meet("sidecar killed");
        self.rig.sidecar.kill();
        self.sidecar_returns = Some(self.soon());
        self.agents.iter_mut().for_each(|m| m.tool_ends = None);
    }

    fn begin_a_turn(&mut self) {
        let busy = self.agents.iter().filter(|m| m.request.is_some()).count();
        let at = self.random.below(self.agents.len());
        let waits = self.agents[at].request.is_some() || self.agents[at].tool_ends.is_some();
        if busy >= self.at_once || waits || !self.random.one_in(2) {
            return;
        }
        if self.agents[at].agent.tokens.len() > TOKENS_MAX {
            self.agents[at] = self.member();
        }
        let new = 1 + self.random.below(8 * BLOCK);
        let wanted = 1 + self.random.below(4 * BLOCK);
        let member = &mut self.agents[at];
        let request = self.rig.begin(&mut member.agent, new, wanted);
        member.request = Some(request);
    }

    fn abort(&mut self) {
        let busy: Vec<String> = self
            .agents
            .iter()
            .filter_map(|m| m.request.clone())
            .collect();
        if !busy.is_empty() {
            let request = self.random.pick(&busy).clone();
            self.rig.engine.abort(&request);
        }
    }

    /// The prefix cache is reset, perhaps because of new weights.
    fn reset(&mut self) {
        self.rig.release();
        self.rig.reset();
        self.take_answers();
        self.meet("reset");
        // Nothing has been computed since.
        if self.random.one_in(2) {
            self.meet("new weights");
            self.rig.change_weights();
        }
    }

    fn kill_a_worker(mut self) -> Self {
        self.meet("worker killed");
        let rank = self.rank();
        self.rig.engine.workers.kill(rank);
        self.rig.step();
        self.take_answers();
        self.met = self.tally();
        self.rig = self.rig.with_another_engine();
        for member in &mut self.agents {
            member.request = None;
        }
        self
    }

    fn take_answers(&mut self) {
        for answer in std::mem::take(&mut self.rig.engine.answers) {
            self.rig.resident.check(&answer);
            self.take(answer);
        }
    }

    fn take(&mut self, answer: Answer) {
        self.meet(match answer.end {
            End::Complete => "complete",
            End::Aborted => "aborted",
        });
        if answer.loaded > 0 {
            self.meet("loaded");
        }
        let ends = self.soon();
        let tool = self.sidecar_returns.is_none() && !self.random.one_in(3);
        let of = |m: &&mut Member| m.request.as_ref() == Some(&answer.request);
        let member = self.agents.iter_mut().find(of).unwrap();
        member.request = None;
        member.agent.tokens = answer.tokens;
        if tool {
            member.tool_ends = Some(ends);
            let path = format!("/v1/sessions/{}/tool_start", member.agent.name);
            self.rig.sidecar.advise(&path, &json!({"tool": "bash"}));
        }
    }

    /// What has been met so far, with what the engine of now has counted itself.
    fn tally(&self) -> BTreeMap<&'static str, u64> {
        let figures = self.rig.engine.hooks.figures();
        let mut met = self.met.clone();
        for (what, count) in [
            ("fetched and used", figures.prefetch_used),
            ("fenced", figures.fenced),
            ("preempted", self.rig.engine.preemptions as u64),
        ] {
            *met.entry(what).or_default() += count;
        }
        met
    }

    fn has_met_all(&self) -> bool {
        let met = self.tally();
        EXPECTED
            .iter()
            .all(|what| met.get(what).is_some_and(|n| *n > 0))
    }

    fn turns(&self) -> u64 {
        let count = |what| self.met.get(what).copied().unwrap_or_default();
        count("complete") + count("aborted")
    }

    /// Everything ends, and nothing is left.
    fn end(mut self) -> BTreeMap<&'static str, u64> {
        if self.sidecar_returns.is_some() {
            self.rig.sidecar.restart(MEMORY);
        }
        self.rig.release();
        until("all requests have ended", || {
            self.rig.step();
            self.take_answers();
            !self.rig.engine.has_requests()
        });
        self.rig.engine.until_ready();
        self.rig.nothing_is_left();
        self.tally()
    }
}

#[test]
fn on_one_rank_whatever_happens_answers_are_right_and_nothing_is_left() {
    let seed = seed();
    println!("GREENROOM_SEED={seed}");
    println!("{:?}", whatever_happens(seed, 1));
}

#[test]
fn on_two_ranks_whatever_happens_answers_are_right_and_nothing_is_left() {
    let seed = seed();
    println!("GREENROOM_SEED={seed}");
    println!("{:?}", whatever_happens(seed, 2));
}

/// What it was.
fn whatever_happens(seed: u64, ranks: u32) -> BTreeMap<&'static str, u64> {
    let turns = from_environment("GREENROOM_TURNS").unwrap_or(TURNS);
    let mut world = World::new(seed, ranks);
    while world.turns() < turns || !world.has_met_all() {
        world = world.round();
        let long = world.turns() > 10 * TURNS.max(turns);
        assert!(!long, "not all of {EXPECTED:?} met: {:?}", world.tally());
    }
    world.end()
}
