//! Requests on the model: continuous batching over a paged pool with a prefix cache, in vLLM's order of calls.
//!
//! As in vLLM a step gives blocks to running requests first, preempts the last one when there are none, starts waiting
//! ones whose whole prompt fits, publishes blocks in the step that fills them, and computes a request's prompt in chunks;
//! here a chunk ends with its block.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kvstore::{BlockHash, GpuBlock};
use sidecar::engine::frames::CopyClass;
use sidecar::engine::plan::StepPlan;
use sidecar::hooks::{
    GpuPool, Holders, HooksConfig, Match, Prefetch, Published, SchedulerHooks, Step, StepMode,
};

use super::model::{BLOCK, Model, REGIONS, Rows};
use crate::engine::chain;
use crate::pool::SimPool;
use crate::sidecar::until;
use crate::worker::{Loads, Memory, Workers};

/// Requests that run at once.
const RUNNING_MAX: usize = 4;

/// What an engine is.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Its id.
    pub name: String,
    /// The sidecar's engine socket.
    pub socket: PathBuf,
    /// Blocks in its pool.
    pub blocks: u32,
    /// Tensor-parallel ranks.
    pub ranks: u32,
    /// Seed of its weights.
    pub weights: u64,
}

/// One token of an answer.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The weights that chose it.
    pub weights: u64,
    /// Of every token of the vocabulary.
    pub logits: Vec<f32>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It has all of its tokens.
    Complete,
    /// Its client hung up.
    Aborted,
}

/// A request that has ended.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its id.
    pub request: String,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// One per token of the answer.
    pub samples: Vec<Sample>,
    /// How it ended.
    pub end: End,
    /// Blocks that the GPU had when it last started.
    pub local: usize,
    /// Blocks that a demand load then brought in.
    pub loaded: usize,
}

struct Request {
    id: String,
    tokens: Vec<u32>,
    prompt: usize,
    /// Tokens that it asks for.
    wanted: usize,
    /// Of the full blocks of its tokens.
    hashes: Vec<BlockHash>,
    blocks: Vec<GpuBlock>,
    /// Leading tokens whose KV its blocks hold, or will when the load has ended.
    computed: usize,
    /// Full blocks that the hooks know of.
    filled: usize,
    samples: Vec<Sample>,
    local: usize,
    loaded: usize,
    load: Load,
}

/// A request's demand load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    None,
    /// Copies write to its blocks.
    Runs,
    /// What of it is of use has been published.
    Ended,
}

/// The engine; see the module's text.
pub struct Engine {
    /// The hooks under test.
    pub hooks: SchedulerHooks,
    /// The pool.
    pub pool: SimPool,
    /// The ranks.
    pub workers: Workers,
    /// Requests that have ended, for the test to take.
    pub answers: Vec<Answer>,
    /// How often a running request has lost its blocks to another.
    pub preemptions: usize,
    model: Model,
    weights: u64,
    ranks: u32,
    running: Vec<Request>,
    /// Demand loads write to their blocks, or have: these are ahead of those that wait.
    loading: Vec<Request>,
    waiting: VecDeque<Request>,
    /// Aborted while they were loading: their blocks are free when the load has ended.
    leaving: Vec<Request>,
    requests: usize,
}

impl Engine {
    /// Starts one; the connection to the sidecar is made in the background.
    pub fn start(options: EngineOptions) -> Self {
        let config = HooksConfig {
            socket: options.socket,
            engine: options.name,
            rank_bytes: Model::rank_bytes(options.ranks) as u64,
            ranks: options.ranks,
            block_tokens: BLOCK as u32,
            gpu_blocks: options.blocks,
            lookup_wait: Duration::from_secs(5),
            hold_ratio: 0.3,
            prefetch: Prefetch::On,
        };
        let workers = Workers::start(&config, REGIONS);
        let mut hooks = SchedulerHooks::connect(config, Box::new(|| {})).unwrap();
        hooks.open_namespace(&options.weights.to_le_bytes());
        Self {
            hooks,
            pool: SimPool::new(options.blocks),
            workers,
            answers: Vec::new(),
            preemptions: 0,
            model: Model::new(options.weights, options.ranks),
            weights: options.weights,
            ranks: options.ranks,
            running: Vec::new(),
            loading: Vec::new(),
            waiting: VecDeque::new(),
            leaving: Vec::new(),
            requests: 0,
        }
    }

    /// Steps until a sidecar is connected and every rank has its arena.
    pub fn until_ready(&mut self) {
        until("the engine is ready", || {
            self.step();
            self.hooks.figures().ready
        });
    }

    // Requests

    /// A request of `session` for `wanted` tokens after `tokens`; its id.
    pub fn add(&mut self, session: Option<&str>, tokens: &[u32], wanted: usize) -> String {
        assert!(!tokens.is_empty() && wanted > 0);
        assert!(
            blocks_of(tokens.len() + wanted) <= self.pool.total(),
            "a request must fit the pool"
        );
        self.requests += 1;
        let id = format!("request-{}", self.requests);
        let hashes = hashes(tokens);
        self.hooks
            .turn_started(&id, session, &hashes, Instant::now());
        self.waiting.push_back(Request {
            id: id.clone(),
            tokens: tokens.to_vec(),
            prompt: tokens.len(),
            wanted,
            hashes,
            blocks: Vec::new(),
            computed: 0,
            filled: 0,
            samples: Vec::new(),
            local: 0,
            loaded: 0,
            load: Load::None,
        });
        id
    }

    /// The client of a request hangs up.
    pub fn abort(&mut self, id: &str) {
        let is_it = |request: &Request| request.id == id;
        let mut request = if let Some(at) = self.waiting.iter().position(is_it) {
            self.waiting.remove(at).unwrap()
        } else if let Some(at) = self.running.iter().position(is_it) {
            self.running.remove(at)
        } else {
            let at = self.loading.iter().position(is_it);
            self.loading.remove(at.expect("the request has not ended"))
        };
        let load_runs = request.load == Load::Runs;
        self.end(&mut request, End::Aborted);
        if load_runs {
            self.leaving.push(request);
        } else {
            self.free(&mut request);
        }
    }

    /// Whether requests run, load or wait, aborted ones included whose load has not ended.
    pub fn has_requests(&self) -> bool {
        self.running.len() + self.loading.len() + self.waiting.len() + self.leaving.len() > 0
    }

    /// Whether a request is being loaded.
    pub fn is_loading(&self) -> bool {
        self.loading
            .iter()
            .any(|request| request.load == Load::Runs)
    }

    /// Tokens that requests which have not ended have been given.
    pub fn sampled(&self) -> usize {
        let requests = self.running.iter().chain(&self.loading);
        let requests = requests.chain(&self.waiting);
        requests.map(|request| request.samples.len()).sum()
    }

    /// Leading blocks of a sequence that the pool has.
    pub fn resident(&self, tokens: &[u32]) -> Vec<GpuBlock> {
        let found = self.pool.lookup(&hashes(tokens));
        found.into_iter().map_while(|block| block).collect()
    }

    /// Steps until every request has ended.
    pub fn run(&mut self) {
        until("all requests have ended", || {
            self.step();
            !self.has_requests()
        });
    }

    /// Steps until nothing is in flight and nothing is due.
    pub fn settle(&mut self) {
        until("copies have settled", || {
            self.step();
            !self.has_requests() && !self.hooks.pending(false)
        });
    }

    /// One request alone, to its end.
    pub fn turn(&mut self, session: Option<&str>, tokens: &[u32], wanted: usize) -> Answer {
        assert!(!self.has_requests() && self.answers.is_empty());
        self.add(session, tokens, wanted);
        self.run();
        self.answers.pop().unwrap()
    }

    fn end(&mut self, request: &mut Request, end: End) {
        let full = request.computed / BLOCK;
        self.hooks
            .turn_ended(&request.id, &request.hashes[..full], Instant::now());
        self.answers.push(Answer {
            request: request.id.clone(),
            tokens: request.tokens.clone(),
            prompt: request.prompt,
            samples: std::mem::take(&mut request.samples),
            end,
            local: request.local,
            loaded: request.loaded,
        });
    }

    fn free(&mut self, request: &mut Request) {
        request.blocks.reverse();
        self.pool.release(&request.blocks);
        request.blocks.clear();
    }

    // Weights and resets

    /// New weights are in place; what the caches hold is of the old ones until [`Self::reset`].
    pub fn change_weights(&mut self, seed: u64) {
        self.model = Model::new(seed, self.ranks);
        self.weights = seed;
    }

    /// Empties the prefix cache, and Greenroom's with it. Running requests start over. False, and nothing is reset, while
    /// copies or loads hold blocks: ask again.
    pub fn reset(&mut self) -> bool {
        while !self.running.is_empty() {
            self.preempt_last();
        }
        let done = self.pool.reset();
        if done {
            self.hooks.reset();
        }
        done
    }

    fn preempt_last(&mut self) {
        let mut request = self.running.pop().unwrap();
        self.free(&mut request);
        (request.computed, request.filled, request.load) = (0, 0, Load::None);
        self.waiting.push_front(request);
    }

    // Steps

    /// One step.
    ///
    /// # Panics
    /// If the pool's books are wrong, or a fetch took what requests need.
    pub fn step(&mut self) {
        self.advance();
        self.pool.check();
    }

    /// A step without the look at all of the pool's books.
    pub(super) fn advance(&mut self) {
        let ends = self.schedule();
        for request in &mut self.running {
            let full = request.computed / BLOCK;
            if full > request.filled {
                let new = &request.hashes[request.filled..full];
                self.hooks.blocks_filled(&request.id, full, new);
                request.filled = full;
            }
        }
        let mode = if self.has_requests() {
            StepMode::Busy
        } else {
            StepMode::Idle
        };
        let step = Step {
            reserve: self.reserve(&ends),
            handed_out: self.pool.take_handed_out(),
            mode,
        };
        let plan = self.hooks.plan(step, &mut self.pool, Instant::now());
        let plan = plan
            .map(|bytes| StepPlan::decode(&bytes).unwrap())
            .unwrap_or_default();
        let fetches = |plan: &StepPlan| plan.loads.iter().any(|j| j.kind == CopyClass::Prefetch);
        assert!(
            !fetches(&plan) || self.pool.free() >= step.reserve,
            "a fetch leaves {} blocks and requests need {}",
            self.pool.free(),
            step.reserve
        );
        self.workers.begin(&plan);
        self.compute(&ends);
        self.workers.end();
        self.end_complete();
        let loads = self.workers.collect(&mut self.hooks, &mut self.pool);
        self.take_loads(&loads);
    }

    /// Gives blocks to what runs and starts what waits. Returns, for the first running requests, the position up to which
    /// each computes; the others pause.
    fn schedule(&mut self) -> Vec<usize> {
        let (mut ends, before) = (Vec::new(), self.preemptions);
        while ends.len() < self.running.len() {
            if !self.make_room(ends.len()) {
                return ends;
            }
            ends.push(self.allocate(ends.len()));
        }
        if self.preemptions == before {
            self.start_loaded(&mut ends);
            self.start_waiting(&mut ends);
        }
        ends
    }

    /// Preempts others, the last first, until a running request can have a block; false if it has to pause.
    fn make_room(&mut self, at: usize) -> bool {
        while at < self.running.len() {
            let request = &self.running[at];
            if request.blocks.len() > request.computed / BLOCK || self.pool.free() > 0 {
                return true;
            }
            if self.hooks.holds_references() {
                return false;
            }
            self.preempt_last();
            self.preemptions += 1;
        }
        false
    }

    /// A block for a running request, if it needs one; published if this step fills it. Returns where the step ends.
    fn allocate(&mut self, at: usize) -> usize {
        let request = &mut self.running[at];
        let block = request.computed / BLOCK;
        if request.blocks.len() == block {
            let taken = self.pool.take_to_compute(1);
            request.blocks.extend(taken.unwrap());
        }
        let end = request.tokens.len().min((block + 1) * BLOCK);
        if end.is_multiple_of(BLOCK) {
            publish(&mut self.pool, request, block..block + 1);
        }
        end
    }

    fn start_loaded(&mut self, ends: &mut Vec<usize>) {
        let mut at = 0;
        while at < self.loading.len() && self.running.len() < RUNNING_MAX {
            let request = &self.loading[at];
            let missing = blocks_of(request.tokens.len()) - request.blocks.len();
            if request.load == Load::Runs || missing > self.pool.free() {
                at += 1;
                continue;
            }
            let request = self.loading.remove(at);
            self.start_running(request, ends);
        }
    }

    fn start_waiting(&mut self, ends: &mut Vec<usize>) {
        let mut at = 0;
        while at < self.waiting.len() && self.running.len() < RUNNING_MAX {
            let request = &self.waiting[at];
            let (id, tokens) = (&request.id, request.tokens.len());
            // The last token is always computed.
            let useful = (tokens - 1) / BLOCK;
            let local = self.pool.leading(&request.hashes[..useful]);
            let hit = match self.hooks.match_prefix(
                id,
                (local, useful),
                Holders::default(),
                Instant::now(),
            ) {
                Match::Hit(blocks) => blocks,
                Match::Miss => 0,
                Match::Pending => {
                    at += 1;
                    continue;
                }
            };
            let resident = self.pool.lookup(&request.hashes[..local]);
            let resident: Vec<GpuBlock> = resident.into_iter().flatten().collect();
            let uses = self.pool.uses(&resident);
            let idle = uses.iter().filter(|u| !u.referenced).count();
            if blocks_of(tokens) - local + idle + self.promised() > self.pool.free() {
                return;
            }
            let mut request = self.waiting.remove(at).unwrap();
            self.pool.reference(&resident);
            request.blocks = resident;
            request.blocks.extend(self.pool.take(hit).unwrap());
            (request.local, request.loaded) = (local, 0);
            request.computed = (local + hit) * BLOCK;
            if hit == 0 {
                self.start_running(request, ends);
            } else {
                self.hooks.swap_in(&request.id, &request.blocks[local..]);
                request.load = Load::Runs;
                self.loading.push(request);
            }
        }
    }

    fn start_running(&mut self, request: Request, ends: &mut Vec<usize>) {
        self.hooks.swap_in(&request.id, &[]);
        self.running.push(request);
        ends.push(self.allocate(self.running.len() - 1));
    }

    /// Blocks that requests which have been started still need for their known tokens.
    fn promised(&self) -> usize {
        let started = self.running.iter().chain(&self.loading);
        started
            .map(|request| blocks_of(request.tokens.len()).saturating_sub(request.blocks.len()))
            .sum()
    }

    /// Blocks that requests need beyond what this step has given them; the connector's `survey` counts the same.
    fn reserve(&self, ends: &[usize]) -> usize {
        let running = self.running.iter().enumerate().map(|(at, request)| {
            let after = ends.get(at).copied().unwrap_or(request.computed);
            blocks_of(request.tokens.len().max(after) + 1) - blocks_of(after)
        });
        let others = self.loading.iter().chain(&self.waiting);
        let others =
            others.map(|request| blocks_of(request.tokens.len() + 1) - blocks_of(request.computed));
        running.chain(others).sum()
    }

    fn compute(&mut self, ends: &[usize]) {
        let memories: Vec<&Memory> = self.workers.iter().map(|worker| &worker.memory).collect();
        for (request, end) in self.running.iter_mut().zip(ends) {
            let rows = Rows {
                tokens: &request.tokens[..*end],
                from: request.computed,
                table: &request.blocks,
            };
            let logits = self.model.compute(rows, &memories);
            request.computed = *end;
            if *end == request.tokens.len() {
                request.tokens.push(greedy(&logits));
                request.hashes = hashes(&request.tokens);
                request.samples.push(Sample {
                    weights: self.weights,
                    logits,
                });
            }
        }
    }

    fn end_complete(&mut self) {
        let complete = |request: &mut Request| request.samples.len() == request.wanted;
        let ended: Vec<Request> = self.running.extract_if(.., complete).collect();
        for mut request in ended {
            self.end(&mut request, End::Complete);
            self.free(&mut request);
        }
    }

    fn take_loads(&mut self, loads: &Loads) {
        for request in &mut self.loading {
            let invalid = |block: &GpuBlock| loads.invalid.contains(block);
            if let Some(at) = request.blocks.iter().position(invalid) {
                request.computed = request.computed.min(at * BLOCK);
            }
            if loads.ended.contains(&request.id) {
                request.load = Load::Ended;
                let good = request.computed / BLOCK;
                request.loaded = good - request.local;
                publish(&mut self.pool, request, request.local..good);
            }
        }
        let gone = |request: &mut Request| loads.ended.contains(&request.id);
        let gone: Vec<Request> = self.leaving.extract_if(.., gone).collect();
        for mut request in gone {
            self.free(&mut request);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.hooks.close();
    }
}

fn blocks_of(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK)
}

/// Of the full blocks: each names all tokens up to its end.
fn hashes(tokens: &[u32]) -> Vec<BlockHash> {
    let chain = chain(tokens.iter().copied());
    chain.into_iter().skip(BLOCK - 1).step_by(BLOCK).collect()
}

fn publish(pool: &mut SimPool, request: &Request, positions: std::ops::Range<usize>) {
    let entries: Vec<Published> = positions
        .map(|position| Published {
            block: request.blocks[position],
            hash: request.hashes[position],
            position: position as u32,
        })
        .collect();
    pool.publish(&entries);
}

/// The likeliest token, the first of equals.
fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}
