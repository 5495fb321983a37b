//! How figures are taken and what they carry: percentiles, bars, seeded choices, the machine and the commit.
//!
//! Measures nothing itself.

use kvstore::{BlockHash, u64_from, usize_from};
use serde_json::{Value, json};

/// One of the project's bars and whether this run meets it.
#[derive(Clone, Debug)]
pub struct Bar {
    /// What is measured, with its unit.
    pub name: String,
    /// What was measured.
    pub value: f64,
    /// The bar.
    pub limit: Limit,
}

/// A bar's side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Good below.
    AtMost(f64),
    /// Good above.
    AtLeast(f64),
}

impl Bar {
    /// Whether the bar is met.
    #[must_use]
    pub fn is_met(&self) -> bool {
        match self.limit {
            Limit::AtMost(limit) => self.value <= limit,
            Limit::AtLeast(limit) => self.value >= limit,
        }
    }

    /// A line of the table.
    #[must_use]
    pub fn line(&self) -> String {
        let (sign, limit) = match self.limit {
            Limit::AtMost(limit) => ("<=", limit),
            Limit::AtLeast(limit) => (">=", limit),
        };
        let verdict = if self.is_met() { "met" } else { "MISSED" };
        format!(
            "bar  {:<64} {:>12.3} {sign} {limit}  {verdict}",
            self.name, self.value
        )
    }

    /// As it stands in the JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        let (side, limit) = match self.limit {
            Limit::AtMost(limit) => ("at_most", limit),
            Limit::AtLeast(limit) => ("at_least", limit),
        };
        json!({"name": self.name, "value": self.value, side: limit, "met": self.is_met()})
    }
}

/// Measured values, sorted.
#[derive(Clone, Debug)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Sorts them.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn new(mut values: Vec<f64>) -> Self {
        assert!(!values.is_empty(), "nothing was measured");
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The smallest value that at least this many of a thousand values do not exceed.
    #[must_use]
    pub fn per_mille(&self, share: usize) -> f64 {
        let rank = (self.0.len() * share).div_ceil(1000).max(1);
        self.0[rank - 1]
    }

    /// The middle, or what is half way between the two that are in the middle.
    #[must_use]
    pub fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        if self.0.len().is_multiple_of(2) {
            f64::midpoint(self.0[middle - 1], self.0[middle])
        } else {
            self.0[middle]
        }
    }

    /// P50, P99, maximum and number.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "p50": round(self.median()),
            "p99": round(self.per_mille(990)),
            "max": round(self.per_mille(1000)),
            "samples": self.0.len(),
        })
    }
}

/// Three decimals.
#[must_use]
pub fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// A small generator for orders and choices (Marsaglia's xorshift, 64 bits, times a constant).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Any seed will do.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u32) -> u32 {
        u32::try_from((u128::from(self.bits()) * u128::from(end)) >> 64).unwrap_or(0)
    }

    /// A hash as sha256 would make it: uniform in every byte.
    pub fn hash(&mut self) -> BlockHash {
        let mut bytes = [0; 32];
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&self.bits().to_le_bytes());
        }
        BlockHash(bytes)
    }

    /// A chain of new blocks.
    pub fn chain(&mut self, blocks: u32) -> Vec<BlockHash> {
        (0..blocks).map(|_| self.hash()).collect()
    }

    /// Puts a list into random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            let end = u32::try_from(last + 1).unwrap_or(u32::MAX);
            list.swap(last, usize_from(self.below(end)));
        }
    }
}

/// The machine, in the words that a reader of the figures needs; the same as in the demo's JSON.
#[must_use]
pub fn machine() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let after = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split(':').nth(1)?.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, |cores| u64_from(cores.get()));
    let memory_kib = after(&read("/proc/meminfo"), "MemTotal")
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .unwrap_or(0.0);
    let load = read("/proc/loadavg")
        .split(' ')
        .next()
        .and_then(|text| text.parse::<f64>().ok());
    json!({
        "cpu": after(&read("/proc/cpuinfo"), "model name"),
        "cores": cores,
        "memory_gib": (memory_kib / 104_857.6_f64).round() / 10.0,
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_1min": load,
    })
}

/// What `GREENROOM_COMMIT` says, for machines that have no checkout; else the current folder's commit, with `-dirty` where
/// tracked files differ from it; `unknown` outside a checkout.
#[must_use]
pub fn commit() -> String {
    if let Ok(commit) = std::env::var("GREENROOM_COMMIT") {
        return commit;
    }
    let describe = [
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
        "--exclude=*",
    ];
    std::process::Command::new("git")
        .args(describe)
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .map_or_else(|| "unknown".to_owned(), |text| text.trim().to_owned())
}

/// Adds what figures are worth nothing without: machine, commit, what was typed, the seed.
pub fn stamp(figures: &mut Value, seed: u64) {
    figures["machine"] = machine();
    figures["commit"] = json!(commit());
    figures["command"] = json!(command());
    figures["seed"] = json!(seed);
}

/// What was typed, without the folder that the program lies in.
fn command() -> String {
    let mut args = std::env::args();
    let program = args.next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default().to_owned();
    std::iter::once(name)
        .chain(args)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_take_the_value_at_their_rank() {
        let samples = Samples::new((1..=200).rev().map(f64::from).collect());
        assert_eq!(
            (
                samples.per_mille(500),
                samples.per_mille(990),
                samples.per_mille(1000)
            ),
            (100.0, 198.0, 200.0)
        );
        assert_eq!(Samples::new(vec![4.0]).per_mille(990), 4.0);
        assert_eq!(samples.median(), 100.5);
        assert_eq!(Samples::new(vec![4.0, 1.0, 2.0]).median(), 2.0);
    }

    #[test]
    fn bars_are_met_on_the_line() {
        let bar = |value, limit| Bar {
            name: "n".into(),
            value,
            limit,
        };
        assert!(bar(1.0, Limit::AtMost(1.0)).is_met() && bar(1.0, Limit::AtLeast(1.0)).is_met());
        assert!(!bar(1.1, Limit::AtMost(1.0)).is_met() && !bar(0.9, Limit::AtLeast(1.0)).is_met());
    }

    #[test]
    fn random_orders_keep_every_element_and_follow_the_seed() {
        let order = |seed| {
            let mut list: Vec<u32> = (0..100).collect();
            Random::new(seed).shuffle(&mut list);
            list
        };
        let mut sorted = order(3);
        assert_ne!(sorted, (0..100).collect::<Vec<_>>());
        assert_eq!(sorted, order(3));
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
    }
}
