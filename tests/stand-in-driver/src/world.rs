//! What the driver knows: one state under one lock, and what each call checks before it does anything.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::LazyLock;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::CONTEXT;
use crate::memory::Ranges;
use crate::streams::{Event, Stream};

pub(crate) const INVALID_VALUE: c_int = 1;
pub(crate) const OUT_OF_MEMORY: c_int = 2;
pub(crate) const INVALID_CONTEXT: c_int = 201;
pub(crate) const INVALID_HANDLE: c_int = 400;
pub(crate) const NOT_FOUND: c_int = 500;
pub(crate) const NOT_READY: c_int = 600;
pub(crate) const CAPTURE_UNSUPPORTED: c_int = 900;
pub(crate) const CAPTURE_INVALIDATED: c_int = 901;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const RELAXED: u32 = 2;

/// How a call ends: an error is the driver's number.
pub(crate) type Answer = Result<(), c_int>;

/// What an entry point needs.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Needs {
    Nothing,
    /// A context that is current on the calling thread.
    Context,
    /// That, and no capture that forbids it: the driver calls these calls potentially unsafe.
    Uncaptured,
}

/// A graph that is being captured, in the mode that forbids much to all other threads.
#[derive(Clone, Copy)]
pub(crate) struct Capture {
    pub(crate) stream: usize,
    /// A forbidden call was made, which is the end of it.
    pub(crate) broken: bool,
}

pub(crate) struct State {
    pub(crate) version: c_int,
    pub(crate) devices: c_int,
    /// Whether there is a batch entry point.
    pub(crate) batch: bool,
    /// Whether copies of memory that is not registered are made, as the real driver makes them: at first as the environment
    /// says (`STAND_IN_PAGEABLE`), for programs that do not know that this is no real one.
    pub(crate) pageable: bool,
    /// The device that all memory is on.
    pub(crate) memory_device: c_int,
    /// What the driver answers to everything, once it has answered it.
    pub(crate) sticky: c_int,
    pub(crate) retained: u64,
    pub(crate) registered: Ranges,
    pub(crate) allocated: Ranges,
    pub(crate) streams: HashMap<usize, Stream>,
    pub(crate) events: HashMap<usize, Event>,
    pub(crate) handles: usize,
    /// Copy engines that are copying, by direction.
    pub(crate) copying: [bool; 2],
    /// Copies do not begin, but for so many.
    pub(crate) held: Option<u64>,
    /// Copies that have begun, and the one that fails with a number.
    pub(crate) copies: u64,
    pub(crate) failing_copy: Option<(u64, c_int)>,
    /// Compute work: launched, and ended.
    pub(crate) launched: u64,
    pub(crate) finished: u64,
    pub(crate) capture: Option<Capture>,
    pub(crate) calls: HashMap<&'static str, u64>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) struck: u64,
}

/// The `nth` call of an entry point from the start ends with `code`.
pub(crate) struct Fault {
    pub(crate) entry: String,
    pub(crate) nth: u64,
    pub(crate) code: c_int,
}

impl State {
    pub(crate) fn new() -> Self {
        Self {
            version: 12_080,
            devices: 1,
            batch: true,
            pageable: std::env::var_os("STAND_IN_PAGEABLE").is_some(),
            memory_device: 0,
            sticky: 0,
            retained: 0,
            registered: Ranges::default(),
            allocated: Ranges::default(),
            streams: HashMap::new(),
            events: HashMap::new(),
            handles: 0x1000,
            copying: [false; 2],
            held: None,
            copies: 0,
            failing_copy: None,
            launched: 0,
            finished: 0,
            capture: None,
            calls: HashMap::new(),
            faults: Vec::new(),
            struck: 0,
        }
    }

    pub(crate) fn handle(&mut self) -> usize {
        self.handles += 1;
        self.handles
    }
}

static WORLD: LazyLock<Mutex<State>> = LazyLock::new(|| Mutex::new(State::new()));

/// Anything in the state has changed.
pub(crate) static CHANGED: Condvar = Condvar::new();

/// The one state there is.
pub(crate) fn world() -> &'static Mutex<State> {
    &WORLD
}

thread_local! {
    /// Contexts of this thread, the current one last.
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
    /// How this thread takes captures of others; 0 is the mode in which they forbid it much.
    static MODE: Cell<u32> = const { Cell::new(0) };
}

/// What every call does first.
pub(crate) fn enter(entry: &'static str, needs: Needs) -> Answer {
    let mut state = world().lock();
    let calls = state.calls.entry(entry).or_insert(0);
    *calls += 1;
    let nth = *calls;
    if state.sticky != 0 {
        return Err(state.sticky);
    }
    let hit = |fault: &Fault| fault.entry == entry && fault.nth == nth;
    if let Some(code) = state
        .faults
        .iter()
        .find(|fault| hit(fault))
        .map(|fault| fault.code)
    {
        state.struck += 1;
        if is_sticky(code) {
            lose(&mut state, code);
        }
        return Err(code);
    }
    if needs == Needs::Nothing {
        return Ok(());
    }
    let current = CURRENT.with_borrow(|contexts| contexts.last().copied());
    if state.retained == 0 || current != Some(CONTEXT) {
        return Err(INVALID_CONTEXT);
    }
    if needs == Needs::Uncaptured
        && MODE.get() != RELAXED
        && let Some(capture) = &mut state.capture
    {
        capture.broken = true;
        return Err(CAPTURE_UNSUPPORTED);
    }
    Ok(())
}

/// Whether a code means that the context is lost.
fn is_sticky(code: c_int) -> bool {
    (700..800).contains(&code) && !(712..=713).contains(&code)
}

/// Loses the context: nothing begins any more, and what copies has ended when this returns.
fn lose(state: &mut MutexGuard<'_, State>, code: c_int) {
    state.sticky = code;
    CHANGED.notify_all();
    while state.copying != [false; 2] {
        CHANGED.wait(state);
    }
}

pub(crate) fn set_current(context: usize) -> Answer {
    known(context)?;
    CURRENT.with_borrow_mut(|contexts| {
        contexts.pop();
        contexts.push(context);
    });
    Ok(())
}

pub(crate) fn push_current(context: usize) -> Answer {
    known(context)?;
    CURRENT.with_borrow_mut(|contexts| contexts.push(context));
    Ok(())
}

pub(crate) fn pop_current() -> Result<usize, c_int> {
    CURRENT.with_borrow_mut(Vec::pop).ok_or(INVALID_CONTEXT)
}

fn known(context: usize) -> Answer {
    if context == CONTEXT && world().lock().retained > 0 {
        return Ok(());
    }
    Err(INVALID_CONTEXT)
}

/// The calling thread's mode becomes `mode`, and comes back as it was.
pub(crate) fn exchange_mode(mode: u32) -> u32 {
    MODE.replace(mode)
}
