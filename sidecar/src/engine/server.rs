//! The sidecar's end of the engine protocol: accepts connections on the Unix socket and turns frames into events.
//!
//! Each connection is two tasks: one reads and delivers (waiting for room, so that a flood slows only its sender), one
//! writes. A peer that is not of this user, says no proper hello in time, or sends a bad frame is disconnected.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kvstore::ArenaFile;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use super::frames::{
    FrameError, HEADER_BYTES, Header, Hello, Rising, Role, ToEngine, ToSidecar, decode, encode,
};
use super::socket::{FRAME_TIMEOUT, invalid, is_trusted, send_with_descriptor};
use crate::actor::{Admitted, ConnectionId, Event, Handle};
use crate::faults::{Exit, delay_task};
use crate::seldom::Seldom;

/// Engine connections at a time.
pub const CONNECTIONS_MAX: usize = 256;
/// Of these, connections of one process: one that runs wild leaves room for others.
pub const CONNECTIONS_PER_PROCESS_MAX: usize = 128;
/// Frames of one connection that may wait for the actor. As many engines as there can be leave half of its queue to clients.
const FRAMES_WAITING_MAX: usize = 32;
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
    let places = Arc::<Places>::default();
    let (mut turned_away, mut failed) = (Seldom::default(), Seldom::default());
    let mut next = 0;
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            // Out of descriptors: those who are connected go on, and some will leave.
            Err(error) if error.raw_os_error().is_some() => {
                if let Some(others) = failed.now() {
                    tracing::warn!(%error, others, "an engine could not connect");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        let admitted = trusted(&stream).and_then(|process| Ok((process, places.take(process)?)));
        let (process, place) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                if let Some(others) = turned_away.now() {
                    tracing::warn!(%error, others, "an engine connection was turned away");
                }
                continue;
            }
        };
        next += 1;
        let peer = Peer {
            connection: ConnectionId(next),
            process,
        };
        let (arena, actor) = (arena.clone(), actor.clone());
        tokio::spawn(async move {
            if let Err(error) = serve(stream, peer, &arena, &actor).await {
                tracing::info!(%error, connection = peer.connection.0, process, "engine connection ended");
            }
            actor.deliver(Event::Lost(peer.connection)).await;
            drop(place);
        });
    }
}

/// The process behind a connection, if it may be there.
fn trusted(stream: &UnixStream) -> io::Result<u32> {
    let peer = stream.peer_cred()?;
    let process = peer.pid().and_then(|pid| u32::try_from(pid).ok());
    check_peer(process, peer.uid(), rustix::process::geteuid().as_raw())
}

/// A process of user `peer`, as a sidecar of user `own` sees it.
fn check_peer(process: Option<u32>, peer: u32, own: u32) -> io::Result<u32> {
    if !is_trusted(peer, own) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "process {} is of user {peer}: only processes of user {own}, which the sidecar runs as, and of root may connect",
                process.unwrap_or(0),
            ),
        ));
    }
    process.ok_or_else(|| {
        io::Error::other(
            "the peer has no process id here: run the sidecar in the same PID namespace",
        )
    })
}

/// Open connections by process.
#[derive(Default)]
struct Places(Mutex<HashMap<u32, usize>>);

/// One of them; free again when it is dropped.
struct Place {
    process: u32,
    places: Arc<Places>,
}

impl Places {
    fn take(self: &Arc<Self>, process: u32) -> io::Result<Place> {
        let mut open = self.0.lock();
        let (all, own) = (
            open.values().sum::<usize>(),
            open.get(&process).copied().unwrap_or(0),
        );
        if all >= CONNECTIONS_MAX || own >= CONNECTIONS_PER_PROCESS_MAX {
            return Err(io::Error::other(format!(
                "{all} engine connections are open, {own} of them of process {process}; the limits are {CONNECTIONS_MAX} \
                 and {CONNECTIONS_PER_PROCESS_MAX}"
            )));
        }
        open.insert(process, own + 1);
        Ok(Place {
            process,
            places: self.clone(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.places.0.lock();
        if let Some(own) = open.get_mut(&self.process) {
            *own -= 1;
            if *own == 0 {
                open.remove(&self.process);
            }
        }
    }
}

/// Who is at the other end.
#[derive(Clone, Copy)]
struct Peer {
    connection: ConnectionId,
    process: u32,
}

async fn serve(
    stream: UnixStream,
    peer: Peer,
    arena: &ArenaFile,
    actor: &Handle,
) -> io::Result<()> {
    let (mut reader, writer) = stream.into_split();
    let (sequence, message) = match tokio::time::timeout(HELLO_TIMEOUT, read(&mut reader)).await? {
        Ok(first) => first,
        // An answer that it cannot read either: but its version it does, and says what to do.
        Err(error) if of_another_release(&error) => {
            return refuse(&writer, 1, error.to_string()).await;
        }
        Err(error) => return Err(error),
    };
    let ToSidecar::Hello(hello) = message else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the first message was no hello",
        ));
    };
    let (outbox, frames, cut) = outbox();
    let role = hello.role;
    let admitted = match admit(peer, hello, outbox, actor).await? {
        Ok(admitted) => admitted,
        Err(reason) => return refuse(&writer, sequence, reason).await,
    };
    if kvstore::fault!("server::welcome::kill") {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    let file = match role {
        Role::Worker { .. } => Some(arena),
        Role::Scheduler => admitted.presence_file.as_deref(),
    };
    let answer = ToEngine::Welcome {
        boot: admitted.boot,
        file_bytes: file.map_or(0, ArenaFile::bytes),
        slot_bytes: admitted.slot_bytes,
    };
    let frame = encode(sequence, &answer).map_err(invalid)?;
    tokio::time::timeout(
        HELLO_TIMEOUT,
        welcome(&writer, &frame, file.map(ArenaFile::fd)),
    )
    .await??;
    let writing = tokio::spawn(write(writer, frames));
    let ended = tokio::select! {
        ended = listen(&mut reader, peer.connection, actor) => ended,
        () = cut.notified() => Err(io::Error::other("cut off: it does not read, or says what it may not")),
    };
    writing.abort();
    ended
}

/// Has the actor take an engine's process in, or say why not. A worker's process is watched from then on: its slots are
/// free when it has exited, whatever becomes of the connection.
async fn admit(
    peer: Peer,
    hello: Hello,
    outbox: Outbox,
    actor: &Handle,
) -> io::Result<Result<Admitted, String>> {
    let process = peer.process;
    let pidfd = match hello.role {
        Role::Worker { .. } => match open_process(process) {
            Ok(pidfd) => Some(pidfd),
            // Without it nobody could tell when the worker's copies have ended for good.
            Err(error) => {
                return Ok(Err(format!(
                    "the worker's process {process} cannot be watched ({error}): run the sidecar in the same PID namespace"
                )));
            }
        },
        Role::Scheduler => None,
    };
    let (reply, admitted) = oneshot::channel();
    actor
        .deliver(Event::Hello {
            connection: peer.connection,
            hello,
            outbox,
            process,
            reply,
        })
        .await;
    let admitted = admitted.await.map_err(io::Error::other)?;
    if let (Ok(Admitted { watch: true, .. }), Some(pidfd)) = (&admitted, pidfd)
        && let Err(error) = watch(pidfd, process, actor.clone())
    {
        tracing::error!(%error, "cannot watch an engine's process; its slots stay reserved when it goes");
    }
    Ok(admitted)
}

/// Delivers what an engine says until it leaves.
async fn listen(
    reader: &mut OwnedReadHalf,
    connection: ConnectionId,
    actor: &Handle,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(FRAMES_WAITING_MAX));
    let mut numbers = Rising::default();
    loop {
        let (sequence, message) = match read(reader).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        };
        numbers.take(sequence).map_err(invalid)?;
        let place = places.clone().acquire_owned().await;
        let place = place.map_err(io::Error::other)?;
        actor
            .deliver(Event::Message {
                connection,
                sequence,
                message: Box::new(message),
                place,
            })
            .await;
    }
}

fn of_another_release(error: &io::Error) -> bool {
    let frame_error = error.get_ref().and_then(|inner| inner.downcast_ref());
    matches!(frame_error, Some(FrameError::Version(_)))
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

/// Reads one message: waits as long as it takes for its first byte, and a bounded time for the rest.
async fn read(reader: &mut OwnedReadHalf) -> io::Result<(u64, ToSidecar)> {
    let mut head = [0; HEADER_BYTES];
    let begun = reader.read(&mut head).await?;
    if begun == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    tokio::time::timeout(FRAME_TIMEOUT, read_rest(reader, head, begun))
        .await
        .map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                "it stopped in the middle of a frame",
            )
        })?
}

async fn read_rest(
    reader: &mut OwnedReadHalf,
    mut head: [u8; HEADER_BYTES],
    begun: usize,
) -> io::Result<(u64, ToSidecar)> {
    reader.read_exact(&mut head[begun..]).await?;
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

/// An outbox without a connection.
#[cfg(test)]
pub(crate) fn outbox_and_frames() -> (Outbox, mpsc::Receiver<Vec<u8>>) {
    let (outbox, inlet, _) = outbox();
    (outbox, inlet.frames)
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
    let mut exit = Exit::of_server();
    while let Some(frame) = inlet.frames.recv().await {
        inlet.queued.fetch_sub(frame.len(), Ordering::Relaxed);
        delay_task!("server::write::delay");
        let (frame, last) = exit.pass(frame);
        if writer.write_all(&frame).await.is_err() || last {
            break;
        }
    }
    writer.shutdown().await.unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_users_processes_and_roots_may_connect() {
        for own in [1000, 0] {
            assert_eq!(check_peer(Some(7), own, own).ok(), Some(7));
            assert_eq!(check_peer(Some(7), 0, own).ok(), Some(7));
            for other in [1001, 65_534, u32::MAX] {
                let error = check_peer(Some(7), other, own).expect_err("another user");
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                let said = format!("process 7 is of user {other}: only processes of user {own},");
                assert!(error.to_string().starts_with(&said), "{error}");
            }
        }
        assert!(
            check_peer(None, 1000, 1000).is_err(),
            "nobody would see it end"
        );
    }
}
