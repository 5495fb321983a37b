//! The `greenroom` command as a process: what it prints, how it ends, and with which exit code.
#![cfg(feature = "server")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn greenroom(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_greenroom"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A running `greenroom serve`; killed when dropped.
struct Serving {
    process: Child,
    /// Read to its end: the log ends with the process.
    log: BufReader<ChildStderr>,
    folder: tempfile::TempDir,
}

impl Serving {
    fn start(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let mut process = Command::new(env!("CARGO_BIN_EXE_greenroom"))
            .args(["serve", "--memory", "1MiB", "--socket"])
            .arg(&socket)
            .args(more)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("serving") {
            assert_ne!(log.read_line(&mut said).unwrap(), 0, "it ended: {said}");
        }
        Self {
            process,
            log,
            folder,
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// The exit code once the process has ended of itself.
    fn ended(mut self) -> (Option<i32>, bool) {
        let mut rest = String::new();
        while self.log.read_line(&mut rest).unwrap() > 0 {}
        let code = self.process.wait().unwrap().code();
        (code, self.socket().exists())
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Already ended is as good.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// An address that was free a moment ago.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[test]
fn a_sidecar_is_asked_told_and_stopped() {
    let address = free_address();
    let serving = Serving::start(&["--listen", &address]);
    let url = format!("http://{address}");
    let ask = |arguments: &[&str]| greenroom(&[arguments, &["--url", &url]].concat());

    let status = ask(&["status", "--json"]);
    let json: Value = serde_json::from_str(&stdout(&status)).unwrap();
    assert_eq!(json["tiers"]["host"]["arena_bytes"], 1 << 20);
    let status = ask(&["status"]);
    assert!(
        stdout(&status).contains("no engine is connected"),
        "{status:?}"
    );

    assert_eq!(stdout(&ask(&["sessions"])), "no sessions\n");
    let told = greenroom(&[
        "hint",
        "--url",
        &url,
        "agent 7",
        "tool-start",
        "bash",
        "--eta",
        "90s",
    ]);
    assert_eq!(
        (code(&told), stdout(&told).as_str()),
        (Some(0), "ok\n"),
        "{told:?}"
    );
    let sessions = ask(&["sessions"]);
    assert!(stdout(&sessions).contains("agent 7"), "{sessions:?}");
    let sessions: Value = serde_json::from_str(&stdout(&ask(&["sessions", "--json"]))).unwrap();
    assert_eq!(sessions["sessions"][0]["tool"], "bash");

    let missing = greenroom(&["hint", "--url", &url, "nobody", "retain"]);
    assert_eq!(code(&missing), Some(1));
    assert!(stderr(&missing).contains("missing"), "{missing:?}");
    let wrong = greenroom(&["hint", "--url", &url, "nobody", "tool-end"]);
    assert_eq!(code(&wrong), Some(1));
    assert!(stderr(&wrong).contains("unknown_session"), "{wrong:?}");

    serving.signal(Signal::TERM);
    assert_eq!(
        serving.ended(),
        (Some(0), false),
        "drained, and the socket is gone"
    );
    assert_eq!(code(&ask(&["status"])), Some(1));
}

#[test]
fn an_interrupt_drains_too() {
    let serving = Serving::start(&["--listen", "none"]);
    serving.signal(Signal::INT);
    assert_eq!(serving.ended(), (Some(0), false));
}

#[test]
fn a_private_sidecar_ends_with_its_parents_pipe_and_has_no_http() {
    let address = free_address();
    let mut serving = Serving::start(&["--until-stdin-closes"]);
    let none = greenroom(&["status", "--url", &format!("http://{address}")]);
    assert_eq!(code(&none), Some(1));
    drop(serving.process.stdin.take());
    assert_eq!(serving.ended(), (Some(0), false));
}

#[test]
fn a_second_sidecar_on_the_same_socket_is_refused_and_the_first_lives_on() {
    let first = Serving::start(&["--listen", "none"]);
    let socket = first.socket();
    let second = greenroom(&[
        "serve",
        "--memory",
        "1MiB",
        "--listen",
        "none",
        "--socket",
        socket.to_str().unwrap(),
    ]);
    assert_eq!(code(&second), Some(1));
    assert!(stderr(&second).contains("already serves"), "{second:?}");
    first.signal(Signal::TERM);
    assert_eq!(first.ended(), (Some(0), false));
}

#[test]
fn a_sidecar_that_cannot_listen_leaves_no_socket_behind() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("greenroom.sock");
    let refused = greenroom(&[
        "serve",
        "--memory",
        "1MiB",
        "--listen",
        &taken.local_addr().unwrap().to_string(),
        "--socket",
        socket.to_str().unwrap(),
    ]);
    assert_eq!(code(&refused), Some(1));
    assert!(stderr(&refused).contains("cannot listen"), "{refused:?}");
    assert!(!socket.exists());
}

#[test]
fn a_token_is_read_from_its_file_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "open-sesame\n").unwrap();
    let token = token.to_str().unwrap();
    let address = free_address();
    let serving = Serving::start(&["--listen", &address, "--token-file", token]);
    let url = format!("http://{address}");
    let refused = greenroom(&["status", "--url", &url]);
    assert_eq!(code(&refused), Some(1));
    assert!(stderr(&refused).contains("unauthorized"), "{refused:?}");
    let allowed = greenroom(&["status", "--url", &url, "--token-file", token]);
    assert_eq!(code(&allowed), Some(0), "{allowed:?}");
    let missing = greenroom(&["serve", "--listen", &address, "--token-file", "/nowhere"]);
    assert_eq!(code(&missing), Some(2), "{missing:?}");
    drop(serving);
}

/// Lines are lost, and nothing else is.
#[test]
fn a_log_on_a_full_disk_ends_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let address = free_address();
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut serving = Command::new(env!("CARGO_BIN_EXE_greenroom"))
        .args(["serve", "--memory", "1MiB", "--log", "trace", "--listen"])
        .args([&address, "--socket"])
        .arg(folder.path().join("s"))
        .stdin(Stdio::null())
        .stderr(full)
        .spawn()
        .unwrap();
    let url = format!("http://{address}");
    let told = |arguments: &[&str]| {
        let (command, rest) = arguments.split_first().unwrap();
        code(&greenroom(&[&[*command, "--url", &url], rest].concat()))
    };
    while told(&["status"]) != Some(0) && serving.try_wait().unwrap().is_none() {}
    let answers = [
        told(&["hint", "a", "tool-start", "bash"]),
        told(&["sessions"]),
    ];
    let pid = Pid::from_raw(i32::try_from(serving.id()).unwrap()).unwrap();
    // Gone already is a failure, too.
    kill_process(pid, Signal::TERM).unwrap_or_default();
    assert_eq!(serving.wait().unwrap().code(), Some(0));
    assert_eq!(answers, [Some(0), Some(0)]);
}

#[test]
fn wrong_usage_and_wrong_config_end_with_2_and_name_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("greenroom.toml");
    std::fs::write(&file, "memroy = \"1GiB\"\n").unwrap();
    let config = file.to_str().unwrap();
    for (arguments, telling) in [
        (&["serve", "--config", config][..], "memroy"),
        (&["doctor", "--config", config], "memroy"),
        (&["serve", "--memory", "1000000GiB"], "does not fit"),
        (&["serve", "--listen", "0.0.0.0:0"], "--token-file"),
        (&["serve", "--nonsense"], "--nonsense"),
        (&["nonsense"], "nonsense"),
        (
            &["status", "--url", "127.0.0.1:7411"],
            "begins with http://",
        ),
        (&["hint", "s", "tool-start"], "<TOOL>"),
        (&["bench", "copy", "--memory", "17MiB"], "in steps of 8MiB"),
    ] {
        let output = greenroom(arguments);
        assert_eq!(code(&output), Some(2), "{arguments:?}: {output:?}");
        assert!(
            stderr(&output).contains(telling),
            "{arguments:?}: {output:?}"
        );
    }
}

#[cfg(not(feature = "faults"))]
#[test]
fn a_build_without_fault_points_says_which_build_has_them() {
    let refused = greenroom(&["serve", "--fault", "store::reserve::full=return"]);
    assert_eq!(code(&refused), Some(2), "{refused:?}");
    assert!(
        stderr(&refused).contains("--features faults"),
        "{refused:?}"
    );
    let help = stdout(&greenroom(&["serve", "--help"]));
    assert!(!help.contains("--fault"), "{help}");
}

#[cfg(feature = "faults")]
#[test]
fn faults_are_armed_from_the_command_line_or_refused_in_words() {
    for (fault, telling) in [
        ("store::reserve::full", "NAME=ACTIONS"),
        ("store::reserve::ful=return", "store::reserve::full"),
        ("store::reserve::full=retrun", "examples"),
        ("host::copy::fail=return", "never by the sidecar"),
    ] {
        let refused = greenroom(&["serve", "--fault", fault]);
        assert_eq!(code(&refused), Some(2), "{refused:?}");
        assert!(stderr(&refused).contains(telling), "{refused:?}");
    }
    let address = free_address();
    let busy = [
        "--fault",
        "handle::ask::busy=1*return",
        "--fault",
        "gate::handler::delay=1*sleep(1)",
    ];
    let serving = Serving::start(&[&["--listen", &address], &busy[..]].concat());
    let ask = || greenroom(&["status", "--url", &format!("http://{address}")]);
    let first = ask();
    assert_eq!(code(&first), Some(1));
    assert!(stderr(&first).contains("busy"), "{first:?}");
    assert_eq!(code(&ask()), Some(0));
    drop(serving);
}

#[test]
fn the_benchmark_of_copies_leaves_its_figures() {
    let folder = tempfile::tempdir().unwrap();
    let [json, svg] = ["copy.json", "copy.svg"].map(|name| folder.path().join(name));
    let output = Command::new(env!("CARGO_BIN_EXE_greenroom"))
        .args("bench copy --engine host --memory 16MiB --repeats 1 --seed 7".split(' '))
        .arg("--json")
        .arg(&json)
        .arg("--svg")
        .arg(&svg)
        .env("GREENROOM_COMMIT", "a-commit")
        .output()
        .unwrap();
    assert_eq!(code(&output), Some(0), "{output:?}");
    let figures: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(
        (&figures["commit"], &figures["seed"]),
        (&"a-commit".into(), &7.into())
    );
    let rows = figures["rows"].as_array().unwrap();
    for way in ["h2d", "d2h", "both"] {
        assert!(rows.iter().any(|row| row["direction"] == way), "{way}");
    }
    for row in rows {
        let [gbps, plain, ratio] =
            ["gbps", "plain_gbps", "ratio"].map(|key| row[key].as_f64().unwrap());
        assert!(
            gbps > 0.0 && (ratio / (gbps / plain) - 1.0).abs() < 0.05,
            "{row}"
        );
        let bytes = row["range_bytes"].as_u64().unwrap() * row["ranges"].as_u64().unwrap();
        assert!(bytes <= 8 << 20, "more than half of the memory: {row}");
    }
    assert_eq!(figures["bars"].as_array().unwrap().len(), 2);
    assert!(
        stdout(&output).lines().count() > rows.len(),
        "a line for each row"
    );
    assert!(std::fs::read_to_string(&svg).unwrap().contains("h2d plain"));
}

#[test]
fn the_doctor_tells_scripts_what_it_found() {
    let folder = tempfile::tempdir().unwrap();
    let socket: &Path = &folder.path().join("s");
    let socket = socket.to_str().unwrap();
    let output = greenroom(&[
        "doctor", "--json", "--memory", "1MiB", "--listen", "none", "--socket", socket,
    ]);
    assert_eq!(code(&output), Some(0), "{output:?}");
    let report: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let areas: Vec<&str> = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["area"].as_str().unwrap())
        .collect();
    for area in [
        "driver",
        "memory",
        "huge pages",
        "runtime folder",
        "socket",
        "python",
    ] {
        assert!(areas.contains(&area), "{area} is not in {areas:?}");
    }
    let too_much = greenroom(&[
        "doctor",
        "--memory",
        "1000000GiB",
        "--listen",
        "none",
        "--socket",
        socket,
    ]);
    assert_eq!(code(&too_much), Some(1));
    assert!(
        stdout(&too_much).contains("PROBLEM  memory"),
        "{too_much:?}"
    );
}
