//! `bench-store`: the store's calls with 100,000 blocks stored.
//!
//! Everything runs on one core. Chains are asked for in turn, so that a call finds its part of the index in no near cache.
//! Beside wall-clock time stands the thread's processor time: on a machine that others use too, the latter is what counts.
//!
//! `bench-store [--json FILE|-] [--seed N] [--repeats N]`

use std::time::{Duration, Instant};

use greenroom_benches::{Bar, Limit, Options, Random, Result, Samples, judge, round, thread_cpu};
use kvstore::{
    BlockHash, Namespace, NamespaceId, Owner, Presence, Store, StoreConfig, Term, u64_from,
    usize_from,
};
use serde_json::{Value, json};

/// Blocks stored.
const STORED: u32 = 100_000;
/// Blocks of the chain that is matched.
const CHAIN: u32 = 8192;
/// Blocks of one reservation or lease.
const BATCH: u32 = 256;
/// Lookups that are timed together.
const LOOKUPS: u32 = 100_000;
const OWNER: Owner = Owner(1);

fn main() -> Result<()> {
    let options = Options::from_args(&[("repeats", 400)]);
    let mut bench = Bench::new(&options)?;
    let rows = [bench.prefix(), bench.lookups(), bench.calls()?].concat();
    options.say(
        "call                                  wall us p50        p99    cpu us p50        p99",
    );
    for row in &rows {
        options.say(&row.line());
    }
    let by_name = |name| {
        let row = rows.iter().find(|row| row.name == name);
        row.map_or(f64::NAN, |row| row.cpu.median())
    };
    let per_second = |name| f64::from(LOOKUPS) / by_name(name) * 1e6;
    let bars = [
        Bar {
            name: "match_prefix of 8192 blocks, wall ms P50".to_owned(),
            value: round(rows[0].wall.median() / 1e3),
            limit: Limit::AtMost(1.0),
        },
        Bar {
            name: "match_prefix of 8192 blocks, wall ms P99".to_owned(),
            value: round(rows[0].wall.per_mille(990) / 1e3),
            limit: Limit::AtMost(1.0),
        },
        Bar {
            name: "lookups of stored blocks, M/s on one core".to_owned(),
            value: round(per_second(FOUND) / 1e6),
            limit: Limit::AtLeast(1.0),
        },
        Bar {
            name: "lookups of unknown blocks, M/s on one core".to_owned(),
            value: round(per_second(UNKNOWN) / 1e6),
            limit: Limit::AtLeast(1.0),
        },
    ];
    let bars = judge(&options, &bars);
    let rows: Value = rows.iter().map(Row::json).collect();
    options.write(json!({"rows": rows, "bars": bars, "stored_blocks": STORED}))
}

const FOUND: &str = "100000 lookups, stored, random";
const UNKNOWN: &str = "100000 lookups, unknown";

struct Bench {
    store: Store,
    namespace: Namespace,
    /// What is stored: chains of [`CHAIN`] blocks and a shorter one.
    chains: Vec<Vec<BlockHash>>,
    random: Random,
    repeats: u64,
    now: Instant,
}

impl Bench {
    fn new(options: &Options) -> Result<Self> {
        let mut store = Store::new(StoreConfig {
            slots: STORED,
            pin_budget_slots: STORED / 2,
            lease_ttl_max: Duration::from_secs(30),
            leases_max: 1024,
            namespaces_max: 16,
        })?
        .shown_in(Presence::create(STORED)?);
        let namespace = store.open_namespace(NamespaceId([7; 32]))?;
        let mut bench = Self {
            store,
            namespace,
            chains: Vec::new(),
            random: Random::new(options.seed),
            repeats: options.number("repeats"),
            now: Instant::now(),
        };
        let mut left = STORED;
        while left > 0 {
            let chain = bench.random.chain(left.min(CHAIN));
            left -= left.min(CHAIN);
            for part in chain.chunks(usize_from(BATCH)) {
                bench.save(part)?;
            }
            bench.chains.push(chain);
        }
        let stored = bench.store.counts().committed;
        assert_eq!(u64_from(stored), u64::from(STORED), "all of it is stored");
        Ok(bench)
    }

    fn term(&self) -> Term {
        Term {
            now: self.now,
            ttl: Duration::from_secs(30),
        }
    }

    fn save(&mut self, hashes: &[BlockHash]) -> Result<()> {
        let term = self.term();
        let reservation = self
            .store
            .reserve(OWNER, self.namespace, hashes, term)?
            .ok_or("nothing was reserved")?;
        assert_eq!(reservation.slots.len(), hashes.len(), "all of it is new");
        let _stored = self.store.commit(OWNER, reservation.id, self.now)?;
        Ok(())
    }

    fn prefix(&self) -> Vec<Row> {
        let whole: Vec<_> = self
            .chains
            .iter()
            .filter(|chain| chain.len() == usize_from(CHAIN))
            .collect();
        let mut timer = Timer::new("match_prefix of 8192 blocks");
        for chain in whole
            .iter()
            .cycle()
            .take(usize_from(CHAIN).min(whole.len() * 40))
        {
            let matched = timer.time(|| self.store.match_prefix(self.namespace, chain));
            assert_eq!(matched, chain.len(), "the whole chain is stored");
        }
        vec![timer.row()]
    }

    fn lookups(&mut self) -> Vec<Row> {
        let mut known: Vec<BlockHash> = self.chains.concat();
        self.random.shuffle(&mut known);
        let unknown = self.random.chain(LOOKUPS);
        let repeats = self.repeats.div_ceil(10);
        [(FOUND, &known), (UNKNOWN, &unknown)]
            .map(|(name, hashes)| {
                let mut timer = Timer::new(name);
                let expected = if name == FOUND { hashes.len() } else { 0 };
                for _ in 0..repeats {
                    let found = timer.time(|| {
                        let found = |hash: &&BlockHash| self.store.contains(self.namespace, hash);
                        hashes.iter().filter(found).count()
                    });
                    assert_eq!(found, expected, "{name}");
                }
                timer.row()
            })
            .into()
    }

    /// A full store: every reservation evicts as many blocks.
    fn calls(&mut self) -> Result<Vec<Row>> {
        let mut timers = [
            "reserve 256 blocks, evicting 256",
            "commit 256 blocks",
            "lease 256 blocks",
            "release 256 blocks",
            "touch 256 blocks",
        ]
        .map(Timer::new);
        let [reserve, commit, lease, release, touch] = &mut timers;
        for _ in 0..self.repeats {
            let hashes = self.random.chain(BATCH);
            let (term, namespace) = (self.term(), self.namespace);
            let reservation = reserve
                .time(|| self.store.reserve(OWNER, namespace, &hashes, term))?
                .ok_or("nothing was reserved")?;
            assert_eq!(reservation.slots.len(), hashes.len(), "all of it is new");
            let _stored = commit.time(|| self.store.commit(OWNER, reservation.id, self.now))?;
            let leased = lease
                .time(|| self.store.lease_prefix(OWNER, namespace, &hashes, term))?
                .ok_or("nothing was leased")?;
            assert_eq!(leased.slots.len(), hashes.len(), "all of it is stored");
            let _let_go = release.time(|| self.store.release(OWNER, leased.id))?;
            touch.time(|| self.store.touch(namespace, &hashes, self.now));
        }
        self.store.check_invariants();
        Ok(timers.into_iter().map(Timer::row).collect())
    }
}

struct Timer {
    name: &'static str,
    wall: Vec<f64>,
    cpu: Vec<f64>,
}

impl Timer {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            wall: Vec::new(),
            cpu: Vec::new(),
        }
    }

    fn time<T>(&mut self, call: impl FnOnce() -> T) -> T {
        let (cpu, wall) = (thread_cpu(), Instant::now());
        let result = std::hint::black_box(call());
        self.wall.push(wall.elapsed().as_secs_f64() * 1e6);
        self.cpu.push((thread_cpu() - cpu).as_secs_f64() * 1e6);
        result
    }

    fn row(self) -> Row {
        Row {
            name: self.name,
            wall: Samples::new(self.wall),
            cpu: Samples::new(self.cpu),
        }
    }
}

/// One call's times in microseconds.
#[derive(Clone)]
struct Row {
    name: &'static str,
    wall: Samples,
    cpu: Samples,
}

impl Row {
    fn line(&self) -> String {
        let [wall, wall_p99] = [self.wall.median(), self.wall.per_mille(990)];
        let [cpu, cpu_p99] = [self.cpu.median(), self.cpu.per_mille(990)];
        format!(
            "{:<36} {wall:>12.1} {wall_p99:>10.1} {cpu:>13.1} {cpu_p99:>10.1}",
            self.name
        )
    }

    fn json(&self) -> Value {
        json!({"call": self.name, "wall_us": self.wall.json(), "cpu_us": self.cpu.json()})
    }
}
