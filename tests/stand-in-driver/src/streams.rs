//! Streams as threads, events as counters, copy engines as one lock per direction.

use std::collections::VecDeque;
use std::ffi::c_int;

use crate::memory::CopyList;
use crate::world::{Answer, CAPTURE_UNSUPPORTED, CHANGED, INVALID_HANDLE, State, world};

/// Work on a stream.
pub(crate) enum Op {
    Copy(CopyList),
    /// An event passes the recording of this number.
    Record(usize, u64),
    /// Waits until an event has passed this recording.
    Wait(usize, u64),
    /// Compute work, until the test ends it.
    Compute(u64),
    /// A function of the program's own, with what it is given.
    Call(HostFunction, usize),
}

/// `CUhostFn`.
pub(crate) type HostFunction = unsafe extern "C" fn(usize);

/// The queue of one stream.
#[derive(Default)]
pub(crate) struct Stream {
    queue: VecDeque<Op>,
    /// The thread is doing something that it has taken out.
    busy: bool,
    /// Destroyed: ends when nothing is left.
    gone: bool,
}

impl Stream {
    /// Nothing more of what is queued is done.
    pub(crate) fn forget(&mut self) {
        self.queue.clear();
    }
}

/// Recordings so far, and the last one that has passed.
#[derive(Default)]
pub(crate) struct Event {
    recorded: u64,
    passed: u64,
}

/// The default stream: there without having been created.
pub(crate) const DEFAULT: usize = 0;

pub(crate) fn create() -> usize {
    let mut state = world().lock();
    let handle = state.handle();
    state.streams.insert(handle, Stream::default());
    std::thread::spawn(move || serve(handle));
    handle
}

fn create_default(state: &mut State) {
    state.streams.insert(DEFAULT, Stream::default());
    std::thread::spawn(|| serve(DEFAULT));
}

pub(crate) fn destroy(stream: usize) -> Answer {
    let mut state = world().lock();
    let found = state.streams.get_mut(&stream).filter(|_| stream != DEFAULT);
    found.ok_or(INVALID_HANDLE)?.gone = true;
    CHANGED.notify_all();
    Ok(())
}

/// Streams that have been created and not destroyed.
pub(crate) fn alive(state: &State) -> usize {
    let alive = |(handle, stream): (&usize, &Stream)| *handle != DEFAULT && !stream.gone;
    state.streams.iter().filter(|one| alive(*one)).count()
}

fn push(state: &mut State, stream: usize, op: Op) -> Answer {
    if stream == DEFAULT && !state.streams.contains_key(&DEFAULT) {
        create_default(state);
    }
    let found = state.streams.get_mut(&stream).filter(|stream| !stream.gone);
    found.ok_or(INVALID_HANDLE)?.queue.push_back(op);
    CHANGED.notify_all();
    Ok(())
}

/// Puts copies on a stream. Those of memory that is not registered have been made when this returns.
pub(crate) fn copy(stream: usize, list: CopyList) -> Answer {
    let waits = !list.registered;
    push(&mut world().lock(), stream, Op::Copy(list))?;
    if waits { synchronize(stream) } else { Ok(()) }
}

/// Compute work on a stream, until the test ends it.
pub(crate) fn compute(stream: usize) -> Answer {
    let mut state = world().lock();
    state.launched += 1;
    let number = state.launched;
    push(&mut state, stream, Op::Compute(number))
}

pub(crate) fn call(stream: usize, function: HostFunction, data: usize) -> Answer {
    push(&mut world().lock(), stream, Op::Call(function, data))
}

pub(crate) fn wait(stream: usize, event: usize) -> Answer {
    let mut state = world().lock();
    let recorded = state.events.get(&event).ok_or(INVALID_HANDLE)?.recorded;
    push(&mut state, stream, Op::Wait(event, recorded))
}

pub(crate) fn is_idle(stream: usize) -> Result<bool, c_int> {
    let state = world().lock();
    let stream = state.streams.get(&stream).ok_or(INVALID_HANDLE)?;
    Ok(stream.queue.is_empty() && !stream.busy)
}

pub(crate) fn synchronize(stream: usize) -> Answer {
    let mut state = world().lock();
    loop {
        if state.sticky != 0 {
            return Err(state.sticky);
        }
        let found = state.streams.get(&stream).ok_or(INVALID_HANDLE)?;
        if found.queue.is_empty() && !found.busy {
            return Ok(());
        }
        CHANGED.wait(&mut state);
    }
}

pub(crate) fn create_event() -> usize {
    let mut state = world().lock();
    let handle = state.handle();
    state.events.insert(handle, Event::default());
    handle
}

pub(crate) fn destroy_event(event: usize) -> Answer {
    let removed = world().lock().events.remove(&event);
    CHANGED.notify_all();
    removed.map(|_| ()).ok_or(INVALID_HANDLE)
}

pub(crate) fn record(event: usize, stream: usize) -> Answer {
    let mut state = world().lock();
    if let Some(capture) = &mut state.capture
        && capture.stream == stream
    {
        // The real driver would make the event, and all who wait for it, a part of the graph.
        capture.broken = true;
        return Err(CAPTURE_UNSUPPORTED);
    }
    let found = state.events.get_mut(&event).ok_or(INVALID_HANDLE)?;
    found.recorded += 1;
    let number = found.recorded;
    push(&mut state, stream, Op::Record(event, number))
}

pub(crate) fn has_passed(event: usize) -> Result<bool, c_int> {
    let state = world().lock();
    let event = state.events.get(&event).ok_or(INVALID_HANDLE)?;
    Ok(event.passed >= event.recorded)
}

/// A stream's thread: one thing after the other.
fn serve(handle: usize) {
    let mut state = world().lock();
    loop {
        let lost = state.sticky != 0;
        let Some(stream) = state.streams.get_mut(&handle) else {
            return;
        };
        if lost {
            stream.forget();
        }
        if stream.queue.is_empty() {
            if stream.gone {
                state.streams.remove(&handle);
                return;
            }
            CHANGED.wait(&mut state);
            continue;
        }
        if !begins(&mut state, handle) {
            CHANGED.wait(&mut state);
            continue;
        }
        let Some(stream) = state.streams.get_mut(&handle) else {
            return;
        };
        stream.busy = true;
        match stream.queue.pop_front() {
            Some(Op::Copy(list)) => {
                let engine = list.direction as usize;
                state.copying[engine] = true;
                state.copies += 1;
                let failing = state.failing_copy.filter(|(nth, _)| *nth == state.copies);
                drop(state);
                list.run(failing.is_some());
                state = world().lock();
                state.copying[engine] = false;
                if let Some((_, code)) = failing {
                    state.struck += 1;
                    state.sticky = code;
                }
            }
            Some(Op::Record(event, number)) => {
                if let Some(event) = state.events.get_mut(&event) {
                    event.passed = event.passed.max(number);
                }
            }
            Some(Op::Call(function, data)) => {
                drop(state);
                // SAFETY: the program gave the function together with its data, to be called once in the stream's turn.
                unsafe { function(data) };
                state = world().lock();
            }
            Some(Op::Wait(..) | Op::Compute(_)) | None => {}
        }
        if let Some(stream) = state.streams.get_mut(&handle) {
            stream.busy = false;
        }
        CHANGED.notify_all();
    }
}

/// Whether the first thing in the queue may begin now.
fn begins(state: &mut State, handle: usize) -> bool {
    let Some(op) = state
        .streams
        .get(&handle)
        .and_then(|stream| stream.queue.front())
    else {
        return false;
    };
    match op {
        Op::Copy(list) => {
            if state.copying[list.direction as usize] {
                return false;
            }
            match &mut state.held {
                Some(0) => false,
                Some(steps) => {
                    *steps -= 1;
                    true
                }
                None => true,
            }
        }
        Op::Record(..) | Op::Call(..) => true,
        Op::Wait(event, number) => state
            .events
            .get(event)
            .is_none_or(|event| event.passed >= *number),
        Op::Compute(number) => state.finished >= *number,
    }
}
