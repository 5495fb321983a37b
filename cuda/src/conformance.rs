//! What every copy engine must do, as one suite: [`run_all`] drives an engine that a factory builds, alone and under a
//! [`CopyThread`](crate::CopyThread), and panics with the case and the seed at the first breach.
//!
//! Compiled for tests only (feature `conformance`). Knows nothing of any particular engine.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvstore::{GpuBlock, SlotId, u64_from};

use crate::device::{DevicePool, DeviceRegion};
use crate::engine::{
    ArenaId, ComputeMark, CopyBatch, CopyEngine, CopyError, CopyKind, CopyRange, Direction, JobId,
    Poll, Ticket,
};
use crate::jobs::Outcome;
use crate::schedule::CopyLimits;
use crate::thread::Job;

mod rng;
mod world;

pub(crate) use rng::Rng;
use world::World;
pub use world::{arena, cells};

/// One region of the pool to build, relative to the start of the device memory.
#[derive(Clone, Copy, Debug)]
pub struct RegionShape {
    /// Where block 0 starts.
    pub offset: u64,
    /// Bytes from one block to the next.
    pub block_stride: u64,
    /// Bytes of one block.
    pub block_bytes: u64,
}

/// The pool to build.
#[derive(Clone, Debug)]
pub struct PoolShape {
    /// Bytes of the device memory.
    pub bytes: u64,
    /// Regions inside it.
    pub regions: Vec<RegionShape>,
    /// Blocks of each region.
    pub blocks: u32,
}

impl PoolShape {
    /// Its regions in device memory that begins at `base`.
    pub fn regions_at(&self, base: u64) -> Vec<DeviceRegion> {
        let regions = self.regions.iter().map(|region| DeviceRegion {
            base: base + region.offset,
            block_stride: region.block_stride,
            block_bytes: region.block_bytes,
        });
        regions.collect()
    }
}

/// Builds engines of one sort, each with a pool of its own.
pub trait EngineFactory {
    /// A new engine that has not been started, and what the suite needs to look behind it.
    fn build(&self, shape: &PoolShape) -> Rig;
}

/// An engine under test.
pub struct Rig {
    /// The engine.
    pub engine: Box<dyn CopyEngine>,
    /// The pool it copies for.
    pub pool: Arc<DevicePool>,
    /// The pool's memory, which outlives the engine.
    pub memory: Arc<dyn DeviceMemory>,
    /// The compute work that copies are ordered after.
    pub compute: Box<dyn Compute>,
}

/// The suite's own way to device memory; must not go through the engine.
pub trait DeviceMemory: Send + Sync {
    /// Reads from `offset` on.
    fn read(&self, offset: u64, into: &mut [u8]);
    /// Writes from `offset` on.
    fn write(&self, offset: u64, from: &[u8]);
}

/// Compute work under the suite's control.
pub trait Compute {
    /// Launches work that runs until [`finish`](Self::finish), and marks it.
    fn launch(&self) -> ComputeMark;
    /// Lets everything launched so far end.
    fn finish(&self);
}

/// Runs every case. The same seed gives the same layouts, contents and jobs.
pub fn run_all(factory: &dyn EngineFactory, seed: u64) {
    let cases: [(&str, CaseFn); 8] = [
        ("batches end once, in any order", batches_end_once),
        ("ranges outside are refused", outside_is_refused),
        ("unknown arenas are refused", arenas_come_and_go),
        ("marks hold copies back", marks_hold_back),
        ("dropping the engine ends its copies", dropping_ends_copies),
        ("round trips keep every byte", round_trips),
        ("fenced jobs touch nothing", fences_hold),
        ("dropping the thread ends its copies", dropping_the_thread),
    ];
    for (name, case) in cases {
        case(&mut Case {
            factory,
            name,
            seed,
            rng: Rng::new(seed),
            fenced: Fenced::default(),
        });
    }
}

type CaseFn = fn(&mut Case<'_>);

struct Case<'a> {
    factory: &'a dyn EngineFactory,
    name: &'static str,
    seed: u64,
    rng: Rng,
    fenced: Fenced,
}

/// How jobs ended that were fenced.
#[derive(Clone, Copy, Debug, Default)]
struct Fenced {
    done: u32,
    cancelled: u32,
}

impl Case<'_> {
    #[track_caller]
    fn check(&self, holds: bool, what: &str) {
        assert!(holds, "{}: {what} (seed {})", self.name, self.seed);
    }

    #[track_caller]
    fn submit(&self, engine: &mut dyn CopyEngine, batch: &CopyBatch) -> Ticket {
        match engine.submit(batch) {
            Ok(ticket) => ticket,
            Err(error) => panic!("{}: refused: {error} (seed {})", self.name, self.seed),
        }
    }

    #[track_caller]
    fn ends_well(&self, engine: &mut dyn CopyEngine, ticket: Ticket) {
        loop {
            match engine.poll(ticket) {
                Poll::Pending => std::thread::yield_now(),
                end => return self.check(end == Poll::Done, "the batch ends well"),
            }
        }
    }

    fn world(&mut self) -> World {
        World::new(self.factory, &mut self.rng)
    }
}

const ARENA: ArenaId = ArenaId(7);

fn batches_end_once(case: &mut Case<'_>) {
    for _ in 0..8 {
        let mut world = case.world();
        let mut engine = world.started();
        world.scramble(&mut case.rng);
        // Loads go to even blocks from even slots, saves from odd blocks to odd slots: nothing overlaps.
        let mut tickets = Vec::new();
        for n in 0..world.blocks.min(world.slots) {
            let pair = (SlotId(n), GpuBlock(n));
            let direction = if n % 2 == 0 {
                Direction::HostToDevice
            } else {
                Direction::DeviceToHost
            };
            let batch = world.batch(direction, &[pair]);
            tickets.push(case.submit(engine.as_mut(), &batch));
            world.model(direction, &[pair]);
        }
        let distinct: HashSet<_> = tickets.iter().collect();
        case.check(distinct.len() == tickets.len(), "tickets are never reused");
        while !tickets.is_empty() {
            let ticket = tickets.swap_remove(case.rng.index(tickets.len()));
            case.ends_well(engine.as_mut(), ticket);
        }
        case.check(world.matches(), "exactly the batches' bytes moved");
    }
}

fn outside_is_refused(case: &mut Case<'_>) {
    let mut world = case.world();
    let mut engine = world.started();
    world.scramble(&mut case.rng);
    let good = world.batch(Direction::HostToDevice, &[(SlotId(0), GpuBlock(0))]);
    let first = good.ranges[0];
    let arena_bytes = world.map.bytes();
    let bad = [
        CopyRange {
            arena_offset: arena_bytes - first.bytes + 1,
            ..first
        },
        CopyRange {
            arena_offset: u64::MAX - 1,
            ..first
        },
        CopyRange {
            device: world.device_base() - 1,
            ..first
        },
        CopyRange {
            device: world.device_end() - first.bytes + 1,
            ..first
        },
        CopyRange {
            device: u64::MAX - 1,
            ..first
        },
        CopyRange {
            bytes: u64::MAX,
            ..first
        },
        CopyRange { bytes: 0, ..first },
    ];
    for direction in [Direction::HostToDevice, Direction::DeviceToHost] {
        for range in bad {
            let mut batch = good.clone();
            batch.direction = direction;
            // The good range first: an engine that checks while it enqueues would copy it.
            batch.ranges.push(range);
            let refused = matches!(engine.submit(&batch), Err(CopyError::RangeOutside { .. }));
            case.check(refused, "a range outside is refused");
        }
    }
    let ticket = case.submit(engine.as_mut(), &good);
    case.ends_well(engine.as_mut(), ticket);
    world.model(Direction::HostToDevice, &[(SlotId(0), GpuBlock(0))]);
    case.check(world.matches(), "nothing of a refused batch moved");
}

fn arenas_come_and_go(case: &mut Case<'_>) {
    let mut world = case.world();
    let mut engine = world.started();
    let pair = [(SlotId(0), GpuBlock(0))];
    let batch = world.batch(Direction::HostToDevice, &pair);
    let other = CopyBatch {
        arena: ArenaId(8),
        ..batch.clone()
    };
    let unknown = |id| Err(CopyError::UnknownArena(id));
    case.check(
        engine.submit(&other) == unknown(ArenaId(8)),
        "never attached",
    );
    let again = engine.attach(ARENA, &world.map);
    case.check(
        again == Err(CopyError::AlreadyAttached(ARENA)),
        "attached twice",
    );
    let second = arena(world.map.bytes());
    case.check(engine.attach(ArenaId(8), &second).is_ok(), "a second arena");
    for (id, fill) in [(ARENA, 1), (ArenaId(8), 2)] {
        let map = if id == ARENA { &world.map } else { &second };
        cells(map)
            .iter()
            .for_each(|cell| cell.store(fill, Ordering::Relaxed));
        let batch = CopyBatch {
            arena: id,
            ..batch.clone()
        };
        let ticket = case.submit(engine.as_mut(), &batch);
        case.ends_well(engine.as_mut(), ticket);
        let copied = world.read_device(batch.ranges[0]);
        case.check(
            copied.iter().all(|byte| *byte == fill),
            "from the arena named",
        );
    }
    engine.detach(ArenaId(8));
    engine.detach(ArenaId(9));
    case.check(engine.submit(&other) == unknown(ArenaId(8)), "detached");
    case.check(
        Arc::strong_count(&second) == 1,
        "a detached mapping is let go",
    );
    case.check(engine.attach(ArenaId(8), &second).is_ok(), "attached anew");
}

fn marks_hold_back(case: &mut Case<'_>) {
    for direction in [Direction::HostToDevice, Direction::DeviceToHost] {
        let mut world = case.world();
        let mut engine = world.started();
        world.scramble(&mut case.rng);
        let pair = [(SlotId(1), GpuBlock(2))];
        let mark = world.compute.launch();
        let mut batch = world.batch(direction, &pair);
        batch.after = mark;
        let ticket = case.submit(engine.as_mut(), &batch);
        for _ in 0..100 {
            let waits = engine.poll(ticket) == Poll::Pending;
            case.check(waits, "it waits for its mark");
        }
        case.check(world.matches(), "not a byte moves before the mark");
        // What compute wrote last is what a save must see, and a load must come after. Slots are stable meanwhile.
        world.scramble_device(&mut case.rng);
        world.compute.finish();
        case.ends_well(engine.as_mut(), ticket);
        world.model(direction, &pair);
        case.check(world.matches(), "the bytes are those of the mark");
    }
}

fn dropping_ends_copies(case: &mut Case<'_>) {
    let mut world = case.world();
    let mut engine = world.started();
    let pairs: Vec<_> = (0..world.blocks.min(world.slots))
        .map(|n| (SlotId(n), GpuBlock(n)))
        .collect();
    for pair in pairs.chunks(2) {
        let submitted = engine.submit(&world.batch(Direction::HostToDevice, pair));
        case.check(submitted.is_ok(), "a good batch is accepted");
    }
    drop(engine);
    world.scramble(&mut case.rng);
    case.check(world.matches(), "nothing moves after the drop");
    case.check(
        Arc::strong_count(&world.map) == 2,
        "the engine let go of the mapping",
    );
}

fn round_trips(case: &mut Case<'_>) {
    for _ in 0..24 {
        let mut world = case.world();
        let limits = CopyLimits {
            sub_batch_bytes: 1 + case.rng.below(2 * world.pool.rank_bytes() + 4096),
            outstanding_per_direction: 1 + case.rng.index(3),
            ..CopyLimits::default()
        };
        let thread = world.thread(limits);
        for id in 0..12 {
            world.scramble(&mut case.rng);
            let kind = CopyKind::ALL[case.rng.index(3)];
            let slots = case.rng.shuffled(world.slots);
            let blocks = case.rng.shuffled(world.blocks);
            let count = case.rng.index(slots.len().min(blocks.len()) + 1);
            let mut pairs: Vec<_> = slots
                .into_iter()
                .map(SlotId)
                .zip(blocks.into_iter().map(GpuBlock))
                .take(count)
                .collect();
            if case.rng.below(2) == 0 {
                // Runs of neighbours, the shape that merges.
                pairs = (0..count)
                    .map(|n| {
                        (
                            SlotId(n.try_into().unwrap_or(0)),
                            GpuBlock(n.try_into().unwrap_or(0)),
                        )
                    })
                    .collect();
            }
            let job = Job {
                id: JobId(id),
                kind,
                arena: ARENA,
                pairs,
            };
            case.check(
                thread.submit(job.clone(), ComputeMark::NONE).is_ok(),
                "accepted",
            );
            thread.wait_idle();
            world.model(kind.direction(), &job.pairs);
            case.check(world.matches(), "exactly the job's bytes moved");
            let ends = thread.take_finished();
            let bytes = u64_from(count) * world.pool.rank_bytes();
            let well = ends.len() == 1
                && ends[0].id == job.id
                && ends[0].outcome == Outcome::Done
                && ends[0].bytes == bytes;
            case.check(well, "one end, with all bytes");
        }
    }
}

/// Jobs with destinations of their own, a random part of them fenced half-way and their destinations poisoned at once.
fn fences_hold(case: &mut Case<'_>) {
    for _ in 0..24 {
        let mut world = case.world();
        world.scramble(&mut case.rng);
        let thread = world.thread(CopyLimits {
            sub_batch_bytes: 1 + world.pool.rank_bytes() / (1 + case.rng.below(4)),
            ..CopyLimits::default()
        });
        let jobs = disjoint_jobs(&world, &mut case.rng);
        let mut fenced = HashSet::new();
        for job in &jobs {
            let accepted = thread.submit(job.clone(), ComputeMark::NONE).is_ok();
            case.check(accepted, "accepted");
            if case.rng.below(3) == 0 {
                let victim = &jobs[case.rng.index(jobs.len())];
                if victim.id <= job.id && fenced.insert(victim.id) {
                    thread.fence(&[victim.id]);
                    world.poison(victim);
                }
            }
        }
        thread.wait_idle();
        let mut ends = HashMap::new();
        for end in thread.take_finished() {
            case.check(
                ends.insert(end.id, end.outcome).is_none(),
                "a job ends once",
            );
        }
        case.check(ends.len() == jobs.len(), "every job ends");
        for job in &jobs {
            let outcome = &ends[&job.id];
            let allowed = *outcome == Outcome::Done
                || (*outcome == Outcome::Cancelled && fenced.contains(&job.id));
            case.check(allowed, "only fenced jobs are cancelled");
            if !fenced.contains(&job.id) {
                world.model(job.kind.direction(), &job.pairs);
            } else if *outcome == Outcome::Done {
                case.fenced.done += 1;
            } else {
                case.fenced.cancelled += 1;
            }
        }
        case.check(world.matches(), "poisoned destinations stay poisoned");
    }
}

fn dropping_the_thread(case: &mut Case<'_>) {
    for _ in 0..8 {
        let mut world = case.world();
        let thread = world.thread(CopyLimits {
            sub_batch_bytes: 64,
            ..CopyLimits::default()
        });
        for job in disjoint_jobs(&world, &mut case.rng) {
            case.check(thread.submit(job, ComputeMark::NONE).is_ok(), "accepted");
        }
        drop(thread);
        world.scramble(&mut case.rng);
        case.check(world.matches(), "nothing moves after the drop");
    }
}

/// Loads between even slots and blocks, saves between odd ones, so that the order of jobs does not show in the bytes.
fn disjoint_jobs(world: &World, rng: &mut Rng) -> Vec<Job> {
    let count = world.slots.min(world.blocks);
    let mut blocks = rng.shuffled(count);
    blocks.sort_by_key(|block| block % 2);
    let mut slots = rng.shuffled(count);
    slots.sort_by_key(|slot| slot % 2);
    let pairs: Vec<_> = slots
        .into_iter()
        .map(SlotId)
        .zip(blocks.into_iter().map(GpuBlock))
        .collect();
    let (loads, saves): (Vec<_>, Vec<_>) = pairs.iter().partition(|(slot, _)| slot.0 % 2 == 0);
    let mut jobs = Vec::new();
    for (pairs, kinds) in [
        (loads, [CopyKind::Demand, CopyKind::Prefetch]),
        (saves, [CopyKind::Save, CopyKind::Save]),
    ] {
        for pairs in pairs.chunks(1 + rng.index(4)) {
            jobs.push(Job {
                id: JobId(u64_from(jobs.len())),
                kind: kinds[rng.index(2)],
                arena: ARENA,
                pairs: pairs.to_vec(),
            });
        }
    }
    jobs
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::host::HostSwitch;
    use crate::testkit::{HostFactory, seed};

    #[test]
    fn host_engine_conforms() {
        run_all(&HostFactory::default(), seed());
    }

    #[test]
    fn host_engine_conforms_when_completions_are_turned_around() {
        let factory = HostFactory::default();
        factory.switch.newest_first();
        // Batches polled in any order need the plain engine: everything that runs under the thread is here.
        let seed = seed();
        for case in [round_trips, fences_hold, dropping_the_thread] {
            case(&mut Case {
                factory: &factory,
                name: "turned around",
                seed,
                rng: Rng::new(seed),
                fenced: Fenced::default(),
            });
        }
    }

    /// Each fences some jobs in two dozen worlds.
    const STOP_AND_GO_ROUNDS: u64 = 100;

    /// Copies stop and go at random moments, so that fences meet every state of a job.
    #[test]
    fn fences_hold_while_copies_stop_and_go() {
        let factory = HostFactory::default();
        let seed = seed();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let switch: HostSwitch = factory.switch.clone();
            let over = &over;
            scope.spawn(move || {
                let mut rng = Rng::new(!seed);
                while !over.load(Ordering::Relaxed) {
                    switch.hold();
                    for _ in 0..rng.below(4) {
                        std::thread::yield_now();
                        switch.step();
                    }
                    switch.release();
                    for _ in 0..rng.below(4) {
                        std::thread::yield_now();
                    }
                }
            });
            let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let mut fenced = Fenced::default();
                for round in 0..STOP_AND_GO_ROUNDS {
                    let mut case = Case {
                        factory: &factory,
                        name: "stop and go",
                        seed,
                        rng: Rng::new(seed.wrapping_add(round)),
                        fenced,
                    };
                    fences_hold(&mut case);
                    fenced = case.fenced;
                }
                let both = fenced.done > 100 && fenced.cancelled > 100;
                assert!(both, "fences came always late or always early: {fenced:?}");
            }));
            over.store(true, Ordering::Relaxed);
            if let Err(panic) = end {
                std::panic::resume_unwind(panic);
            }
        });
    }
}
