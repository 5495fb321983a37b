//! `bench-hooks`: the hooks that an engine's scheduler calls in every step, with 100 sessions waiting.
//!
//! The hooks are connected to a real sidecar in this process over its Unix socket; the pool is the simulated one of the
//! process tests, whose calls cost as much as the blocks that they name. Between two steps a buffer larger than the near
//! caches is read, as an engine's own work would push the hooks' data out. Times are those of single calls: wall clock,
//! and the thread's processor time, which does not count what other processes take. The kinds of traffic take turns, and
//! each figure is the median of its rounds: a shared machine is slow for seconds at a time.
//!
//! `bench-hooks [--json FILE|-] [--seed N] [--rounds N] [--steps N]`

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use greenroom_benches::{Bar, Limit, Options, Random, Result, Samples, judge, round, thread_cpu};
use greenroom_tests::pool::SimPool;
use greenroom_tests::sidecar::{Sidecar, until};
use kvstore::{BlockHash, GpuBlock, u64_from, usize_from};
use serde_json::{Value, json};
use sidecar::engine::client::WorkerLink;
use sidecar::engine::frames::{Hello, Role};
use sidecar::engine::plan::{JobReport, PlannedJob, Report, StepPlan};
use sidecar::hooks::{
    GpuPool, Holders, HooksConfig, Match, Prefetch, Published, SchedulerHooks, Step, StepMode,
};

const SESSIONS: u32 = 100;
/// Blocks that all sessions share (a system prompt), and blocks of each one's own.
const SHARED_BLOCKS: u32 = 64;
const OWN_BLOCKS: u32 = 1000;
/// Blocks of the engine's pool: room for eight of the sessions.
const POOL_BLOCKS: u32 = 8192;
/// Small enough that a job has as many blocks as a job may have.
const RANK_BYTES: u64 = 4096;
/// Never touched, so it costs no memory: slots for the sessions and for what other traffic saves.
const ARENA: &str = "2GiB";
/// Steps from the start of a copy to its report.
const COPY_STEPS: u64 = 2;
/// Other traffic: the blocks that its turn under way fills in a step, those of a whole turn, and how many turns stay.
const TRAFFIC_BLOCKS: usize = 32;
const TRAFFIC_TURN_BLOCKS: u32 = 512;
const TRAFFIC_TURNS: usize = 3;
/// In the prefetch scenario a tool ends every so many steps.
const TOOL_END_STEPS: u64 = 12;
/// So many sessions are called back at a time; then the first of them waits for its next tool.
const CALLED_BACK: usize = 5;
/// Read between steps.
const SWEEP_BYTES: usize = 8 << 20;

fn main() -> Result<()> {
    let options = Options::from_args(&[("rounds", 9), ("steps", 1000)]);
    let mut bench = Bench::start(&options)?;
    bench.sessions_wait()?;
    let stored = bench.stored();
    options.say(&format!(
        "{SESSIONS} sessions wait, {stored} blocks stored; microseconds"
    ));
    options.say(
        "scenario              hook            calls/round  wall p50      p99   cpu p50      p99",
    );
    let mut rows: Vec<Row> = Vec::new();
    for _ in 0..options.number("rounds") {
        for scenario in Scenario::ALL {
            for (hook, times) in bench.run(scenario, options.number("steps")) {
                let same = |row: &&mut Row| row.scenario == scenario && row.hook == hook;
                match rows.iter_mut().find(same) {
                    Some(row) => row.rounds.push(times),
                    None => rows.push(Row {
                        scenario,
                        hook,
                        rounds: vec![times],
                    }),
                }
            }
        }
    }
    rows.sort_by_key(|row| row.scenario);
    for row in &rows {
        options.say(&row.line());
    }
    let bars: Vec<Bar> = rows.iter().flat_map(Row::bars).collect();
    let bars = judge(&options, &bars);
    let rows: Value = rows.iter().map(Row::json).collect();
    options.write(json!({
        "rows": rows,
        "bars": bars,
        "sessions": SESSIONS,
        "stored_blocks": stored,
        "stored_blocks_at_the_end": bench.stored(),
        "pool_blocks": POOL_BLOCKS,
        "chain_blocks": SHARED_BLOCKS + OWN_BLOCKS,
    }))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Scenario {
    /// Steps in which nothing is new.
    Idle,
    /// Other requests take and free blocks: holds are refreshed, residence is looked at again.
    Traffic,
    /// The same, and their blocks are saved.
    SavedTraffic,
    /// The same, and one session after the other is called back.
    Prefetch,
}

impl Scenario {
    const ALL: [Self; 4] = [
        Self::Idle,
        Self::Traffic,
        Self::SavedTraffic,
        Self::Prefetch,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Idle => "nothing new",
            Self::Traffic => "traffic",
            Self::SavedTraffic => "traffic, saved",
            Self::Prefetch => "traffic, prefetches",
        }
    }
}

/// One hook's times in one scenario.
struct Row {
    scenario: Scenario,
    hook: &'static str,
    rounds: Vec<Times>,
}

/// Those of one round, in microseconds.
struct Times {
    wall: Samples,
    cpu: Samples,
    calls: usize,
}

impl Row {
    /// The median of the rounds.
    fn at(&self, clock: fn(&Times) -> &Samples, share: usize) -> f64 {
        let rounds = self
            .rounds
            .iter()
            .map(|times| clock(times).per_mille(share));
        round(Samples::new(rounds.collect()).median())
    }

    fn line(&self) -> String {
        let calls: usize = self.rounds.iter().map(|times| times.calls).sum();
        format!(
            "{:<21} {:<15} {:>11} {:>9.2} {:>8.1} {:>9.2} {:>8.1}",
            self.scenario.name(),
            self.hook,
            calls / self.rounds.len(),
            self.at(|times| &times.wall, 500),
            self.at(|times| &times.wall, 990),
            self.at(|times| &times.cpu, 500),
            self.at(|times| &times.cpu, 990),
        )
    }

    fn bars(&self) -> Vec<Bar> {
        if self.hook != "plan" {
            return Vec::new();
        }
        let bar = |name: &str, share, limit| Bar {
            name: format!("plan, {}, us wall {name}", self.scenario.name()),
            value: self.at(|times| &times.wall, share),
            limit: Limit::AtMost(limit),
        };
        vec![bar("P50", 500, 50.0), bar("P99", 990, 200.0)]
    }

    fn json(&self) -> Value {
        let rounds = self.rounds.iter().map(|times| {
            json!({
                "wall_us": times.wall.json(),
                "cpu_us": times.cpu.json(),
            })
        });
        json!({
            "scenario": self.scenario.name(),
            "hook": self.hook,
            "rounds": rounds.collect::<Value>(),
        })
    }
}

#[derive(Default)]
struct Timer {
    wall: Vec<f64>,
    cpu: Vec<f64>,
}

impl Timer {
    fn time<T>(&mut self, call: impl FnOnce() -> T) -> T {
        let (cpu, wall) = (thread_cpu(), Instant::now());
        let result = call();
        self.wall.push(wall.elapsed().as_secs_f64() * 1e6);
        self.cpu.push((thread_cpu() - cpu).as_secs_f64() * 1e6);
        result
    }

    /// The times of a round, if there was a call.
    fn times(self) -> Option<Times> {
        let calls = self.wall.len();
        (calls > 0).then(|| Times {
            calls,
            wall: Samples::new(self.wall),
            cpu: Samples::new(self.cpu),
        })
    }
}

#[derive(Default)]
struct Timers {
    plan: Timer,
    copies_done: Timer,
    turn_started: Timer,
    turn_ended: Timer,
    match_prefix: Timer,
}

/// A running request: the blocks that it has, of as many as it has hashes.
struct Guest {
    request: Option<String>,
    blocks: Vec<GpuBlock>,
    hashes: Vec<BlockHash>,
}

struct Bench {
    hooks: SchedulerHooks,
    pool: SimPool,
    _worker: WorkerLink,
    sidecar: Sidecar,
    random: Random,
    chains: Vec<Vec<BlockHash>>,
    copies: VecDeque<(u64, JobReport)>,
    guests: VecDeque<Guest>,
    timers: Timers,
    step: u64,
    requests: u64,
    sweep: Vec<u64>,
    /// While steps are timed.
    sweeps: bool,
    /// The next session to be called back, and those that are.
    next: u32,
    called_back: VecDeque<u32>,
}

impl Bench {
    fn start(options: &Options) -> Result<Self> {
        let sidecar = Sidecar::start(ARENA);
        let hello = Hello {
            role: Role::Worker { rank: 0 },
            engine: "bench".to_owned(),
            rank_bytes: RANK_BYTES,
            ranks: 1,
            block_tokens: 16,
            gpu_blocks: POOL_BLOCKS,
        };
        // The arena is mapped and left alone: copies are reported as done without being made.
        let worker = WorkerLink::open(sidecar.socket(), hello, Box::new(|_| Ok(())))?;
        let config = HooksConfig {
            socket: sidecar.socket(),
            engine: "bench".to_owned(),
            rank_bytes: RANK_BYTES,
            ranks: 1,
            block_tokens: 16,
            gpu_blocks: POOL_BLOCKS,
            lookup_wait: Duration::from_secs(5),
            hold_ratio: 0.3,
            prefetch: Prefetch::On,
        };
        let mut hooks = SchedulerHooks::connect(config, Box::new(|| {}))?;
        hooks.open_namespace(b"bench");
        let mut random = Random::new(options.seed);
        let shared = random.chain(SHARED_BLOCKS);
        let chains = (0..SESSIONS)
            .map(|_| [&shared[..], &random.chain(OWN_BLOCKS)].concat())
            .collect();
        let mut bench = Self {
            hooks,
            pool: SimPool::new(POOL_BLOCKS),
            _worker: worker,
            sidecar,
            random,
            chains,
            copies: VecDeque::new(),
            guests: VecDeque::new(),
            timers: Timers::default(),
            step: 0,
            requests: 0,
            sweep: vec![1; SWEEP_BYTES / size_of::<u64>()],
            sweeps: false,
            next: 0,
            called_back: VecDeque::new(),
        };
        until("the engine is ready", || {
            bench.one_step();
            bench.hooks.figures().ready
        });
        Ok(bench)
    }

    /// Every session has a turn, is saved, and waits for a tool.
    fn sessions_wait(&mut self) -> Result<()> {
        for index in 0..SESSIONS {
            self.session_turn(index);
            let own = u64::from(OWN_BLOCKS) * u64::from(index + 1);
            // Slots are granted after the turn is known: until then a tool would be that of the turn before.
            until("the turn's saves are shipped", || {
                self.one_step();
                self.hooks.figures().saved_blocks >= u64::from(SHARED_BLOCKS) + own
            });
            self.tool_starts(index, 600_000 + index * 1000);
        }
        until("every session waits", || {
            self.one_step();
            self.hooks.figures().waiting == u64::from(SESSIONS)
        });
        self.settle();
        Ok(())
    }

    /// The whole turn of a session: what the pool does not have is computed (or would be loaded: the same to the pool).
    fn session_turn(&mut self, index: u32) {
        let chain = self.chains[usize_from(index)].clone();
        self.requests += 1;
        let request = format!("request-{}", self.requests);
        let name = format!("s{index}");
        let started = |hooks: &mut SchedulerHooks| {
            hooks.turn_started(&request, Some(&name), &chain, Instant::now());
        };
        self.timers.turn_started.time(|| started(&mut self.hooks));
        let local = self.pool.leading(&chain);
        until("the lookup is answered", || {
            self.one_step();
            let ask = |hooks: &mut SchedulerHooks| {
                hooks.match_prefix(
                    &request,
                    (local, chain.len() - 1),
                    Holders::default(),
                    Instant::now(),
                )
            };
            self.timers.match_prefix.time(|| ask(&mut self.hooks)) != Match::Pending
        });
        self.hooks.swap_in(&request, &[]);
        let guest = self.admit(Some(request), chain);
        let settled = |this: &mut Self| {
            this.settle();
        };
        settled(self);
        self.leave(guest);
    }

    /// A request gets its blocks and fills them at once.
    fn admit(&mut self, request: Option<String>, hashes: Vec<BlockHash>) -> Guest {
        let local = self.pool.leading(&hashes);
        let found = self.pool.lookup(&hashes[..local]);
        let blocks: Vec<GpuBlock> = found.into_iter().flatten().collect();
        self.pool.reference(&blocks);
        let mut guest = Guest {
            request,
            blocks,
            hashes,
        };
        self.fill(&mut guest, usize::MAX);
        guest
    }

    /// A request fills its next blocks.
    fn fill(&mut self, guest: &mut Guest, blocks_max: usize) {
        let from = guest.blocks.len();
        let filled = guest.hashes.len().min(from.saturating_add(blocks_max));
        let fresh = self.pool.take_to_compute(filled - from).unwrap_or_default();
        assert_eq!(fresh.len(), filled - from, "the pool is large enough");
        let entries = fresh.iter().zip(from..).map(|(block, at)| Published {
            block: *block,
            hash: guest.hashes[at],
            position: u32::try_from(at).unwrap_or(u32::MAX),
        });
        self.pool.publish(&entries.collect::<Vec<_>>());
        guest.blocks.extend(fresh);
        if let Some(request) = &guest.request {
            let new = &guest.hashes[from..filled];
            self.hooks.blocks_filled(request, filled, new);
        }
    }

    fn leave(&mut self, guest: Guest) {
        if let Some(request) = &guest.request {
            let ended = |hooks: &mut SchedulerHooks| {
                hooks.turn_ended(request, &guest.hashes, Instant::now());
            };
            self.timers.turn_ended.time(|| ended(&mut self.hooks));
        }
        let blocks: Vec<GpuBlock> = guest.blocks.into_iter().rev().collect();
        self.pool.release(&blocks);
    }

    /// One engine step: the plan is timed, its copies end some steps later.
    fn one_step(&mut self) {
        self.step += 1;
        self.end_copies();
        if self.sweeps {
            std::hint::black_box(self.sweep.iter().sum::<u64>());
        }
        let running: usize = self.guests.iter().map(|guest| guest.blocks.len()).sum();
        let step = Step {
            // Each request goes on for a while.
            reserve: running / 4,
            handed_out: self.pool.take_handed_out(),
            mode: StepMode::Busy,
        };
        let plan =
            |hooks: &mut SchedulerHooks, pool: &mut SimPool| hooks.plan(step, pool, Instant::now());
        let plan = self
            .timers
            .plan
            .time(|| plan(&mut self.hooks, &mut self.pool));
        let Some(plan) = plan.and_then(|bytes| StepPlan::decode(&bytes).ok()) else {
            return;
        };
        for job in plan.loads.iter().chain(&plan.saves) {
            self.copies.push_back((self.step + COPY_STEPS, done(job)));
        }
    }

    fn end_copies(&mut self) {
        let mut ended = Vec::new();
        while let Some((_, report)) = self.copies.pop_front_if(|(at, _)| *at <= self.step) {
            ended.push(report);
        }
        if ended.is_empty() {
            return;
        }
        let Ok(report) = (Report { rank: 0, ended }).encode() else {
            return;
        };
        let report = |hooks: &mut SchedulerHooks, pool: &mut SimPool| {
            hooks.copies_done(&report, pool, Instant::now())
        };
        let done = self
            .timers
            .copies_done
            .time(|| report(&mut self.hooks, &mut self.pool));
        assert_eq!(done, Ok(Vec::new()), "no request waits for a load");
    }

    /// Steps until nothing is in flight, for a while.
    fn settle(&mut self) {
        let mut quiet = 0;
        until("copies have settled", || {
            self.one_step();
            quiet = if self.hooks.pending(false) {
                0
            } else {
                // What the sidecar has to say comes before this answer.
                self.stored();
                quiet + 1
            };
            quiet > 3
        });
    }

    fn run(&mut self, scenario: Scenario, steps: u64) -> Vec<(&'static str, Times)> {
        self.settle();
        self.timers = Timers::default();
        self.sweeps = true;
        for step in 0..steps {
            if scenario != Scenario::Idle {
                self.traffic(scenario);
            }
            if scenario == Scenario::Prefetch && step % TOOL_END_STEPS == 0 {
                self.call_back();
            }
            self.one_step();
        }
        self.sweeps = false;
        while let Some(index) = self.called_back.pop_front() {
            self.tool_starts(index, 600_000);
        }
        let timers = std::mem::take(&mut self.timers);
        while let Some(guest) = self.guests.pop_front() {
            self.leave(guest);
        }
        let hooks = [
            ("plan", timers.plan),
            ("copies_done", timers.copies_done),
            ("turn_started", timers.turn_started),
            ("turn_ended", timers.turn_ended),
        ];
        let times = hooks.into_iter();
        times
            .filter_map(|(hook, timer)| Some((hook, timer.times()?)))
            .collect()
    }

    /// The turn under way fills blocks; when it has all of its own, the next one comes in and an old one leaves.
    fn traffic(&mut self, scenario: Scenario) {
        let complete = |guest: &Guest| guest.blocks.len() == guest.hashes.len();
        if self.guests.back().is_none_or(complete) {
            let turn = self.traffic_turn(scenario);
            self.guests.push_back(turn);
        }
        if self.guests.len() > TRAFFIC_TURNS
            && let Some(guest) = self.guests.pop_front()
        {
            self.leave(guest);
        }
        if let Some(mut guest) = self.guests.pop_back() {
            self.fill(&mut guest, TRAFFIC_BLOCKS);
            self.guests.push_back(guest);
        }
    }

    fn traffic_turn(&mut self, scenario: Scenario) -> Guest {
        let hashes = self.random.chain(TRAFFIC_TURN_BLOCKS);
        let request = (scenario == Scenario::SavedTraffic).then(|| {
            self.requests += 1;
            let request = format!("request-{}", self.requests);
            let started = |hooks: &mut SchedulerHooks| {
                hooks.turn_started(&request, None, &hashes, Instant::now());
            };
            self.timers.turn_started.time(|| started(&mut self.hooks));
            request
        });
        Guest {
            request,
            blocks: Vec::new(),
            hashes,
        }
    }

    /// One more session's tool has ended.
    fn call_back(&mut self) {
        let index = self.next;
        self.next = (self.next + 7) % SESSIONS;
        self.sidecar
            .post(&format!("/v1/sessions/s{index}/tool_end"), &json!({}));
        self.called_back.push_back(index);
        if self.called_back.len() > CALLED_BACK
            && let Some(index) = self.called_back.pop_front()
        {
            self.tool_starts(index, 600_000);
        }
    }

    fn tool_starts(&self, index: u32, eta_ms: u32) {
        let start = json!({"tool": "bash", "eta_ms": eta_ms});
        self.sidecar
            .post(&format!("/v1/sessions/s{index}/tool_start"), &start);
    }

    /// Blocks in the arena.
    fn stored(&self) -> Value {
        self.sidecar.get("/v1/status")["tiers"]["host"]["slots_used"].clone()
    }
}

fn done(job: &PlannedJob) -> JobReport {
    JobReport {
        id: job.id,
        ok: true,
        bytes: u64_from(job.pairs.len()) * RANK_BYTES,
        micros: 1000,
    }
}
