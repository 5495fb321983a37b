//! The CUDA driver: every call into it that vLLM's process makes, and nothing else. (`workbench`, which is in no wheel, adds those
//! that only measuring and tests need.)
//!
//! The library is loaded when it is asked for, so that Greenroom builds and starts where there is none. Errors are the driver's
//! own numbers with the name of the call ([`DriverError`]). Nothing in this file panics: some of it runs on vLLM's threads.

#![allow(unsafe_code, reason = "foreign calls are what this file is for")]

use std::error::Error as _;
use std::ffi::{CStr, OsStr, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;
use kvstore::usize_from_u64;
use libloading::Library;

use super::codes::{CAPTURE_UNSUPPORTED, DriverError, NOT_SUPPORTED};
use super::probe::NoCuda;
use super::table::{BatchCopy, Table};
use crate::engine::Direction;

/// The library that every driver installs. Not `libcuda.so`, which may be a stub.
pub(super) const LIBRARY: &str = "libcuda.so.1";
/// CUDA 12.0, the first release whose drivers have all that is looked up here (R525).
pub(super) const VERSION_MIN: i32 = 12_000;
/// The release whose `cuMemcpyBatchAsync` is asked for: later ones have another signature under the same name.
const BATCH_VERSION: c_int = 12_080;
/// Time between questions whether a stream has become idle, where waiting for it failed.
const IDLE_POLL: Duration = Duration::from_micros(100);

/// One call, in an unsafe block that argues it. The error names the entry point.
macro_rules! call {
    ($table:expr, $symbol:ident($($argument:expr),* $(,)?)) => {
        DriverError::check(stringify!($symbol), ($table.$symbol)($($argument),*))
    };
}
#[cfg(feature = "workbench")]
pub(super) use call;

/// While something is being let go there is nobody to tell.
fn noted(result: Result<(), DriverError>) {
    if let Err(error) = result {
        tracing::debug!(%error, "the driver did not let go of something");
    }
}

/// The loaded driver.
pub(super) struct Driver {
    table: Table,
    batch: Option<BatchCopy>,
    /// Never unloaded: its threads run in it, and vLLM uses it too.
    #[cfg_attr(not(feature = "workbench"), expect(dead_code, reason = "kept loaded"))]
    library: ManuallyDrop<Library>,
}

impl Driver {
    /// Loads and initialises the driver.
    pub(super) fn load(library: &OsStr) -> Result<Arc<Self>, NoCuda> {
        // SAFETY: the CUDA driver, which vLLM loads as well; its initialisers touch nothing of ours.
        let loaded = unsafe { Library::new(library) };
        let library = loaded.map_err(|error| {
            let why = error
                .source()
                .map_or_else(|| error.to_string(), |why| why.to_string());
            NoCuda::NoLibrary(why)
        })?;
        let mut driver = Self {
            table: Table::find(&library)?,
            batch: None,
            library: ManuallyDrop::new(library),
        };
        // SAFETY: the arguments are those of the entry point; 0 is the only flag there is.
        unsafe { call!(driver.table, cuInit(0)) }.map_err(NoCuda::of_init)?;
        driver.batch = driver.find_batch();
        Ok(Arc::new(driver))
    }

    /// The batch entry point, of drivers that have one.
    fn find_batch(&self) -> Option<BatchCopy> {
        let mut found = ptr::null_mut();
        let mut status: c_uint = 0;
        // SAFETY: the name is a C string, the results are variables of the sizes that the driver writes.
        let asked = unsafe {
            let (name, status) = (c"cuMemcpyBatchAsync".as_ptr(), (&raw mut status).cast());
            call!(
                self.table,
                cuGetProcAddress_v2(name, &raw mut found, BATCH_VERSION, 0, status)
            )
        };
        if let Err(error) = asked {
            tracing::info!(%error, "the driver has no batch copies: ranges are copied one by one");
            return None;
        }
        if found.is_null() || status != 0 {
            return None;
        }
        // SAFETY: under this version the driver's function of that name has this signature.
        Some(unsafe { std::mem::transmute::<*mut c_void, BatchCopy>(found) })
    }

    /// For tables of other entry points.
    #[cfg(feature = "workbench")]
    pub(super) fn library(&self) -> &Library {
        &self.library
    }

    /// Whether there is `cuMemcpyBatchAsync`.
    pub(super) fn has_batch(&self) -> bool {
        self.batch.is_some()
    }

    /// The newest CUDA release that the driver serves: 12080 is 12.8.
    pub(super) fn version(&self) -> Result<i32, DriverError> {
        let mut version = 0;
        // SAFETY: the result is a variable of the type written.
        unsafe { call!(self.table, cuDriverGetVersion(&raw mut version)) }.map(|()| version)
    }

    /// How many devices this process sees.
    pub(super) fn devices(&self) -> Result<u32, DriverError> {
        let mut count = 0;
        // SAFETY: the result is a variable of the type written.
        unsafe { call!(self.table, cuDeviceGetCount(&raw mut count)) }
            .map(|()| u32::try_from(count).unwrap_or(0))
    }

    /// The device of this number, which is below [`devices`](Self::devices).
    pub(super) fn device(self: &Arc<Self>, ordinal: u32) -> Result<Device, DriverError> {
        let mut raw = 0;
        let number = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: the result is a variable of the type written.
        unsafe { call!(self.table, cuDeviceGet(&raw mut raw, number)) }?;
        Ok(Device {
            driver: Arc::clone(self),
            raw,
        })
    }
}

/// One GPU. Knowing it costs no memory on it.
#[derive(Clone)]
pub(super) struct Device {
    driver: Arc<Driver>,
    raw: sys::CUdevice,
}

impl Device {
    pub(super) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    #[cfg(feature = "workbench")]
    pub(super) fn raw(&self) -> sys::CUdevice {
        self.raw
    }

    /// The longest distance between rows of a 2D copy, in bytes.
    pub(super) fn max_pitch(&self) -> Result<u64, DriverError> {
        let mut pitch = 0;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_PITCH;
        // SAFETY: the result is a variable of the type written.
        unsafe {
            call!(
                self.driver.table,
                cuDeviceGetAttribute(&raw mut pitch, attribute, self.raw)
            )
        }
        .map(|()| u64::try_from(pitch).unwrap_or(0))
    }

    /// Its address on the PCI bus, in the spelling of sysfs: `0000:3b:00.0`.
    pub(super) fn pci_address(&self) -> Result<String, DriverError> {
        let mut text = [0_u8; 32];
        // SAFETY: the driver writes at most the length given, which is that of the buffer, terminator included.
        unsafe {
            call!(
                self.driver.table,
                cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), 32, self.raw)
            )
        }?;
        let text = CStr::from_bytes_until_nul(&text).unwrap_or_default();
        Ok(text.to_string_lossy().to_lowercase())
    }

    /// The context that the CUDA runtime, and so torch, uses on this device.
    pub(super) fn primary_context(&self) -> Result<Arc<Context>, DriverError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the result is a variable of the type written.
        unsafe {
            call!(
                self.driver.table,
                cuDevicePrimaryCtxRetain(&raw mut raw, self.raw)
            )
        }?;
        Ok(Arc::new(Context {
            device: self.clone(),
            raw: Handle(raw),
        }))
    }
}

/// A handle of the driver's.
struct Handle<T>(*mut T);

// SAFETY: the driver takes its handles on any thread, and nothing in this process looks behind them.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above; the driver does its own locking.
unsafe impl<T> Sync for Handle<T> {}

/// A share in the device's primary context. Not made current by being held.
pub(super) struct Context {
    device: Device,
    raw: Handle<sys::CUctx_st>,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once. Streams and events hold the context, so none of ours is left.
        noted(unsafe { call!(self.table(), cuDevicePrimaryCtxRelease_v2(self.device.raw)) });
    }
}

impl Context {
    fn table(&self) -> &Table {
        &self.device.driver.table
    }

    /// Makes it the calling thread's context.
    pub(super) fn bind(&self) -> Result<(), DriverError> {
        // SAFETY: the handle is alive as long as `self`, and the threads that are bound end before (the engine's owner).
        unsafe { call!(self.table(), cuCtxSetCurrent(self.raw.0)) }
    }

    /// Runs `call` with this context current, on a thread that belongs to somebody else.
    pub(super) fn within<T, E: From<DriverError>>(
        &self,
        call: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        // SAFETY: the handle is alive as long as `self`; it is popped below.
        unsafe { call!(self.table(), cuCtxPushCurrent_v2(self.raw.0)) }?;
        let result = call();
        let mut popped = ptr::null_mut();
        // SAFETY: the result is a variable of the type written.
        let after = unsafe { call!(self.table(), cuCtxPopCurrent_v2(&raw mut popped)) };
        let value = result?;
        after?;
        Ok(value)
    }

    /// Lets the calling thread use CUDA while another thread captures a graph. vLLM captures in the mode that forbids it to
    /// every thread that has not said this, and a call then breaks the capture.
    pub(super) fn ignore_captures(&self) -> Result<(), DriverError> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as c_uint;
        // SAFETY: the argument is a variable of the enum's size; the mode that comes back is not read.
        unsafe {
            call!(
                self.table(),
                cuThreadExchangeStreamCaptureMode((&raw mut mode).cast())
            )
        }
    }

    /// Refuses a stream of somebody else's while it is captured into a graph, of which the copies that wait for an event on it
    /// would become a part. The context must be current.
    ///
    /// # Safety
    /// `stream` is a live stream of this context, or 0.
    pub(super) unsafe fn refuse_captured(&self, stream: u64) -> Result<(), DriverError> {
        let stream = ptr::with_exposed_provenance_mut(usize_from_u64(stream));
        let mut status: c_uint = 0;
        // SAFETY: the stream is alive, by the contract of this function; the result is a variable of the enum's size.
        unsafe {
            call!(
                self.table(),
                cuStreamIsCapturing(stream, (&raw mut status).cast())
            )
        }?;
        if status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as c_uint {
            return DriverError::check("cuStreamIsCapturing", CAPTURE_UNSUPPORTED);
        }
        Ok(())
    }

    /// A new stream that does not wait for the default one. The context must be current.
    pub(super) fn stream(self: &Arc<Self>) -> Result<Stream, DriverError> {
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: the result is a variable of the type written.
        unsafe { call!(self.table(), cuStreamCreate(&raw mut raw, flags)) }?;
        Ok(Stream {
            context: Arc::clone(self),
            raw: Handle(raw),
        })
    }

    /// A new event, without a clock. The context must be current.
    pub(super) fn event(self: &Arc<Self>) -> Result<Event, DriverError> {
        let mut raw = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: the result is a variable of the type written.
        unsafe { call!(self.table(), cuEventCreate(&raw mut raw, flags)) }?;
        Ok(Event {
            context: Arc::clone(self),
            raw: Handle(raw),
        })
    }

    /// The number of the device that an address belongs to. An address that is none of CUDA's is refused by the driver.
    pub(super) fn device_of(&self, address: u64) -> Result<i32, DriverError> {
        let mut ordinal: c_int = 0;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        // SAFETY: this attribute is an `int`, which the result is; the address is looked up, not followed.
        unsafe {
            call!(
                self.table(),
                cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address)
            )
        }
        .map(|()| ordinal)
    }

    /// Registers memory, so that the device can reach it.
    ///
    /// # Safety
    /// The range is mapped, by whole pages, and stays so until it has been unregistered.
    pub(super) unsafe fn register(&self, address: u64, bytes: u64) -> Result<(), DriverError> {
        let start = ptr::with_exposed_provenance_mut(usize_from_u64(address));
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE;
        // SAFETY: by the contract of this function.
        unsafe {
            call!(
                self.table(),
                cuMemHostRegister_v2(start, usize_from_u64(bytes), flags)
            )
        }
    }

    /// Ends the registration that begins at `address`. The driver refuses an address that has none.
    pub(super) fn unregister(&self, address: u64) -> Result<(), DriverError> {
        let start = ptr::with_exposed_provenance_mut(usize_from_u64(address));
        // SAFETY: the driver only looks the address up. That no copy uses it any more is what makes ending it right.
        unsafe { call!(self.table(), cuMemHostUnregister(start)) }
    }
}

/// A stream of ours. Work on it runs in order.
pub(super) struct Stream {
    context: Arc<Context>,
    raw: Handle<sys::CUstream_st>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        noted(self.context.within(|| {
            // SAFETY: created once, destroyed once. The driver lets go of it when its last work has ended.
            unsafe { call!(self.context.table(), cuStreamDestroy_v2(self.raw.0)) }
        }));
    }
}

impl Stream {
    #[cfg(feature = "workbench")]
    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw.0
    }

    /// What is enqueued from here on waits until `event`, as it was last recorded, has passed.
    pub(super) fn wait(&self, event: &Event) -> Result<(), DriverError> {
        // SAFETY: both handles are alive; the driver keeps what it needs of the event.
        unsafe {
            call!(
                self.context.table(),
                cuStreamWaitEvent(self.raw.0, event.raw.0, 0)
            )
        }
    }

    /// Waits until nothing is left on the stream. An error means that neither waiting nor asking gave an answer.
    pub(super) fn finish(&self) -> Result<(), DriverError> {
        // SAFETY: the handle is alive.
        let waited = unsafe { call!(self.context.table(), cuStreamSynchronize(self.raw.0)) };
        let Err(error) = waited else {
            return Ok(());
        };
        tracing::warn!(%error, "waiting for copies to end failed, asking instead");
        loop {
            // SAFETY: the handle is alive.
            let idle = unsafe { call!(self.context.table(), cuStreamQuery(self.raw.0)) };
            if DriverError::ended(idle)? {
                return Ok(());
            }
            std::thread::sleep(IDLE_POLL);
        }
    }

    /// Enqueues one copy.
    ///
    /// # Safety
    /// `host` is mapped and `device` is memory of this context's device, each for `bytes`, until the copy has ended.
    pub(super) unsafe fn copy(
        &self,
        direction: Direction,
        host: u64,
        device: u64,
        bytes: u64,
    ) -> Result<(), DriverError> {
        let table = self.context.table();
        let bytes = usize_from_u64(bytes);
        let host = ptr::with_exposed_provenance_mut::<c_void>(usize_from_u64(host));
        match direction {
            Direction::HostToDevice => {
                // SAFETY: by the contract of this function.
                unsafe { call!(table, cuMemcpyHtoDAsync_v2(device, host, bytes, self.raw.0)) }
            }
            Direction::DeviceToHost => {
                // SAFETY: by the contract of this function.
                unsafe { call!(table, cuMemcpyDtoHAsync_v2(host, device, bytes, self.raw.0)) }
            }
        }
    }

    /// Enqueues equal copies whose addresses are a constant distance apart on either side.
    ///
    /// # Safety
    /// As for [`copy`](Self::copy), for each row.
    pub(super) unsafe fn copy_rows(
        &self,
        direction: Direction,
        rows: &Rows,
    ) -> Result<(), DriverError> {
        let host = sys::CUmemorytype::CU_MEMORYTYPE_HOST;
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let (from, from_pitch, to, to_pitch) = match direction {
            Direction::HostToDevice => (host, rows.host_pitch, device, rows.device_pitch),
            Direction::DeviceToHost => (device, rows.device_pitch, host, rows.host_pitch),
        };
        let start = ptr::with_exposed_provenance_mut::<c_void>(usize_from_u64(rows.host));
        // The driver reads that address of each side which the memory type names.
        let what = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from,
            srcHost: start,
            srcDevice: rows.device,
            srcArray: ptr::null_mut(),
            srcPitch: usize_from_u64(from_pitch),
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to,
            dstHost: start,
            dstDevice: rows.device,
            dstArray: ptr::null_mut(),
            dstPitch: usize_from_u64(to_pitch),
            WidthInBytes: usize_from_u64(rows.bytes),
            Height: usize_from_u64(rows.count),
        };
        // SAFETY: by the contract of this function; the driver reads the description before it returns.
        unsafe {
            call!(
                self.context.table(),
                cuMemcpy2DAsync_v2(&raw const what, self.raw.0)
            )
        }
    }

    /// Enqueues all copies of `batch` at once, unordered among themselves. A driver without batches refuses it.
    ///
    /// # Safety
    /// As for [`copy`](Self::copy), for each one.
    pub(super) unsafe fn copy_batch(
        &self,
        direction: Direction,
        batch: &mut Batch,
    ) -> Result<(), DriverError> {
        const OPERATION: &str = "cuMemcpyBatchAsync";
        let Some(copy) = self.context.device.driver.batch else {
            return DriverError::check(OPERATION, NOT_SUPPORTED);
        };
        let (from, to, order) = match direction {
            // A slot is stable for as long as its lease: the driver may read it early.
            Direction::HostToDevice => (
                &mut batch.host,
                &mut batch.device,
                sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_ANY,
            ),
            // The KV pool is not: what is read early is not what compute wrote.
            Direction::DeviceToHost => (
                &mut batch.device,
                &mut batch.host,
                sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            ),
        };
        // Only managed memory has use for a hint.
        let no_hint = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
            id: 0,
        };
        let mut attributes = sys::CUmemcpyAttributes {
            srcAccessOrder: order,
            srcLocHint: no_hint,
            dstLocHint: no_hint,
            // Copy engines rather than multiprocessors, which belong to the model.
            flags: sys::CUmemcpyFlags::CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE as c_uint,
        };
        let mut first_of_attributes = 0;
        let mut failed = usize::MAX;
        // SAFETY: by the contract of this function; the three lists are of one length, and the driver reads them before it
        // returns.
        let code = unsafe {
            copy(
                to.as_mut_ptr(),
                from.as_mut_ptr(),
                batch.bytes.as_mut_ptr(),
                batch.bytes.len(),
                &raw mut attributes,
                &raw mut first_of_attributes,
                1,
                &raw mut failed,
                self.raw.0,
            )
        };
        DriverError::check(OPERATION, code)
    }
}

/// Equal copies a constant distance apart; the driver calls this a 2D copy. Addresses and sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rows {
    /// Where the first row is.
    pub(super) host: u64,
    pub(super) device: u64,
    /// From one row to the next, at least `bytes`.
    pub(super) host_pitch: u64,
    pub(super) device_pitch: u64,
    /// Of one row.
    pub(super) bytes: u64,
    /// Rows.
    pub(super) count: u64,
}

/// Copies for [`Stream::copy_batch`], in the form that the driver takes.
#[derive(Default)]
pub(super) struct Batch {
    host: Vec<u64>,
    device: Vec<u64>,
    bytes: Vec<usize>,
}

impl Batch {
    pub(super) fn clear(&mut self) {
        self.host.clear();
        self.device.clear();
        self.bytes.clear();
    }

    pub(super) fn push(&mut self, host: u64, device: u64, bytes: u64) {
        self.host.push(host);
        self.device.push(device);
        self.bytes.push(usize_from_u64(bytes));
    }
}

/// A point in a stream's work.
pub(super) struct Event {
    context: Arc<Context>,
    raw: Handle<sys::CUevent_st>,
}

impl Drop for Event {
    fn drop(&mut self) {
        noted(self.context.within(|| {
            // SAFETY: created once, destroyed once. Streams that wait for it have what they need.
            unsafe { call!(self.context.table(), cuEventDestroy_v2(self.raw.0)) }
        }));
    }
}

impl Event {
    /// Moves it behind everything that is on `stream` now.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DriverError> {
        // SAFETY: both handles are alive.
        unsafe {
            call!(
                self.context.table(),
                cuEventRecord(self.raw.0, stream.raw.0)
            )
        }
    }

    /// The same on a stream of somebody else's, 0 for the default one. The context must be current.
    ///
    /// # Safety
    /// `stream` is a live stream of this context, or 0.
    pub(super) unsafe fn record_on(&self, stream: u64) -> Result<(), DriverError> {
        let stream = ptr::with_exposed_provenance_mut(usize_from_u64(stream));
        // SAFETY: both handles are alive, the stream's by the contract of this function.
        unsafe { call!(self.context.table(), cuEventRecord(self.raw.0, stream)) }
    }

    /// Whether everything before its last recording has ended. An error is none of both.
    pub(super) fn passed(&self) -> Result<bool, DriverError> {
        // SAFETY: the handle is alive.
        DriverError::ended(unsafe { call!(self.context.table(), cuEventQuery(self.raw.0)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any library that is not a driver will do.
    #[test]
    fn a_library_without_the_symbols_is_no_driver() {
        let found = Driver::load(OsStr::new("libc.so.6")).err();
        assert!(
            matches!(found, Some(NoCuda::MissingSymbol("cuInit"))),
            "{found:?}"
        );
    }
}
