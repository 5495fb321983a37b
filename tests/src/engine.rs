//! A simulated engine: the scheduler's and one worker's side of Greenroom around a model that only writes checkable bytes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use cuda::HostSwitch;
use kvstore::{BlockHash, GpuBlock};
use sidecar::engine::plan::StepPlan;
use sidecar::hooks::{
    GpuPool, Holders, HooksConfig, Match, Prefetch, Published, SchedulerHooks, Step, StepMode,
};

use crate::pool::SimPool;
use crate::sidecar::{Sidecar, until};
use crate::worker::{Memory, Workers};

/// Regions of the simulated pool (layers), and bytes of a block in each.
const LAYERS: usize = 3;
const LAYER_BYTES: usize = 512;

/// A chain of hashes along a path; equal prefixes of paths give equal prefixes of chains.
pub fn chain(path: impl IntoIterator<Item = u32>) -> Vec<BlockHash> {
    let mut state = [0x9e37_79b9_7f4a_7c15_u64; 4];
    path.into_iter()
        .map(|step| {
            for (i, word) in state.iter_mut().enumerate() {
                *word = (word.rotate_left(13) ^ u64::from(step).wrapping_add(i as u64))
                    .wrapping_mul(0xff51_afd7_ed55_8ccd);
                *word ^= *word >> 29;
            }
            let mut hash = [0; 32];
            for (bytes, word) in hash.chunks_mut(8).zip(state) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            BlockHash(hash)
        })
        .collect()
}

/// The bytes that the model computes for a block in a layer.
fn expected(hash: &BlockHash, layer: usize) -> Vec<u8> {
    hash.0
        .iter()
        .cycle()
        .take(LAYER_BYTES)
        .map(|byte| byte.wrapping_add(layer as u8))
        .collect()
}

/// One simulated engine.
pub struct Engine {
    /// The hooks under test.
    pub hooks: SchedulerHooks,
    /// The engine's pool.
    pub pool: SimPool,
    /// Stops and resumes the copies.
    pub switch: HostSwitch,
    workers: Workers,
    /// The last step's.
    pub plan: StepPlan,
    loaded: Vec<String>,
    invalid: Vec<GpuBlock>,
    requests: u32,
    lookup_wait: Duration,
    /// Blocks that running requests will still need.
    pub reserve: usize,
    /// Whether it is at work.
    pub mode: StepMode,
    /// Blocks that came from the arena, by demand or prefetch, and were checked.
    pub reloaded: usize,
}

fn compute(memory: &Memory, block: GpuBlock, hash: &BlockHash) {
    for layer in 0..LAYERS {
        memory.write(block, layer, 0, &expected(hash, layer));
    }
}

fn holds(memory: &Memory, block: GpuBlock, hash: &BlockHash) -> bool {
    (0..LAYERS).all(|layer| {
        let mut bytes = vec![0; LAYER_BYTES];
        memory.read(block, layer, 0, &mut bytes);
        bytes == expected(hash, layer)
    })
}

/// How an engine differs from the usual one.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// What its namespace is made of.
    pub material: &'a [u8],
    /// Whether waiting sessions are brought back.
    pub prefetch: Prefetch,
    /// How long a request waits for the sidecar's answer.
    pub lookup_wait: Duration,
    /// Whether its cache is reset before its first request.
    pub reset: bool,
    /// Share of the pool that holds may protect.
    pub hold_ratio: f64,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            material: b"weights",
            prefetch: Prefetch::On,
            lookup_wait: Duration::from_secs(5),
            reset: false,
            hold_ratio: 0.3,
        }
    }
}

/// What a turn found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Leading blocks that were on the GPU.
    pub local: usize,
    /// Blocks that a demand load brought in.
    pub loaded: usize,
    /// Blocks that had to be computed.
    pub computed: usize,
}

impl Engine {
    /// An engine with `blocks` GPU blocks, connected to `sidecar` with its arena mapped.
    pub fn start(sidecar: &Sidecar, name: &str, blocks: u32) -> Self {
        Self::start_in(sidecar, name, blocks, b"weights")
    }

    /// As [`Self::start`], for an engine that is told to load on request only.
    pub fn start_without_prefetch(sidecar: &Sidecar, name: &str, blocks: u32) -> Self {
        let options = Options {
            prefetch: Prefetch::Off,
            ..Options::default()
        };
        Self::connect(sidecar.socket(), name, blocks, options)
    }

    /// As [`Self::start`], in the namespace of `material`.
    pub fn start_in(sidecar: &Sidecar, name: &str, blocks: u32, material: &[u8]) -> Self {
        let options = Options {
            material,
            ..Options::default()
        };
        Self::connect(sidecar.socket(), name, blocks, options)
    }

    /// An engine that differs from the usual one, at a sidecar of which only the socket is known.
    pub fn connect(socket: PathBuf, name: &str, blocks: u32, options: Options<'_>) -> Self {
        let config = HooksConfig {
            socket,
            engine: name.to_owned(),
            rank_bytes: (LAYERS * LAYER_BYTES) as u64,
            ranks: 1,
            block_tokens: 16,
            gpu_blocks: blocks,
            lookup_wait: options.lookup_wait,
            hold_ratio: options.hold_ratio,
            prefetch: options.prefetch,
        };
        let workers = Workers::start(&config, LAYERS);
        let mut hooks = SchedulerHooks::connect(config, Box::new(|| {})).unwrap();
        if options.reset {
            hooks.reset();
        }
        hooks.open_namespace(options.material);
        let mut this = Self {
            hooks,
            pool: SimPool::new(blocks),
            switch: workers[0].switch.clone(),
            workers,
            plan: StepPlan::default(),
            loaded: Vec::new(),
            invalid: Vec::new(),
            requests: 0,
            lookup_wait: options.lookup_wait,
            reserve: 0,
            mode: StepMode::Busy,
            reloaded: 0,
        };
        this.until_ready();
        this
    }

    /// Steps until a sidecar is connected and the arena is mapped.
    pub fn until_ready(&mut self) {
        until("the engine is ready", || {
            self.step();
            self.hooks.figures().ready
        });
    }

    /// One engine step: plan, copies, reports. Computes nothing.
    pub fn step(&mut self) {
        self.step_beside(|_| {});
    }

    /// A step that computes for as long as `meanwhile` takes.
    pub fn step_beside(&mut self, meanwhile: impl FnOnce(&StepPlan)) {
        let step = Step {
            reserve: self.reserve,
            handed_out: self.pool.take_handed_out(),
            mode: self.mode,
        };
        let plan = self.hooks.plan(step, &mut self.pool, Instant::now());
        self.plan = plan
            .map(|bytes| StepPlan::decode(&bytes).unwrap())
            .unwrap_or_default();
        self.workers.begin(&self.plan);
        meanwhile(&self.plan);
        self.workers.end();
        let loads = self.workers.collect(&mut self.hooks, &mut self.pool);
        self.loaded.extend(loads.ended);
        self.invalid.extend(loads.invalid);
        self.pool.check();
    }

    /// Steps until nothing is in flight and nothing is due.
    pub fn settle(&mut self) {
        until("copies have settled", || {
            self.step();
            !self.hooks.pending(false)
        });
    }

    /// Steps until the sidecar has answered, as it does within one step of a real engine, or takes too long.
    fn until_answered(&mut self, request: &str) {
        let enqueued = Instant::now();
        until("the sidecar has answered", || {
            self.step();
            self.hooks.knows_session(request)
                || !self.hooks.figures().ready
                || enqueued.elapsed() > self.lookup_wait
        });
    }

    /// Serves one request of `session` whose full blocks are `chain`, and frees its blocks. The last block is always
    /// computed, as a request always computes a token.
    pub fn turn(&mut self, session: Option<&str>, chain: &[BlockHash]) -> Turn {
        self.requests += 1;
        let request = format!("request-{}", self.requests);
        self.hooks
            .turn_started(&request, session, chain, Instant::now());
        self.until_answered(&request);
        let useful = chain.len() - 1;
        let (mut local, mut hit) = (0, 0);
        until("the lookup is answered", || {
            self.step();
            local = self.pool.leading(&chain[..useful]);
            match self.hooks.match_prefix(
                &request,
                (local, useful),
                Holders::default(),
                Instant::now(),
            ) {
                Match::Hit(n) => hit = n,
                Match::Miss => hit = 0,
                Match::Pending => return false,
            }
            true
        });
        let resident: Vec<GpuBlock> = self
            .pool
            .lookup(&chain[..local])
            .into_iter()
            .flatten()
            .collect();
        self.pool.reference(&resident);
        self.verify(&resident, &chain[..local]);
        // As vLLM does: a request waits for blocks that copies hold.
        until("copies leave the request its blocks", || {
            let enough = self.pool.free() >= chain.len() - local;
            if !enough {
                self.step();
            }
            enough
        });
        let mut fresh = self.pool.take(hit).unwrap();
        fresh.extend(
            self.pool
                .take_to_compute(chain.len() - local - hit)
                .unwrap(),
        );
        self.hooks.swap_in(&request, &fresh[..hit]);
        let mut loaded = hit;
        if hit > 0 {
            until("the load has ended", || {
                self.step();
                self.loaded.contains(&request)
            });
            self.loaded.retain(|done| *done != request);
            let bad = fresh[..hit]
                .iter()
                .position(|block| self.invalid.contains(block));
            self.invalid.clear();
            loaded = bad.unwrap_or(hit);
            self.verify(&fresh[..loaded], &chain[local..]);
            self.hooks.swap_in(&request, &[]);
        }
        let blocks = [&resident[..], &fresh[..]].concat();
        for (block, hash) in blocks.iter().zip(chain).skip(local + loaded) {
            compute(&self.workers[0].memory, *block, hash);
        }
        let entries = blocks.iter().zip(chain).enumerate().skip(local);
        let entries: Vec<Published> = entries
            .map(|(i, (block, hash))| Published {
                block: *block,
                hash: *hash,
                position: i as u32,
            })
            .collect();
        self.pool.publish(&entries);
        self.hooks.blocks_filled(&request, chain.len(), chain);
        self.step();
        self.hooks.turn_ended(&request, chain, Instant::now());
        let mut blocks = blocks;
        blocks.reverse();
        self.pool.release(&blocks);
        Turn {
            local,
            loaded,
            computed: chain.len() - local - loaded,
        }
    }

    /// A request that is aborted while its load is in flight; true if there was one.
    pub fn aborted_turn(&mut self, session: &str, chain: &[BlockHash]) -> bool {
        self.requests += 1;
        let request = format!("request-{}", self.requests);
        self.hooks
            .turn_started(&request, Some(session), chain, Instant::now());
        self.until_answered(&request);
        let mut hit = None;
        until("the lookup is answered", || {
            self.step();
            let local = self.pool.leading(chain);
            match self.hooks.match_prefix(
                &request,
                (local, chain.len() - 1),
                Holders::default(),
                Instant::now(),
            ) {
                Match::Pending => return false,
                Match::Hit(n) => hit = Some(n),
                Match::Miss => {}
            }
            true
        });
        let Some(hit) = hit else {
            self.hooks.turn_ended(&request, &[], Instant::now());
            return false;
        };
        let fresh = self.pool.take(hit).unwrap();
        self.hooks.swap_in(&request, &fresh);
        self.hooks.turn_ended(&request, &[], Instant::now());
        // As vLLM does: the blocks of an aborted load are freed when the load has ended.
        until("the aborted load has ended", || {
            self.step();
            self.loaded.contains(&request)
        });
        self.loaded.retain(|done| *done != request);
        self.invalid.clear();
        self.pool.release(&fresh);
        true
    }

    /// Other traffic: requests of unique content until `blocks` blocks have been handed out.
    pub fn flood(&mut self, seed: u32, blocks: usize) {
        let mut handed = 0;
        let mut n = 0;
        while handed < blocks {
            n += 1;
            let turn = self.turn(None, &chain((0..20).map(|i| seed ^ (n << 16) ^ (i + 1))));
            handed += turn.computed + turn.loaded;
        }
    }

    fn verify(&mut self, blocks: &[GpuBlock], chain: &[BlockHash]) {
        for (block, hash) in blocks.iter().zip(chain) {
            assert!(
                holds(&self.workers[0].memory, *block, hash),
                "block {block:?} does not hold the bytes of {hash:?}"
            );
        }
        self.reloaded += blocks.len();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.hooks.close();
    }
}
