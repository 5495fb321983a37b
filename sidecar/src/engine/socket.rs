//! Passing a descriptor over a Unix socket, and reading whole frames from a blocking one.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::frames::{FrameError, HEADER_BYTES, Header};

/// Whether a process of this user may be at the other end of the engine socket: the sidecar hands out a writable mapping of
/// the arena, and an engine hands over every saved block. Both ends ask; so does whoever reads a token file, of its owner.
pub fn is_trusted(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

/// Sends the start of `frame` together with a descriptor; returns how many bytes went.
///
/// # Errors
/// As `sendmsg(2)`; `WouldBlock` on a non-blocking socket whose buffer is full.
pub fn send_with_descriptor(
    socket: BorrowedFd<'_>,
    frame: &[u8],
    descriptor: BorrowedFd<'_>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    assert!(
        control.push(SendAncillaryMessage::ScmRights(&descriptors)),
        "the buffer was made for one descriptor"
    );
    Ok(sendmsg(
        socket,
        &[IoSlice::new(frame)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

/// How long the rest of a frame may take once its first byte is there. Both ends give up on a peer that stops in the middle
/// of one: it would otherwise hold the connection, and the engine would miss for as long as it does.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(5);

/// As [`read_frame`], but waits as long as it takes for the first byte, on a socket whose read timeout is
/// [`FRAME_TIMEOUT`].
///
/// # Errors
/// As [`read_frame`].
pub fn next_frame(socket: &UnixStream) -> io::Result<(u64, Vec<u8>, Option<OwnedFd>)> {
    loop {
        match read_frame(socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

/// Reads one frame; returns its sequence number, its body and the descriptor that came with it, if any.
///
/// # Errors
/// The socket's own error, `UnexpectedEof` when the peer is gone, `InvalidData` around a [`FrameError`], `TimedOut` when the
/// rest of a frame takes longer than [`FRAME_TIMEOUT`], `WouldBlock` when the socket's read timeout passes before there is
/// anything.
pub fn read_frame(socket: &UnixStream) -> io::Result<(u64, Vec<u8>, Option<OwnedFd>)> {
    let mut head = [0; HEADER_BYTES];
    let (mut filled, mut descriptor) = (0, None);
    while filled < HEADER_BYTES {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(&mut head[filled..])],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let got = match got {
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) if filled > 0 => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            other => other?,
        };
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                descriptor = descriptors.last();
            }
        }
        filled += got.bytes;
    }
    let (body_bytes, sequence) = Header::parse(&head).map_err(invalid)?;
    let mut body = vec![0; body_bytes];
    read_body(socket, &mut body, Instant::now() + FRAME_TIMEOUT)?;
    Ok((sequence, body, descriptor))
}

/// A deadline for the whole: a peer that sends a little now and then never lets the socket's own read timeout pass.
fn read_body(mut socket: &UnixStream, mut rest: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !rest.is_empty() {
        match socket.read(rest) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => rest = &mut rest[read..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
        if !rest.is_empty() && Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// A frame error as an I/O error, the reason kept.
pub fn invalid(error: FrameError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
