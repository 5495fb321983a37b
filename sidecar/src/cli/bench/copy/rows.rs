//! One row of the table: which copies, in which order, how fast.

use cuda::bench::{CopyJob, CopyShape};
use cuda::{CopyKind, CopyMethod, Direction};
use kvstore::{GpuBlock, PageSize, SlotId};
use serde_json::{Value, json};

use super::{EngineName, KIB};
use crate::measure::{Random, round};

pub(super) fn method_word(engine: EngineName, method: CopyMethod) -> &'static str {
    match (engine, method) {
        (EngineName::Host, _) => "memcpy",
        (_, CopyMethod::Auto) => "auto",
        (_, CopyMethod::Single) => "single",
        (_, CopyMethod::Batch) => "batch",
        (_, CopyMethod::Rows) => "rows",
    }
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    One(Direction),
    Both,
}

impl Way {
    pub(super) const SINGLE: [Self; 2] = [
        Self::One(Direction::HostToDevice),
        Self::One(Direction::DeviceToHost),
    ];

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::One(Direction::HostToDevice) => "h2d",
            Self::One(Direction::DeviceToHost) => "d2h",
            Self::Both => "both",
        }
    }

    pub(super) fn directions(self) -> usize {
        if self == Self::Both { 2 } else { 1 }
    }

    pub(super) fn jobs(
        self,
        pairs: &[(SlotId, GpuBlock)],
        blocks: u32,
        first: u32,
        second: u32,
    ) -> Vec<CopyJob> {
        let window = |number: u32| {
            let moved = |&(slot, block): &(SlotId, GpuBlock)| {
                (
                    SlotId(slot.0 + number * blocks),
                    GpuBlock(block.0 + number * blocks),
                )
            };
            pairs.iter().map(moved).collect::<Vec<_>>()
        };
        match self {
            Self::One(Direction::HostToDevice) => vec![(CopyKind::Demand, window(first))],
            Self::One(Direction::DeviceToHost) => vec![(CopyKind::Save, window(first))],
            Self::Both => vec![
                (CopyKind::Demand, window(first)),
                (CopyKind::Save, window(second)),
            ],
        }
    }
}

/// In which order blocks are copied, and where their ranges are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Block `n` in slot `n`: neighbours merge.
    Contiguous,
    /// Both sides in random order: nothing merges.
    Shuffled,
    /// The same, and a block's layers lie apart in the pool.
    Layered,
}

impl Order {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Contiguous => "contiguous",
            Self::Shuffled => "shuffled",
            Self::Layered => "layered",
        }
    }

    pub(super) fn pairs(self, blocks: u32, seed: u64) -> Vec<(SlotId, GpuBlock)> {
        let mut slots: Vec<u32> = (0..blocks).collect();
        let mut order = slots.clone();
        if self != Self::Contiguous {
            let mut random = Random::new(seed);
            random.shuffle(&mut slots);
            random.shuffle(&mut order);
        }
        let order = order.into_iter().map(GpuBlock);
        slots.into_iter().map(SlotId).zip(order).collect()
    }
}

/// What one row is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct What {
    pub(super) way: Way,
    pub(super) order: Order,
    pub(super) page: PageSize,
    pub(super) shape: CopyShape,
    /// Of each job.
    pub(super) ranges: u64,
}

/// Decimal gigabytes per second, medians of so many turns.
pub(super) struct Row {
    pub(super) what: What,
    pub(super) turns: u64,
    pub(super) gbps: f64,
    pub(super) plain_gbps: f64,
    pub(super) unpaced_gbps: Option<f64>,
}

impl Row {
    pub(super) fn ratio(&self) -> f64 {
        self.gbps / self.plain_gbps
    }

    pub(super) const HEAD: &str =
        "WAY   ORDER       PAGES  RANGE KiB  RANGES  METHOD    GB/s   PLAIN  RATIO  UNPACED\n";

    pub(super) fn line(&self, engine: EngineName) -> String {
        let what = &self.what;
        format!(
            "{:<4}  {:<10}  {:<5}  {:>9}  {:>6}  {:<6}  {:>6.2}  {:>6.2}  {:>5.3}  {:>7}\n",
            what.way.word(),
            what.order.word(),
            page_word(what.page),
            what.shape.range_bytes / KIB,
            what.ranges,
            method_word(engine, what.shape.method),
            self.gbps,
            self.plain_gbps,
            self.ratio(),
            self.unpaced_gbps
                .map_or_else(|| "-".to_owned(), |gbps| format!("{gbps:.2}"))
        )
    }

    pub(super) fn json(&self, engine: EngineName) -> Value {
        let what = &self.what;
        json!({
            "engine": engine.word(),
            "direction": what.way.word(),
            "order": what.order.word(),
            "page": page_word(what.page),
            "range_bytes": what.shape.range_bytes,
            "ranges": what.ranges,
            "method": method_word(engine, what.shape.method),
            "turns": self.turns,
            "gbps": round(self.gbps),
            "plain_gbps": round(self.plain_gbps),
            "ratio": round(self.ratio()),
            "unpaced_gbps": self.unpaced_gbps.map(round),
        })
    }
}

pub(super) fn page_word(page: PageSize) -> &'static str {
    match page {
        PageSize::Base4K => "4KiB",
        PageSize::Huge2M => "2MiB",
    }
}

pub(super) fn gbps(bytes: u64, seconds: f64) -> f64 {
    // Beyond what is ever copied a float still has nine digits.
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let bytes = bytes as f64;
    bytes / seconds / 1e9
}
