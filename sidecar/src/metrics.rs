//! Every figure that the sidecar shows to Prometheus, by name, in one table ([`TABLE`]).
//!
//! Owns one registry per instance (two sidecars in one test process do not share figures). The actor and the API count here; nothing
//! in here decides anything, and no label value comes from a client, so the number of series is bounded.

use std::collections::BTreeMap;
use std::time::Duration;

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::commands::{HintVerb, Outcome};

/// One metric: its name, its labels and what it means.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Name as Prometheus sees it.
    pub name: &'static str,
    /// Label names, in the order in which the code gives their values.
    pub labels: &'static [&'static str],
    /// Help text, with the unit.
    pub help: &'static str,
}

macro_rules! table {
    ($($id:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(const $id: Row = Row { name: $name, labels: &[$($label),*], help: $help };)*
        /// All metrics of the sidecar.
        pub const TABLE: &[Row] = &[$($id),*];
    };
}

table! {
    BUILD_INFO "greenroom_build_info" ["version"] "Always 1; carries the version of the sidecar.";
    SLOTS "greenroom_slots" ["state"] "Slots of the arena by state; pinned, leased and draining slots may count as used too.";
    SESSIONS "greenroom_sessions" ["state"] "Sessions by state.";
    HINTS "greenroom_hints_total" ["action", "outcome"] "Hint actions answered.";
    TOOL_EVENTS "greenroom_tool_events_total" ["event"] "Tool events accepted from clients.";
    PREFETCH_BLOCKS "greenroom_prefetch_blocks_total" ["outcome"] "Blocks brought back ahead of a request, by what became of them.";
    COPY_BYTES "greenroom_copy_bytes_total" ["direction", "kind"] "Bytes copied between arena and GPU.";
    COPY_SECONDS "greenroom_copy_seconds" ["direction", "kind"] "Duration of a copy job, first submission to last completion, in seconds.";
    COPY_FAILURES "greenroom_copy_failures_total" ["direction", "kind"] "Copy jobs that failed or were cancelled.";
    HOOK_SECONDS "greenroom_hook_seconds" ["hook"] "Duration of a scheduler hook, in seconds.";
    HOOK_TIMEOUTS "greenroom_hook_timeouts_total" [] "Lookups that the scheduler gave up waiting for (each became a miss).";
    MATCH_BLOCKS "greenroom_match_blocks_total" ["result"] "Blocks of prompts that the GPU did not have: loaded from the arena (hit) or computed (miss).";
    EVICTED_BLOCKS "greenroom_evicted_blocks_total" ["reason"] "Blocks that lost their slot.";
    FENCED_COPIES "greenroom_fenced_copies_total" [] "Copies whose slots or GPU blocks were held back until the copy was proved to have ended.";
    EXPIRED_LEASES "greenroom_expired_leases_total" [] "Leases and reservations that ran out of time.";
    ENGINE_CONNECTIONS "greenroom_engine_connections" [] "Connected engines.";
    ARENA_BYTES "greenroom_arena_bytes" [] "Size of the arena in bytes.";
    COMMANDS_REFUSED "greenroom_commands_refused_total" ["reason"] "Client commands that were not taken.";
    HTTP_REQUESTS "greenroom_http_requests_total" ["route", "status"] "HTTP requests answered, by route and status class.";
    HTTP_CONNECTIONS "greenroom_http_connections" [] "Open HTTP connections.";
    HTTP_CONNECTIONS_CLOSED "greenroom_http_connections_closed_total" ["reason"] "HTTP connections that the sidecar closed by itself.";
    BATCHAGENT_PAIRS "prefetch_block_pairs_total" [] "Block pairs answered to BatchAgent's prefetch calls.";
    BATCHAGENT_MISSING "prefetch_missing_total" [] "Hints of BatchAgent's prefetch calls that named nothing known.";
}

/// Bounds of the copy histogram in seconds: 100 µs to 10 s.
const COPY_BUCKETS: &[f64] = &[
    0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0,
];

/// Bounds of the hook histogram in seconds: 1 µs to 100 ms, with the two bars of the design (50 µs, 200 µs) among them.
const HOOK_BUCKETS: &[f64] = &[
    0.000_001, 0.000_003, 0.000_01, 0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.005,
    0.05, 0.1,
];

macro_rules! label {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vmeta])* $variant,)* }
        impl $name {
            /// Every value, in table order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            /// The label's text.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }
    };
}

label! {
    /// What a slot is counted as. `Used` = committed or being filled; the later ones are subsets or on the way out.
    SlotState {
        /// In the allocator.
        Free = "free",
        /// Holds or receives content.
        Used = "used",
        /// Under at least one pin.
        Pinned = "pinned",
        /// Under at least one lease.
        Leased = "leased",
        /// Waiting for the proof that its copies have ended.
        Draining = "draining",
    }
}

label! {
    /// What became of a block that was brought back ahead of a request.
    PrefetchEnd {
        /// A request hit it on the GPU.
        Used = "used",
        /// Evicted or retired unused.
        Wasted = "wasted",
        /// The request came before the copy had ended.
        Late = "late",
        /// The copy was called off.
        Cancelled = "cancelled",
    }
}

label! {
    /// Which way a copy goes.
    CopyDirection {
        /// Arena to GPU.
        HostToDevice = "h2d",
        /// GPU to arena.
        DeviceToHost = "d2h",
    }
}

label! {
    /// Why a copy was made.
    CopyCause {
        /// A request waits for it.
        Demand = "demand",
        /// Ahead of a request.
        Prefetch = "prefetch",
        /// Full blocks on their way into the arena.
        Save = "save",
    }
}

label! {
    /// A scheduler hook.
    Hook {
        /// Request enqueued.
        TurnStarted = "turn_started",
        /// Longest committed prefix asked for.
        MatchPrefix = "match_prefix",
        /// Demand load.
        SwapIn = "swap_in",
        /// Every engine step.
        Plan = "plan",
        /// Worker reports.
        CopiesDone = "copies_done",
        /// Request finished.
        TurnEnded = "turn_ended",
        /// New epoch.
        Reset = "reset",
    }
}

label! {
    /// Why a block lost its slot.
    EvictReason {
        /// Longest unused.
        Lru = "lru",
        /// Asked for by a `kv.demote`.
        Demoted = "demoted",
        /// Its session was retired.
        Retired = "retired",
        /// A newer turn of its session no longer has it.
        Superseded = "superseded",
        /// New epoch of its namespace.
        Reset = "reset",
    }
}

label! {
    /// A tool event.
    ToolEvent {
        /// The tool began.
        Start = "start",
        /// News of it.
        Progress = "progress",
        /// It ended.
        End = "end",
    }
}

label! {
    /// Why a command was not taken.
    Refusal {
        /// The command queue was full.
        Busy = "busy",
        /// The sidecar was shutting down.
        Draining = "draining",
        /// Missing or wrong token.
        Unauthorized = "unauthorized",
        /// Not understood.
        Malformed = "malformed",
    }
}

label! {
    /// Why the sidecar closed a connection.
    ConnectionEnd {
        /// No complete request in time.
        Timeout = "timeout",
        /// Made room for a newer one.
        Replaced = "replaced",
        /// All connections were at work.
        Full = "full",
    }
}

/// What a hint action is counted as; an action whose type was not understood has no verb.
pub fn verb_label(verb: Option<HintVerb>) -> &'static str {
    match verb {
        Some(HintVerb::Prefetch) => "prefetch",
        Some(HintVerb::Pin) => "pin",
        Some(HintVerb::Unpin) => "unpin",
        Some(HintVerb::Retain) => "retain",
        Some(HintVerb::Demote) => "demote",
        None => "unknown",
    }
}

/// All figures of one sidecar.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    slots: IntGaugeVec,
    sessions: IntGaugeVec,
    hints: IntCounterVec,
    tool_events: IntCounterVec,
    prefetch_blocks: IntCounterVec,
    copy_bytes: IntCounterVec,
    copy_seconds: HistogramVec,
    copy_failures: IntCounterVec,
    hook_seconds: HistogramVec,
    hook_timeouts: IntCounter,
    match_blocks: IntCounterVec,
    evicted_blocks: IntCounterVec,
    fenced_copies: IntCounter,
    expired_leases: IntCounter,
    engine_connections: IntGauge,
    arena_bytes: IntGauge,
    commands_refused: IntCounterVec,
    http_requests: IntCounterVec,
    http_connections: IntGauge,
    http_connections_closed: IntCounterVec,
    batchagent_pairs: IntCounter,
    batchagent_missing: IntCounter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A fresh set of figures, all zero; labels with a closed set of values are shown from the start.
    pub fn new() -> Self {
        let r = Registry::new();
        gauges(&r, BUILD_INFO)
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        let metrics = Self {
            slots: gauges(&r, SLOTS),
            sessions: gauges(&r, SESSIONS),
            hints: counters(&r, HINTS),
            tool_events: counters(&r, TOOL_EVENTS),
            prefetch_blocks: counters(&r, PREFETCH_BLOCKS),
            copy_bytes: counters(&r, COPY_BYTES),
            copy_seconds: histograms(&r, COPY_SECONDS, COPY_BUCKETS),
            copy_failures: counters(&r, COPY_FAILURES),
            hook_seconds: histograms(&r, HOOK_SECONDS, HOOK_BUCKETS),
            hook_timeouts: counter(&r, HOOK_TIMEOUTS),
            match_blocks: counters(&r, MATCH_BLOCKS),
            evicted_blocks: counters(&r, EVICTED_BLOCKS),
            fenced_copies: counter(&r, FENCED_COPIES),
            expired_leases: counter(&r, EXPIRED_LEASES),
            engine_connections: gauge(&r, ENGINE_CONNECTIONS),
            arena_bytes: gauge(&r, ARENA_BYTES),
            commands_refused: counters(&r, COMMANDS_REFUSED),
            http_requests: counters(&r, HTTP_REQUESTS),
            http_connections: gauge(&r, HTTP_CONNECTIONS),
            http_connections_closed: counters(&r, HTTP_CONNECTIONS_CLOSED),
            batchagent_pairs: counter(&r, BATCHAGENT_PAIRS),
            batchagent_missing: counter(&r, BATCHAGENT_MISSING),
            registry: r,
        };
        metrics.show_zeroes();
        metrics
    }

    /// Makes the series of closed label sets exist, so that a rate over them starts at the first event.
    fn show_zeroes(&self) {
        for state in SlotState::ALL {
            self.slots.with_label_values(&[state.as_str()]).set(0);
        }
        for event in ToolEvent::ALL {
            self.tool_events
                .with_label_values(&[event.as_str()])
                .reset();
        }
        for end in PrefetchEnd::ALL {
            self.prefetch_blocks
                .with_label_values(&[end.as_str()])
                .reset();
        }
        for reason in EvictReason::ALL {
            self.evicted_blocks
                .with_label_values(&[reason.as_str()])
                .reset();
        }
        for reason in Refusal::ALL {
            self.commands_refused
                .with_label_values(&[reason.as_str()])
                .reset();
        }
        for reason in ConnectionEnd::ALL {
            self.http_connections_closed
                .with_label_values(&[reason.as_str()])
                .reset();
        }
        for hook in Hook::ALL {
            drop(self.hook_seconds.with_label_values(&[hook.as_str()]));
        }
        for (direction, cause) in [
            (CopyDirection::HostToDevice, CopyCause::Demand),
            (CopyDirection::HostToDevice, CopyCause::Prefetch),
            (CopyDirection::DeviceToHost, CopyCause::Save),
        ] {
            let labels = [direction.as_str(), cause.as_str()];
            self.copy_bytes.with_label_values(&labels).reset();
            self.copy_failures.with_label_values(&labels).reset();
            drop(self.copy_seconds.with_label_values(&labels));
        }
        self.match_blocks.with_label_values(&["hit"]).reset();
        self.match_blocks.with_label_values(&["miss"]).reset();
    }

    /// Text for `GET /metrics`.
    ///
    /// # Errors
    /// Only if the encoder refuses a family, which the table rules out.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Every counter by name and labels as `render` writes them, for `GET /v1/status`.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let Ok(text) = self.render() else {
            return BTreeMap::new();
        };
        let counters = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let name = series.split('{').next()?;
            let counted = name.ends_with("_total");
            Some((series.to_owned(), value.parse().ok().filter(|_| counted)?))
        });
        counters.collect()
    }

    /// Sets the number of slots in `state`.
    pub fn set_slots(&self, state: SlotState, slots: u64) {
        self.slots
            .with_label_values(&[state.as_str()])
            .set(clamp(slots));
    }

    /// Sets the sessions per state; states that are not named drop to 0.
    pub fn set_sessions(&self, by_state: &[(&'static str, u64)]) {
        self.sessions.reset();
        for (state, sessions) in by_state {
            self.sessions
                .with_label_values(&[*state])
                .set(clamp(*sessions));
        }
    }

    /// Counts one answered hint action; `None` for an action whose type was not understood.
    pub fn hint(&self, verb: Option<HintVerb>, outcome: Outcome) {
        self.hints
            .with_label_values(&[verb_label(verb), outcome.as_str()])
            .inc();
    }

    /// Counts one accepted tool event.
    pub fn tool_event(&self, event: ToolEvent) {
        self.tool_events.with_label_values(&[event.as_str()]).inc();
    }

    /// Counts blocks brought back ahead of a request.
    pub fn prefetch_blocks(&self, end: PrefetchEnd, blocks: u64) {
        self.prefetch_blocks
            .with_label_values(&[end.as_str()])
            .inc_by(blocks);
    }

    /// Counts one finished copy job.
    pub fn copied(&self, direction: CopyDirection, cause: CopyCause, bytes: u64, took: Duration) {
        let labels = [direction.as_str(), cause.as_str()];
        self.copy_bytes.with_label_values(&labels).inc_by(bytes);
        self.copy_seconds
            .with_label_values(&labels)
            .observe(took.as_secs_f64());
    }

    /// Counts one copy job that failed or was cancelled.
    pub fn copy_failed(&self, direction: CopyDirection, cause: CopyCause) {
        self.copy_failures
            .with_label_values(&[direction.as_str(), cause.as_str()])
            .inc();
    }

    /// Records one run of a hook.
    pub fn hook(&self, hook: Hook, took: Duration) {
        self.hook_seconds
            .with_label_values(&[hook.as_str()])
            .observe(took.as_secs_f64());
    }

    /// Counts lookups that were given up.
    pub fn hook_timeouts(&self, lookups: u64) {
        self.hook_timeouts.inc_by(lookups);
    }

    /// Counts the blocks of one prefix lookup.
    pub fn match_blocks(&self, hit: u64, miss: u64) {
        self.match_blocks.with_label_values(&["hit"]).inc_by(hit);
        self.match_blocks.with_label_values(&["miss"]).inc_by(miss);
    }

    /// Counts blocks that lost their slot.
    pub fn evicted(&self, reason: EvictReason, blocks: u64) {
        self.evicted_blocks
            .with_label_values(&[reason.as_str()])
            .inc_by(blocks);
    }

    /// Counts copies that had to be fenced.
    pub fn fenced(&self, copies: u64) {
        self.fenced_copies.inc_by(copies);
    }

    /// Counts leases and reservations that ran out.
    pub fn expired_leases(&self, leases: u64) {
        self.expired_leases.inc_by(leases);
    }

    /// Sets the number of connected engines.
    pub fn set_engines(&self, engines: u64) {
        self.engine_connections.set(clamp(engines));
    }

    /// Sets the arena's size.
    pub fn set_arena_bytes(&self, bytes: u64) {
        self.arena_bytes.set(clamp(bytes));
    }

    /// Counts one command that was not taken.
    pub fn refused(&self, reason: Refusal) {
        self.commands_refused
            .with_label_values(&[reason.as_str()])
            .inc();
    }

    /// Counts one answered HTTP request. `route` is a route pattern of ours, never the path that a client wrote.
    pub fn http(&self, route: &str, status: u16) {
        let class = match status {
            200..=299 => "2xx",
            400..=499 => "4xx",
            500..=599 => "5xx",
            _ => "other",
        };
        self.http_requests.with_label_values(&[route, class]).inc();
    }

    /// Sets the number of open HTTP connections.
    pub fn set_http_connections(&self, open: usize) {
        self.http_connections
            .set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// Counts one connection that the sidecar closed by itself.
    pub fn connection_closed(&self, reason: ConnectionEnd) {
        self.http_connections_closed
            .with_label_values(&[reason.as_str()])
            .inc();
    }

    /// Counts what a BatchAgent prefetch call was answered.
    pub fn batchagent(&self, pairs: usize, missing: usize) {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        self.batchagent_pairs.inc_by(count(pairs));
        self.batchagent_missing.inc_by(count(missing));
    }
}

fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Takes a metric whose name, labels and help come from [`TABLE`].
///
/// # Panics
/// If the table holds a bad or a repeated name: a programmer's error that every test finds.
fn registered<C>(registry: &Registry, row: Row, made: prometheus::Result<C>) -> C
where
    C: prometheus::core::Collector + Clone + 'static,
{
    let outcome = made.and_then(|metric| {
        registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    });
    match outcome {
        Ok(metric) => metric,
        Err(error) => panic!("metric {}: {error}", row.name),
    }
}

fn counters(registry: &Registry, row: Row) -> IntCounterVec {
    registered(
        registry,
        row,
        IntCounterVec::new(Opts::new(row.name, row.help), row.labels),
    )
}

fn counter(registry: &Registry, row: Row) -> IntCounter {
    registered(registry, row, IntCounter::new(row.name, row.help))
}

fn gauges(registry: &Registry, row: Row) -> IntGaugeVec {
    registered(
        registry,
        row,
        IntGaugeVec::new(Opts::new(row.name, row.help), row.labels),
    )
}

fn gauge(registry: &Registry, row: Row) -> IntGauge {
    registered(registry, row, IntGauge::new(row.name, row.help))
}

fn histograms(registry: &Registry, row: Row, buckets: &[f64]) -> HistogramVec {
    let opts = HistogramOpts::new(row.name, row.help).buckets(buckets.to_vec());
    registered(registry, row, HistogramVec::new(opts, row.labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(metrics: &Metrics, start: &str) -> String {
        let text = metrics.render().unwrap();
        let found: Vec<&str> = text.lines().filter(|l| l.starts_with(start)).collect();
        assert_eq!(found.len(), 1, "{start} in\n{text}");
        found[0].to_owned()
    }

    #[test]
    fn every_row_of_the_table_is_rendered_once_used() {
        let m = Metrics::new();
        m.set_sessions(&[("hold", 2)]);
        m.hint(Some(HintVerb::Pin), Outcome::Clipped);
        m.http("/v1/status", 200);
        let text = m.render().unwrap();
        for row in TABLE {
            assert!(
                text.contains(&format!("# TYPE {} ", row.name)),
                "{} is missing",
                row.name
            );
            for label in row.labels {
                let with_label =
                    |l: &str| l.starts_with(row.name) && l.contains(&format!("{label}=\""));
                assert!(text.lines().any(with_label), "{} without {label}", row.name);
            }
        }
    }

    #[test]
    fn names_follow_the_contract() {
        for row in TABLE {
            let ours = row.name.starts_with("greenroom_");
            assert!(ours || row.name.starts_with("prefetch_"), "{}", row.name);
        }
    }

    #[test]
    fn counts_arrive_under_their_labels() {
        let m = Metrics::new();
        m.hint(Some(HintVerb::Prefetch), Outcome::Accepted);
        m.hint(None, Outcome::Rejected);
        m.match_blocks(5, 2);
        m.copied(
            CopyDirection::HostToDevice,
            CopyCause::Demand,
            4096,
            Duration::from_millis(2),
        );
        m.batchagent(3, 4);
        let prefix = "greenroom_hints_total{action=\"prefetch\",outcome=\"accepted\"}";
        assert!(line(&m, prefix).ends_with(" 1"));
        assert!(
            line(
                &m,
                "greenroom_hints_total{action=\"unknown\",outcome=\"rejected\"}"
            )
            .ends_with(" 1")
        );
        assert!(line(&m, "greenroom_match_blocks_total{result=\"hit\"}").ends_with(" 5"));
        assert!(line(&m, "greenroom_match_blocks_total{result=\"miss\"}").ends_with(" 2"));
        assert!(
            line(
                &m,
                "greenroom_copy_bytes_total{direction=\"h2d\",kind=\"demand\"}"
            )
            .ends_with(" 4096")
        );
        assert!(
            line(
                &m,
                "greenroom_copy_seconds_count{direction=\"h2d\",kind=\"demand\"}"
            )
            .ends_with(" 1")
        );
        assert!(line(&m, "prefetch_block_pairs_total").ends_with(" 3"));
        assert!(line(&m, "prefetch_missing_total").ends_with(" 4"));
    }

    #[test]
    fn counters_are_listed_as_rendered_and_gauges_are_not() {
        let m = Metrics::new();
        m.set_engines(1);
        m.match_blocks(5, 0);
        m.fenced(2);
        let counters = m.counters();
        assert_eq!(counters["greenroom_match_blocks_total{result=\"hit\"}"], 5);
        assert_eq!(counters["greenroom_fenced_copies_total"], 2);
        assert!(counters.keys().all(|name| name.contains("_total")));
    }

    #[test]
    fn a_session_state_that_is_gone_drops_out() {
        let m = Metrics::new();
        m.set_sessions(&[("hold", 2), ("host", 1)]);
        m.set_sessions(&[("host", 3)]);
        assert!(!m.render().unwrap().contains("state=\"hold\""));
        assert!(line(&m, "greenroom_sessions{state=\"host\"}").ends_with(" 3"));
    }

    #[test]
    fn two_instances_do_not_share_figures() {
        let (a, b) = (Metrics::new(), Metrics::new());
        a.set_engines(7);
        assert!(line(&a, "greenroom_engine_connections").ends_with(" 7"));
        assert!(line(&b, "greenroom_engine_connections").ends_with(" 0"));
    }
}
