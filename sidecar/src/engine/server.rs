//! The sidecar's end of the engine protocol: accepts connections on the Unix socket and turns frames into events.
//!
//! Each connection is two tasks: one reads and delivers (waiting for room, so that a flood slows only its sender), one
//! writes. A peer that is not of this user, says no proper hello in time, or sends a bad frame is disconnected.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kvstore::ArenaFile;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use super::frames::{HEADER_BYTES, Header, Role, ToEngine, ToSidecar, decode, encode};
use super::socket::{invalid, send_with_descriptor};
use crate::actor::{ConnectionId, Event, Handle};

/// Engine connections at a time.
const CONNECTIONS_MAX: usize = 256;
/// How long a peer may take to say hello, or to take a welcome.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Frames that may wait for an engine to read them.
const OUTBOX_FRAMES: usize = 4096;
/// Bytes of such frames.
const OUTBOX_BYTES: usize = 32 << 20;

/// Accepts engines until the future is dropped.
///
/// # Errors
/// If the socket cannot be accepted on any more.
pub async fn accept(
    listener: UnixListener,
    arena: Arc<ArenaFile>,
    actor: Handle,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut next = 0;
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            // Out of descriptors: those who are connected go on, and some will leave.
            Err(error) if error.raw_os_error().is_some() => {
                tracing::warn!(%error, "an engine could not connect");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!("{CONNECTIONS_MAX} engine connections are open; one more was closed");
            continue;
        };
        next += 1;
        let (connection, arena, actor) = (ConnectionId(next), arena.clone(), actor.clone());
        tokio::spawn(async move {
            if let Err(error) = serve(stream, connection, &arena, &actor).await {
                tracing::info!(%error, connection = connection.0, "engine connection ended");
            }
            actor.deliver(Event::Lost(connection)).await;
            drop(place);
        });
    }
}

async fn serve(
    stream: UnixStream,
    connection: ConnectionId,
    arena: &ArenaFile,
    actor: &Handle,
) -> io::Result<()> {
    let peer = stream.peer_cred()?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() != own && peer.uid() != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the peer is another user's process",
        ));
    }
    let process = peer
        .pid()
        .and_then(|pid| u32::try_from(pid).ok())
        .ok_or_else(|| io::Error::other("the peer has no process id"))?;
    let (mut reader, writer) = stream.into_split();
    let (sequence, message) = tokio::time::timeout(HELLO_TIMEOUT, read(&mut reader)).await??;
    let ToSidecar::Hello(hello) = message else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the first message was no hello",
        ));
    };
    let pidfd = match hello.role {
        Role::Worker { .. } => match open_process(process) {
            Ok(pidfd) => Some(pidfd),
            // Without it nobody could tell when the worker's copies have ended for good.
            Err(error) => return refuse(&writer, sequence, format!("the worker's process {process} cannot be watched ({error}): run the sidecar in the same PID namespace")).await,
        },
        Role::Scheduler => None,
    };
    let (outbox, frames, cut) = outbox();
    let (reply, admitted) = oneshot::channel();
    actor
        .deliver(Event::Hello {
            connection,
            hello,
            outbox,
            process,
            reply,
        })
        .await;
    let admitted = match admitted.await.map_err(io::Error::other)? {
        Ok(admitted) => admitted,
        Err(reason) => return refuse(&writer, sequence, reason).await,
    };
    let answer = ToEngine::Welcome {
        boot: admitted.boot,
        arena_bytes: admitted.arena_bytes,
        slot_bytes: admitted.slot_bytes,
    };
    let frame = encode(sequence, &answer).map_err(invalid)?;
    tokio::time::timeout(HELLO_TIMEOUT, welcome(&writer, &frame, Some(arena.fd()))).await??;
    if let Some(pidfd) = pidfd
        && let Err(error) = watch(pidfd, process, actor.clone())
    {
        tracing::error!(%error, "cannot watch an engine's process; its slots stay reserved when it goes");
    }
    let writing = tokio::spawn(write(writer, frames));
    let ended = loop {
        let message = tokio::select! {
            message = read(&mut reader) => message,
            () = cut.notified() => break Err(io::Error::other("cut off: it does not read, or says what it may not")),
        };
        match message {
            Ok((sequence, message)) => {
                actor
                    .deliver(Event::Message {
                        connection,
                        sequence,
                        message: Box::new(message),
                    })
                    .await;
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    writing.abort();
    ended
}

/// Answers a hello that cannot be accepted, and ends the connection.
async fn refuse(writer: &OwnedWriteHalf, sequence: u64, reason: String) -> io::Result<()> {
    let frame = encode(
        sequence,
        &ToEngine::Refused {
            reason: reason.clone(),
        },
    )
    .map_err(invalid)?;
    tokio::time::timeout(HELLO_TIMEOUT, welcome(writer, &frame, None)).await??;
    Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
}

/// A descriptor of a process, which cannot be confused with a later process of the same number.
fn open_process(process: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(process)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("bad process id"))?;
    Ok(rustix::process::pidfd_open(
        pid,
        rustix::process::PidfdFlags::empty(),
    )?)
}

/// Reports the end of a process.
fn watch(pidfd: OwnedFd, process: u32, actor: Handle) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    // A thread of its own: it sleeps for as long as the process lives, and does not keep the runtime from ending.
    std::thread::Builder::new().name(format!("exit-{process}")).spawn(move || {
        loop {
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None) {
                Ok(_) => return actor.deliver_blocking(Event::Exited(process)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "cannot watch an engine's process; its slots stay reserved"),
            }
        }
    })?;
    Ok(())
}

async fn read(reader: &mut OwnedReadHalf) -> io::Result<(u64, ToSidecar)> {
    let mut head = [0; HEADER_BYTES];
    reader.read_exact(&mut head).await?;
    let (body_bytes, sequence) = Header::parse(&head).map_err(invalid)?;
    let mut body = Vec::new();
    // Grows with what really arrives: a header that only claims a large body takes no memory.
    (&mut *reader)
        .take(u64::try_from(body_bytes).unwrap_or(u64::MAX))
        .read_to_end(&mut body)
        .await?;
    if body.len() < body_bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((sequence, decode(&body).map_err(invalid)?))
}

async fn welcome(
    writer: &OwnedWriteHalf,
    frame: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let stream: &UnixStream = writer.as_ref();
    let mut sent = 0;
    while sent < frame.len() {
        sent += stream
            .async_io(Interest::WRITABLE, || {
                match descriptor.filter(|_| sent == 0) {
                    Some(descriptor) => send_with_descriptor(stream.as_fd(), frame, descriptor),
                    None => stream.try_write(&frame[sent..]),
                }
            })
            .await?;
    }
    Ok(())
}

/// The actor's end of a connection: frames to it, and the means to end it.
#[derive(Clone)]
pub struct Outbox {
    frames: mpsc::Sender<Vec<u8>>,
    /// Bytes in the queue.
    queued: Arc<AtomicUsize>,
    cut: Arc<Notify>,
}

/// The connection's end of an [`Outbox`].
struct Inlet {
    frames: mpsc::Receiver<Vec<u8>>,
    queued: Arc<AtomicUsize>,
}

fn outbox() -> (Outbox, Inlet, Arc<Notify>) {
    let (sender, frames) = mpsc::channel(OUTBOX_FRAMES);
    let (queued, cut) = (Arc::<AtomicUsize>::default(), Arc::new(Notify::new()));
    let outbox = Outbox {
        frames: sender,
        queued: queued.clone(),
        cut: cut.clone(),
    };
    (outbox, Inlet { frames, queued }, cut)
}

impl Outbox {
    /// Queues a frame. A peer that lets the queue fill up is cut off: its engine connects anew and starts clean.
    pub fn send(&self, frame: Vec<u8>) {
        let bytes = frame.len();
        let queued = self.queued.fetch_add(bytes, Ordering::Relaxed);
        if queued + bytes > OUTBOX_BYTES || self.frames.try_send(frame).is_err() {
            self.cut_off();
        }
    }

    /// Ends the connection, whatever its tasks are waiting for.
    pub fn cut_off(&self) {
        self.cut.notify_one();
    }
}

/// Writes frames until the outbox is closed; then the connection is shut down, which the reader sees.
async fn write(mut writer: OwnedWriteHalf, mut inlet: Inlet) {
    while let Some(frame) = inlet.frames.recv().await {
        inlet.queued.fetch_sub(frame.len(), Ordering::Relaxed);
        if writer.write_all(&frame).await.is_err() {
            break;
        }
    }
    writer.shutdown().await.unwrap_or_default();
}
