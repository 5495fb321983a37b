//! Processes of their own for tests: this test binary once more, told by its environment what to be.
//!
//! A test binary that uses one has a test at its root for it, which does nothing when it is run as a test.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::iter::once;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;

use crate::sidecar::until;

/// Arguments of the command line, one a line.
const ARGUMENTS: &str = "GREENROOM_TEST_ARGUMENTS";

/// What the test `child_greenroom` of a binary does: in a child, what the `greenroom` command does.
pub fn greenroom_if_told() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else {
        return;
    };
    let arguments = arguments.split('\n').map(OsString::from);
    let code = ::sidecar::cli::run(once("greenroom".into()).chain(arguments));
    assert_eq!(code, ExitCode::SUCCESS);
}

/// The command that runs one test of this binary, with its output as it comes.
pub fn test_of_this_binary(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]);
    command
}

fn greenroom_command(arguments: &[&str]) -> Command {
    let mut command = test_of_this_binary("child_greenroom");
    command.env(ARGUMENTS, arguments.join("\n"));
    command
}

/// Everything that a run of the `greenroom` command says.
pub fn greenroom(arguments: &[&str]) -> String {
    let output = greenroom_command(arguments).output().unwrap();
    [output.stdout, output.stderr]
        .map(|bytes| String::from_utf8(bytes).unwrap())
        .concat()
}

/// A running `greenroom serve`; killed when dropped.
pub struct Serving {
    folder: TempDir,
    url: String,
    child: Child,
    log: Option<JoinHandle<String>>,
}

impl Serving {
    /// Starts one with an arena of 4 MiB and `more` arguments.
    pub fn start(more: &[&str]) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let folder = tempfile::tempdir().unwrap();
        Self::spawn(folder, format!("127.0.0.1:{port}"), more)
    }

    fn spawn(folder: TempDir, address: String, more: &[&str]) -> Self {
        let socket = folder.path().join("s");
        let usual = [
            "serve",
            "--memory",
            "4MiB",
            "--listen",
            &address,
            "--socket",
            socket.to_str().unwrap(),
        ];
        let mut child = greenroom_command(&[&usual[..], more].concat())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (ready, started) = channel();
        let log = std::thread::spawn(move || {
            let mut log = String::new();
            while let Some(Ok(line)) = lines.next() {
                log.push_str(&line);
                log.push('\n');
                if line.contains("serving") {
                    ready.send(()).ok();
                }
            }
            log
        });
        let started = started.recv_timeout(Duration::from_secs(30));
        let mut this = Self {
            folder,
            url: format!("http://{address}"),
            child,
            log: Some(log),
        };
        if started.is_err() {
            panic!("it does not serve: {}", this.end());
        }
        this
    }

    /// Waits until it has died by itself, starts it anew in the same places; how it died.
    pub fn reborn(mut self, more: &[&str]) -> (Self, ExitStatus) {
        let died = self.child.wait().unwrap();
        // Its parts move; nothing is left to kill.
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        let address = self.url.trim_start_matches("http://").to_owned();
        (Self::spawn(folder, address, more), died)
    }

    /// Whether it has died.
    pub fn is_dead(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Ends it; everything that it has logged.
    pub fn end(&mut self) -> String {
        // Already dead is as good.
        self.child.kill().ok();
        self.child.wait().ok();
        self.log
            .take()
            .map(|log| log.join().unwrap())
            .unwrap_or_default()
    }

    /// The engines' socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// The folder of the socket.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Base address of the HTTP API.
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs `work` as another user, on a thread of its own: to the kernel users belong to threads. `None`, and a line that says
/// so, if this user may not become another.
pub fn as_nobody<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    if !rustix::process::geteuid().is_root() {
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a test");
        let left_out = format!("{test}: LEFT OUT, only root can become another user\n");
        // Not by `eprintln!`, which the harness keeps to itself where a test passes.
        std::io::stderr().write_all(left_out.as_bytes()).unwrap();
        return None;
    }
    let thread = std::thread::spawn(move || {
        let nobody = rustix::thread::Uid::from_raw(65_534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        work()
    });
    until("the other user's work is done", || thread.is_finished());
    Some(thread.join().unwrap())
}
