//! What benchmarks and tests on a GPU need besides the engine: device memory, plain copies, compute work that lasts until it is
//! let go, captures.
//!
//! Feature `workbench`: no part of what vLLM loads, and besides `driver` the only file that calls the driver.

#![allow(
    unsafe_code,
    reason = "foreign calls on memory and streams that this file owns"
)]

use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys;
use kvstore::{ArenaMap, u64_from, usize_from_u64};
use parking_lot::{Condvar, Mutex};

use super::codes::DriverError;
use super::driver::{Context, Event, Stream, call};
use super::probe::{CudaDevice, NoCuda};
use super::table::WorkbenchTable;
use crate::engine::{CopyError, Direction};

/// One GPU, in the context that engines for it use.
pub struct Workbench {
    context: Arc<Context>,
    calls: Arc<WorkbenchTable>,
    name: String,
    loads: Stream,
    saves: Stream,
    loaded: Event,
    saved: Event,
    gate: Arc<Gate>,
}

/// One plain copy between an arena and device memory.
#[derive(Clone, Copy, Debug)]
pub struct PlainCopy {
    /// Which way.
    pub direction: Direction,
    /// Bytes from the start of the arena.
    pub arena_offset: u64,
    /// Bytes from the start of the device memory.
    pub device_offset: u64,
    /// How many.
    pub bytes: u64,
}

/// How much compute work has been launched and how much of it may end.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    launched: u64,
    ended: u64,
}

/// What the driver calls in a stream's turn, on a thread of its own.
unsafe extern "C" fn wait_at_gate(ticket: *mut c_void) {
    // SAFETY: `Workbench::compute` made it of a box, and the driver calls this once.
    let ticket = unsafe { Box::from_raw(ticket.cast::<(Arc<Gate>, u64)>()) };
    let (gate, number) = *ticket;
    let mut state = gate.state.lock();
    while state.ended < number {
        gate.changed.wait(&mut state);
    }
}

impl Workbench {
    /// Takes a share in the device's primary context.
    ///
    /// Errors: [`NoCuda::MissingSymbol`] and [`NoCuda::Driver`].
    pub fn new(device: &CudaDevice) -> Result<Self, NoCuda> {
        let raw = &device.device;
        let calls = WorkbenchTable::find(raw.driver().library())?;
        let mut name = [0_u8; 128];
        // SAFETY: the driver writes at most the length given, which is that of the buffer, terminator included.
        unsafe {
            call!(
                calls,
                cuDeviceGetName(name.as_mut_ptr().cast(), 128, raw.raw())
            )
        }?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        let context = raw.primary_context()?;
        let (loads, saves, loaded, saved) = context.within(|| {
            Ok::<_, DriverError>((
                context.stream()?,
                context.stream()?,
                context.event()?,
                context.event()?,
            ))
        })?;
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            calls: Arc::new(calls),
            loads,
            saves,
            loaded,
            saved,
            context,
            gate: Arc::default(),
        })
    }

    /// The name of the GPU.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of device memory that nobody has taken.
    ///
    /// Errors: [`CopyError::Driver`] and [`CopyError::DeviceLost`], as everything here.
    pub fn free_bytes(&self) -> Result<u64, CopyError> {
        let (mut free, mut total) = (0_usize, 0_usize);
        self.context.within(|| {
            // SAFETY: the results are variables of the types written.
            unsafe { call!(self.calls, cuMemGetInfo_v2(&raw mut free, &raw mut total)) }
        })?;
        Ok(u64_from(free))
    }

    /// Device memory, of any content.
    pub fn memory(&self, bytes: u64) -> Result<GpuMemory, CopyError> {
        let mut base = 0;
        let stream = self.context.within(|| {
            // SAFETY: the result is a variable of the type written.
            unsafe {
                call!(
                    self.calls,
                    cuMemAlloc_v2(&raw mut base, usize_from_u64(bytes))
                )
            }?;
            self.context.stream()
        })?;
        Ok(GpuMemory {
            context: Arc::clone(&self.context),
            calls: Arc::clone(&self.calls),
            stream,
            base,
            bytes,
        })
    }

    /// Launches compute work on the default stream that lasts until [`end_compute`](Self::end_compute).
    pub fn compute(&self) -> Result<(), CopyError> {
        let number = {
            let mut state = self.gate.state.lock();
            state.launched += 1;
            state.launched
        };
        let ticket = Box::into_raw(Box::new((Arc::clone(&self.gate), number)));
        self.context.within(|| {
            // SAFETY: the function takes this ticket; a call that fails leaks it, which ends the test anyway.
            unsafe {
                call!(
                    self.calls,
                    cuLaunchHostFunc(ptr::null_mut(), Some(wait_at_gate), ticket.cast())
                )
            }
        })?;
        Ok(())
    }

    /// Lets all compute work end that has been launched.
    pub fn end_compute(&self) {
        let mut state = self.gate.state.lock();
        state.ended = state.launched;
        self.gate.changed.notify_all();
    }

    /// Makes plain copies, those of each direction on a stream of its own. Seconds from the first call until the last byte is
    /// known to have moved.
    ///
    /// Errors: [`CopyError::BadConfig`] if one is outside the arena or the memory, or of no bytes.
    pub fn copy(
        &self,
        map: &ArenaMap,
        memory: &GpuMemory,
        copies: &[PlainCopy],
    ) -> Result<f64, CopyError> {
        let base = u64_from(map.base().as_ptr().expose_provenance());
        let inside = |start: u64, bytes: u64, all: u64| {
            start.checked_add(bytes).is_some_and(|end| end <= all) && bytes > 0
        };
        for copy in copies {
            if !inside(copy.arena_offset, copy.bytes, map.bytes())
                || !inside(copy.device_offset, copy.bytes, memory.bytes)
            {
                return Err(CopyError::BadConfig("a plain copy outside its memory"));
            }
        }
        let seconds = self.context.within(|| {
            let borrowed = Borrowed(&[&self.loads, &self.saves]);
            let start = Instant::now();
            for copy in copies {
                let stream = match copy.direction {
                    Direction::HostToDevice => &self.loads,
                    Direction::DeviceToHost => &self.saves,
                };
                // SAFETY: both ranges were checked, and both memories are borrowed until `borrowed` has seen the copies end.
                unsafe {
                    stream.copy(
                        copy.direction,
                        base + copy.arena_offset,
                        memory.base + copy.device_offset,
                        copy.bytes,
                    )
                }?;
            }
            self.loaded.record(&self.loads)?;
            self.saved.record(&self.saves)?;
            while !(self.loaded.passed()? && self.saved.passed()?) {
                std::hint::spin_loop();
            }
            let seconds = start.elapsed().as_secs_f64();
            drop(borrowed);
            Ok::<_, DriverError>(seconds)
        })?;
        Ok(seconds)
    }

    /// Captures a graph on a stream of its own, in the mode that forbids much to all other threads, while `meanwhile` runs. It is given
    /// the stream's handle.
    ///
    /// Errors: what ended the capture, code 901 if a forbidden call did.
    pub fn capture(&self, meanwhile: impl FnOnce(u64)) -> Result<(), CopyError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        let stream = self.loads.raw();
        self.context.within(|| {
            // SAFETY: the stream is alive.
            unsafe { call!(self.calls, cuStreamBeginCapture_v2(stream, mode)) }?;
            meanwhile(u64_from(stream.expose_provenance()));
            let mut graph = ptr::null_mut();
            // SAFETY: the stream is alive and the result is a variable of the type written.
            unsafe { call!(self.calls, cuStreamEndCapture(stream, &raw mut graph)) }?;
            // SAFETY: the graph that has just been made.
            unsafe { call!(self.calls, cuGraphDestroy(graph)) }
        })?;
        Ok(())
    }
}

/// Memory that copies on these streams use and that is somebody's again when this goes.
struct Borrowed<'a>(&'a [&'a Stream]);

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        for stream in self.0 {
            if let Err(error) = stream.finish() {
                tracing::error!(%error, "the driver does not tell whether copies have ended, and their memory is needed");
                std::process::abort();
            }
        }
    }
}

impl Drop for Workbench {
    fn drop(&mut self) {
        // Streams end when their work has.
        self.end_compute();
    }
}

/// Memory of a GPU. Engines that copy to it end before it.
pub struct GpuMemory {
    context: Arc<Context>,
    calls: Arc<WorkbenchTable>,
    /// For looking at the memory, beside everything else.
    stream: Stream,
    base: u64,
    bytes: u64,
}

impl GpuMemory {
    /// The device address of its first byte.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads from `offset` on.
    ///
    /// Errors: [`CopyError::BadConfig`] if that is outside.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), CopyError> {
        let host = into.as_mut_ptr().expose_provenance();
        self.look(Direction::DeviceToHost, host, offset, into.len())
    }

    /// Writes from `offset` on.
    ///
    /// Errors: as [`read`](Self::read).
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), CopyError> {
        let host = from.as_ptr().expose_provenance();
        self.look(Direction::HostToDevice, host, offset, from.len())
    }

    fn look(
        &self,
        direction: Direction,
        host: usize,
        offset: u64,
        length: usize,
    ) -> Result<(), CopyError> {
        let bytes = u64_from(length);
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(CopyError::BadConfig("a look outside of device memory"));
        }
        if bytes == 0 {
            return Ok(());
        }
        self.context.within(|| {
            let _borrowed = Borrowed(&[&self.stream]);
            // SAFETY: the callers hold a slice of this length, to be written if it is copied to, until `_borrowed` has seen the
            // copy end.
            unsafe {
                self.stream
                    .copy(direction, u64_from(host), self.base + offset, bytes)
            }?;
            self.stream.finish()
        })?;
        Ok(())
    }
}

impl Drop for GpuMemory {
    fn drop(&mut self) {
        let freed = self.context.within(|| {
            // SAFETY: allocated once, freed once; the driver waits for what still uses it.
            unsafe { call!(self.calls, cuMemFree_v2(self.base)) }
        });
        if let Err(error) = freed {
            tracing::debug!(%error, "device memory was not freed");
        }
    }
}
