//! Passing the arena's descriptor over a Unix socket, and reading whole frames from a blocking one.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::frames::{FrameError, HEADER_BYTES, Header};

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

/// Reads one frame; returns its sequence number, its body and the descriptor that came with it, if any.
///
/// # Errors
/// The socket's own error, `UnexpectedEof` when the peer is gone, `InvalidData` around a [`FrameError`].
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
    (&*socket).read_exact(&mut body)?;
    Ok((sequence, body, descriptor))
}

/// A frame error as an I/O error, the reason kept.
pub fn invalid(error: FrameError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
