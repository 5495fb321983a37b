//! `bench-copy`: the real copy thread with the host engine beside a loop of `memcpy` over the same list of ranges.
//!
//! Both sides run in one process, alternating, and the table shows medians. Every run takes the next window of an arena and a
//! pool that are larger than the caches: blocks that come back after a tool call are in no cache either. A copy uses one
//! core: the caller sleeps while the copy thread works. `taskset -c 0` keeps both sides on the same one.
//!
//! `bench-copy [--json FILE|-] [--seed N] [--repeats N]`

#![allow(unsafe_code, reason = "the comparison is a memcpy between raw memory")]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use cuda::{
    ArenaId, ArenaShard, ComputeMark, CopyKind, CopyLimits, CopyThread, DevicePool, DeviceRegion,
    Direction, HostEngine, Job, JobEnd, JobId, Outcome,
};
use greenroom_benches::{Bar, Limit, Options, Random, Result, Samples, judge, round};
use kvstore::{ArenaFile, ArenaMap, GpuBlock, PageSize, SlotId, u64_from, usize_from_u64};
use serde_json::{Value, json};

const KIB: u64 = 1024;
const RANGE_BYTES: [u64; 7] = [
    4 * KIB,
    16 * KIB,
    32 * KIB,
    64 * KIB,
    256 * KIB,
    1024 * KIB,
    4096 * KIB,
];
const RANGE_COUNTS: [u32; 3] = [16, 256, 4096];
/// Bytes of the arena, of the pool, and of the largest job: beyond the caches of most machines.
const POOL_BYTES: u64 = 256 << 20;
/// Copied per row and side, so that small jobs are repeated often enough.
const ROW_BYTES: u64 = 1 << 30;
const REPEATS_MAX: u64 = 400;
const LATENCY_SAMPLES: u64 = 5000;
/// Jobs from this size on are judged.
const CHUNK_BYTES: u64 = 8 << 20;
const ARENA: ArenaId = ArenaId(1);

fn main() -> Result<()> {
    let options = Options::from_args(&[("repeats", 15)]);
    let mut rows = Vec::new();
    options.say("dir  order       range KiB  ranges   GB/s  memcpy GB/s  ratio");
    for bytes in RANGE_BYTES {
        let mut bench = Bench::new(bytes)?;
        for count in RANGE_COUNTS {
            if u64::from(count) * bytes > POOL_BYTES / 2 {
                continue;
            }
            bench.ranges = count;
            for order in [Order::Contiguous, Order::Shuffled] {
                for kind in [CopyKind::Demand, CopyKind::Save] {
                    let row = bench.measure(kind, order, &options)?;
                    options.say(&row.line());
                    rows.push(row);
                }
            }
        }
    }
    let latency = latency()?;
    options.say(&format!(
        "one 4 KiB job, submit to end seen by its caller: {latency} us"
    ));
    let bars = [
        bar(&rows, "32 KiB", 32 * KIB..256 * KIB, 0.9),
        bar(&rows, "256 KiB", 256 * KIB..u64::MAX, 0.95),
    ];
    let bars = judge(&options, &bars);
    let rows: Value = rows.iter().map(Row::json).collect();
    options.write(json!({"rows": rows, "latency_us": latency, "bars": bars}))
}

/// The median ratio of the rows with ranges of these sizes, of jobs as large as a chunk that the hooks ship; what a
/// smaller job costs besides its bytes is the latency, which is measured apart.
fn bar(rows: &[Row], from: &str, sizes: Range<u64>, least: f64) -> Bar {
    let judged = rows
        .iter()
        .filter(|row| sizes.contains(&row.range_bytes))
        .filter(|row| row.range_bytes * u64::from(row.ranges) >= CHUNK_BYTES);
    let ratios = judged.map(|row| row.plain_seconds / row.seconds).collect();
    Bar {
        name: format!("ratio to memcpy, ranges from {from}, jobs from 8 MiB (median of rows)"),
        value: Samples::new(ratios).median(),
        limit: Limit::AtLeast(least),
    }
}

#[derive(Clone, Copy)]
enum Order {
    /// Block `n` in slot `n`: neighbours merge.
    Contiguous,
    /// Both sides in random order: nothing merges.
    Shuffled,
}

impl Order {
    fn name(self) -> &'static str {
        match self {
            Order::Contiguous => "contiguous",
            Order::Shuffled => "shuffled",
        }
    }

    fn pairs(self, count: u32, seed: u64) -> Vec<(SlotId, GpuBlock)> {
        let mut slots: Vec<u32> = (0..count).collect();
        let mut blocks = slots.clone();
        if matches!(self, Order::Shuffled) {
            let mut random = Random::new(seed);
            random.shuffle(&mut slots);
            random.shuffle(&mut blocks);
        }
        let blocks = blocks.into_iter().map(GpuBlock);
        slots.into_iter().map(SlotId).zip(blocks).collect()
    }
}

/// One arena, one pool of the same size, and a copy thread between them.
struct Bench {
    // Fields drop in this order: the thread before the memory it copies to.
    thread: CopyThread,
    map: Arc<ArenaMap>,
    device: NonNull<u8>,
    _device: Vec<u64>,
    range_bytes: u64,
    /// Ranges of one job.
    ranges: u32,
    /// Ranges in the arena, and in the pool.
    blocks: u32,
}

impl Bench {
    fn new(range_bytes: u64) -> Result<Self> {
        let bytes = POOL_BYTES;
        let blocks = u32::try_from(bytes / range_bytes)?;
        let file = ArenaFile::create(bytes, PageSize::Base4K)?;
        let map = Arc::new(ArenaMap::map(file.fd().try_clone_to_owned()?, bytes)?);
        map.populate(1)?;
        // Written, so that every page is there; words, so that the content is cheap to make.
        let mut device: Vec<u64> = (0..bytes / 8).collect();
        let base = NonNull::from(device.as_mut_slice()).cast::<u8>();
        let region = DeviceRegion {
            base: u64_from(base.as_ptr().expose_provenance()),
            block_stride: range_bytes,
            block_bytes: range_bytes,
        };
        // SAFETY: the region is the vector's memory, which lives until after the thread and is touched only through
        // `base` from here on.
        let pool = Arc::new(unsafe { DevicePool::new(vec![region], blocks)? });
        let engine = Box::new(HostEngine::new(Arc::clone(&pool)));
        let thread = CopyThread::spawn(engine, pool, CopyLimits::default())?;
        let shard = ArenaShard {
            map: Arc::clone(&map),
            slot_bytes: range_bytes,
            rank_offset: 0,
        };
        thread.attach(ARENA, shard)?;
        Ok(Self {
            thread,
            map,
            device: base,
            _device: device,
            range_bytes,
            ranges: 1,
            blocks,
        })
    }

    /// The same mapping in another window of arena and pool, one that has not been touched for long.
    fn in_window(&self, run: u64, pairs: &[(SlotId, GpuBlock)]) -> Vec<(SlotId, GpuBlock)> {
        // One further every four runs, so that both sides meet every window.
        let window = (run + run / 4) % u64::from(self.blocks / self.ranges);
        let first = u32::try_from(window).map_or(0, |window| window * self.ranges);
        let moved = |&(slot, block): &(SlotId, GpuBlock)| {
            (SlotId(slot.0 + first), GpuBlock(block.0 + first))
        };
        pairs.iter().map(moved).collect()
    }

    fn measure(&self, kind: CopyKind, order: Order, options: &Options) -> Result<Row> {
        let pairs = order.pairs(self.ranges, options.seed);
        let bytes = self.range_bytes * u64::from(self.ranges);
        let least = options.number("repeats");
        let repeats = (ROW_BYTES / bytes).clamp(least, REPEATS_MAX.max(least));
        let (mut ours, mut plain) = (Vec::new(), Vec::new());
        for run in 0..2 * repeats {
            let pairs = self.in_window(run, &pairs);
            // In the order a b b a: what one side does to the next run, both do equally often.
            if matches!(run % 4, 0 | 3) {
                plain.push(self.plain(kind, &pairs));
            } else {
                ours.push(self.ours(kind, pairs)?);
            }
        }
        Ok(Row {
            kind,
            order,
            range_bytes: self.range_bytes,
            ranges: self.ranges,
            seconds: Samples::new(ours).median(),
            plain_seconds: Samples::new(plain).median(),
        })
    }

    /// Seconds from handing the job over until its end is known.
    fn ours(&self, kind: CopyKind, pairs: Vec<(SlotId, GpuBlock)>) -> Result<f64> {
        let job = Job {
            id: JobId(1),
            kind,
            arena: ARENA,
            pairs,
        };
        let start = Instant::now();
        self.thread.submit(job, ComputeMark::NONE)?;
        self.thread.wait_idle();
        let seconds = start.elapsed().as_secs_f64();
        match self.thread.take_finished().as_slice() {
            [
                JobEnd {
                    outcome: Outcome::Done,
                    ..
                },
            ] => Ok(seconds),
            ends => Err(format!("the copy did not end well: {ends:?}").into()),
        }
    }

    /// Seconds of a loop of `memcpy` over the ranges as they are listed.
    fn plain(&self, kind: CopyKind, pairs: &[(SlotId, GpuBlock)]) -> f64 {
        let bytes = usize_from_u64(self.range_bytes);
        let start = Instant::now();
        for &(slot, block) in pairs {
            // SAFETY: slots and blocks are below `blocks`, and both sides hold that many ranges. The copy thread has no
            // job now, so nobody else touches either side.
            unsafe {
                let host = self.map.base().add(slot.index() * bytes);
                let device = self.device.add(block.index() * bytes);
                match kind.direction() {
                    Direction::HostToDevice => device.copy_from_nonoverlapping(host, bytes),
                    Direction::DeviceToHost => device.copy_to_nonoverlapping(host, bytes),
                }
            }
        }
        start.elapsed().as_secs_f64()
    }
}

struct Row {
    kind: CopyKind,
    order: Order,
    range_bytes: u64,
    ranges: u32,
    seconds: f64,
    plain_seconds: f64,
}

impl Row {
    fn direction(&self) -> &'static str {
        match self.kind.direction() {
            Direction::HostToDevice => "h2d",
            Direction::DeviceToHost => "d2h",
        }
    }

    /// Decimal gigabytes per second.
    fn gbps(&self, seconds: f64) -> f64 {
        let mib = u32::try_from(self.range_bytes / KIB).map_or(0.0, f64::from) / 1024.0;
        mib * f64::from(self.ranges) * 1.048_576e-3 / seconds
    }

    fn line(&self) -> String {
        format!(
            "{:<4} {:<11} {:>9} {:>7} {:>6.2} {:>12.2} {:>6.3}",
            self.direction(),
            self.order.name(),
            self.range_bytes / KIB,
            self.ranges,
            self.gbps(self.seconds),
            self.gbps(self.plain_seconds),
            self.plain_seconds / self.seconds
        )
    }

    fn json(&self) -> Value {
        json!({
            "engine": "host",
            "direction": self.direction(),
            "range_bytes": self.range_bytes,
            "ranges": self.ranges,
            "method": self.order.name(),
            "gbps": self.gbps(self.seconds),
            "plain_gbps": self.gbps(self.plain_seconds),
            "ratio": self.plain_seconds / self.seconds,
        })
    }
}

/// What a caller waits for the smallest job, in microseconds.
fn latency() -> Result<Value> {
    let bench = Bench::new(4 * KIB)?;
    let pair = vec![(SlotId(0), GpuBlock(0))];
    let mut samples = Vec::new();
    for _ in 0..LATENCY_SAMPLES {
        samples.push(bench.ours(CopyKind::Demand, pair.clone())? * 1e6);
    }
    let samples = Samples::new(samples);
    let at = |share| round(samples.per_mille(share));
    Ok(json!({"p50": at(500), "p95": at(950), "p99": at(990), "samples": LATENCY_SAMPLES}))
}
