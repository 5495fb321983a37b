//! The HTTP API over real connections: the actor without an engine, the API as `greenroom serve` runs it.
//!
//! The client is a bare TCP stream, so that a test can send what no decent client would.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod abuse;
mod contract;
mod hints;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use serde_json::Value;
use sidecar::actor;
use sidecar::api::auth::Token;
use sidecar::api::{ApiLimits, router_within, serve};
use sidecar::config::memory::Memory;
use sidecar::config::{Config, Machine, Settings, Size};
use sidecar::metrics::Metrics;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// A sidecar without engines on a port of its own; stops when dropped.
struct Sidecar {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sidecar {
    fn start() -> Self {
        Self::start_with(ApiLimits::default(), None)
    }

    fn start_with(limits: ApiLimits, token: Option<&str>) -> Self {
        let token = token.map(Token::digest);
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, started) = channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let handle = actor::start(&config(), 7, Arc::new(Metrics::new()));
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = listener.local_addr().unwrap();
                let app = router_within(handle, token, limits);
                ready.send(address).unwrap();
                let stopped = async move { drop(stopped.await) };
                serve(listener, app, stopped).await.unwrap();
            });
        });
        let address = started.recv().unwrap();
        Self {
            address,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).unwrap()
    }

    /// One request on a connection of its own.
    fn send(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        self.send_with(method, path, &[], body)
    }

    fn send_with(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Answer {
        let mut stream = self.connect();
        let extra: String = headers.iter().map(|h| format!("{h}\r\n")).collect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{extra}\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        Answer::read(&mut stream)
    }

    fn get(&self, path: &str) -> Answer {
        self.send("GET", path, b"")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, body.to_string().as_bytes())
    }

    /// Starts a tool in a session and so makes the session known.
    fn make_session(&self, name: &str) {
        let body = serde_json::json!({"tool": "bash"});
        let answer = self.post(&format!("/v1/sessions/{name}/tool_start"), &body);
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    /// The value of one series of `GET /metrics`; 0 if it is not there.
    fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").text;
        let line = text.lines().find(|l| {
            l.strip_prefix(series)
                .is_some_and(|rest| rest.starts_with(' '))
        });
        line.and_then(|l| l.rsplit(' ').next())
            .map_or(0.0, |value| value.parse().unwrap())
    }

    /// Whether an ordinary client is served.
    fn assert_serves(&self) {
        let answer = self.get("/healthz");
        assert_eq!(
            (answer.status, answer.json()["status"].as_str()),
            (200, Some("ok"))
        );
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the sidecar's thread panicked");
        }
    }
}

fn config() -> Config {
    let machine = Machine {
        memory: Memory {
            machine_free: 1 << 30,
            cgroup: None,
            huge_total: 0,
            huge_free: 0,
        },
        socket: "unused".into(),
    };
    let settings = Settings {
        memory: Some(Size(1 << 20)),
        ..Settings::default()
    };
    Config::resolve(settings, &machine).unwrap()
}

/// What came back.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    text: String,
}

impl Answer {
    /// Everything until the other side closes.
    fn read(stream: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Self::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (head, body) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self {
            status,
            head: head.to_lowercase(),
            text: body.to_owned(),
        }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Asserts the shape of all errors and returns the message.
    fn error(&self, status: u16, code: &str) -> String {
        let body = self.json();
        assert_eq!(
            (self.status, body["error"]["code"].as_str()),
            (status, Some(code)),
            "{self:?}"
        );
        assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
        let message = body["error"]["message"].as_str().unwrap();
        assert!(!message.is_empty());
        message.to_owned()
    }

    fn has_header(&self, line: &str) -> bool {
        self.head.lines().any(|l| l == line)
    }
}
