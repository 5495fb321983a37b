//! Compute marks: events on vLLM's stream, which copies wait for.
//!
//! Marks are made on vLLM's thread and looked up on the copy thread, under one lock that both hold for a driver call or two.
//! Nothing here panics or waits for the GPU.

#![allow(
    unsafe_code,
    reason = "vLLM's raw stream handles enter here, in one place"
)]

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::codes::DriverError;
use super::driver::{Context, Event, Stream};
use crate::engine::{ComputeMark, ComputeMarker, CopyError};

/// Marks that the GPU has not reached. An engine step makes two and vLLM runs two steps ahead: more means that the GPU hangs.
const MARKS_MAX: usize = 256;

/// The marks of one engine.
pub(super) struct Marks {
    context: Arc<Context>,
    ledger: Mutex<Ledger>,
}

#[derive(Default)]
struct Ledger {
    /// The number of the newest mark.
    issued: u64,
    /// Marks not known to have passed, oldest first.
    pending: VecDeque<(u64, Event)>,
    /// Events without a mark.
    free: Vec<Event>,
}

impl Ledger {
    /// Takes back the events of marks that have passed. Of several streams the oldest mark holds the others up.
    fn reclaim(&mut self) -> Result<(), DriverError> {
        while let Some((_, event)) = self.pending.front()
            && event.passed()?
            && let Some((_, event)) = self.pending.pop_front()
        {
            self.free.push(event);
        }
        Ok(())
    }

    /// The event of a mark, unless it has passed.
    fn find(&self, mark: ComputeMark) -> Result<Option<&Event>, CopyError> {
        if mark.0 > self.issued {
            return Err(CopyError::BadConfig(
                "a compute mark of another engine's marker",
            ));
        }
        let found = self.pending.binary_search_by_key(&mark.0, |(id, _)| *id);
        Ok(found.ok().map(|index| &self.pending[index].1))
    }
}

impl Marks {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            ledger: Mutex::default(),
        }
    }

    /// Makes what is enqueued on `stream` from here on wait for `mark`.
    pub(super) fn order(&self, mark: ComputeMark, stream: &Stream) -> Result<(), CopyError> {
        let mut ledger = self.ledger.lock();
        ledger.reclaim()?;
        match ledger.find(mark)? {
            Some(event) => Ok(stream.wait(event)?),
            None => Ok(()),
        }
    }

    /// Whether the GPU has reached `mark`.
    pub(super) fn passed(&self, mark: ComputeMark) -> Result<bool, CopyError> {
        let ledger = self.ledger.lock();
        match ledger.find(mark)? {
            Some(event) => Ok(event.passed()?),
            None => Ok(true),
        }
    }

    /// Marks what is on `stream` now.
    ///
    /// # Safety
    /// `stream` is a live stream of the context, or 0.
    unsafe fn mark(&self, stream: u64) -> Result<ComputeMark, CopyError> {
        let mut ledger = self.ledger.lock();
        self.context.within(|| {
            // First of all: to ask whether marks have passed would break the capture.
            // SAFETY: by the contract of this function.
            unsafe { self.context.refuse_captured(stream)? };
            if ledger.free.is_empty() {
                ledger.reclaim()?;
            }
            let event = match ledger.free.pop() {
                Some(event) => event,
                None if ledger.pending.len() >= MARKS_MAX => return Err(CopyError::Busy),
                None => self.context.event()?,
            };
            // SAFETY: by the contract of this function.
            unsafe { event.record_on(stream)? };
            ledger.issued += 1;
            let mark = ComputeMark(ledger.issued);
            ledger.pending.push_back((mark.0, event));
            Ok(mark)
        })
    }
}

/// Marks vLLM's compute work for a [`CudaEngine`](super::CudaEngine).
pub struct CudaMarker {
    marks: Arc<Marks>,
}

impl CudaMarker {
    /// # Safety
    /// Every stream that is marked is a live stream of the engine's device, as torch names it (0: the default one).
    pub(super) unsafe fn new(marks: Arc<Marks>) -> Self {
        Self { marks }
    }
}

impl ComputeMarker for CudaMarker {
    fn mark(&self, stream: u64) -> Result<ComputeMark, CopyError> {
        // SAFETY: whoever made the marker has vouched for the streams that it is called with.
        unsafe { self.marks.mark(stream) }
    }
}
