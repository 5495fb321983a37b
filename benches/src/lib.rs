//! What the benchmarks share: their options, and how they print and write figures. The figures themselves are
//! [`sidecar::measure`]'s, as `greenroom bench` has them too.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "benchmarks print their tables"
)]

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use serde_json::Value;
use sidecar::measure::stamp;
pub use sidecar::measure::{Bar, Limit, Random, Samples, round};

/// Any error ends a benchmark.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What the command line says: `--json FILE`, `--seed N` and each benchmark's own numbers.
#[derive(Debug)]
pub struct Options {
    json: Option<String>,
    /// Where all randomness comes from; random unless given.
    pub seed: u64,
    numbers: BTreeMap<&'static str, u64>,
}

impl Options {
    /// Reads the command line. `numbers` are the benchmark's own flags with their defaults; all must be positive.
    /// Ends the process with status 2 when something is wrong.
    #[must_use]
    pub fn from_args(numbers: &[(&'static str, u64)]) -> Self {
        Self::parse(std::env::args().skip(1), numbers).unwrap_or_else(|| {
            let own: String = numbers
                .iter()
                .map(|(name, default)| format!(" [--{name} N ({default})]"))
                .collect();
            eprintln!("options: [--json FILE|-] [--seed N]{own}");
            std::process::exit(2);
        })
    }

    fn parse(
        mut args: impl Iterator<Item = String>,
        numbers: &[(&'static str, u64)],
    ) -> Option<Self> {
        let mut options = Self {
            json: None,
            // 52 bits: what every reader of JSON can hold.
            seed: RandomState::new().hash_one("greenroom") >> 12,
            numbers: numbers.iter().copied().collect(),
        };
        while let Some(flag) = args.next() {
            let value = args.next()?;
            match flag.strip_prefix("--")? {
                "json" => options.json = Some(value),
                "seed" => options.seed = value.parse().ok()?,
                name => {
                    let number = options.numbers.get_mut(name)?;
                    *number = value.parse().ok().filter(|n| *n > 0)?;
                }
            }
        }
        Some(options)
    }

    /// The value of one of the benchmark's own numbers.
    ///
    /// # Panics
    /// If the benchmark did not declare it.
    #[must_use]
    pub fn number(&self, name: &str) -> u64 {
        self.numbers[name]
    }

    /// Prints a line of the table, unless standard output is the JSON's.
    pub fn say(&self, line: &str) {
        if self.json.as_deref() != Some("-") {
            println!("{line}");
        }
    }

    /// Writes the figures, an object, together with what they were taken on.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, mut figures: Value) -> Result<()> {
        stamp(&mut figures, self.seed);
        match self.json.as_deref() {
            None => {}
            Some("-") => println!("{figures:#}"),
            Some(file) => std::fs::write(file, format!("{figures:#}\n"))?,
        }
        Ok(())
    }
}

/// Prints bars and gives their JSON.
#[must_use]
pub fn judge(options: &Options, bars: &[Bar]) -> Value {
    for bar in bars {
        options.say(&bar.line());
    }
    bars.iter().map(Bar::json).collect()
}

/// Processor time of the calling thread: what the work itself costs, whoever else wants the processor.
#[must_use]
pub fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Option<Options> {
        Options::parse(
            line.split_whitespace().map(str::to_owned),
            &[("repeats", 15)],
        )
    }

    #[test]
    fn options_are_read_or_refused() {
        let options = parse("--json - --seed 7 --repeats 3").unwrap();
        assert_eq!((options.seed, options.number("repeats")), (7, 3));
        assert_eq!(parse("").unwrap().number("repeats"), 15);
        for wrong in [
            "--json",
            "--repeats 0",
            "--repeats x",
            "--other 1",
            "seed 1",
        ] {
            assert!(parse(wrong).is_none(), "{wrong}");
        }
    }
}
