//! What is waited for: registering, the smallest job, small copies of others beside large jobs of ours.

use cuda::bench::{BenchMemory, CopyShape};
use cuda::{CopyKind, CopyLimits, CopyMethod, Direction};
use kvstore::{GpuBlock, PageSize, SlotId};
use serde_json::{Value, json};

use super::rows::{Order, Way, gbps, page_word};
use super::{GIB, KIB, MIB};
use crate::cli::CliError;
use crate::measure::{Samples, round};

/// Of an engine's own copies: the tokens it has sampled, the tables of a step.
const SMALL_BYTES: u64 = 64 * KIB;
const SMALL_COPIES: usize = 2000;
/// Large jobs that small copies are made beside.
const LARGE_JOBS: usize = 10;
const LATENCY_SAMPLES: usize = 2000;

/// What it costs to have the arena's pages backed and registered.
pub(super) fn registered(memory: &BenchMemory, page: PageSize) -> Result<Option<Value>, CliError> {
    let Some(cost) = memory.registering()? else {
        return Ok(None);
    };
    let gib = gbps(memory.bytes(), 1.0) / gbps(GIB, 1.0);
    Ok(Some(json!({
        "page": page_word(page),
        "touch_s_per_gib": round(memory.touch_seconds / gib),
        "register_s_per_gib": round(cost.seconds / gib),
        "device_bytes": cost.device_bytes,
    })))
}

/// What a caller waits for the smallest job, in microseconds.
pub(super) fn latency(memory: &BenchMemory) -> Result<Value, CliError> {
    let shape = CopyShape {
        range_bytes: 4 * KIB,
        layers: 1,
        method: CopyMethod::Auto,
    };
    let copies = memory.copies(shape, memory.limits())?;
    let job = [(CopyKind::Demand, vec![(SlotId(0), GpuBlock(0))])];
    let times: Result<Vec<_>, _> = (0..LATENCY_SAMPLES).map(|_| copies.ours(&job)).collect();
    Ok(micros(times?))
}

/// Percentiles of seconds, as microseconds.
fn micros(seconds: Vec<f64>) -> Value {
    let samples = Samples::new(seconds.into_iter().map(|one| one * 1e6).collect());
    let at = |share| round(samples.per_mille(share));
    json!({"p50": at(500), "p95": at(950), "p99": at(990), "max": at(1000)})
}

/// What an engine's own small copies wait for a large job of ours: the longest wait in each of some runs, beside the same
/// copies alone, for the pacing that workers have, for one sub-batch at a time, and for none. Microseconds; null without a GPU.
pub(super) fn small_copies(memory: &BenchMemory) -> Result<Value, CliError> {
    let shape = CopyShape {
        range_bytes: MIB,
        layers: 1,
        method: CopyMethod::Auto,
    };
    let paced = memory.limits();
    let single = CopyLimits {
        outstanding_per_direction: 1,
        ..paced
    };
    let unpaced = CopyLimits {
        sub_batch_bytes: memory.bytes(),
        ..paced
    };
    let mut all = json!({"bytes": SMALL_BYTES});
    for (name, limits) in [
        ("paced", paced),
        ("one_outstanding", single),
        ("unpaced", unpaced),
    ] {
        let copies = memory.copies(shape, limits)?;
        for way in [Direction::HostToDevice, Direction::DeviceToHost] {
            let word = Way::One(way).word();
            let Some(alone) = copies.small(way, SMALL_BYTES, SMALL_COPIES)? else {
                return Ok(Value::Null);
            };
            all[word]["alone"] = micros(alone);
            // All but the last block of either side, which the small copies use.
            let blocks = copies.blocks() - 1;
            let pairs = Order::Shuffled.pairs(blocks, 0);
            let kind = match way {
                Direction::HostToDevice => CopyKind::Demand,
                Direction::DeviceToHost => CopyKind::Save,
            };
            let (mut longest, mut beside, mut large) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..LARGE_JOBS {
                large.push(copies.ours(&[(kind, pairs.clone())])?);
                let waits = copies.small_beside((kind, pairs.clone()), SMALL_BYTES)?;
                let waits = waits.unwrap_or_default();
                longest.extend(waits.iter().copied().reduce(f64::max));
                beside.extend(waits);
            }
            let rate = gbps(u64::from(blocks) * MIB, Samples::new(large).median());
            all[word][name] = json!({
                "longest": micros(longest),
                "all": micros(beside),
                "large_gbps": round(rate),
            });
        }
    }
    Ok(all)
}
