//! Accepts HTTP connections and keeps slow, half-open and idle ones from hurting the others.
//!
//! The number of connections is bounded. When all are taken, the one that waits for its client and has the least claim makes room: first
//! one that never brought a complete request, then the one idle for longest. A connection whose request is at work is never closed.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tower_service::Service;

use super::App;
use super::slow::{Impatient, was_too_slow};
use crate::metrics::{ConnectionEnd, Metrics};
use crate::seldom::Seldom;

/// Pause after a failed `accept` (no more file descriptors, mostly), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Bounds of the connections.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Open connections.
    pub connections_max: usize,
    /// Time for a request's head to arrive, counted from the end of the last request: also the longest idle time.
    pub head_timeout: Duration,
    /// Longest time in which a client takes nothing of its answer.
    pub answer_timeout: Duration,
    /// Bytes read ahead per connection; also the longest request head.
    pub buffer_bytes: usize,
    /// On shutdown, time for requests at work to end.
    pub drain_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections_max: 512,
            head_timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(30),
            buffer_bytes: 32 << 10,
            drain_timeout: Duration::from_secs(5),
        }
    }
}

/// What the accept loop knows of a connection.
#[derive(Debug, Default)]
pub struct ConnectionState {
    working: AtomicBool,
    /// When the last request ended, by the count of ended requests; 0 = never had one.
    last_served: AtomicU64,
    served: Arc<AtomicU64>,
    leave: Notify,
}

impl ConnectionState {
    /// Marks the connection as at work until the guard is dropped.
    pub(super) fn work(&self) -> Work<'_> {
        self.working.store(true, Ordering::Relaxed);
        Work(self)
    }
}

/// A request is at work on the connection.
#[must_use]
pub(super) struct Work<'a>(&'a ConnectionState);

impl Drop for Work<'_> {
    fn drop(&mut self) {
        let now = self.0.served.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.last_served.store(now, Ordering::Relaxed);
        self.0.working.store(false, Ordering::Relaxed);
    }
}

/// The accept loop's own table of connections.
struct Connections {
    limits: ConnectionLimits,
    metrics: Arc<Metrics>,
    open: BTreeMap<u64, Arc<ConnectionState>>,
    tasks: JoinSet<u64>,
    next_id: u64,
    served: Arc<AtomicU64>,
}

/// Serves `app` on `listener` until `shutdown` ends; then takes no more connections and lets requests at work end.
///
/// # Errors
/// Only if the listener itself is unusable; what is wrong with a connection concerns that connection.
pub async fn serve(
    listener: TcpListener,
    app: App,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let App {
        router,
        metrics,
        connections: limits,
    } = app;
    let drain_timeout = limits.drain_timeout;
    let mut connections = Connections {
        limits,
        metrics,
        open: BTreeMap::new(),
        tasks: JoinSet::new(),
        next_id: 0,
        served: Arc::default(),
    };
    let mut failed = Seldom::default();
    let (stop, stopping) = watch::channel(());
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => connections.admit(stream, &router, &stopping),
                Err(error) if of_the_connection(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(error),
                Err(error) => {
                    if let Some(others) = failed.now() {
                        tracing::warn!(%error, others, "cannot accept HTTP connections");
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = connections.tasks.join_next() => connections.forget(ended),
        }
    }
    drop(listener);
    drop(stop);
    let drained = timeout(drain_timeout, async {
        while let Some(ended) = connections.tasks.join_next().await {
            connections.forget(ended);
        }
    });
    if drained.await.is_err() {
        tracing::warn!(
            open = connections.open.len(),
            "HTTP connections cut off on shutdown"
        );
    }
    connections.metrics.set_http_connections(0);
    Ok(())
}

/// Errors of `accept` that concern only the connection that was to be accepted.
fn of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

impl Connections {
    fn admit(&mut self, stream: TcpStream, router: &Router, stopping: &watch::Receiver<()>) {
        if self.open.len() >= self.limits.connections_max && !self.make_room() {
            self.metrics.connection_closed(ConnectionEnd::Full);
            return;
        }
        let state = Arc::new(ConnectionState {
            served: Arc::clone(&self.served),
            ..ConnectionState::default()
        });
        let id = self.next_id;
        self.next_id += 1;
        self.open.insert(id, Arc::clone(&state));
        self.metrics.set_http_connections(self.open.len());
        let connection = Connection {
            state,
            router: router.clone(),
            limits: self.limits.clone(),
            metrics: Arc::clone(&self.metrics),
        };
        let stopping = stopping.clone();
        self.tasks.spawn(async move {
            connection.run(stream, stopping).await;
            id
        });
    }

    /// Closes the waiting connection with the least claim; false if every one is at work.
    fn make_room(&mut self) -> bool {
        let waiting = self
            .open
            .iter()
            .filter(|(_, state)| !state.working.load(Ordering::Relaxed));
        let least =
            waiting.min_by_key(|(id, state)| (state.last_served.load(Ordering::Relaxed), **id));
        let Some(id) = least.map(|(id, _)| *id) else {
            return false;
        };
        if let Some(state) = self.open.remove(&id) {
            state.leave.notify_one();
            self.metrics.connection_closed(ConnectionEnd::Replaced);
        }
        true
    }

    fn forget(&mut self, ended: Result<u64, tokio::task::JoinError>) {
        match ended {
            Ok(id) => {
                self.open.remove(&id);
            }
            Err(error) => {
                tracing::error!(%error, "a request handler failed");
                self.open.retain(|_, state| Arc::strong_count(state) > 1);
            }
        }
        self.metrics.set_http_connections(self.open.len());
    }
}

/// One connection, from the first byte to the last.
struct Connection {
    state: Arc<ConnectionState>,
    router: Router,
    limits: ConnectionLimits,
    metrics: Arc<Metrics>,
}

impl Connection {
    async fn run(self, stream: TcpStream, mut stopping: watch::Receiver<()>) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        let service = service_fn(|request: Request<Incoming>| self.call(request));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head_timeout)
            .max_buf_size(self.limits.buffer_bytes)
            .serve_connection(
                Impatient::new(TokioIo::new(stream), self.limits.answer_timeout),
                service,
            );
        tokio::pin!(connection);
        let mut stopped = false;
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if ended.is_err_and(|error| was_too_slow(&error)) {
                        self.metrics.connection_closed(ConnectionEnd::Timeout);
                    }
                    return;
                }
                () = self.state.leave.notified() => return,
                _ = stopping.changed(), if !stopped => {
                    stopped = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }

    async fn call(&self, request: Request<Incoming>) -> Result<Response, Infallible> {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Arc::clone(&self.state));
        self.router.clone().call(request).await
    }
}
