//! What happens by the mere passing of time, on a clock that the test turns.

use tokio::sync::mpsc::Receiver;

use super::*;
use crate::commands::{ToolEnd, ToolStart};
use crate::config::tests::machine;
use crate::config::{Settings, Size};
use crate::engine::frames::{Hashes, Role};
use crate::engine::server;

const ENGINE: ConnectionId = ConnectionId(1);

/// An actor with one engine, and the frames to that.
fn with_an_engine(now: Instant) -> (Actor, Receiver<Vec<u8>>) {
    let settings = Settings {
        memory: Some(Size(1 << 20)),
        ..Settings::default()
    };
    let config = Config::resolve(settings, &machine(1 << 30)).unwrap();
    let shared = Arc::new(Shared {
        boot_id: String::new(),
        engines: AtomicUsize::new(0),
        draining: AtomicBool::new(false),
        metrics: Arc::new(Metrics::new()),
    });
    let mut actor = Actor::new(&config, 1, shared);
    let hello = Hello {
        role: Role::Scheduler,
        engine: "e".to_owned(),
        rank_bytes: 4096,
        ranks: 1,
        block_tokens: 16,
        gpu_blocks: 100,
    };
    let (outbox, frames) = server::outbox_and_frames();
    actor.admit(ENGINE, &hello, outbox, 1).unwrap();
    actor.message(ENGINE, 1, ToSidecar::OpenNamespace { id: [1; 32] }, now);
    (actor, frames)
}

fn session() -> SessionName {
    SessionName::new("a").unwrap()
}

fn turn(actor: &mut Actor, number: u64, now: Instant) {
    let hashes = || Hashes(vec![BlockHash([7; 32])]);
    let started = ToSidecar::TurnStarted {
        turn: number,
        request: number.to_string(),
        identity: Some(session().as_str().to_owned()),
        hashes: hashes(),
    };
    actor.message(ENGINE, 10 * number, started, now);
    let ended = ToSidecar::TurnEnded {
        turn: number,
        hashes: hashes(),
    };
    actor.message(ENGINE, 10 * number + 1, ended, now);
}

fn tool_start(actor: &mut Actor, now: Instant) {
    let start = ToolStart {
        tool: "bash".to_owned(),
        call_id: None,
        detail: None,
        eta: None,
    };
    let command = Command::ToolStart(session(), start, oneshot::channel().0);
    actor.command(command, now);
}

fn tool_end(actor: &mut Actor, now: Instant) {
    let end = ToolEnd {
        call_id: None,
        ok: None,
    };
    let command = Command::ToolEnd(session(), end, oneshot::channel().0);
    actor.command(command, now);
}

/// Messages since the last call.
fn told(frames: &mut Receiver<Vec<u8>>) -> usize {
    std::iter::from_fn(|| frames.try_recv().ok()).count()
}

/// Every message wakes an engine that sleeps.
#[test]
fn an_engine_whose_sessions_wait_is_told_nothing() {
    let start = Instant::now();
    let (mut actor, mut frames) = with_an_engine(start);
    turn(&mut actor, 1, start);
    tool_start(&mut actor, start);
    tool_end(&mut actor, start);
    // The session comes back as was said, and waits for its next tool.
    turn(&mut actor, 2, start);
    tool_start(&mut actor, start);
    assert!(told(&mut frames) > 0);
    assert_eq!(actor.next_deadline(), None);
    actor.pass(start + Duration::from_secs(3600));
    assert_eq!(told(&mut frames), 0);
}

#[test]
fn a_session_that_does_not_come_is_due_no_longer() {
    let start = Instant::now();
    let (mut actor, mut frames) = with_an_engine(start);
    turn(&mut actor, 1, start);
    tool_start(&mut actor, start);
    tool_end(&mut actor, start);
    told(&mut frames);
    let at = actor.next_deadline().unwrap();
    actor.pass(at - Duration::from_millis(1));
    assert_eq!(told(&mut frames), 0);
    actor.pass(at);
    assert_eq!(told(&mut frames), 1);
    assert_eq!(actor.next_deadline(), None);
}
