//! Copies that come late: what a fence covers is not touched again, wherever its copies were when it came.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cuda::conformance::{DeviceMemory, PoolShape, RegionShape};
use cuda::{
    ArenaId, ArenaShard, ComputeMark, ComputeMarker, CopyKind, CopyLimits, CopyThread, Direction,
    Job, JobId, Outcome,
};
use greenroom_tests::random::{Random, from_environment, seed};
use kvstore::{ArenaMap, GpuBlock, SlotId};

use crate::rig::{Engine, Factory, METHODS, arena, cells, take};

const BLOCK: u64 = 64 << 10;
const BLOCKS: usize = 64;
/// The last ones are the followers'.
const USED: usize = BLOCKS - 4;
const ROUNDS: u64 = 1000;
const POISON: u8 = 0xEE;

/// Rounds in which jobs wait for compute work that ends at a random moment, run, or have run, when some of them are fenced and
/// their destinations poisoned.
#[test]
fn poison_stays_where_a_fence_has_been() {
    let Some((_turn, gpu)) = take() else {
        return;
    };
    let seed = seed();
    println!("GREENROOM_SEED={seed}");
    let mut random = Random::new(seed);
    let rounds = from_environment("GREENROOM_ROUNDS").unwrap_or(ROUNDS);
    let (mut cancelled, mut done) = (0, 0);
    for method in METHODS {
        let made = Factory::new(&gpu, method).engine(&PoolShape {
            bytes: BLOCK * BLOCKS as u64,
            regions: vec![RegionShape {
                offset: 0,
                block_stride: BLOCK,
                block_bytes: BLOCK,
            }],
            blocks: BLOCKS as u32,
        });
        let Engine {
            engine,
            marker,
            pool,
            memory,
        } = made;
        // Jobs of several sub-batches, so that fences find some under way and some not begun.
        let limits = CopyLimits {
            sub_batch_bytes: 4 * BLOCK,
            ..CopyLimits::default()
        };
        let map = arena(BLOCK * BLOCKS as u64);
        let thread = CopyThread::spawn(Box::new(engine), pool, limits).unwrap();
        let shard = ArenaShard {
            map: Arc::clone(&map),
            slot_bytes: BLOCK,
            rank_offset: 0,
        };
        thread.attach(ArenaId(1), shard).unwrap();
        let sides = Sides { map, memory };
        for round in 0..rounds / METHODS.len() as u64 {
            sides.fill(0x11);
            let held = random.one_in(2);
            let mark = if held {
                gpu.bench.compute().unwrap();
                marker.mark(0).unwrap()
            } else {
                ComputeMark::NONE
            };
            let jobs = jobs(&mut random);
            for job in &jobs {
                thread.submit(job.clone(), mark).unwrap();
            }
            let fenced: Vec<JobId> = jobs
                .iter()
                .map(|job| job.id)
                .filter(|_| random.one_in(2))
                .collect();
            let pause = |random: &mut Random| Duration::from_micros(random.below(400) as u64);
            let (before_fence, before_end) = (pause(&mut random), pause(&mut random));
            std::thread::scope(|scope| {
                if held {
                    scope.spawn(|| {
                        spin(before_end);
                        gpu.bench.end_compute();
                    });
                }
                spin(before_fence);
                thread.fence(&fenced);
                for job in jobs.iter().filter(|job| fenced.contains(&job.id)) {
                    sides.poison(job);
                }
            });
            // Whatever is still to come on any stream comes before the end of these.
            for job in followers() {
                thread.submit(job, ComputeMark::NONE).unwrap();
            }
            thread.wait_idle();
            for end in thread.take_finished() {
                match end.outcome {
                    Outcome::Done => done += 1,
                    Outcome::Cancelled if fenced.contains(&end.id) => cancelled += 1,
                    other => panic!("{other:?}"),
                }
            }
            for job in jobs.iter().filter(|job| fenced.contains(&job.id)) {
                let intact = sides.is_poisoned(job);
                assert!(intact, "{method:?}, round {round}: a copy after its fence");
            }
        }
    }
    println!("{done} jobs done, {cancelled} cancelled");
    assert!(done > 0 && cancelled > 0, "fences met only one sort of job");
}

/// Sleeping takes longer than a copy.
fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// Some loads and saves that share nothing: even blocks are loaded, odd ones saved.
fn jobs(random: &mut Random) -> Vec<Job> {
    let mut used = HashSet::new();
    (0..4)
        .map(|id| {
            let load = random.one_in(2);
            let mut pairs = Vec::new();
            for _ in 0..1 + random.below(16) {
                let block = 2 * random.below(USED / 2) + usize::from(!load);
                let slot = 2 * random.below(USED / 2) + usize::from(!load);
                if used.insert((0, block)) && used.insert((1, slot)) {
                    pairs.push((SlotId(slot as u32), GpuBlock(block as u32)));
                }
            }
            let kinds = [CopyKind::Demand, CopyKind::Prefetch];
            Job {
                id: JobId(id),
                kind: if load {
                    *random.pick(&kinds)
                } else {
                    CopyKind::Save
                },
                arena: ArenaId(1),
                pairs,
            }
        })
        .filter(|job| !job.pairs.is_empty())
        .collect()
}

/// Two jobs each way, which take turns on that way's streams.
fn followers() -> impl Iterator<Item = Job> {
    let kinds = [
        CopyKind::Demand,
        CopyKind::Save,
        CopyKind::Demand,
        CopyKind::Save,
    ];
    kinds
        .into_iter()
        .zip(USED as u32..)
        .map(|(kind, index)| Job {
            id: JobId(u64::from(index)),
            kind,
            arena: ArenaId(1),
            pairs: vec![(SlotId(index), GpuBlock(index))],
        })
}

/// Both ends of the copies.
struct Sides {
    map: Arc<ArenaMap>,
    memory: Arc<dyn DeviceMemory>,
}

impl Sides {
    fn fill(&self, byte: u8) {
        self.memory.write(0, &vec![byte; BLOCKS * BLOCK as usize]);
        cells(&self.map)
            .iter()
            .for_each(|cell| cell.store(byte, Ordering::Relaxed));
    }

    fn poison(&self, job: &Job) {
        for (slot, block) in &job.pairs {
            match job.kind.direction() {
                Direction::HostToDevice => {
                    let offset = u64::from(block.0) * BLOCK;
                    self.memory.write(offset, &[POISON; BLOCK as usize]);
                }
                Direction::DeviceToHost => {
                    let start = slot.index() * BLOCK as usize;
                    let cells = &cells(&self.map)[start..start + BLOCK as usize];
                    cells
                        .iter()
                        .for_each(|cell| cell.store(POISON, Ordering::Relaxed));
                }
            }
        }
    }

    fn is_poisoned(&self, job: &Job) -> bool {
        job.pairs
            .iter()
            .all(|(slot, block)| match job.kind.direction() {
                Direction::HostToDevice => {
                    let mut found = vec![0; BLOCK as usize];
                    self.memory.read(u64::from(block.0) * BLOCK, &mut found);
                    found.iter().all(|byte| *byte == POISON)
                }
                Direction::DeviceToHost => {
                    let start = slot.index() * BLOCK as usize;
                    let cells = &cells(&self.map)[start..start + BLOCK as usize];
                    cells
                        .iter()
                        .all(|cell| cell.load(Ordering::Relaxed) == POISON)
                }
            })
    }
}
