//! An engine beside a sidecar, and the resident engine that its answers are held against.

use greenroom_tests::random::Random;
use greenroom_tests::reference::{Answer, BLOCK, Engine, EngineOptions, Resident, VOCABULARY};
use greenroom_tests::sidecar::{Sidecar, until};
use serde_json::json;
use sidecar::hooks::GpuPool;

/// Of the arena.
pub(crate) const MEMORY: &str = "4MiB";
/// Of the engine's pool.
const BLOCKS: u32 = 64;
/// Of an agent's first prompt: more blocks than holds may protect.
pub(crate) const PROMPT: usize = 24 * BLOCK + 3;
/// Agents whose first prompts take the whole pool and more.
pub(crate) const STRANGERS: usize = 4;
/// Seed of the weights that an engine starts with.
const WEIGHTS: u64 = 1;

/// See the module's text.
pub(crate) struct Rig {
    pub(crate) engine: Engine,
    /// More engines of the same weights.
    others: Vec<Engine>,
    pub(crate) sidecar: Sidecar,
    pub(crate) resident: Resident,
    ranks: u32,
    weights: u64,
    strangers: usize,
    random: Random,
}

/// A conversation.
pub(crate) struct Agent {
    pub(crate) name: String,
    pub(crate) tokens: Vec<u32>,
}

impl Agent {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            tokens: Vec::new(),
        }
    }

    /// Full blocks of what has been computed for it: of the last token there are only the logits that chose it.
    pub(crate) fn blocks(&self) -> usize {
        (self.tokens.len() - 1) / BLOCK
    }
}

impl Rig {
    /// Ready to serve.
    pub(crate) fn new(ranks: u32) -> Self {
        let sidecar = Sidecar::start(MEMORY);
        let engine = start(&sidecar, "engine", (ranks, WEIGHTS));
        Self {
            engine,
            others: Vec::new(),
            sidecar,
            resident: Resident::new(ranks),
            ranks,
            weights: WEIGHTS,
            strangers: 0,
            random: Random::new(u64::from(ranks)),
        }
    }

    /// A request at another engine of the same weights, which is new; its answer is right.
    pub(crate) fn elsewhere(&mut self, engine: &str, tokens: &[u32]) -> Answer {
        let mut other = start(&self.sidecar, engine, (self.ranks, self.weights));
        let answer = other.turn(None, tokens, 3);
        self.others.push(other);
        self.resident.check(&answer);
        answer
    }

    /// The engine is gone; another one of its name takes its place.
    pub(crate) fn with_another_engine(self) -> Self {
        // It must have left before its name is free.
        drop(self.engine);
        let engine = start(&self.sidecar, "engine", (self.ranks, self.weights));
        Self { engine, ..self }
    }

    /// Weights that no engine has had. What the caches hold is of the old ones.
    pub(crate) fn change_weights(&mut self) {
        self.weights += 1;
        self.engine.change_weights(self.weights);
    }

    /// The prefix cache is reset as soon as nothing holds its blocks.
    pub(crate) fn reset(&mut self) {
        until("the engine is reset", || {
            let done = self.engine.reset();
            if !done {
                self.step();
            }
            done
        });
    }

    /// So many tokens that nobody has said before.
    pub(crate) fn words(&mut self, count: usize) -> Vec<u32> {
        let word = |_| self.random.below(VOCABULARY) as u32;
        (0..count).map(word).collect()
    }

    /// One step of every engine.
    pub(crate) fn step(&mut self) {
        self.engine.step();
        self.others.iter_mut().for_each(Engine::step);
    }

    /// The agent's next request with `new` tokens, alone, to its end; its answer is right.
    pub(crate) fn turn(&mut self, agent: &mut Agent, new: usize, wanted: usize) -> Answer {
        agent.tokens.extend(self.words(new));
        let answer = self.engine.turn(Some(&agent.name), &agent.tokens, wanted);
        self.resident.check(&answer);
        agent.tokens.clone_from(&answer.tokens);
        answer
    }

    /// An agent that has had its first turn.
    pub(crate) fn agent(&mut self, name: &str) -> Agent {
        let mut agent = Agent::new(name);
        self.turn(&mut agent, PROMPT, 6);
        agent
    }

    /// One that is in the arena and not in the pool.
    pub(crate) fn evicted_agent(&mut self, name: &str) -> Agent {
        let agent = self.agent(name);
        self.save(&agent);
        self.evict(&agent);
        agent
    }

    /// Starts an agent's next request.
    pub(crate) fn begin(&mut self, agent: &mut Agent, new: usize, wanted: usize) -> String {
        agent.tokens.extend(self.words(new));
        self.engine.add(Some(&agent.name), &agent.tokens, wanted)
    }

    /// Starts one, and steps until its load is held.
    pub(crate) fn begin_held_load(&mut self, agent: &mut Agent) -> String {
        self.hold();
        let request = self.begin(agent, 9, 6);
        until("its load is in flight", || {
            self.step();
            self.engine.is_loading()
        });
        request
    }

    /// Lets all requests end; their answers are right.
    pub(crate) fn run(&mut self) -> Vec<Answer> {
        self.engine.run();
        let answers = std::mem::take(&mut self.engine.answers);
        answers
            .iter()
            .for_each(|answer| self.resident.check(answer));
        answers
    }

    /// What the arena has of an agent, in blocks.
    pub(crate) fn in_arena(&self, agent: &Agent) -> usize {
        let view = self.sidecar.find(&format!("/v1/sessions/{}", agent.name));
        view.map_or(0, |view| {
            usize::try_from(view["blocks"]["host"].as_u64().unwrap()).unwrap()
        })
    }

    /// Steps until all of an agent is in the arena.
    pub(crate) fn save(&mut self, agent: &Agent) {
        until("the agent is saved", || {
            self.step();
            self.in_arena(agent) == agent.blocks()
        });
    }

    /// Others come, and nothing of an agent is in the pool any more. What they leave is saved: then no copy is due.
    pub(crate) fn evict(&mut self, agent: &Agent) {
        for _ in 0..STRANGERS {
            let stranger = self.stranger();
            self.save(&stranger);
        }
        assert_eq!(self.engine.resident(&agent.tokens), []);
    }

    /// Somebody who takes a part of the pool, once.
    pub(crate) fn stranger(&mut self) -> Agent {
        self.strangers += 1;
        let mut agent = Agent::new(&format!("stranger-{}", self.strangers));
        let prompt = self.words(PROMPT);
        agent.tokens = self.engine.turn(Some(&agent.name), &prompt, 1).tokens;
        agent
    }

    /// The agent's tool begins and ends.
    pub(crate) fn tool(&self, agent: &Agent) {
        let path = |event| format!("/v1/sessions/{}/{event}", agent.name);
        self.sidecar
            .post(&path("tool_start"), &json!({"tool": "bash"}));
        self.sidecar.post(&path("tool_end"), &json!({}));
    }

    /// From now on no copy of any rank moves.
    pub(crate) fn hold(&self) {
        self.engine.workers.iter().for_each(|w| w.switch.hold());
    }

    /// Copies go on.
    pub(crate) fn release(&self) {
        self.engine.workers.iter().for_each(|w| w.switch.release());
    }

    /// Everything that was taken has been given back: blocks of the pool, slots of the arena.
    pub(crate) fn nothing_is_left(&mut self) {
        self.engine.settle();
        assert_eq!(self.engine.pool.free(), self.engine.pool.total());
        until("no slot is leased or drains", || {
            self.step();
            let host = &self.sidecar.get("/v1/status")["tiers"]["host"];
            host["slots_leased"] == 0 && host["slots_draining"] == 0
        });
    }

    /// The proof that a fault is over: an agent leaves, comes back from the arena with the right answer, on demand and
    /// ahead of its request, and leaves nothing behind.
    pub(crate) fn goes_on(&mut self) {
        let mut agent = self.evicted_agent("afterwards");
        assert!(self.turn(&mut agent, 9, 6).loaded > 0);
        self.save(&agent);
        self.evict(&agent);
        self.tool(&agent);
        let blocks = agent.blocks();
        until("the agent is back", || {
            self.step();
            self.engine.resident(&agent.tokens).len() == blocks
        });
        let answer = self.turn(&mut agent, 9, 6);
        assert_eq!((answer.local, answer.loaded), (blocks, 0));
        self.nothing_is_left();
    }
}

/// An engine that is ready.
fn start(sidecar: &Sidecar, name: &str, (ranks, weights): (u32, u64)) -> Engine {
    let mut engine = Engine::start(EngineOptions {
        name: name.to_owned(),
        socket: sidecar.socket(),
        blocks: BLOCKS,
        ranks,
        weights,
    });
    engine.until_ready();
    engine
}
