//! The test's own functions, exported beside the driver's. Names are C strings; an unknown one answers -1.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::{CStr, c_char, c_int};

use crate::streams::{Stream, alive, compute};
use crate::world::{CHANGED, Capture, Fault, State, world};

/// Device memory is aligned as the driver's is.
const ALIGN: usize = 256;

/// Everything as it was when the library was loaded. Only when nothing of the driver is in use.
#[unsafe(no_mangle)]
pub extern "C" fn stand_in_reset() {
    let mut state = world().lock();
    // Streams that somebody left behind keep their threads, but nothing to do; handles are never used twice.
    let mut streams = std::mem::take(&mut state.streams);
    streams.values_mut().for_each(Stream::forget);
    let handles = state.handles;
    *state = State::new();
    (state.streams, state.handles) = (streams, handles);
    CHANGED.notify_all();
}

/// Sets `version`, `devices`, `batch`, `pageable`, `memory_device`, `held` (0: no), `steps`, `capture` (a stream; -1: none).
///
/// # Safety
/// `name` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stand_in_set(name: *const c_char, value: i64) -> i64 {
    let number = c_int::try_from(value).unwrap_or(0);
    let count = u64::try_from(value).unwrap_or(0);
    let mut state = world().lock();
    // SAFETY: by the contract of this function.
    match unsafe { CStr::from_ptr(name) }.to_bytes() {
        b"version" => state.version = number,
        b"devices" => state.devices = number,
        b"batch" => state.batch = value != 0,
        b"pageable" => state.pageable = value != 0,
        b"memory_device" => state.memory_device = number,
        b"held" => state.held = (value != 0).then_some(0),
        b"steps" => {
            if let Some(steps) = &mut state.held {
                *steps += count;
            }
        }
        b"capture" => {
            state.capture = usize::try_from(value).ok().map(|stream| Capture {
                stream,
                broken: false,
            });
        }
        _ => return -1,
    }
    CHANGED.notify_all();
    0
}

/// Reads `streams`, `events`, `registered`, `retained`, `copies`, `struck`, `capture_broken`, or, under the name of an entry
/// point, how often it was called.
///
/// # Safety
/// `name` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stand_in_get(name: *const c_char) -> i64 {
    let state = world().lock();
    // SAFETY: by the contract of this function.
    let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap_or("");
    let value = match name {
        "streams" => alive(&state) as u64,
        "events" => state.events.len() as u64,
        "registered" => state.registered.len() as u64,
        "retained" => state.retained,
        "copies" => state.copies,
        "struck" => state.struck,
        "capture_broken" => u64::from(state.capture.is_some_and(|capture| capture.broken)),
        entry => state.calls.get(entry).copied().unwrap_or(0),
    };
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Makes the `nth` call of an entry point from now end with `code`; under the name `copy`, the `nth` copy that begins, which
/// then is made by half and loses the context.
///
/// # Safety
/// `entry` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn stand_in_fail(entry: *const c_char, nth: u64, code: c_int) {
    let mut state = world().lock();
    // SAFETY: by the contract of this function.
    let entry = unsafe { CStr::from_ptr(entry) }
        .to_string_lossy()
        .into_owned();
    if entry == "copy" {
        state.failing_copy = Some((state.copies + nth, code));
        return;
    }
    let so_far = state.calls.get(entry.as_str()).copied().unwrap_or(0);
    let nth = so_far + nth;
    state.faults.push(Fault { entry, nth, code });
}

/// Device memory of zeroes; 0 if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn stand_in_alloc(bytes: usize) -> u64 {
    let Some(layout) = layout(bytes) else {
        return 0;
    };
    // SAFETY: the layout is not empty.
    let start = unsafe { alloc_zeroed(layout) }.expose_provenance() as u64;
    if start != 0 {
        world().lock().allocated.insert(start, bytes);
    }
    start
}

/// Gives memory of `stand_in_alloc` back.
#[unsafe(no_mangle)]
pub extern "C" fn stand_in_free(start: u64) {
    let removed = world().lock().allocated.remove(start);
    if let Some(layout) = removed.and_then(layout) {
        let start = std::ptr::with_exposed_provenance_mut(usize::try_from(start).unwrap_or(0));
        // SAFETY: allocated with this layout, and given back once: it was on the list.
        unsafe { dealloc(start, layout) };
    }
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes, ALIGN)
        .ok()
        .filter(|layout| layout.size() > 0)
}

/// Puts compute work on a stream, which runs until `stand_in_finish`.
#[unsafe(no_mangle)]
pub extern "C" fn stand_in_launch(stream: usize) -> c_int {
    compute(stream).err().unwrap_or(0)
}

/// Ends all compute work that has been launched.
#[unsafe(no_mangle)]
pub extern "C" fn stand_in_finish() {
    let mut state = world().lock();
    state.finished = state.launched;
    CHANGED.notify_all();
}
