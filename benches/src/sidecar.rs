//! `bench-sidecar`: memory and idle processor time of a running `greenroom serve` that holds 100,000 blocks.
//!
//! The command is the one that cargo built beside this program. It is filled over the engine protocol, by one engine with
//! 100 sessions that then wait for their tools; nothing is copied, so the arena itself stays untouched.
//!
//! `bench-sidecar [--json FILE|-] [--seed N] [--seconds N]`

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use greenroom_benches::{Bar, Limit, Options, Random, Result, judge, round};
use greenroom_tests::sidecar::until;
use kvstore::BlockHash;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sidecar::engine::client::{Inbound, Outbox, SchedulerLink, WorkerLink};
use sidecar::engine::frames::{Hashes, Hello, Role, ToEngine, ToSidecar};

const SESSIONS: u32 = 100;
const SESSION_BLOCKS: u32 = 1000;
/// Blocks of one reservation.
const BATCH: usize = 128;
const SLOT_BYTES: u64 = 4096;
const MEMORY: &str = "512MiB";

fn main() -> Result<()> {
    let options = Options::from_args(&[("seconds", 10)]);
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("engine.sock");
    let mut served = Served::start(&socket)?;
    let mut engine = Engine::connect(&socket)?;
    let empty = served.anonymous_bytes()?;
    let mut random = Random::new(options.seed);
    for session in 0..SESSIONS {
        let chain = random.chain(SESSION_BLOCKS);
        engine.save(session, &chain)?;
        served.post(
            &format!("/v1/sessions/s{session}/tool_start"),
            &json!({"tool": "bash"}),
        )?;
    }
    until("everything is stored", || {
        served.stored_blocks() == Some(u64::from(SESSIONS * SESSION_BLOCKS))
    });
    let full = served.anonymous_bytes()?;
    let seconds = options.number("seconds");
    let idle = served.cpu_share(Duration::from_secs(seconds))?;
    served.stop()?;
    let mib =
        |bytes: u64| round(f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX)) / 1024.0);
    options.say(&format!(
        "RssAnon {} MiB when empty, {} MiB with {} blocks; {:.3} % of a core over {seconds} idle seconds",
        mib(empty),
        mib(full),
        SESSIONS * SESSION_BLOCKS,
        idle * 100.0
    ));
    let bars = [
        Bar {
            name: "RssAnon with 100k blocks, MiB".to_owned(),
            value: mib(full),
            limit: Limit::AtMost(64.0),
        },
        Bar {
            name: "idle, % of a core".to_owned(),
            value: round(idle * 100.0),
            limit: Limit::AtMost(2.0),
        },
    ];
    let bars = judge(&options, &bars);
    options.write(json!({
        "rss_anon_mib": {"empty": mib(empty), "stored": mib(full)},
        "idle_core_percent": round(idle * 100.0),
        "idle_seconds": seconds,
        "stored_blocks": SESSIONS * SESSION_BLOCKS,
        "sessions": SESSIONS,
        "bars": bars,
    }))
}

/// A running `greenroom serve`; killed when dropped.
struct Served {
    child: Child,
    url: String,
}

impl Served {
    fn start(socket: &Path) -> Result<Self> {
        let binary = std::env::current_exe()?.with_file_name("greenroom");
        if !binary.exists() {
            return Err(
                "no greenroom command beside this one: cargo build --release -p greenroom-sidecar"
                    .into(),
            );
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let child = Command::new(binary)
            .args(["serve", "--memory", MEMORY, "--log", "warn"])
            .args(["--listen", &format!("127.0.0.1:{port}"), "--socket"])
            .arg(socket)
            .spawn()?;
        let served = Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
        };
        until("the sidecar answers", || served.get("/healthz").is_ok());
        Ok(served)
    }

    fn get(&self, path: &str) -> Result<Value> {
        let mut answer = ureq::get(format!("{}{path}", self.url)).call()?;
        Ok(answer.body_mut().read_json()?)
    }

    fn post(&self, path: &str, body: &Value) -> Result<()> {
        ureq::post(format!("{}{path}", self.url)).send_json(body)?;
        Ok(())
    }

    fn stored_blocks(&self) -> Option<u64> {
        self.get("/v1/status").ok()?["tiers"]["host"]["slots_used"].as_u64()
    }

    fn proc(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.child.id()))
    }

    /// Memory of its own, the arena not counted.
    fn anonymous_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(self.proc().join("status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib: u64 = line
            .and_then(|rest| rest.trim().split(' ').next()?.parse().ok())
            .ok_or("the kernel does not say RssAnon")?;
        Ok(kib * 1024)
    }

    /// Processor time of all its threads over the time given, as a share of one core.
    fn cpu_share(&self, wait: Duration) -> Result<f64> {
        let before = self.cpu()?;
        std::thread::sleep(wait);
        Ok((self.cpu()? - before).as_secs_f64() / wait.as_secs_f64())
    }

    fn cpu(&self) -> Result<Duration> {
        let mut total = Duration::ZERO;
        for task in std::fs::read_dir(self.proc().join("task"))? {
            let stat = std::fs::read_to_string(task?.path().join("schedstat"))?;
            let on_cpu = stat.split(' ').next().and_then(|ns| ns.parse().ok());
            total +=
                Duration::from_nanos(on_cpu.ok_or("the kernel does not count processor time")?);
        }
        Ok(total)
    }

    fn stop(&mut self) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM)?;
        let status = self.child.wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("the sidecar ended with {status}").into())
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Gone already after `stop`.
        self.child.kill().unwrap_or_default();
    }
}

/// The scheduler's end of the protocol, by hand.
struct Engine {
    link: SchedulerLink,
    _worker: WorkerLink,
    outbox: Outbox,
    sequence: u64,
}

impl Engine {
    fn connect(socket: &Path) -> Result<Self> {
        let hello = |role| Hello {
            role,
            engine: "bench".to_owned(),
            rank_bytes: SLOT_BYTES,
            ranks: 1,
            block_tokens: 16,
            gpu_blocks: 8192,
        };
        let worker = WorkerLink::open(
            socket.to_owned(),
            hello(Role::Worker { rank: 0 }),
            Box::new(|_| Ok(())),
        )?;
        let link = SchedulerLink::open(socket.to_owned(), hello(Role::Scheduler), Box::new(|| {}))?;
        let mut connected = None;
        until("the engine is connected", || {
            if let Some(Inbound::Connected { outbox, .. }) = link.receive() {
                connected = Some(outbox);
            }
            connected.is_some()
        });
        let outbox = connected.ok_or("the sidecar did not take the engine")?;
        let mut engine = Self {
            link,
            _worker: worker,
            outbox,
            sequence: 1,
        };
        engine.send(&ToSidecar::OpenNamespace { id: [7; 32] })?;
        Ok(engine)
    }

    fn send(&mut self, message: &ToSidecar) -> Result<u64> {
        self.sequence += 1;
        self.outbox.send(self.sequence, message)?;
        Ok(self.sequence)
    }

    fn ask(&mut self, message: &ToSidecar) -> Result<ToEngine> {
        let asked = self.send(message)?;
        let mut answer = None;
        until("the sidecar answers", || {
            match self.link.receive() {
                Some(Inbound::Message {
                    sequence, message, ..
                }) if sequence == asked => {
                    answer = Some(message);
                }
                _ => {}
            }
            answer.is_some()
        });
        answer.ok_or_else(|| "no answer".into())
    }

    /// A session's whole turn: begun, saved, ended.
    fn save(&mut self, session: u32, chain: &[BlockHash]) -> Result<()> {
        let turn = u64::from(session);
        let hashes = Hashes(chain.to_vec());
        self.ask(&ToSidecar::TurnStarted {
            turn,
            request: format!("request-{session}"),
            identity: Some(format!("s{session}")),
            hashes: hashes.clone(),
        })?;
        for part in chain.chunks(BATCH) {
            let reserve = ToSidecar::Reserve {
                hashes: Hashes(part.to_vec()),
            };
            let ToEngine::Reserved {
                lease: Some(lease), ..
            } = self.ask(&reserve)?
            else {
                return Err("nothing was reserved".into());
            };
            let commit = true;
            self.send(&ToSidecar::Settle { lease, commit })?;
        }
        self.send(&ToSidecar::TurnEnded { turn, hashes })?;
        Ok(())
    }
}
