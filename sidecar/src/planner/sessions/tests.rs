//! Tests of what is known of each session.

use super::*;

const SESSIONS_MAX: usize = 300;
const HOME: (EngineKey, NamespaceId) = (EngineKey(1), NamespaceId([7; 32]));

fn chain(path: &[u8]) -> Vec<BlockHash> {
    let mut hash = [0u8; 32];
    path.iter()
        .enumerate()
        .map(|(i, step)| {
            hash[i % 32] = hash[i % 32].wrapping_mul(31).wrapping_add(*step + 1);
            BlockHash(hash)
        })
        .collect()
}

fn name(text: &str) -> Option<SessionName> {
    Some(SessionName::new(text).unwrap())
}

fn start(tool: &str) -> ToolStart {
    ToolStart {
        tool: tool.into(),
        call_id: None,
        detail: None,
        eta: None,
    }
}

const END: ToolEnd = ToolEnd {
    call_id: None,
    ok: None,
};

struct World {
    sessions: Sessions,
    now: Instant,
}

impl World {
    fn new() -> Self {
        Self {
            sessions: Sessions::new(SESSIONS_MAX),
            now: Instant::now(),
        }
    }
    fn turn(&mut self, who: Option<&str>, path: &[u8]) -> SessionKey {
        let name = who.and_then(name);
        let key = self
            .sessions
            .turn_started(name, HOME, &chain(path), self.now)
            .unwrap();
        self.sessions.turn_ended(key, &chain(path), self.now);
        key
    }
    fn wish(&self, key: SessionKey) -> Wish {
        self.sessions.want(key, self.now).wish
    }
    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }
}

#[test]
fn a_tool_wait_from_start_to_return() {
    let mut w = World::new();
    let a = name("a").unwrap();
    let key = w.turn(Some("a"), &[1, 2, 3]);
    assert_eq!(w.wish(key), Wish::Keep);
    w.sessions.tool_start(&a, start("bash"), w.now).unwrap();
    assert_eq!(w.wish(key), Wish::WhenRoom);
    assert!(w.sessions.expected_return(key, w.now).is_some());
    w.pass(20);
    assert_eq!(w.sessions.want(key, w.now).hold, Duration::ZERO);
    w.sessions.tool_end(&a, &END, w.now).unwrap();
    assert_eq!(w.wish(key), Wish::Now);
    assert_eq!(w.sessions.expected_return(key, w.now), Some(w.now));
    w.sessions
        .turn_started(Some(a), HOME, &chain(&[1, 2, 3, 4]), w.now)
        .unwrap();
    assert_eq!(w.wish(key), Wish::Nothing);
}

#[test]
fn a_due_session_that_does_not_come_is_given_up() {
    let mut w = World::new();
    let key = w.turn(Some("a"), &[1]);
    w.sessions.expect(key, Duration::ZERO, 0, w.now);
    assert_eq!(w.wish(key), Wish::Now);
    let change = w.sessions.next_change(key).unwrap();
    let want = w.sessions.want(key, change);
    assert_eq!((want.wish, want.hold), (Wish::Keep, Duration::ZERO));
}

#[test]
fn people_and_retired_sessions_are_not_brought_back() {
    let mut w = World::new();
    let key = w.turn(Some("a"), &[1, 2]);
    w.sessions
        .tool_start(&name("a").unwrap(), start("AskUserQuestion"), w.now)
        .unwrap();
    let want = w.sessions.want(key, w.now);
    assert_eq!((want.wish, want.hold), (Wish::Keep, Duration::ZERO));
    assert_eq!(w.sessions.expected_return(key, w.now), None);
    w.sessions.retire(key).unwrap();
    assert_eq!(w.wish(key), Wish::Nothing);
    assert!(w.sessions.find(&name("a").unwrap()).is_none());
}

#[test]
fn parallel_calls_return_with_the_last() {
    let mut w = World::new();
    let a = name("a").unwrap();
    let key = w.turn(Some("a"), &[1]);
    for (id, eta) in [("x", 5), ("y", 50)] {
        let eta = Some(Duration::from_secs(eta));
        let call = ToolStart {
            call_id: Some(id.into()),
            eta,
            ..start("bash")
        };
        w.sessions.tool_start(&a, call, w.now).unwrap();
    }
    assert_eq!(
        w.sessions.expected_return(key, w.now),
        Some(w.now + Duration::from_secs(50))
    );
    let y = ToolEnd {
        call_id: Some("y".into()),
        ok: Some(true),
    };
    w.sessions.tool_end(&a, &y, w.now).unwrap();
    assert_eq!(w.wish(key), Wish::WhenRoom);
    assert_eq!(
        w.sessions.tool_end(&a, &y, w.now),
        Err(CommandError::UnknownCall)
    );
    w.sessions.tool_end(&a, &END, w.now).unwrap();
    assert_eq!(w.wish(key), Wish::Now);
}

#[test]
fn progress_extrapolates_the_work_done() {
    let mut w = World::new();
    let a = name("a").unwrap();
    let key = w.turn(Some("a"), &[1]);
    w.sessions.tool_start(&a, start("bash"), w.now).unwrap();
    w.pass(30);
    let progress = ToolProgress {
        call_id: None,
        fraction: Some(0.75),
        eta: None,
    };
    w.sessions.tool_progress(&a, &progress, w.now).unwrap();
    assert_eq!(
        w.sessions.expected_return(key, w.now),
        Some(w.now + Duration::from_secs(10))
    );
}

#[test]
fn unnamed_requests_join_the_longest_prompt_that_is_not_in_a_turn() {
    let mut w = World::new();
    let short = w.turn(None, &[1, 2]);
    let long = w.turn(None, &[1, 2, 3, 4]);
    // The first request's prompt is a prefix of the second's: it was the same session all along.
    assert_eq!(short, long);
    let other = w.turn(None, &[9, 9]);
    assert_ne!(other, long);
    let again = w
        .sessions
        .turn_started(None, HOME, &chain(&[1, 2, 3, 4, 5]), w.now)
        .unwrap();
    assert_eq!(again, long);
    // It is active now: a twin request begins a session of its own.
    let twin = w
        .sessions
        .turn_started(None, HOME, &chain(&[1, 2, 3, 4, 5, 6]), w.now)
        .unwrap();
    assert_ne!(twin, long);
    let elsewhere = (EngineKey(1), NamespaceId([8; 32]));
    let foreign = w
        .sessions
        .turn_started(None, elsewhere, &chain(&[9, 9, 1]), w.now)
        .unwrap();
    assert_ne!(foreign, other);
}

#[test]
fn the_output_need_not_match_for_a_request_to_join() {
    let mut w = World::new();
    let key = w
        .sessions
        .turn_started(None, HOME, &chain(&[1, 2]), w.now)
        .unwrap();
    w.sessions.turn_ended(key, &chain(&[1, 2, 50, 51]), w.now);
    assert_eq!(w.turn(None, &[1, 2, 60]), key);
}

#[test]
fn retirement_spares_what_others_share() {
    let mut w = World::new();
    let a = w.turn(Some("a"), &[1, 2, 3, 4]);
    w.turn(Some("b"), &[1, 2, 9]);
    w.turn(Some("c"), &[1, 7]);
    let (session, shared) = w.sessions.retire(a).unwrap();
    assert_eq!((session.chain.len(), shared), (4, 2));
}

#[test]
fn a_dead_engine_takes_its_turns_along() {
    let mut w = World::new();
    let key = w
        .sessions
        .turn_started(name("a"), HOME, &chain(&[1]), w.now)
        .unwrap();
    w.sessions.engine_left(EngineKey(1));
    let session = w.sessions.get(key).unwrap();
    assert!(!session.is_active());
    assert_eq!(session.state(), "host");
}

#[test]
fn the_table_is_bounded_and_spares_sessions_in_use() {
    let mut w = World::new();
    let busy = w
        .sessions
        .turn_started(name("busy"), HOME, &chain(&[1]), w.now)
        .unwrap();
    for i in 0..SESSIONS_MAX + 10 {
        w.now += Duration::from_millis(1);
        w.turn(Some(&format!("s{i}")), &[2]);
    }
    assert_eq!(w.sessions.iter().count(), SESSIONS_MAX);
    assert!(w.sessions.get(busy).is_some());
    assert!(w.sessions.find(&name("s0").unwrap()).is_none());
}
