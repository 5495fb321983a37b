//! `greenroom bench copy`: the copy thread and its engine beside plain copies of the same bytes.
//!
//! Three times are taken for each row, turn by turn, and the table shows medians:
//! - the copy thread's, from handing a job over until its caller knows the end: planning, pacing and polling are in it;
//! - a plain copy's: on a GPU one copy of as many page-locked bytes, on the host a loop of `memcpy` over the same ranges;
//! - on a GPU what the engine takes for the whole job as one batch, which is on one stream, without hand-over, pacing and the
//!   poll timer.
//!
//! Every turn takes the next window of an arena and a pool that are larger than the caches.

mod rows;
mod waits;

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::io::{IsTerminal, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use cuda::bench::{BenchCopies, BenchError, BenchMemory, CopyShape};
use cuda::{CopyLimits, CopyMethod, CudaDevice};
use kvstore::{PageSize, u64_from};
use serde_json::{Value, json};

use self::rows::{Order, Row, Way, What, gbps, method_word};
use self::waits::{latency, registered, small_copies};
use super::super::{CliError, out};
use super::chart::{self, Line};
use crate::config::{Machine, Size};
use crate::measure::{Bar, Limit, Samples, stamp};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const RANGE_BYTES: [u64; 8] = [
    4 * KIB,
    16 * KIB,
    32 * KIB,
    64 * KIB,
    128 * KIB,
    256 * KIB,
    MIB,
    4 * MIB,
];
const RANGE_COUNTS: [u64; 3] = [16, 256, 4096];
/// The largest chunk that the hooks ship.
const CHUNK_BYTES: u64 = 64 * MIB;
/// Of one job: a chunk of the smallest ranges.
const RANGE_COUNT_MAX: u64 = CHUNK_BYTES / (4 * KIB);
/// Regions of the pool where a block's layers lie apart, and the longest range that they are measured with: longer ones do not
/// depend on how they are put to the driver.
const LAYERS: u32 = 32;
const LAYERED_BYTES_MAX: u64 = 256 * KIB;
/// Bytes that a row is to copy in all, where that does not take too many turns.
const ROW_BYTES: u64 = GIB;
/// So many times the least number of turns are the most.
const TURNS_MAX: u64 = 40;
/// The most that is registered in one piece, which a plain copy may not reach beyond.
const GIB: u64 = 1 << 30;

#[derive(Debug, clap::Args)]
pub(super) struct CopyArgs {
    /// What copies; without it the GPU's copy engines where there is a GPU
    #[arg(long, value_enum)]
    engine: Option<EngineName>,
    /// Number of the GPU
    #[arg(long, default_value_t = 0)]
    device: u32,
    /// Size of the arena and of the pool, 1GiB at most [default: 1GiB on a GPU, 256MiB on the host]
    #[arg(long, value_name = "SIZE", value_parser = memory_size)]
    memory: Option<Size>,
    /// Turns of each row, at least [default: 5 on a GPU, 15 on the host]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    repeats: Option<u64>,
    /// The figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Bandwidth over the size of a range, as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Where all randomness comes from [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum EngineName {
    Host,
    Cuda,
}

impl EngineName {
    fn word(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Cuda => "cuda",
        }
    }
}

fn memory_size(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error| format!("{error}"))?;
    if (16 * MIB..=GIB).contains(&size.0) && size.0.is_multiple_of(8 * MIB) {
        Ok(size)
    } else {
        Err("from 16MiB to 1GiB, in steps of 8MiB".to_owned())
    }
}

pub(super) fn run(args: &CopyArgs) -> Result<(), CliError> {
    // 52 bits: what every reader of JSON can hold.
    let seed = args
        .seed
        .unwrap_or_else(|| RandomState::new().hash_one("greenroom") >> 12);
    let engine = match args.engine {
        Some(engine) => engine,
        None => match CudaDevice::probe(args.device) {
            Ok(_) => EngineName::Cuda,
            Err(why) => {
                out::print(&format!("Copies within the host's memory: {why}\n"))?;
                EngineName::Host
            }
        },
    };
    let bytes = args.memory.map_or_else(
        || match engine {
            EngineName::Cuda => GIB,
            EngineName::Host => 256 * MIB,
        },
        |size| size.0,
    );
    let least = args.repeats.unwrap_or(match engine {
        EngineName::Cuda => 5,
        EngineName::Host => 15,
    });
    let bench = Bench {
        engine,
        device: args.device,
        bytes,
        least,
        seed,
    };
    bench.run(args)
}

struct Bench {
    engine: EngineName,
    device: u32,
    /// Of either side.
    bytes: u64,
    /// Turns of a row.
    least: u64,
    seed: u64,
}

impl Bench {
    fn run(&self, args: &CopyArgs) -> Result<(), CliError> {
        let mut figures = json!({});
        let mut rows = Vec::new();
        let mut registering = Vec::new();
        for page in self.pages()? {
            let memory = self.memory(page)?;
            if let Some((name, device)) = memory.device() {
                let place = device.place();
                let version = device.driver_version();
                figures["gpu"] = json!({
                    "name": name,
                    "cuda": format!("{}.{}", version / 1000, version % 1000 / 10),
                    "batch_copies": device.has_batch_copies(),
                    "node": place.node,
                    "link_max_gt_per_s": place.link_max_gt,
                    "sub_batch_bytes": memory.limits().sub_batch_bytes,
                });
                out::print(&format!(
                    "{name}, driver for CUDA {}\n",
                    figures["gpu"]["cuda"]
                ))?;
            }
            if let Some(cost) = registered(&memory, page)? {
                out::print(&format!("registering: {cost}\n"))?;
                registering.push(cost);
            }
            if page == PageSize::Base4K {
                figures["latency_us"] = latency(&memory)?;
                figures["small_copies"] = small_copies(&memory)?;
                out::print(&format!(
                    "one 4 KiB job, handed over to end known, us: {}\nsmall copies of others, us: {}\n",
                    figures["latency_us"], figures["small_copies"]
                ))?;
            }
            out::print(Row::HEAD)?;
            self.measure(&memory, page, &mut rows)?;
        }
        let bars: Vec<Bar> = self.bars(&rows);
        for bar in &bars {
            out::print(&format!("{}\n", bar.line()))?;
        }
        figures["rows"] = rows.iter().map(|row| row.json(self.engine)).collect();
        figures["registering"] = json!(registering);
        figures["bars"] = bars.iter().map(Bar::json).collect();
        stamp(&mut figures, self.seed);
        if let Some(file) = &args.json {
            fs::write(file, format!("{figures:#}\n"))?;
        }
        if let Some(file) = &args.svg {
            fs::write(file, self.chart(&rows, &figures))?;
        }
        Ok(())
    }

    fn memory(&self, page: PageSize) -> Result<BenchMemory, CliError> {
        Ok(match self.engine {
            EngineName::Host => BenchMemory::host(self.bytes, page)?,
            EngineName::Cuda => {
                let device = CudaDevice::probe(self.device).map_err(BenchError::from)?;
                BenchMemory::gpu(device, self.bytes, page)?
            }
        })
    }

    /// Huge pages are measured where enough are free.
    fn pages(&self) -> Result<Vec<PageSize>, CliError> {
        let free = Machine::probe()?.memory.huge_free;
        let mut pages = vec![PageSize::Base4K];
        if free >= self.bytes {
            pages.push(PageSize::Huge2M);
        } else {
            out::print("2MiB pages: not measured, too few are free (sysctl vm.nr_hugepages)\n")?;
        }
        Ok(pages)
    }

    /// All rows of one sort of pages.
    fn measure(
        &self,
        memory: &BenchMemory,
        page: PageSize,
        rows: &mut Vec<Row>,
    ) -> Result<(), CliError> {
        let series = self.series(page);
        for (number, (shape, orders)) in series.iter().enumerate() {
            progress(number, series.len());
            // Saves do not pause here: both directions at once are measured too.
            let limits = CopyLimits {
                save_every: Duration::ZERO,
                ..memory.limits()
            };
            let mut copies = memory.copies(*shape, limits)?;
            for &order in orders {
                for ranges in self.counts(shape) {
                    for both in [false, true] {
                        let whole = ranges == self.most(shape);
                        if both && !whole {
                            continue;
                        }
                        let directions: &[Way] = if both { &[Way::Both] } else { &Way::SINGLE };
                        for &way in directions {
                            let what = What {
                                way,
                                order,
                                page,
                                shape: *shape,
                                ranges,
                            };
                            let row = self.row(&mut copies, what)?;
                            progress(0, 0);
                            out::print(&row.line(self.engine))?;
                            progress(number, series.len());
                            rows.push(row);
                        }
                    }
                }
            }
        }
        progress(series.len(), series.len());
        Ok(())
    }

    /// Every shape that is measured, with the orders in which its blocks are copied.
    fn series(&self, page: PageSize) -> Vec<(CopyShape, Vec<Order>)> {
        use CopyMethod::{Auto, Batch, Rows, Single};
        let gpu = self.engine == EngineName::Cuda;
        let mut all = Vec::new();
        for range_bytes in RANGE_BYTES {
            let methods: &[CopyMethod] = match (gpu, page) {
                (true, PageSize::Base4K) => &[Auto, Single, Batch],
                _ => &[Auto],
            };
            for &method in methods {
                let shape = CopyShape {
                    range_bytes,
                    layers: 1,
                    method,
                };
                let orders = if method == Auto {
                    vec![Order::Contiguous, Order::Shuffled]
                } else {
                    vec![Order::Shuffled]
                };
                all.push((shape, orders));
            }
            if !gpu || page != PageSize::Base4K || range_bytes > LAYERED_BYTES_MAX {
                continue;
            }
            for method in [Auto, Rows] {
                let shape = CopyShape {
                    range_bytes,
                    layers: LAYERS,
                    method,
                };
                all.push((shape, vec![Order::Layered]));
            }
        }
        all
    }

    /// The most ranges of one job: as many as fill half of the memory, if they are not too many. Whole blocks.
    fn most(&self, shape: &CopyShape) -> u64 {
        let ranges = (self.bytes / 2 / shape.range_bytes).min(RANGE_COUNT_MAX);
        (ranges - ranges % u64::from(shape.layers)).max(u64::from(shape.layers))
    }

    /// Numbers of ranges of one job: some fixed ones, those of the largest chunk that the hooks ship, and the most.
    fn counts(&self, shape: &CopyShape) -> Vec<u64> {
        let most = self.most(shape);
        let fits = |count: &u64| *count < most && count.is_multiple_of(u64::from(shape.layers));
        let chunk = CHUNK_BYTES / shape.range_bytes;
        let mut counts: Vec<u64> = RANGE_COUNTS
            .into_iter()
            .chain([chunk])
            .filter(fits)
            .collect();
        counts.sort_unstable();
        counts.dedup();
        counts.push(most);
        counts
    }

    fn row(&self, copies: &mut BenchCopies, what: What) -> Result<Row, CliError> {
        let blocks = u32::try_from(what.ranges / u64::from(what.shape.layers)).unwrap_or(u32::MAX);
        let pairs = what.order.pairs(blocks, self.seed);
        let bytes = what.ranges * what.shape.range_bytes;
        let turns = (ROW_BYTES / bytes).clamp(self.least, self.least * TURNS_MAX);
        let windows = copies.blocks() / blocks;
        let (mut ours, mut plain, mut unpaced) = (Vec::new(), Vec::new(), Vec::new());
        for turn in 0..=turns {
            // Neither side is given what the other has just brought into the caches, and both get every window.
            let first = (2 * u32::try_from(turn).unwrap_or(0)) % windows;
            let second = (first + 1) % windows;
            let turned = turn % 4 < 2;
            let jobs = what.way.jobs(&pairs, blocks, first, second);
            let others = what.way.jobs(&pairs, blocks, second, first);
            let (for_ours, for_plain) = if turned {
                (&jobs, &others)
            } else {
                (&others, &jobs)
            };
            let samples = if turned {
                let ours = copies.ours(for_ours)?;
                (ours, copies.plain(for_plain)?)
            } else {
                let plain = copies.plain(for_plain)?;
                (copies.ours(for_ours)?, plain)
            };
            let whole = copies.unpaced(for_ours)?;
            // The first turn is there to warm up.
            if turn > 0 {
                ours.push(samples.0);
                plain.push(samples.1);
                unpaced.extend(whole);
            }
        }
        let moved = bytes * u64_from(what.way.directions());
        let gbps = |seconds: Vec<f64>| gbps(moved, Samples::new(seconds).median());
        Ok(Row {
            turns,
            gbps: gbps(ours),
            plain_gbps: gbps(plain),
            unpaced_gbps: (!unpaced.is_empty()).then(|| gbps(unpaced)),
            what,
        })
    }

    /// Bars are for medians over rows of what a worker does: the automatic method, one direction. On the host jobs from the size
    /// of the chunks that the hooks ship, for what a smaller one costs besides is the latency; on a GPU the largest jobs, in
    /// orders in which ranges are not merged.
    fn bars(&self, rows: &[Row]) -> Vec<Bar> {
        let bars = match self.engine {
            EngineName::Host => [
                (32 * KIB..256 * KIB, "32 to 128 KiB", 0.9),
                (256 * KIB..GIB, "256 KiB and more", 0.95),
            ],
            EngineName::Cuda => [
                (16 * KIB..128 * KIB, "16 to 64 KiB", 0.8),
                (256 * KIB..GIB, "256 KiB and more", 0.95),
            ],
        };
        let judged = |sizes: &Range<u64>| -> Vec<f64> {
            let wanted = |row: &&Row| {
                let What {
                    way,
                    order,
                    shape,
                    ranges,
                    ..
                } = &row.what;
                let large = match self.engine {
                    EngineName::Host => shape.range_bytes * ranges >= (8 * MIB).min(self.bytes / 2),
                    EngineName::Cuda => *ranges == self.most(shape) && *order != Order::Contiguous,
                };
                *way != Way::Both
                    && shape.method == CopyMethod::Auto
                    && sizes.contains(&shape.range_bytes)
                    && large
            };
            rows.iter().filter(wanted).map(Row::ratio).collect()
        };
        let made = bars.into_iter().map(|(sizes, from, limit)| Bar {
            name: format!("ratio to a plain copy, ranges of {from} (median of rows)"),
            value: Samples::new(judged(&sizes)).median(),
            limit: Limit::AtLeast(limit),
        });
        made.collect()
    }

    /// Blocks in random order, jobs of half the memory.
    fn chart(&self, rows: &[Row], figures: &Value) -> String {
        let mut lines: Vec<Line> = Vec::new();
        let mut add = |name: String, dashed: bool, point: (u64, f64)| match lines
            .iter_mut()
            .find(|line| line.name == name)
        {
            Some(line) => line.points.push(point),
            None => lines.push(Line {
                name,
                dashed,
                points: vec![point],
            }),
        };
        for row in rows {
            let What {
                way,
                order,
                page,
                shape,
                ranges,
            } = row.what;
            let whole = ranges == self.most(&shape);
            if order != Order::Shuffled || page != PageSize::Base4K || !whole {
                continue;
            }
            let (way, method) = (way.word(), method_word(self.engine, shape.method));
            add(
                format!("{way} {method}"),
                false,
                (shape.range_bytes, row.gbps),
            );
            if shape.method == CopyMethod::Auto {
                add(
                    format!("{way} plain"),
                    true,
                    (shape.range_bytes, row.plain_gbps),
                );
            }
        }
        let caption = match figures["gpu"]["name"].as_str() {
            Some(name) => name.to_owned(),
            None => figures["machine"]["cpu"]
                .as_str()
                .unwrap_or("host")
                .to_owned(),
        };
        chart::svg(
            "Block copies in random order, GB/s by bytes of a range",
            &caption,
            &lines,
        )
    }
}

/// How far it is, for people who look on.
fn progress(done: usize, all: usize) {
    let mut terminal = std::io::stderr();
    if !terminal.is_terminal() {
        return;
    }
    let bar = "#".repeat(40 * done / all.max(1));
    // Of nothing: it makes way for a line of the table.
    let end = if done == all { "\r\x1b[K" } else { "" };
    // A progress bar that cannot be drawn stops nothing.
    drop(write!(terminal, "\r[{bar:40}] {done}/{all}{end}"));
}
