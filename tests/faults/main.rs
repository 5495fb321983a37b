//! Every fault point of `kvstore::faults::POINTS`: it is reached, and the service goes on afterwards.
//!
//! Points belong to the process: nextest gives each test its own, and under `cargo test` they take turns. Every block that
//! an engine reads is compared with the bytes of its hash (`greenroom_tests::engine`), so each turn is also a check.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod deaths;
mod scenarios;

use std::path::Path;
use std::time::{Duration, Instant};

use greenroom_tests::child;
use greenroom_tests::engine::{Engine, Options, chain};
use greenroom_tests::sidecar::{Sidecar, until};
use kvstore::BlockHash;
use kvstore::faults::{POINTS, arm, reached};

/// Not a test of its own: see `greenroom_tests::child`.
#[test]
fn child_greenroom() {
    child::greenroom_if_told();
}

/// Points that lie where these tests do not come, and the tests that go there.
const ELSEWHERE: &[(&str, Elsewhere)] = &[
    (
        "mover::submit::report_early",
        Elsewhere {
            file: "tests/python/harness/test_harness.py",
            test: "def test_the_harness_catches(",
        },
    ),
    ("thread::submit::skip_wake", MODELS),
    ("thread::fence::skip_wait", MODELS),
    ("owner::settle::skip_wake", MODELS),
];
const MODELS: Elsewhere = Elsewhere {
    file: "cuda/src/models.rs",
    test: "fn broken_variants_are_caught(",
};

/// A test that is none of this binary's.
struct Elsewhere {
    /// In the workspace. It names the point, too.
    file: &'static str,
    /// How the test's definition begins.
    test: &'static str,
}

macro_rules! points {
    ($($test:ident: $point:literal, $scenario:expr;)*) => {
        /// The tests here, and their points: a run's list of tests is the list of the points that were reached.
        const HERE: &[(&str, &str)] = &[$((stringify!($test), $point)),*];

        $(#[test]
        fn $test() {
            go_through($point, $scenario);
        })*
    };
}

points! {
    store_reserve_full: "store::reserve::full", scenarios::nothing_is_stored;
    store_commit_refused: "store::commit::refused", scenarios::not_all_is_stored;
    actor_settle_lost: "actor::settle::lost", scenarios::a_commit_is_lost;
    server_welcome_kill: "server::welcome::kill", scenarios::another_engine_comes;
    client_hello_kill: "client::hello::kill", scenarios::another_engine_comes;
    server_write_delay: "server::write::delay", scenarios::a_frame_is_held;
    server_write_reorder: "server::write::reorder", scenarios::a_frame_is_spoilt;
    server_write_duplicate: "server::write::duplicate", scenarios::a_frame_is_spoilt;
    server_write_truncate: "server::write::truncate", scenarios::a_frame_is_spoilt;
    server_write_flip: "server::write::flip", scenarios::a_bit_is_flipped;
    server_write_kill: "server::write::kill", scenarios::a_frame_is_spoilt;
    server_write_abort: "server::write::abort", deaths::the_sidecar_dies;
    client_write_delay: "client::write::delay", scenarios::a_message_is_held;
    client_write_reorder: "client::write::reorder", scenarios::a_frame_is_spoilt;
    client_write_duplicate: "client::write::duplicate", scenarios::a_frame_is_spoilt;
    client_write_truncate: "client::write::truncate", scenarios::a_frame_is_spoilt;
    client_write_flip: "client::write::flip", scenarios::a_bit_is_flipped;
    client_write_kill: "client::write::kill", scenarios::a_frame_is_spoilt;
    client_write_abort: "client::write::abort", deaths::an_engine_dies;
    hooks_recheck_saves_skip: "hooks::recheck_saves::skip", scenarios::a_turn_is_served;
    hooks_reset_skip: "hooks::reset::skip", scenarios::a_reset_is_not_heard;
    budget_admit_one_less: "budget::admit::one_less", scenarios::a_session_comes_back;
    host_copy_delay: "host::copy::delay", scenarios::a_copy_is_held;
    host_copy_fail: "host::copy::fail", scenarios::copies_fail;
    thread_take_finished_late: "thread::take_finished::late", scenarios::copies_are_told_late;
    gate_handler_delay: "gate::handler::delay", scenarios::a_call_is_held;
    handle_ask_busy: "handle::ask::busy", scenarios::a_call_is_refused;
    gate_answer_cut: "gate::answer::cut", scenarios::an_answer_is_cut;
}

#[test]
fn every_point_has_a_test() {
    for point in POINTS {
        let elsewhere = ELSEWHERE.iter().any(|(name, _)| *name == point.name);
        let here = HERE.iter().filter(|(_, name)| *name == point.name).count();
        assert_eq!(here + usize::from(elsewhere), 1, "{}", point.name);
    }
    for (test, point) in HERE {
        assert_eq!(
            *test,
            point.replace("::", "_"),
            "the test's name is the point's"
        );
    }
    assert_eq!(HERE.len() + ELSEWHERE.len(), POINTS.len());
}

/// Whether those tests fail without their point is theirs to show; here a rename must not leave a point without one.
#[test]
fn tests_elsewhere_are_where_they_are_said_to_be() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (point, Elsewhere { file, test }) in ELSEWHERE {
        let code = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        assert!(code.contains(test), "{point}: {file} has no `{test}`");
        let quoted = format!("\"{point}\"");
        assert!(code.contains(&quoted), "{file} does not name {point}");
    }
}

/// One at a time, where all share a process.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn go_through(point: &'static str, scenario: fn(&mut World, &'static str)) {
    let _turn = TURN.lock();
    let before = reached(point);
    let mut world = World::new();
    let armed = Disarm;
    scenario(&mut world, point);
    // Of those that die there is nobody left to ask; how they died has been looked at.
    let died = point.ends_with("::abort");
    assert!(died || reached(point) > before, "{point} was not reached");
    drop(armed);
    world.goes_on();
}

/// Turns every point off when it is dropped: a test that fails while something is held should fail, not wait for it.
struct Disarm;

impl Drop for Disarm {
    fn drop(&mut self) {
        for point in POINTS {
            arm(point.name, "off").unwrap();
        }
    }
}

/// Blocks of a session.
const BLOCKS: u32 = 40;

fn session(id: u32) -> Vec<BlockHash> {
    chain((0..BLOCKS).map(|i| id << 20 | i))
}

/// A sidecar, an engine that the fault strikes, and one that must not notice.
struct World {
    sidecar: Sidecar,
    struck: Engine,
    other: Engine,
    /// For names and contents that were not there before.
    next: u32,
}

impl World {
    fn new() -> Self {
        let sidecar = Sidecar::start("16MiB");
        let connect = |name: &str, material, lookup_wait| {
            let options = Options {
                material,
                lookup_wait,
                ..Options::default()
            };
            Engine::connect(sidecar.socket(), name, 100, options)
        };
        let struck = connect("struck", &b"weights"[..], Duration::from_millis(300));
        let other = connect("other", b"other weights", Duration::from_secs(5));
        let mut this = Self {
            sidecar,
            struck,
            other,
            next: 100,
        };
        this.struck.turn(Some("a"), &session(1));
        this.saved("a");
        this.other.turn(Some("b"), &session(2));
        until("the other engine's session is saved", || {
            this.other.step();
            this.stored("b") == u64::from(BLOCKS)
        });
        this.other_is_served();
        this
    }

    fn fresh(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// Blocks of a session that are in the arena.
    fn stored(&self, name: &str) -> u64 {
        let view = self.sidecar.get(&format!("/v1/sessions/{name}"));
        view["blocks"]["host"].as_u64().unwrap()
    }

    /// Steps until a session of the struck engine is in the arena in full.
    fn saved(&mut self, name: &str) {
        until("the session is saved", || {
            self.struck.step();
            self.stored(name) == u64::from(BLOCKS)
        });
    }

    /// Steps the struck engine until the point has struck once more than `before`.
    fn until_reached(&mut self, point: &str, before: u64) {
        until("the point is reached", || {
            self.struck.step();
            reached(point) > before
        });
    }

    /// Drives session "a" out of the struck engine's pool.
    fn evict(&mut self) {
        let seed = self.fresh();
        self.struck.flood(seed, 200);
    }

    /// Some life of the struck engine: other requests, then one of session "a".
    fn live(&mut self) {
        let seed = self.fresh();
        self.struck.flood(seed, 60);
        self.struck.turn(Some("a"), &session(1));
    }

    /// The other engine finds all that it has stored.
    fn other_is_served(&mut self) {
        let seed = self.fresh();
        self.other.flood(seed, 200);
        let turn = self.other.turn(Some("b"), &session(2));
        assert_eq!(turn.local + turn.loaded, 39, "{turn:?}");
        assert!(turn.loaded > 0, "{turn:?}");
        self.other_is_quiet();
    }

    /// Until it copies nothing and all that it has said is heard: what is armed next strikes somebody else.
    fn other_is_quiet(&mut self) {
        self.other.settle();
        let turn = self.fresh();
        let (request, name) = (format!("quiet-{turn}"), format!("quiet-{turn}"));
        let now = Instant::now();
        self.other
            .hooks
            .turn_started(&request, Some(&name), &chain([turn]), now);
        self.other.hooks.turn_ended(&request, &[], now);
        until("its last word is heard", || {
            let path = format!("/v1/sessions/{name}");
            self.sidecar.status_of(&path) == 200 && self.sidecar.get(&path)["state"] != "active"
        });
    }

    /// Both engines save, hit and leave nothing behind.
    fn goes_on(&mut self) {
        self.struck.until_ready();
        let id = self.fresh();
        let (name, mine) = (format!("after-{id}"), session(id));
        self.struck.turn(Some(&name), &mine);
        self.saved(&name);
        self.evict();
        let turn = self.struck.turn(Some(&name), &mine);
        assert_eq!(turn.local + turn.loaded, 39, "{turn:?}");
        assert!(turn.loaded > 0, "{turn:?}");
        self.other_is_served();
        self.given_back();
        assert_eq!(self.sidecar.get("/healthz")["engines"], 2);
    }

    /// No slot is leased or drains any more.
    fn given_back(&mut self) {
        until("everything is given back", || {
            self.struck.step();
            self.other.step();
            let host = self.sidecar.get("/v1/status")["tiers"]["host"].clone();
            let idle = |engine: &mut Engine| !engine.hooks.pending(false);
            host["slots_leased"] == 0
                && host["slots_draining"] == 0
                && idle(&mut self.struck)
                && idle(&mut self.other)
        });
    }
}
