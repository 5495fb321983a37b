//! The engine socket, and the HTTP port beside it, against strangers, floods and deaths: the offender is cut off, nobody
//! else notices.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use greenroom_tests::engine::{Engine, chain};
use greenroom_tests::sidecar::{Sidecar, until};
use kvstore::BlockHash;
use sidecar::engine::client::{Inbound, SchedulerLink};
use sidecar::engine::frames::{
    Hashes, Hello, PROTOCOL, Role, ToEngine, ToSidecar, Wish, decode, encode,
};
use sidecar::engine::socket::read_frame;

use crate::hooks::{evict, with_a_saved};

fn hello(engine: &str, role: Role) -> Hello {
    Hello {
        role,
        engine: engine.into(),
        rank_bytes: 1536,
        ranks: 1,
        block_tokens: 16,
        gpu_blocks: 10,
    }
}

/// A connection that has said hello; the answer to it.
fn greet(sidecar: &Sidecar, hello: Hello) -> (UnixStream, ToEngine) {
    let stream = UnixStream::connect(sidecar.socket()).unwrap();
    (&stream)
        .write_all(&encode(1, &ToSidecar::Hello(hello)).unwrap())
        .unwrap();
    let (_, body, _) = read_frame(&stream).unwrap();
    (stream, decode(&body).unwrap())
}

fn ask(stream: &UnixStream, sequence: u64, message: &ToSidecar) -> ToEngine {
    let mut stream = stream;
    stream
        .write_all(&encode(sequence, message).unwrap())
        .unwrap();
    loop {
        let (answered, body, _) = read_frame(stream).unwrap();
        if answered == sequence {
            return decode(&body).unwrap();
        }
    }
}

/// Reads until the other side closes.
fn closed(mut stream: &UnixStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn garbage_is_cut_off_and_nothing_is_lost_by_it() {
    let (sidecar, mut engine, mine) = with_a_saved();
    let http = sidecar.url().strip_prefix("http://").unwrap().to_owned();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..200 {
        let mut stream = UnixStream::connect(sidecar.socket()).unwrap();
        let mut bytes = vec![0u8; 40 + round * 7];
        for byte in &mut bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        if round % 2 == 0 {
            // A good start makes the parser go further.
            let good = encode(1, &ToSidecar::Hello(hello("bad", Role::Scheduler))).unwrap();
            let keep = round % good.len();
            bytes[..keep.min(40)].copy_from_slice(&good[..keep.min(40)]);
        }
        // The other side may have closed before all of it was taken.
        stream.write_all(&bytes).ok();
        stream.shutdown(Shutdown::Write).ok();
        assert!(closed(&stream), "round {round}");
        let mut client = TcpStream::connect(&http).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        client.write_all(&bytes).ok();
        client.shutdown(Shutdown::Write).ok();
        // Answered or hung up on; either way it is over.
        if let Err(error) = client.read_to_end(&mut Vec::new()) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "round {round}");
        }
    }
    assert_eq!(sidecar.get("/v1/sessions/a")["blocks"]["host"], 40);
    evict(&mut engine, &mine);
    let back = engine.turn(Some("a"), &mine);
    assert_eq!((back.local, back.loaded, back.computed), (0, 39, 1));
    assert_eq!(
        sidecar.get("/v1/status")["engines"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn a_header_that_claims_much_and_sends_nothing_takes_no_memory_and_no_place() {
    let sidecar = Sidecar::start("4MiB");
    let mut claim = encode(1, &ToSidecar::Hello(hello("slow", Role::Scheduler))).unwrap();
    claim[8..12].copy_from_slice(&(4u32 << 20).to_le_bytes());
    let waiting: Vec<UnixStream> = (0..100)
        .map(|_| {
            let mut stream = UnixStream::connect(sidecar.socket()).unwrap();
            stream.write_all(&claim[..24]).unwrap();
            stream
        })
        .collect();
    Engine::start(&sidecar, "good", 50);
    drop(waiting);
    let mut claim_too_much = claim.clone();
    claim_too_much[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut stream = UnixStream::connect(sidecar.socket()).unwrap();
    stream.write_all(&claim_too_much).unwrap();
    assert!(closed(&stream));
}

#[test]
fn hellos_that_cannot_be_accepted_are_told_why() {
    let sidecar = Sidecar::start("4MiB");
    let (_first, answer) = greet(&sidecar, hello("e", Role::Scheduler));
    assert!(matches!(answer, ToEngine::Welcome { .. }), "{answer:?}");
    let refused = |hello: Hello| match greet(&sidecar, hello).1 {
        ToEngine::Refused { reason } => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(hello("e", Role::Scheduler)).contains("already"));
    assert!(refused(hello("e", Role::Worker { rank: 1 })).contains("rank 1"));
    assert!(
        refused(Hello {
            rank_bytes: 1 << 20,
            ..hello("other", Role::Scheduler)
        })
        .contains("sidecar of its own")
    );
    assert!(
        refused(Hello {
            ranks: 0,
            ..hello("none", Role::Scheduler)
        })
        .contains("ranks")
    );
    assert!(refused(hello("", Role::Scheduler)).contains("id"));
    assert!(refused(hello("two\nlines", Role::Scheduler)).contains("control characters"));
    assert!(
        refused(Hello {
            block_tokens: 32,
            ..hello("e", Role::Worker { rank: 0 })
        })
        .contains("differ")
    );
}

#[test]
fn an_engine_of_another_release_is_told_so() {
    let sidecar = Sidecar::start("4MiB");
    let stream = UnixStream::connect(sidecar.socket()).unwrap();
    let mut frame = encode(1, &ToSidecar::Hello(hello("old", Role::Scheduler))).unwrap();
    frame[4..6].copy_from_slice(&(PROTOCOL - 1).to_le_bytes());
    (&stream).write_all(&frame).unwrap();
    // In this end's version: the other one sees that, whatever it makes of the rest.
    let (_, body, _) = read_frame(&stream).unwrap();
    match decode(&body).unwrap() {
        ToEngine::Refused { reason } => {
            assert!(reason.contains("same Greenroom release"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    assert!(closed(&stream));
}

#[test]
fn an_arena_too_small_for_one_slot_is_refused_in_words() {
    let sidecar = Sidecar::start("4MiB");
    match greet(
        &sidecar,
        Hello {
            rank_bytes: 64 << 20,
            ..hello("big", Role::Scheduler)
        },
    )
    .1
    {
        ToEngine::Refused { reason } => assert!(reason.contains("more memory"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn leases_are_only_their_owners() {
    let sidecar = Sidecar::start("4MiB");
    let (one, _) = greet(&sidecar, hello("one", Role::Scheduler));
    let (two, _) = greet(&sidecar, hello("two", Role::Scheduler));
    let id = [1; 32];
    for stream in [&one, &two] {
        (&mut &*stream)
            .write_all(&encode(2, &ToSidecar::OpenNamespace { id }).unwrap())
            .unwrap();
    }
    let hashes: Vec<BlockHash> = chain(1..=8);
    let lookup = ToSidecar::Lookup {
        turn: 1,
        for_session: false,
        hashes: Hashes(hashes.clone()),
    };
    let ToEngine::Reserved {
        lease: Some(lease),
        slots,
        ..
    } = ask(
        &one,
        3,
        &ToSidecar::Reserve {
            hashes: Hashes(hashes.clone()),
        },
    )
    else {
        panic!("nothing reserved")
    };
    assert_eq!(slots.len(), 8);
    // Another engine can neither see, nor commit, nor reserve what is being written.
    let commit = encode(
        4,
        &ToSidecar::Settle {
            lease,
            commit: true,
        },
    )
    .unwrap();
    (&two).write_all(&commit).unwrap();
    let ToEngine::Match { lease: None, .. } = ask(&two, 5, &lookup) else {
        panic!("half-saved blocks are visible")
    };
    let ToEngine::Reserved { lease: None, .. } = ask(
        &two,
        6,
        &ToSidecar::Reserve {
            hashes: Hashes(hashes),
        },
    ) else {
        panic!("reserved twice")
    };
    (&one).write_all(&commit).unwrap();
    let ToEngine::Match {
        lease: Some(_),
        slots,
        ..
    } = ask(&one, 7, &lookup)
    else {
        panic!("not committed")
    };
    assert_eq!(slots.len(), 8);
    let ToEngine::Match { lease: Some(_), .. } = ask(&two, 8, &lookup) else {
        panic!("not shared")
    };
    // A double release and a foreign one are refused without harm.
    for sequence in [9, 10] {
        (&two)
            .write_all(&encode(sequence, &ToSidecar::Release { lease }).unwrap())
            .unwrap();
    }
    let ToEngine::Match { lease: Some(_), .. } = ask(&two, 11, &lookup) else {
        panic!("harmed")
    };
}

const CHILD: &str = "GREENROOM_TEST_CHILD_SOCKET";

/// Not a test of its own: the process that `draining_slots_wait_for_the_worker_process` kills.
#[test]
fn child_worker() {
    let Some(socket) = std::env::var_os(CHILD) else {
        return;
    };
    let stream = UnixStream::connect(socket).unwrap();
    let message = ToSidecar::Hello(hello("e", Role::Worker { rank: 0 }));
    (&stream).write_all(&encode(1, &message).unwrap()).unwrap();
    let (_, _, descriptor) = read_frame(&stream).unwrap();
    assert!(descriptor.is_some());
    (&stream)
        .write_all(&encode(2, &ToSidecar::ArenaReady).unwrap())
        .unwrap();
    println!("mapped");
    // Closes its connection and lives on, as a worker does whose DMA is still running.
    drop(stream);
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

fn spawn_worker(sidecar: &Sidecar) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "engine_socket::child_worker",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CHILD, sidecar.socket())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn draining_slots_wait_for_the_worker_process() {
    let sidecar = Sidecar::start("4MiB");
    let (scheduler, _) = greet(&sidecar, hello("e", Role::Scheduler));
    let mut worker = spawn_worker(&sidecar);
    let mut said = String::new();
    let mut out = std::io::BufReader::new(worker.stdout.take().unwrap());
    while !said.contains("mapped") {
        assert!(
            std::io::BufRead::read_line(&mut out, &mut said).unwrap() > 0,
            "{said}"
        );
    }
    (&scheduler)
        .write_all(&encode(2, &ToSidecar::OpenNamespace { id: [1; 32] }).unwrap())
        .unwrap();
    let reserve = ToSidecar::Reserve {
        hashes: Hashes(chain(1..=8)),
    };
    let ToEngine::Reserved { lease: Some(_), .. } = ask(&scheduler, 3, &reserve) else {
        panic!()
    };
    drop(scheduler);
    let host = || sidecar.get("/v1/status")["tiers"]["host"].clone();
    until("the engine is gone", || {
        sidecar.get("/healthz")["engines"] == 0
    });
    assert_eq!(
        host()["slots_draining"],
        8,
        "the worker lives: it may still write"
    );
    worker.kill().unwrap();
    worker.wait().unwrap();
    until("its slots are free", || host()["slots_draining"] == 0);
    assert_eq!(host()["slots_used"], 0);
}

#[test]
fn a_scheduler_that_reconnects_frees_its_slots_by_saying_that_it_is_fenced() {
    let sidecar = Sidecar::start("4MiB");
    let (scheduler, _) = greet(&sidecar, hello("e", Role::Scheduler));
    let (worker, _) = greet(&sidecar, hello("e", Role::Worker { rank: 0 }));
    (&scheduler)
        .write_all(&encode(2, &ToSidecar::OpenNamespace { id: [1; 32] }).unwrap())
        .unwrap();
    let reserve = ToSidecar::Reserve {
        hashes: Hashes(chain(1..=8)),
    };
    let ToEngine::Reserved { lease: Some(_), .. } = ask(&scheduler, 3, &reserve) else {
        panic!()
    };
    drop(scheduler);
    until("the scheduler is gone", || {
        sidecar.get("/healthz")["engines"] == 0
    });
    let (scheduler, _) = greet(&sidecar, hello("e", Role::Scheduler));
    let draining = || sidecar.get("/v1/status")["tiers"]["host"]["slots_draining"].clone();
    assert_eq!(draining(), 8);
    (&scheduler)
        .write_all(&encode(2, &ToSidecar::Fenced).unwrap())
        .unwrap();
    until("its slots are free", || draining() == 0);
    drop(worker);
}

#[test]
fn an_engine_that_does_not_read_is_disconnected_and_the_api_goes_on() {
    let sidecar = Sidecar::start("4MiB");
    let (deaf, _) = greet(&sidecar, hello("deaf", Role::Scheduler));
    (&deaf)
        .write_all(&encode(2, &ToSidecar::OpenNamespace { id: [1; 32] }).unwrap())
        .unwrap();
    let lookup = ToSidecar::Lookup {
        turn: 1,
        for_session: false,
        hashes: Hashes(chain(1..=8)),
    };
    let mut sent = 3;
    while (&deaf).write_all(&encode(sent, &lookup).unwrap()).is_ok() {
        sent += 1;
        assert!(sent < 5_000_000, "never disconnected");
    }
    until("the deaf engine is gone", || {
        sidecar.get("/healthz")["engines"] == 0
    });
}

/// A reply that is believed twice would give a lease back that the first one put to use, a want likewise.
#[test]
fn an_answer_or_a_want_that_comes_twice_ends_the_connection() {
    let reserved = ToEngine::Reserved {
        lease: Some(1),
        slots: Vec::new(),
        ttl_ms: 1000,
    };
    let want = ToEngine::Want {
        session: 1,
        want: 7,
        wish: Wish::Now,
        priority: 0,
        expected_ms: None,
        hold_ms: 0,
        hashes: Hashes::default(),
        lease: Some(1),
        slots: Vec::new(),
        ttl_ms: 1000,
    };
    for (sequence, message) in [(5, reserved), (0, want)] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut link =
            SchedulerLink::open(socket, hello("e", Role::Scheduler), Box::new(|| {})).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        read_frame(&stream).unwrap();
        let welcome = ToEngine::Welcome {
            boot: 1,
            file_bytes: 4096,
            slot_bytes: 4096,
        };
        let frame = encode(sequence, &message).unwrap();
        stream.write_all(&encode(1, &welcome).unwrap()).unwrap();
        stream
            .write_all(&[&frame[..], &frame[..]].concat())
            .unwrap();
        let mut told = Vec::new();
        until("the connection is lost", || {
            told.extend(link.receive());
            matches!(told.last(), Some(Inbound::Lost))
        });
        assert_eq!(told.len(), 3, "connected, told once, lost: {told:?}");
        link.close();
    }
}
