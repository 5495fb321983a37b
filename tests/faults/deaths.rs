//! Processes that die in the middle of a frame: the sidecar, an engine, a worker that never got its welcome.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use greenroom_tests::child::{Serving, test_of_this_binary};
use greenroom_tests::engine::{Engine, Options, chain};
use greenroom_tests::sidecar::{Sidecar, until};
use kvstore::faults::{arm, reached};
use sidecar::engine::frames::{Hashes, Hello, Role, ToEngine, ToSidecar, decode, encode};
use sidecar::engine::socket::read_frame;

use super::{TURN, World, session};

/// SIGABRT.
const ABORTED: Option<i32> = Some(6);

/// A second sidecar, in a process of its own, dies at its fourth frame and is started again in the same place.
pub(super) fn the_sidecar_dies(_: &mut World, point: &'static str) {
    let fault = format!("{point}=3*off->1*return");
    let mut serving = Serving::start(&["--fault", &fault]);
    let options = Options {
        lookup_wait: Duration::from_millis(300),
        ..Options::default()
    };
    let mut engine = Engine::connect(serving.socket(), "e", 100, options);
    let mine = session(1);
    until("the sidecar dies", || {
        engine.turn(Some("a"), &mine);
        serving.is_dead()
    });
    until("its end is noticed", || {
        engine.step();
        !engine.hooks.figures().ready
    });
    engine.flood(7, 200);
    assert_eq!(engine.turn(Some("a"), &mine).loaded, 0, "a miss");
    let (serving, died) = serving.reborn(&[]);
    assert_eq!(died.signal(), ABORTED, "{died}");
    engine.until_ready();
    until("hits resume", || {
        engine.settle();
        engine.flood(8, 200);
        engine.turn(Some("a"), &mine).loaded > 0
    });
    drop(engine);
    drop(serving);
}

const ENGINE: &str = "GREENROOM_TEST_ENGINE";

/// Not a test of its own: the engine that dies in `an_engine_dies`.
#[test]
fn child_engine() {
    let Some(socket) = std::env::var_os(ENGINE) else {
        return;
    };
    let mut engine = Engine::connect(socket.into(), "mortal", 100, Options::default());
    arm("client::write::abort", "6*off->1*return").unwrap();
    for id in 0..1000 {
        engine.turn(Some("mortal"), &chain((0..40).map(|i| id << 20 | i)));
    }
}

pub(super) fn an_engine_dies(world: &mut World, _: &'static str) {
    let mut engine = test_of_this_binary("deaths::child_engine")
        .env(ENGINE, world.sidecar.socket())
        .spawn()
        .unwrap();
    let died = engine.wait().unwrap();
    assert_eq!(died.signal(), ABORTED, "{died}");
    until("it is gone", || {
        world.sidecar.get("/healthz")["engines"] == 2
    });
    world.given_back();
}

const WORKER: &str = "GREENROOM_TEST_WORKER";

fn hello(role: Role) -> Hello {
    Hello {
        role,
        engine: "raw".into(),
        rank_bytes: 1536,
        ranks: 1,
        block_tokens: 16,
        gpu_blocks: 10,
    }
}

fn say(mut stream: &UnixStream, sequence: u64, message: &ToSidecar) {
    stream
        .write_all(&encode(sequence, message).unwrap())
        .unwrap();
}

fn connect(socket: &Path, role: Role) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    say(&stream, 1, &ToSidecar::Hello(hello(role)));
    stream
}

/// Not a test of its own: a worker that gives up when it gets no welcome.
#[test]
fn child_worker() {
    let Some(socket) = std::env::var_os(WORKER) else {
        return;
    };
    let stream = connect(Path::new(&socket), Role::Worker { rank: 0 });
    assert!(read_frame(&stream).is_err(), "it was welcomed");
}

/// The sidecar has counted the worker's process before the welcome was lost: it must learn that the process is gone.
#[test]
fn a_worker_that_dies_without_a_welcome_holds_no_slot() {
    let _turn = TURN.lock();
    let sidecar = Sidecar::start("4MiB");
    let scheduler = connect(&sidecar.socket(), Role::Scheduler);
    read_frame(&scheduler).unwrap();
    say(&scheduler, 2, &ToSidecar::OpenNamespace { id: [1; 32] });
    let hashes = Hashes(chain(1..=8));
    say(&scheduler, 3, &ToSidecar::Reserve { hashes });
    let granted = loop {
        let (sequence, body, _) = read_frame(&scheduler).unwrap();
        if sequence == 3 {
            break decode(&body).unwrap();
        }
    };
    assert!(
        matches!(granted, ToEngine::Reserved { lease: Some(_), .. }),
        "{granted:?}"
    );
    arm("server::welcome::kill", "1*return").unwrap();
    let mut worker = test_of_this_binary("deaths::child_worker")
        .env(WORKER, sidecar.socket())
        .spawn()
        .unwrap();
    assert!(worker.wait().unwrap().success());
    assert_eq!(reached("server::welcome::kill"), 1);
    arm("server::welcome::kill", "off").unwrap();
    drop(scheduler);
    until("no slot drains", || {
        let host = sidecar.get("/v1/status")["tiers"]["host"].clone();
        sidecar.get("/healthz")["engines"] == 0
            && host["slots_draining"] == 0
            && host["slots_used"] == 0
    });
}
