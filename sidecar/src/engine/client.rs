//! The engine's end of the protocol: threads that keep a connection to the sidecar, so that no caller ever waits for it.
//!
//! [`SchedulerLink`] carries the scheduler hooks' messages. Its reader thread puts what arrives into a bounded inbox,
//! moves the *epoch word* and calls the waker; its writer thread drains a bounded outbox. A full outbox or any error
//! ends the connection, which is then made anew: the hooks learn of it through the inbox.
//! [`WorkerLink`] only fetches the arena, and fetches it again from a restarted sidecar.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvstore::{ArenaMap, PresenceView};
use parking_lot::{Condvar, Mutex};

use super::frames::{FrameError, Hello, Rising, ToEngine, ToSidecar, decode, encode};
use super::socket::{FRAME_TIMEOUT, invalid, is_trusted, next_frame, read_frame};
use crate::faults::Exit;
use crate::sync::thread::{Builder, JoinHandle};
use crate::sync::{AtomicU64, Receiver, Sender, TrySendError, bounded};

/// Most messages that wait to be sent.
const OUTBOX_MESSAGES: usize = 4096;
/// Most messages that wait to be read; few in a model, where the reader shall meet a full inbox.
const INBOX_MESSAGES: usize = if cfg!(feature = "models") { 2 } else { 4096 };
/// How long the sidecar may take to answer a hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// First and last pause between attempts to connect.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// Called from the reader thread when something arrived; must not block for long.
pub type Waker = Box<dyn Fn() + Send + Sync>;

/// What the scheduler side finds in its inbox.
#[derive(Debug)]
pub enum Inbound {
    /// Connected to a sidecar. Everything known of an earlier connection is void unless `boot` is the same.
    Connected {
        /// Identifies the sidecar's start and its arena.
        boot: u64,
        /// Messages to this sidecar over this connection, and over no other.
        outbox: Outbox,
        /// Which blocks this sidecar need not be asked for.
        presence: Option<PresenceView>,
    },
    /// The sidecar answered with a refusal; tried again later.
    Refused(String),
    /// The connection is gone.
    Lost,
    /// A message.
    Message {
        /// Number of the message that this answers; 0 for a push.
        sequence: u64,
        /// The message.
        message: ToEngine,
        /// When it came: the times that it names begin then, however late an engine in a long step takes it in.
        at: Instant,
    },
}

/// The message could not be queued: there is no connection, or it was just given up because its outbox was full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not connected to the sidecar")]
pub struct LinkDown;

/// The sending end of one connection. What is sent over an ended one is refused, never carried over to the next.
#[derive(Clone)]
pub struct Outbox {
    frames: Sender<Vec<u8>>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").finish_non_exhaustive()
    }
}

impl Outbox {
    /// Queues a message; never blocks.
    ///
    /// # Errors
    /// [`LinkDown`] when the connection has ended; a full outbox ends it first.
    pub fn send(&self, sequence: u64, message: &ToSidecar) -> Result<(), LinkDown> {
        let frame = encode(sequence, message).map_err(|error: FrameError| {
            tracing::warn!(%error, "message to the sidecar not sent");
            LinkDown
        })?;
        self.frames.try_send(frame).map_err(|error| {
            if matches!(error, TrySendError::Full(_)) {
                tracing::warn!("the sidecar does not keep up; connecting anew");
                self.shared.disconnect();
            }
            LinkDown
        })
    }
}

struct Shared {
    /// Moves whenever the inbox gains something; read without a system call on every engine step.
    epoch: AtomicU64,
    state: Mutex<LinkState>,
    closing: Condvar,
}

#[derive(Default)]
struct LinkState {
    closed: bool,
    /// A clone of the connected stream, to break a blocked read from outside.
    stream: Option<UnixStream>,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            epoch: AtomicU64::new(0),
            state: Mutex::default(),
            closing: Condvar::new(),
        })
    }

    /// Waits between attempts; true when the link is closed.
    fn pause(&self, pause: Duration) -> bool {
        let mut state = self.state.lock();
        if !state.closed {
            self.closing.wait_for(&mut state, pause);
        }
        state.closed
    }

    /// Makes a new connection known; false when the link was closed meanwhile.
    fn connected(&self, stream: &UnixStream) -> io::Result<bool> {
        let clone = stream.try_clone()?;
        let mut state = self.state.lock();
        state.stream = Some(clone);
        Ok(!state.closed)
    }

    fn disconnect(&self) {
        let mut state = self.state.lock();
        if let Some(stream) = state.stream.take() {
            // The peer may have closed it already; then there is nothing left to shut down.
            stream.shutdown(Shutdown::Both).unwrap_or_default();
        }
    }

    fn close(&self) {
        self.state.lock().closed = true;
        self.closing.notify_all();
        self.disconnect();
    }
}

/// Whoever serves the socket is handed every saved block and says which bytes come back: this user's sidecar, or root's.
fn check_server(stream: &UnixStream) -> io::Result<()> {
    let server = rustix::net::sockopt::socket_peercred(stream)?.uid;
    check_user(server.as_raw(), rustix::process::geteuid().as_raw())
}

/// A sidecar of user `server`, as an engine of user `own` sees it.
fn check_user(server: u32, own: u32) -> io::Result<()> {
    if is_trusted(server, own) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!(
            "the socket is served by a process of user {server}: only a sidecar of user {own}, which the engine runs as, or of root is used"
        ),
    ))
}

/// Connects and says hello; returns the stream, the welcome and the descriptor that came with it.
fn greet(socket: &Path, hello: &Hello) -> io::Result<(UnixStream, ToEngine, Option<OwnedFd>)> {
    let stream = UnixStream::connect(socket)?;
    check_server(&stream)?;
    stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
    stream.set_write_timeout(Some(HELLO_TIMEOUT))?;
    if kvstore::fault!("client::hello::kill") {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    (&stream).write_all(&encode(1, &ToSidecar::Hello(hello.clone())).map_err(invalid)?)?;
    let (_, body, descriptor) = read_frame(&stream)?;
    let answer = decode(&body).map_err(invalid)?;
    stream.set_read_timeout(Some(FRAME_TIMEOUT))?;
    stream.set_write_timeout(None)?;
    Ok((stream, answer, descriptor))
}

/// The scheduler side's connection.
pub struct SchedulerLink {
    shared: Arc<Shared>,
    inbox: Receiver<Inbound>,
    supervisor: Option<JoinHandle<()>>,
}

impl SchedulerLink {
    /// Starts connecting in the background and keeps at it until [`Self::close`].
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn open(socket: PathBuf, hello: Hello, waker: Waker) -> io::Result<Self> {
        let (mut link, supervisor) = Self::pair(socket, hello, waker);
        let thread = Builder::new().name("greenroom-link".into());
        link.supervisor = Some(thread.spawn(move || supervisor.run())?);
        Ok(link)
    }

    /// Both ends of the inbox, before a thread is at the other one.
    pub(crate) fn pair(socket: PathBuf, hello: Hello, waker: Waker) -> (Self, Supervisor) {
        let shared = Shared::new();
        let (inbox_in, inbox) = bounded(INBOX_MESSAGES);
        let supervisor = Supervisor {
            shared: shared.clone(),
            inbox: inbox_in,
            waker,
            socket,
            hello,
        };
        let link = Self {
            shared,
            inbox,
            supervisor: None,
        };
        (link, supervisor)
    }

    /// The epoch word: unchanged means that the inbox has nothing new. Costs no system call.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch.load(Ordering::Acquire)
    }

    /// Next arrival, if any.
    pub fn receive(&self) -> Option<Inbound> {
        self.inbox.try_recv().ok()
    }

    /// Ends the connection and its threads.
    pub fn close(&mut self) {
        self.shared.close();
        // A full inbox may hold the reader: it is emptied until the thread has let go of its end.
        while self.inbox.recv().is_ok() {}
        if let Some(supervisor) = self.supervisor.take()
            && supervisor.join().is_err()
        {
            tracing::error!("the link thread panicked");
        }
    }
}

impl Drop for SchedulerLink {
    fn drop(&mut self) {
        self.close();
    }
}

/// The other end of a [`SchedulerLink`].
pub(crate) struct Supervisor {
    shared: Arc<Shared>,
    inbox: Sender<Inbound>,
    waker: Waker,
    socket: PathBuf,
    hello: Hello,
}

impl Supervisor {
    fn run(self) {
        let mut pause = RETRY_MIN;
        let mut reported = false;
        loop {
            match self.serve_one_connection() {
                Ok(()) => (pause, reported) = (RETRY_MIN, false),
                Err(error) if !reported => {
                    tracing::info!(socket = %self.socket.display(), %error, "no sidecar; lookups miss until there is one");
                    reported = true;
                }
                Err(_) => {}
            }
            if self.shared.pause(pause) {
                return;
            }
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    pub(crate) fn deliver(&self, inbound: Inbound) -> io::Result<()> {
        self.inbox
            .send(inbound)
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        self.shared.epoch.fetch_add(1, Ordering::Release);
        (self.waker)();
        Ok(())
    }

    /// Connects once and reads until the connection ends; `Err` if it never was made.
    fn serve_one_connection(&self) -> io::Result<()> {
        let (stream, answer, descriptor) = greet(&self.socket, &self.hello)?;
        let (boot, file_bytes) = match answer {
            ToEngine::Welcome {
                boot, file_bytes, ..
            } => (boot, file_bytes),
            ToEngine::Refused { reason } => {
                self.deliver(Inbound::Refused(reason.clone()))?;
                return Err(io::Error::other(reason));
            }
            _ => return Err(invalid(FrameError::Malformed)),
        };
        let presence = descriptor.and_then(|file| {
            let opened = PresenceView::open(file, file_bytes);
            opened
                .inspect_err(|error| tracing::warn!(%error, "no presence filter; every request asks the sidecar"))
                .ok()
        });
        let (outbox, frames) = self.outbox();
        if !self.shared.connected(&stream)? {
            return Ok(());
        }
        let writer = stream.try_clone()?;
        // Not joined: it ends when the hooks let go of the outbox, which an idle engine may do later.
        Builder::new().name("greenroom-out".into()).spawn(move || {
            let mut exit = Exit::of_client();
            for frame in frames {
                kvstore::fault_delay!("client::write::delay");
                let (frame, last) = exit.pass(frame);
                if (&writer).write_all(&frame).is_err() || last {
                    // The reader sees the same end and reports it.
                    writer.shutdown(Shutdown::Both).unwrap_or_default();
                    return;
                }
            }
        })?;
        let ended = self
            .deliver(Inbound::Connected {
                boot,
                outbox,
                presence,
            })
            .and_then(|()| self.read(&stream));
        self.shared.disconnect();
        if let Err(error) = ended
            && matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::TimedOut
            )
        {
            tracing::warn!(%error, "the sidecar sent a bad frame, or half of one; connecting anew");
        }
        self.deliver(Inbound::Lost).or(Ok(()))
    }

    /// A new connection's outbox, and the frames that are put into it.
    pub(crate) fn outbox(&self) -> (Outbox, Receiver<Vec<u8>>) {
        let (sender, frames) = bounded(OUTBOX_MESSAGES);
        let outbox = Outbox {
            frames: sender,
            shared: self.shared.clone(),
        };
        (outbox, frames)
    }

    fn read(&self, stream: &UnixStream) -> io::Result<()> {
        let (mut replies, mut wants) = (Rising::default(), Rising::default());
        loop {
            let (sequence, body, _) = next_frame(stream)?;
            let message = decode(&body).map_err(invalid)?;
            if sequence != 0 {
                replies.take(sequence).map_err(invalid)?;
            } else if let ToEngine::Want { want, .. } = &message {
                wants.take(*want).map_err(invalid)?;
            }
            self.deliver(Inbound::Message {
                sequence,
                message,
                at: Instant::now(),
            })?;
        }
    }
}

/// An arena that a worker has mapped.
#[derive(Clone)]
pub struct MappedArena {
    /// Identifies the sidecar's start.
    pub boot: u64,
    /// The mapping.
    pub map: Arc<ArenaMap>,
    /// Bytes of one slot.
    pub slot_bytes: u64,
}

/// Takes a mapped arena into use; called on the link's thread before any job can name the arena.
pub type OnArena = Box<dyn FnMut(MappedArena) -> io::Result<()> + Send>;

/// A worker's connection: fetches the arena, then only tells the sidecar that this process lives.
pub struct WorkerLink {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerLink {
    /// Starts connecting in the background; `on_arena` is called once for each sidecar start that is found.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn open(socket: PathBuf, hello: Hello, mut on_arena: OnArena) -> io::Result<Self> {
        let shared = Shared::new();
        let thread = Builder::new().name("greenroom-arena".into()).spawn({
            let shared = shared.clone();
            move || {
                let (mut pause, mut attached, mut last) = (RETRY_MIN, None, String::new());
                loop {
                    match attend(&shared, &socket, &hello, &mut attached, &mut on_arena) {
                        Ok(()) => (pause, last) = (RETRY_MIN, String::new()),
                        Err(error) if error.to_string() != last => {
                            last = error.to_string();
                            tracing::info!(socket = %socket.display(), %error, "no arena yet");
                        }
                        Err(_) => {}
                    }
                    if shared.pause(pause) {
                        return;
                    }
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Ends the connection and its thread.
    pub fn close(&mut self) {
        self.shared.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the arena thread panicked");
        }
    }
}

impl Drop for WorkerLink {
    fn drop(&mut self) {
        self.close();
    }
}

/// One connection of a worker, from hello to the sidecar's end.
fn attend(
    shared: &Shared,
    socket: &Path,
    hello: &Hello,
    attached: &mut Option<u64>,
    on_arena: &mut OnArena,
) -> io::Result<()> {
    let (stream, answer, descriptor) = greet(socket, hello)?;
    let (boot, file_bytes, slot_bytes) = match answer {
        ToEngine::Welcome {
            boot,
            file_bytes,
            slot_bytes,
        } => (boot, file_bytes, slot_bytes),
        ToEngine::Refused { reason } => return Err(io::Error::other(reason)),
        _ => return Err(invalid(FrameError::Malformed)),
    };
    if !shared.connected(&stream)? {
        return Ok(());
    }
    if *attached != Some(boot) {
        let descriptor =
            descriptor.ok_or_else(|| io::Error::other("the welcome came without the arena"))?;
        let map = ArenaMap::map(descriptor, file_bytes).map_err(io::Error::other)?;
        on_arena(MappedArena {
            boot,
            map: Arc::new(map),
            slot_bytes,
        })?;
        *attached = Some(boot);
    }
    (&stream).write_all(&encode(2, &ToSidecar::ArenaReady).map_err(invalid)?)?;
    // Nothing more is sent to a worker: the read ends when the sidecar does.
    let ended = next_frame(&stream);
    shared.disconnect();
    match ended {
        Ok(_) => Err(invalid(FrameError::Malformed)),
        Err(_) => Ok(()),
    }
}

#[cfg(all(test, feature = "models"))]
mod models;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_users_sidecar_and_roots_is_used() {
        for own in [1000, 0] {
            assert!(check_user(own, own).is_ok());
            assert!(check_user(0, own).is_ok());
            for other in [1001, 65_534, u32::MAX] {
                let error = check_user(other, own).expect_err("another user");
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                let said = format!("a process of user {other}: only a sidecar of user {own},");
                assert!(error.to_string().contains(&said), "{error}");
            }
        }
    }
}
