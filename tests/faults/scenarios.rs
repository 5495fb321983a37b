//! What is done while a point is armed, and what must be seen of it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use greenroom_tests::engine::{Engine, Options};
use greenroom_tests::sidecar::until;
use kvstore::faults::{arm, reached};
use serde_json::json;
use sidecar::hooks::{Holders, Match};

use super::{BLOCKS, World, session};

/// A frame is spoilt, or the connection ended, at each of the first frames of a piece of life.
pub(super) fn a_frame_is_spoilt(world: &mut World, point: &'static str) {
    for frame in 0..6 {
        strike_at(world, point, &format!("{frame}*off->1*return"));
    }
}

/// Bits of every field: magic, version, reserved, length (a little longer, much longer), padding, sequence.
pub(super) fn a_bit_is_flipped(world: &mut World, point: &'static str) {
    for bit in [0, 31, 35, 50, 64, 84, 100, 128, 150, 191] {
        strike_at(world, point, &format!("1*off->1*return({bit})"));
    }
}

fn strike_at(world: &mut World, point: &'static str, actions: &str) {
    let before = reached(point);
    arm(point, actions).unwrap();
    until("the point is reached", || {
        world.live();
        reached(point) > before
    });
    arm(point, "off").unwrap();
    world.other_is_served();
    until("the struck engine is served again", || {
        world.evict();
        world.struck.turn(Some("a"), &session(1)).loaded > 0
    });
}

/// Held for longer than a request waits, then let go; then a few that are only late.
pub(super) fn a_frame_is_held(world: &mut World, point: &'static str) {
    world.evict();
    world.struck.settle();
    let before = reached(point);
    arm(point, "1*pause").unwrap();
    let asked = Instant::now();
    world
        .struck
        .hooks
        .turn_started("held", Some("a"), &session(1), asked);
    world.until_reached(point, before);
    world.other_is_served();
    let turn = world.struck.turn(Some("a"), &session(1));
    assert_eq!(turn.loaded, 0, "a request waits for a held frame: {turn:?}");
    arm(point, "off").unwrap();
    world.struck.hooks.turn_ended("held", &[], Instant::now());
    world.given_back();
    let before = reached(point);
    arm(point, "5*sleep(20)").unwrap();
    until("some frames were late", || {
        world.live();
        reached(point) >= before + 5
    });
}

/// And so is a commit: what it names is asked for all the same, though the sidecar does not show it yet.
pub(super) fn a_message_is_held(world: &mut World, point: &'static str) {
    a_frame_is_held(world, point);
    arm(point, "off").unwrap();
    let fresh = session(4);
    world.struck.settle();
    world.struck.switch.hold();
    world.struck.turn(Some("fresh"), &fresh);
    until("its save is under way", || {
        world.struck.step();
        world.struck.hooks.copies_in_flight()
    });
    arm(point, "1*pause").unwrap();
    world.struck.switch.release();
    until("its copies have ended", || {
        world.struck.step();
        !world.struck.hooks.copies_in_flight()
    });
    let hooks = &mut world.struck.hooks;
    hooks.turn_started("next", Some("fresh"), &fresh, Instant::now());
    let mut find = || {
        let useful = (0, fresh.len() - 1);
        hooks.match_prefix("next", useful, Holders::default(), Instant::now())
    };
    assert_eq!(find(), Match::Pending);
    arm(point, "off").unwrap();
    until("it is found", || find() == Match::Hit(fresh.len() - 1));
    hooks.turn_ended("next", &[], Instant::now());
    world.given_back();
}

pub(super) fn nothing_is_stored(world: &mut World, point: &'static str) {
    arm(point, "return").unwrap();
    world.struck.turn(Some("unsaved"), &session(3));
    world.until_reached(point, 0);
    world.struck.settle();
    assert_eq!(world.stored("unsaved"), 0);
    saved_at_its_next_turn(world, point, "unsaved");
}

pub(super) fn not_all_is_stored(world: &mut World, point: &'static str) {
    arm(point, "1*return").unwrap();
    world.struck.turn(Some("unsaved"), &session(3));
    world.until_reached(point, 0);
    world.struck.settle();
    assert!(world.stored("unsaved") < u64::from(BLOCKS));
    saved_at_its_next_turn(world, point, "unsaved");
}

fn saved_at_its_next_turn(world: &mut World, point: &'static str, name: &str) {
    arm(point, "off").unwrap();
    world.struck.turn(Some(name), &session(3));
    world.saved(name);
}

pub(super) fn a_commit_is_lost(world: &mut World, point: &'static str) {
    arm(point, "1*return").unwrap();
    world.struck.turn(Some("unsaved"), &session(3));
    world.until_reached(point, 0);
    arm(point, "off").unwrap();
    world.struck.settle();
    assert!(world.stored("unsaved") < u64::from(BLOCKS));
    world.evict();
    world.struck.turn(Some("unsaved"), &session(3));
    world.other_is_served();
    // The engine has said all it had to say of it: only the connection's end tells that the slots are nobody's.
    arm("client::write::kill", "1*return").unwrap();
    until("the connection ends", || {
        world.live();
        reached("client::write::kill") > 0
    });
    arm("client::write::kill", "off").unwrap();
    world.struck.until_ready();
    world.given_back();
    saved_at_its_next_turn(world, point, "unsaved");
}

/// The first two connections of a third engine's link go wrong.
pub(super) fn another_engine_comes(world: &mut World, point: &'static str) {
    arm(point, "2*return").unwrap();
    let mut third = Engine::connect(world.sidecar.socket(), "third", 50, Options::default());
    assert_eq!(reached(point), 2);
    arm(point, "off").unwrap();
    third.turn(None, &session(1)[..20]);
    // Its process is this one, which goes on: what it had then would drain for as long.
    third.settle();
    world.given_back();
    drop(third);
    until("the third engine is gone", || {
        world.sidecar.get("/healthz")["engines"] == 2
    });
}

pub(super) fn a_turn_is_served(world: &mut World, point: &'static str) {
    arm(point, "1*return").unwrap();
    world.live();
    world.until_reached(point, 0);
}

pub(super) fn a_reset_is_not_heard(world: &mut World, point: &'static str) {
    world.struck.settle();
    arm(point, "1*return").unwrap();
    assert!(world.struck.pool.reset());
    world.struck.hooks.reset();
    assert_eq!(reached(point), 1);
    world.struck.hooks.reset();
    let turn = world.struck.turn(Some("a"), &session(1));
    assert_eq!(turn.computed, 40, "the second one is heard");
}

pub(super) fn a_session_comes_back(world: &mut World, point: &'static str) {
    world.evict();
    arm(point, "1*return").unwrap();
    tool_call(world);
    world.until_reached(point, 0);
    until("the session is back", || {
        world.struck.step();
        world.struck.pool.leading(&session(1)) == 40
    });
}

fn tool_call(world: &World) {
    let tool = json!({"tool": "bash"});
    world.sidecar.post("/v1/sessions/a/tool_start", &tool);
    world.sidecar.post("/v1/sessions/a/tool_end", &json!({}));
}

pub(super) fn a_copy_is_held(world: &mut World, point: &'static str) {
    arm(point, "1*pause").unwrap();
    world.struck.turn(Some("slow"), &session(3));
    world.until_reached(point, 0);
    assert!(world.struck.hooks.copies_in_flight());
    world.other_is_served();
    assert!(world.struck.hooks.copies_in_flight(), "it is held");
    arm(point, "off").unwrap();
    world.saved("slow");
    arm(point, "5*sleep(10)").unwrap();
    world.evict();
    assert!(world.struck.turn(Some("a"), &session(1)).loaded > 0);
}

/// One of each kind: a save, a load that a request waits for, a fetch. All copies fail until one of the kind has: what the
/// struck engine still had to save may be copied at any step.
pub(super) fn copies_fail(world: &mut World, point: &'static str) {
    arm(point, "return").unwrap();
    world.struck.turn(Some("unsaved"), &session(3));
    a_copy_has_failed(world, "save");
    world.struck.settle();
    assert!(world.stored("unsaved") < u64::from(BLOCKS));
    saved_at_its_next_turn(world, point, "unsaved");

    world.evict();
    arm(point, "return").unwrap();
    let turn = world.struck.turn(Some("a"), &session(1));
    assert!(
        turn.computed > 1,
        "what did not come was computed: {turn:?}"
    );
    a_copy_has_failed(world, "demand");
    arm(point, "off").unwrap();

    world.evict();
    arm(point, "return").unwrap();
    tool_call(world);
    a_copy_has_failed(world, "prefetch");
    arm(point, "off").unwrap();
    world.struck.settle();
    world.struck.turn(Some("a"), &session(1));
}

/// Steps the struck engine until it has reported that a copy of a kind failed.
fn a_copy_has_failed(world: &mut World, kind: &str) {
    let series = format!(
        "greenroom_copy_failures_total{{direction=\"{}\",kind=\"{kind}\"}}",
        if kind == "save" { "d2h" } else { "h2d" }
    );
    until("a copy of the kind has failed", || {
        world.struck.step();
        world.sidecar.metric(&series) > 0
    });
}

pub(super) fn copies_are_told_late(world: &mut World, point: &'static str) {
    world.evict();
    world.struck.settle();
    arm(point, "20*return").unwrap();
    let turn = world.struck.turn(Some("a"), &session(1));
    assert!(turn.loaded > 0, "{turn:?}");
    world.until_reached(point, 19);
}

pub(super) fn a_call_is_held(world: &mut World, point: &'static str) {
    arm(point, "1*pause").unwrap();
    std::thread::scope(|scope| {
        let held = scope.spawn(|| world.sidecar.status_of("/v1/sessions/a"));
        until("a call is held", || reached(point) > 0);
        assert_eq!(world.sidecar.status_of("/v1/sessions/b"), 200);
        assert!(!held.is_finished());
        arm(point, "off").unwrap();
        assert_eq!(held.join().unwrap(), 200);
    });
    arm(point, "2*sleep(10)").unwrap();
    assert_eq!(world.sidecar.status_of("/v1/sessions/a"), 200);
}

pub(super) fn a_call_is_refused(world: &mut World, point: &'static str) {
    arm(point, "1*return").unwrap();
    let answer = bare_get(world, "/v1/sessions/a").to_lowercase();
    assert!(answer.starts_with("http/1.1 429 "), "{answer}");
    assert!(answer.contains("retry-after: 1"), "{answer}");
    assert_eq!(world.sidecar.status_of("/v1/sessions/a"), 200);
}

pub(super) fn an_answer_is_cut(world: &mut World, point: &'static str) {
    let whole = bare_get(world, "/v1/sessions/a");
    arm(point, "1*return").unwrap();
    let cut = bare_get(world, "/v1/sessions/a");
    let body = |answer: &str| answer.split_once("\r\n\r\n").unwrap().1.len();
    assert!(body(&cut) > 0 && body(&cut) < body(&whole), "{cut}");
    assert_eq!(world.sidecar.status_of("/v1/sessions/a"), 200);
}

/// Everything that comes over a connection of its own until it ends, however it ends.
fn bare_get(world: &World, path: &str) -> String {
    let address = world.sidecar.url().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut answer = Vec::new();
    // A connection that is reset has still brought what came before.
    stream.read_to_end(&mut answer).ok();
    String::from_utf8(answer).unwrap()
}
