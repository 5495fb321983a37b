//! A sidecar on a runtime of its own in this process, and HTTP calls to it.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use sidecar::config::{Config, Machine, Settings};
use tempfile::TempDir;

/// A running sidecar; stopped and joined when dropped.
pub struct Sidecar {
    folder: TempDir,
    url: String,
    /// Dropped: it ends as after SIGTERM. Used: as after SIGKILL.
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sidecar {
    /// Starts one with an arena of `memory` (as in the config file).
    pub fn start(memory: &str) -> Self {
        Self::start_with(memory, "")
    }

    /// The same with `more` lines of the config file.
    pub fn start_with(memory: &str, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let mut this = Self {
            folder,
            url: format!("http://127.0.0.1:{port}"),
            stop: None,
            thread: None,
        };
        this.run(memory, port, more);
        this
    }

    fn run(&mut self, memory: &str, port: u16, more: &str) {
        let path = self.folder.path().join("greenroom.toml");
        let socket = self.socket();
        std::fs::write(
            &path,
            format!("memory = \"{memory}\"\nsocket = {socket:?}\nlisten = \"127.0.0.1:{port}\"\ndrain_timeout = \"100ms\"\n{more}"),
        )
        .unwrap();
        let config = Config::resolve(
            Settings::from_file(&path).unwrap(),
            &Machine::probe().unwrap(),
        )
        .unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let (drain, drained) = tokio::sync::oneshot::channel::<()>();
            let shutdown = async move {
                drained.await.ok();
            };
            runtime.block_on(async move {
                let mut serving = std::pin::pin!(::sidecar::server::run(config, shutdown));
                tokio::select! {
                    served = &mut serving => return served.unwrap(),
                    killed = stopped => if killed.is_ok() { return },
                }
                drop(drain);
                serving.await.unwrap();
            });
        });
        (self.stop, self.thread) = (Some(stop), Some(thread));
        until("the sidecar answers", || self.find("/healthz").is_some());
    }

    /// Ends it as SIGTERM would.
    pub fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// Ends it as SIGKILL would: connections break, nothing is drained, the socket's file stays.
    pub fn kill(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.stop();
    }

    /// Stops, if it runs, and starts anew: another boot, an empty arena.
    pub fn restart(&mut self, memory: &str) {
        self.stop();
        let port = self.url.rsplit(':').next().unwrap().parse().unwrap();
        self.run(memory, port, "");
    }

    /// The engines' socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("engine.sock")
    }

    /// Base address of the HTTP API.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// `GET` of what may not be there yet.
    pub fn find(&self, path: &str) -> Option<Value> {
        ureq::get(format!("{}{path}", self.url))
            .call()
            .ok()?
            .body_mut()
            .read_json()
            .ok()
    }

    /// `GET` of something that is not JSON.
    pub fn text(&self, path: &str) -> String {
        let answer = ureq::get(format!("{}{path}", self.url)).call();
        answer.unwrap().body_mut().read_to_string().unwrap()
    }

    /// `GET`, which must succeed.
    pub fn get(&self, path: &str) -> Value {
        ureq::get(format!("{}{path}", self.url))
            .call()
            .unwrap()
            .body_mut()
            .read_json()
            .unwrap()
    }

    /// The status of a `GET`, whatever it is.
    pub fn status_of(&self, path: &str) -> u16 {
        let request = ureq::get(format!("{}{path}", self.url)).config();
        let request = request.http_status_as_error(false).build();
        request.call().unwrap().status().as_u16()
    }

    /// `POST` of JSON, which must succeed.
    pub fn post(&self, path: &str, body: &Value) -> Value {
        ureq::post(format!("{}{path}", self.url))
            .send_json(body)
            .unwrap()
            .body_mut()
            .read_json()
            .unwrap()
    }

    /// `POST` of a hint; false if it is refused, which a hint may be.
    pub fn advise(&self, path: &str, body: &Value) -> bool {
        ureq::post(format!("{}{path}", self.url))
            .send_json(body)
            .is_ok()
    }

    /// `DELETE`, which must succeed.
    pub fn delete(&self, path: &str) -> Value {
        ureq::delete(format!("{}{path}", self.url))
            .call()
            .unwrap()
            .body_mut()
            .read_json()
            .unwrap()
    }

    /// The value of one series of `GET /metrics`.
    ///
    /// # Panics
    /// If there is no such series.
    pub fn metric(&self, series: &str) -> u64 {
        let text = self.text("/metrics");
        let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok();
        text.lines().find_map(value).unwrap()
    }

    /// One prefetch hint for a session; its result.
    pub fn prefetch(&self, session: &str, message: &str) -> Value {
        self.hint("kv.prefetch", session, message)
    }

    /// One hint for a session; its result.
    pub fn hint(&self, action: &str, session: &str, message: &str) -> Value {
        let hint = serde_json::json!({"protocol_version": "1.0", "message_id": message, "actions": [{
            "action_id": "a", "action_type": action, "action_version": "1.0",
            "payload": {"target": {"session_id": session}}}]});
        self.post("/v1/hints", &hint)["results"][0].clone()
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Waits for a condition; a watchdog, not a measurement.
///
/// # Panics
/// After 30 seconds.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "waited too long until {what}"
        );
        std::thread::yield_now();
    }
}
