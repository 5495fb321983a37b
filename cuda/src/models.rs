//! The copy thread under interleavings that a scheduler chooses: no call hangs, a fence means it, every job ends once.
//!
//! Shuttle runs each model with thousands of orders of its threads' steps. A wait that nothing would end is a failure of
//! its own ("deadlock!"). A failure prints its schedule, which `shuttle::replay` takes; `GREENROOM_SCHEDULES=n` tries more.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex as Plain, PoisonError};
use std::time::Duration;

use kvstore::{ArenaMap, GpuBlock, SlotId, faults};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread;

use crate::device::DevicePool;
use crate::engine::{
    ArenaId, ComputeMark, CopyBatch, CopyEngine, CopyError, CopyKind, JobId, Poll, Ticket,
};
use crate::jobs::JobEnd;
use crate::ranges::ArenaShard;
use crate::schedule::CopyLimits;
use crate::testkit::{arena, paper_pool};
use crate::thread::{CopyThread, Job};

/// Orders that each of the two schedulers tries of a model.
const SCHEDULES: usize = 4000;
/// How many surprises the second scheduler looks for at once.
const PCT_DEPTH: usize = 3;
/// Bytes of a model's thread: debug builds and panics are deeper than Shuttle's default.
const STACK_BYTES: usize = 512 << 10;
/// A schedule of this many steps goes in circles.
const STEPS_MAX: usize = 100_000;

const BLOCK: u64 = 64;
/// Every job is two sub-batches.
const JOB_BLOCKS: u32 = 2;
const ARENA: ArenaId = ArenaId(1);
const OTHER_ARENA: ArenaId = ArenaId(2);

fn explore(model: impl Fn() + Clone + Send + Sync + 'static) {
    let asked = std::env::var("GREENROOM_SCHEDULES").ok();
    let schedules = asked.map_or(SCHEDULES, |n| n.parse().expect("a number of schedules"));
    let mut config = shuttle::Config::new();
    config.stack_size = STACK_BYTES;
    config.max_steps = shuttle::MaxSteps::FailAfter(STEPS_MAX);
    config.silence_warnings = true;
    config
        .ungraceful_shutdown_config
        .immediately_return_on_panic = true;
    let random = RandomScheduler::new(schedules);
    shuttle::Runner::new(random, config.clone()).run(model.clone());
    let pct = PctScheduler::new(PCT_DEPTH, schedules);
    shuttle::Runner::new(pct, config).run(model);
}

/// Fault points belong to the process: under `cargo test` the tests take turns.
static TURN: Plain<()> = Plain::new(());

/// The model holds in every order that was tried.
fn holds(model: impl Fn() + Clone + Send + Sync + 'static) {
    let _turn = TURN.lock();
    explore(model);
}

/// The model fails in some order when the code is broken at this point.
fn is_caught(point: &str, model: impl Fn() + Clone + Send + Sync + 'static) {
    let _turn = TURN.lock();
    faults::arm(point, "return").expect("a fault point");
    let found = catch_unwind(AssertUnwindSafe(|| explore(model))).is_err();
    faults::arm(point, "off").expect("a fault point");
    assert!(found, "{point} went unnoticed");
}

/// How the engine goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    Never,
    AtSubmit(u64),
    AtPoll(u64),
}

/// What the engine is doing, seen from outside. Plain locks: looking is no step of the model.
#[derive(Clone, Default)]
struct Seen(Arc<Plain<Engine>>);

#[derive(Default)]
struct Engine {
    /// Ticket, arena and job of each batch whose bytes may move, and how often it is polled before it has ended.
    moving: Vec<(Ticket, ArenaId, JobId, u64)>,
    fenced: HashSet<JobId>,
    tickets: u64,
    polls: u64,
    attached: HashSet<ArenaId>,
    dropped: bool,
}

impl Seen {
    fn with<T>(&self, look: impl FnOnce(&mut Engine) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on no byte of these jobs may move.
    fn fenced(&self, jobs: &[JobId]) {
        self.with(|engine| {
            let at_work = engine
                .moving
                .iter()
                .any(|(_, _, job, _)| jobs.contains(job));
            assert!(!at_work, "a fence returned while a copy was running");
            engine.fenced.extend(jobs);
        });
    }
}

/// An engine whose batches end at their first or second poll.
struct Modelled {
    seen: Seen,
    death: Death,
}

impl CopyEngine for Modelled {
    fn name(&self) -> &'static str {
        "modelled"
    }

    fn attach(&mut self, id: ArenaId, _: &Arc<ArenaMap>) -> Result<(), CopyError> {
        self.seen.with(|engine| engine.attached.insert(id));
        Ok(())
    }

    fn detach(&mut self, id: ArenaId) {
        self.seen.with(|engine| {
            let in_use = engine.moving.iter().any(|(_, arena, _, _)| *arena == id);
            assert!(!in_use, "an arena was let go under a copy");
            assert!(engine.attached.remove(&id), "let go twice");
        });
    }

    fn submit(&mut self, batch: &CopyBatch) -> Result<Ticket, CopyError> {
        self.seen.with(|engine| {
            engine.tickets += 1;
            if self.death == Death::AtSubmit(engine.tickets) {
                return Err(CopyError::EngineDead);
            }
            assert!(engine.attached.contains(&batch.arena), "no such arena");
            let job = JobId(batch.ranges[0].arena_offset / (BLOCK * u64::from(JOB_BLOCKS)));
            assert!(!engine.fenced.contains(&job), "a fenced job was started");
            let ticket = Ticket(engine.tickets);
            let polls = engine.tickets % 2;
            engine.moving.push((ticket, batch.arena, job, polls));
            Ok(ticket)
        })
    }

    fn poll(&mut self, ticket: Ticket) -> Poll {
        // A copy takes its time: others go on meanwhile.
        thread::yield_now();
        self.seen.with(|engine| {
            engine.polls += 1;
            if self.death == Death::AtPoll(engine.polls) {
                return Poll::Failed(CopyError::EngineDead);
            }
            let found = engine.moving.iter().position(|(id, ..)| *id == ticket);
            let position = found.expect("polled until it has ended");
            if engine.moving[position].3 > 0 {
                engine.moving[position].3 -= 1;
                return Poll::Pending;
            }
            engine.moving.remove(position);
            Poll::Done
        })
    }
}

impl Drop for Modelled {
    fn drop(&mut self) {
        thread::yield_now();
        self.seen.with(|engine| {
            engine.moving.clear();
            engine.dropped = true;
        });
    }
}

/// Memory that nothing is copied to, mapped once for all schedules.
#[derive(Clone)]
struct Memory {
    pool: Arc<DevicePool>,
    map: Arc<ArenaMap>,
}

impl Memory {
    fn new() -> Self {
        Self {
            pool: Arc::new(paper_pool(&[(4096, BLOCK, BLOCK)], 64)),
            map: arena(64 * BLOCK),
        }
    }

    fn shard(&self) -> ArenaShard {
        ArenaShard {
            map: Arc::clone(&self.map),
            slot_bytes: BLOCK,
            rank_offset: 0,
        }
    }

    fn copies(&self, death: Death) -> Copies {
        let seen = Seen::default();
        let engine = Modelled {
            seen: seen.clone(),
            death,
        };
        let limits = CopyLimits {
            sub_batch_bytes: BLOCK,
            // Never or always: a model has no time.
            save_every: Duration::ZERO,
            ..CopyLimits::default()
        };
        let thread = CopyThread::spawn(Box::new(engine), Arc::clone(&self.pool), limits);
        let copies = Copies {
            thread: Arc::new(thread.expect("it starts")),
            seen,
        };
        let attached = copies.thread.attach(ARENA, self.shard());
        attached.expect("attached");
        copies
    }
}

#[derive(Clone)]
struct Copies {
    thread: Arc<CopyThread>,
    seen: Seen,
}

impl Copies {
    fn submit(&self, id: u64, kind: CopyKind, arena: ArenaId) -> Result<(), CopyError> {
        let first = u32::try_from(id).expect("few jobs") * JOB_BLOCKS;
        let pairs = (first..first + JOB_BLOCKS).map(|n| (SlotId(n), GpuBlock(n)));
        let job = Job {
            id: JobId(id),
            kind,
            arena,
            pairs: pairs.collect(),
        };
        self.thread.submit(job, ComputeMark::NONE)
    }

    fn accepted(&self, id: u64, kind: CopyKind) {
        self.submit(id, kind, ARENA).expect("accepted");
    }

    fn fence(&self, id: u64) {
        self.thread.fence(&[JobId(id)]);
        self.seen.fenced(&[JobId(id)]);
    }

    /// Lets go of the last handle: the thread ends, and the engine before it.
    fn shut_down(self) {
        let Self { thread, seen } = self;
        assert_eq!(Arc::strong_count(&thread), 1);
        drop(thread);
        seen.with(|engine| assert!(engine.dropped && engine.moving.is_empty()));
    }
}

fn ids(ends: &[JobEnd]) -> Vec<u64> {
    let mut ids: Vec<u64> = ends.iter().map(|end| end.id.0).collect();
    ids.sort_unstable();
    ids
}

fn fencing(memory: &Memory) {
    let copies = memory.copies(Death::Never);
    let fencing = thread::spawn({
        let copies = copies.clone();
        move || {
            copies.accepted(0, CopyKind::Demand);
            copies.accepted(1, CopyKind::Save);
            copies.fence(0);
            copies.fence(1);
            copies.thread.take_finished()
        }
    });
    let other = thread::spawn({
        let copies = copies.clone();
        move || {
            copies.accepted(2, CopyKind::Prefetch);
            copies.thread.cancel(&[JobId(2)]);
            copies.accepted(3, CopyKind::Save);
            copies.thread.take_finished()
        }
    });
    copies.thread.wait_idle();
    let mut ends = copies.thread.take_finished();
    for thread in [fencing, other] {
        ends.extend(thread.join().expect("no panic"));
    }
    copies.thread.wait_idle();
    ends.extend(copies.thread.take_finished());
    assert_eq!(ids(&ends), [0, 1, 2, 3]);
    copies.shut_down();
}

/// Whoever lets go last ends the thread, whatever the jobs are doing.
fn shutting_down(memory: &Memory) {
    let copies = memory.copies(Death::Never);
    let threads = [CopyKind::Demand, CopyKind::Save].map(|kind| {
        let copies = copies.clone();
        thread::spawn(move || {
            // Refused if the arena is let go already.
            let accepted = copies.submit(kind as u64, kind, ARENA);
            assert!(matches!(
                accepted,
                Ok(()) | Err(CopyError::UnknownArena(ARENA))
            ));
            copies.thread.cancel(&[JobId(CopyKind::Demand as u64)]);
        })
    });
    copies.thread.detach(ARENA);
    let Copies { thread, seen } = copies;
    drop(thread);
    for thread in threads {
        thread.join().expect("no panic");
    }
    seen.with(|engine| assert!(engine.dropped && engine.moving.is_empty()));
}

fn dying(memory: &Memory, death: Death) {
    let copies = memory.copies(death);
    let callers = [
        (0, CopyKind::Demand, OTHER_ARENA),
        (1, CopyKind::Save, ArenaId(3)),
    ];
    let threads = callers.map(|(id, kind, new)| {
        let (copies, memory) = (copies.clone(), memory.clone());
        thread::spawn(move || {
            let accepted = copies.submit(id, kind, ARENA);
            let attached = copies.thread.attach(new, memory.shard());
            copies.fence(id);
            for answer in [&accepted, &attached] {
                assert!(matches!(answer, Ok(()) | Err(CopyError::EngineDead)));
            }
            accepted.is_ok().then_some(id)
        })
    });
    copies.thread.wait_idle();
    let threads = threads.map(|thread| thread.join().expect("no panic"));
    let accepted: Vec<u64> = threads.into_iter().flatten().collect();
    assert_eq!(ids(&copies.thread.take_finished()), accepted);
    if copies.thread.is_dead() {
        let refused = copies.submit(9, CopyKind::Demand, ARENA);
        assert_eq!(refused, Err(CopyError::EngineDead));
    }
    copies.shut_down();
}

fn changing_arenas(memory: &Memory) {
    let copies = memory.copies(Death::Never);
    let changing = thread::spawn({
        let (copies, memory) = (copies.clone(), memory.clone());
        move || {
            let attach = || copies.thread.attach(OTHER_ARENA, memory.shard());
            assert_eq!(attach(), Ok(()));
            let accepted = copies.submit(0, CopyKind::Save, OTHER_ARENA);
            assert_eq!(accepted, Ok(()));
            copies.thread.detach(OTHER_ARENA);
            let refused = copies.submit(1, CopyKind::Save, OTHER_ARENA);
            assert_eq!(refused, Err(CopyError::UnknownArena(OTHER_ARENA)));
            // Not let go yet is `Busy`, and that ends.
            while attach() == Err(CopyError::Busy) {
                thread::yield_now();
            }
            assert_eq!(attach(), Err(CopyError::AlreadyAttached(OTHER_ARENA)));
            // Letting go needs no other call.
            copies.thread.detach(OTHER_ARENA);
            while copies
                .seen
                .with(|engine| engine.attached.contains(&OTHER_ARENA))
            {
                thread::yield_now();
            }
        }
    });
    copies.accepted(2, CopyKind::Demand);
    copies.fence(2);
    changing.join().expect("no panic");
    copies.thread.wait_idle();
    assert_eq!(ids(&copies.thread.take_finished()), [0, 2]);
    copies.shut_down();
}

#[test]
fn a_fence_means_it_and_every_job_ends_once() {
    let memory = Memory::new();
    holds(move || fencing(&memory));
}

#[test]
fn the_last_handle_ends_the_thread() {
    let memory = Memory::new();
    holds(move || shutting_down(&memory));
}

#[test]
fn nobody_hangs_on_a_dying_engine() {
    for death in [
        Death::AtSubmit(1),
        Death::AtSubmit(3),
        Death::AtPoll(1),
        Death::AtPoll(4),
    ] {
        let memory = Memory::new();
        holds(move || dying(&memory, death));
    }
}

#[test]
fn arenas_come_and_go_between_copies() {
    let memory = Memory::new();
    holds(move || changing_arenas(&memory));
}

#[test]
fn broken_variants_are_caught() {
    for point in [
        "thread::fence::skip_wait",
        "thread::submit::skip_wake",
        "owner::settle::skip_wake",
    ] {
        let memory = Memory::new();
        is_caught(point, move || fencing(&memory));
    }
}
