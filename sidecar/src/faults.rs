//! What the fault points of the engine socket and the API do to frames, tasks and answers. Nothing, without the feature
//! `faults`: a frame then passes [`Exit`] as it is.

/// The way out of one connection's end: every frame passes it before it is written.
#[derive(Debug)]
pub(crate) struct Exit {
    #[cfg(feature = "faults")]
    points: &'static armed::FramePoints,
    /// A frame that goes after the next.
    #[cfg(feature = "faults")]
    kept: Vec<u8>,
}

impl Exit {
    /// What is written in place of a frame, and whether the connection ends with it.
    pub(crate) fn pass(&mut self, frame: Vec<u8>) -> (Vec<u8>, bool) {
        #[cfg(feature = "faults")]
        return self.spoil(frame);
        #[cfg(not(feature = "faults"))]
        (frame, false)
    }

    /// Towards the sidecar.
    pub(crate) fn of_client() -> Self {
        Self {
            #[cfg(feature = "faults")]
            points: &armed::CLIENT,
            #[cfg(feature = "faults")]
            kept: Vec::new(),
        }
    }

    /// Towards an engine.
    #[cfg(feature = "server")]
    pub(crate) fn of_server() -> Self {
        Self {
            #[cfg(feature = "faults")]
            points: &armed::SERVER,
            #[cfg(feature = "faults")]
            kept: Vec::new(),
        }
    }
}

/// Makes this task late, or holds it, if the point says so; the others go on.
#[cfg(feature = "server")]
macro_rules! delay_task {
    ($name:literal) => {
        #[cfg(feature = "faults")]
        $crate::faults::aside($name).await;
    };
}
#[cfg(feature = "server")]
pub(crate) use delay_task;

#[cfg(all(feature = "faults", feature = "server"))]
pub(crate) use armed::{aside, cut_short};

#[cfg(feature = "faults")]
mod armed {
    use kvstore::faults::{argument, strikes};

    use super::Exit;
    use crate::engine::frames::HEADER_BYTES;

    /// Names of the points of one end.
    #[derive(Debug)]
    pub(super) struct FramePoints {
        reorder: &'static str,
        duplicate: &'static str,
        truncate: &'static str,
        flip: &'static str,
        kill: &'static str,
        abort: &'static str,
    }

    pub(super) static CLIENT: FramePoints = FramePoints {
        reorder: "client::write::reorder",
        duplicate: "client::write::duplicate",
        truncate: "client::write::truncate",
        flip: "client::write::flip",
        kill: "client::write::kill",
        abort: "client::write::abort",
    };

    #[cfg(feature = "server")]
    pub(super) static SERVER: FramePoints = FramePoints {
        reorder: "server::write::reorder",
        duplicate: "server::write::duplicate",
        truncate: "server::write::truncate",
        flip: "server::write::flip",
        kill: "server::write::kill",
        abort: "server::write::abort",
    };

    impl Exit {
        pub(super) fn spoil(&mut self, mut frame: Vec<u8>) -> (Vec<u8>, bool) {
            let points = self.points;
            if strikes(points.abort) {
                std::process::abort();
            }
            if strikes(points.kill) {
                return (Vec::new(), true);
            }
            if strikes(points.truncate) {
                frame.truncate(frame.len() / 2);
                return (frame, true);
            }
            if let Some(bit) = argument(points.flip) {
                let bit = bit.parse().unwrap_or(0) % (HEADER_BYTES * 8);
                frame[bit / 8] ^= 1 << (bit % 8);
            }
            if strikes(points.duplicate) {
                frame.extend_from_within(..);
            }
            if strikes(points.reorder) {
                self.kept.append(&mut frame);
            } else {
                frame.append(&mut self.kept);
            }
            (frame, false)
        }
    }

    /// The point's sleep or pause on a thread of its own, which nobody joins; only the caller's task waits for it.
    #[cfg(feature = "server")]
    pub(crate) async fn aside(name: &'static str) {
        if !kvstore::faults::is_armed(name) {
            return;
        }
        let (done, passed) = tokio::sync::oneshot::channel::<()>();
        std::thread::spawn(move || {
            kvstore::faults::delay(name);
            drop(done);
        });
        passed.await.unwrap_or_default();
    }

    /// The answer with a body that breaks off in its middle.
    #[cfg(feature = "server")]
    pub(crate) async fn cut_short(answer: axum::response::Response) -> axum::response::Response {
        let (head, body) = answer.into_parts();
        let whole = axum::body::to_bytes(body, usize::MAX)
            .await
            .unwrap_or_default();
        let half = BrokenBody {
            start: Some(whole.slice(..whole.len() / 2)),
            length: whole.len(),
            written: false,
        };
        axum::response::Response::from_parts(head, axum::body::Body::new(half))
    }

    /// Gives its start, lets that be written, and fails.
    #[cfg(feature = "server")]
    struct BrokenBody {
        start: Option<axum::body::Bytes>,
        /// Of the whole answer, as the head says.
        length: usize,
        written: bool,
    }

    #[cfg(feature = "server")]
    impl axum::body::HttpBody for BrokenBody {
        type Data = axum::body::Bytes;
        type Error = std::io::Error;

        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
            use std::task::Poll;
            if let Some(start) = self.start.take() {
                return Poll::Ready(Some(Ok(hyper::body::Frame::data(start))));
            }
            // Only a body that makes its reader wait gets what it has given written.
            if !std::mem::replace(&mut self.written, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(Some(Err(std::io::ErrorKind::ConnectionReset.into())))
        }

        fn size_hint(&self) -> hyper::body::SizeHint {
            hyper::body::SizeHint::with_exact(u64::try_from(self.length).unwrap_or(u64::MAX))
        }
    }
}
