//! Clients that are slow, broken, greedy or gone: each gets what the contract says, and the others are served as if it were not there.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use greenroom_tests::sidecar::until;
use serde_json::json;
use sidecar::api::ApiLimits;

use super::{Answer, Sidecar};

fn head(path: &str, more: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: x\r\n{more}\r\n")
}

/// Reads one answer that has a `content-length` from a connection that stays open.
fn read_one(stream: &mut TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    let lines = String::from_utf8(bytes.clone()).unwrap().to_lowercase();
    let length = lines
        .lines()
        .find_map(|l| l.strip_prefix("content-length: "))
        .unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).unwrap();
    bytes.extend(body);
    Answer::parse(&bytes)
}

#[test]
fn a_body_that_is_too_long_gets_an_answer_and_not_a_broken_connection() {
    let sidecar = Sidecar::start();
    let long = vec![b' '; 9 << 20];
    let message = sidecar
        .send("POST", "/v1/hints", &long)
        .error(413, "too_large");
    assert!(message.contains("4194304"), "{message}");
    let mut chunked = sidecar.connect();
    chunked
        .write_all(
            head(
                "/v1/hints",
                "transfer-encoding: chunked\r\nconnection: close\r\n",
            )
            .as_bytes(),
        )
        .unwrap();
    for _ in 0..9 {
        chunked
            .write_all(format!("{:x}\r\n", 1 << 20).as_bytes())
            .unwrap();
        chunked.write_all(&long[..1 << 20]).unwrap();
        chunked.write_all(b"\r\n").unwrap();
    }
    chunked.write_all(b"0\r\n\r\n").unwrap();
    Answer::read(&mut chunked).error(413, "too_large");
    sidecar.assert_serves();
}

#[test]
fn the_memory_for_large_bodies_is_bounded_and_small_ones_always_get_in() {
    let limits = ApiLimits {
        large_bodies_max: 1,
        small_body_bytes: 1000,
        ..ApiLimits::default()
    };
    let sidecar = Sidecar::start_with(limits, None);
    let mut holder = sidecar.connect();
    holder
        .write_all(head("/v1/hints", "content-length: 5000\r\n").as_bytes())
        .unwrap();
    holder.write_all(&[b' '; 4999]).unwrap();
    // The holder's bytes may still be on their way: ask until they have arrived.
    let refused = loop {
        let answer = sidecar.send("POST", "/v1/hints", &[b' '; 2000]);
        if answer.status == 429 {
            break answer;
        }
        answer.error(400, "malformed");
    };
    refused.error(429, "busy");
    assert!(refused.has_header("retry-after: 1"), "{refused:?}");
    sidecar.make_session("a");
    holder.write_all(b" ").unwrap();
    read_one(&mut holder).error(400, "malformed");
    sidecar
        .send("POST", "/v1/hints", &[b' '; 2000])
        .error(400, "malformed");
}

#[test]
fn a_body_that_does_not_arrive_is_given_up() {
    let limits = ApiLimits {
        body_timeout: Duration::from_millis(50),
        ..ApiLimits::default()
    };
    let sidecar = Sidecar::start_with(limits, None);
    let mut slow = sidecar.connect();
    slow.write_all(head("/v1/hints", "content-length: 100\r\n").as_bytes())
        .unwrap();
    slow.write_all(b"{\"pro").unwrap();
    let answer = Answer::read(&mut slow);
    answer.error(408, "timeout");
    assert!(answer.has_header("connection: close"), "{answer:?}");
    sidecar.assert_serves();
}

#[test]
fn a_half_open_connection_is_closed_in_time() {
    let mut limits = ApiLimits::default();
    // Long enough for the ordinary request at the end on a busy machine.
    limits.connections.head_timeout = Duration::from_millis(500);
    let sidecar = Sidecar::start_with(limits, None);
    let starts = [
        "",
        "GET /healthz HTT",
        "GET /healthz HTTP/1.1\r\nhost: x\r\n",
    ];
    let half_open = starts.map(|start| {
        let mut stream = sidecar.connect();
        stream.write_all(start.as_bytes()).unwrap();
        stream
    });
    for mut stream in half_open {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert!(!rest.starts_with(b"HTTP/1.1 2"));
    }
    let closed = "greenroom_http_connections_closed_total{reason=\"timeout\"}";
    assert!((sidecar.metric(closed) - 3.0).abs() < 1e-9);
}

/// The limits are long and the connections few: without making room nobody else would be served before the test ends.
#[test]
fn any_number_of_waiting_connections_leaves_room_for_others() {
    let mut limits = ApiLimits::default();
    limits.connections.connections_max = 8;
    let sidecar = Sidecar::start_with(limits, None);
    sidecar.make_session("kept");
    let mut waiting = Vec::new();
    for i in 0..100 {
        let mut stream = sidecar.connect();
        let start = match i % 4 {
            0 => String::new(),
            1 => "GET /v1/sta".to_owned(),
            2 => head("/v1/hints", "content-length: 100\r\n"),
            _ => head("/v1/hints", "content-length: 100\r\n") + "{",
        };
        stream.write_all(start.as_bytes()).unwrap();
        waiting.push(stream);
        if i % 10 == 0 {
            sidecar.assert_serves();
        }
    }
    sidecar.assert_serves();
    assert_eq!(
        sidecar.get("/v1/sessions/kept").status,
        200,
        "nothing was lost"
    );
    assert!(sidecar.metric("greenroom_http_connections_closed_total{reason=\"replaced\"}") >= 90.0);
    assert!(sidecar.metric("greenroom_http_connections") <= 8.0);
}

/// A connection that has been served is worth more than ones that never said anything.
#[test]
fn a_good_client_keeps_its_connection_while_strangers_come_and_go() {
    let mut limits = ApiLimits::default();
    limits.connections.connections_max = 4;
    let sidecar = Sidecar::start_with(limits, None);
    let mut good = sidecar.connect();
    let request = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";
    good.write_all(request).unwrap();
    assert_eq!(read_one(&mut good).status, 200);
    let strangers: Vec<TcpStream> = (0..20).map(|_| sidecar.connect()).collect();
    // Served after all of them: the accept loop has seen them.
    sidecar.assert_serves();
    good.write_all(request).unwrap();
    assert_eq!(read_one(&mut good).status, 200);
    drop(strangers);
}

/// Asks for one long list after the other and reads none.
#[test]
fn a_client_that_does_not_read_is_cut_off_and_holds_up_nobody_for_long() {
    let mut limits = ApiLimits {
        lists_max: 1,
        ..ApiLimits::default()
    };
    limits.connections.answer_timeout = Duration::from_millis(200);
    let sidecar = Sidecar::start_with(limits, None);
    for i in 0..100 {
        sidecar.make_session(&format!("{i:0>200}"));
    }
    let mut deaf = sidecar.connect();
    let request = b"GET /v1/sessions HTTP/1.1\r\nhost: x\r\n\r\n";
    let closed = "greenroom_http_connections_closed_total{reason=\"timeout\"}";
    deaf.set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut refused = 0;
    until("it is cut off", || {
        // More than any socket's buffers hold; once it is cut off there is nowhere to write to.
        deaf.write_all(&request.repeat(100)).ok();
        refused += u32::from(sidecar.get("/v1/sessions").status == 429);
        sidecar.assert_serves();
        sidecar.metric(closed) > 0.5
    });
    assert!(refused > 0, "its list was never in the way");
    assert_eq!(sidecar.get("/v1/sessions").status, 200);
    drop(deaf);
}

#[test]
fn garbage_is_answered_or_hung_up_on() {
    let sidecar = Sidecar::start();
    let big_head = format!(
        "GET /healthz HTTP/1.1\r\nhost: x\r\nlong: {}\r\n\r\n",
        "y".repeat(200_000)
    );
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00"[..],
        b"\r\n\r\n\r\n",
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0; 4096],
        big_head.as_bytes(),
    ] {
        let mut stream = sidecar.connect();
        // The sidecar may hang up before everything is sent: that is an answer too.
        if stream.write_all(garbage).is_ok() && stream.shutdown(Shutdown::Write).is_ok() {
            let mut rest = Vec::new();
            if stream.read_to_end(&mut rest).is_ok() {
                assert!(
                    !rest.starts_with(b"HTTP/1.1 2"),
                    "{}",
                    String::from_utf8_lossy(&rest)
                );
            }
        }
        sidecar.assert_serves();
    }
}

#[test]
fn clients_that_vanish_at_any_point_harm_nothing() {
    let sidecar = Sidecar::start();
    sidecar.make_session("kept");
    let body = json!({"tool": "bash"}).to_string();
    let length = body.len();
    let whole = head(
        "/v1/sessions/gone/tool_start",
        &format!("content-length: {length}\r\n"),
    ) + &body;
    for cut in 0..=whole.len() {
        let mut stream = sidecar.connect();
        stream.write_all(&whole.as_bytes()[..cut]).unwrap();
        drop(stream);
    }
    sidecar.assert_serves();
    assert_eq!(sidecar.get("/v1/sessions/kept").json()["tool"], "bash");
}

#[test]
fn requests_follow_each_other_on_one_connection_also_after_an_error() {
    let sidecar = Sidecar::start();
    let mut stream = sidecar.connect();
    for _ in 0..3 {
        stream
            .write_all(head("/v1/hints", "content-length: 1\r\n").as_bytes())
            .unwrap();
        stream.write_all(b"{").unwrap();
        read_one(&mut stream).error(400, "malformed");
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
        assert_eq!(read_one(&mut stream).status, 200);
    }
}

#[test]
fn idle_connections_do_not_hold_up_the_shutdown() {
    let mut limits = ApiLimits::default();
    // The shutdown must not come from running out of patience.
    limits.connections.drain_timeout = Duration::from_secs(86_400);
    limits.connections.head_timeout = Duration::from_secs(86_400);
    let sidecar = Sidecar::start_with(limits, None);
    let mut idle = sidecar.connect();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    assert_eq!(read_one(&mut idle).status, 200);
    let silent = sidecar.connect();
    sidecar.assert_serves();
    drop(sidecar);
    let mut rest = Vec::new();
    assert_eq!(
        idle.read_to_end(&mut rest).unwrap(),
        0,
        "closed without a word"
    );
    drop(silent);
}
