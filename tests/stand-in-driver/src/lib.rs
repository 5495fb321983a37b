//! A stand-in for NVIDIA's `libcuda.so.1`: the entry points that Greenroom calls, on a machine without a GPU.
//!
//! Device memory is ordinary memory, a stream is a thread that takes one thing after the other, and a copy engine is a lock
//! per direction. It is stricter than the real driver: memory must be registered or allocated, a context current, and what
//! it cannot vouch for it refuses. A test steers it by the functions in `control`: it holds copies, lets compute work end,
//! makes the n-th call of an entry point fail, and looks at what is left.
//!
//! What it cannot show: bandwidth, the order of reads that `ANY` allows beyond "early", real graph capture, bugs of drivers.

#![allow(non_snake_case, reason = "the driver's own names")]
#![allow(missing_docs, reason = "documented by NVIDIA")]
#![allow(
    clippy::too_many_arguments,
    reason = "the driver's own signatures: the batch call takes nine"
)]

pub mod control;
mod memory;
mod streams;
mod world;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;

use memory::{Copy, CopyList, Direction};
use world::{
    Answer, CAPTURE_INVALIDATED, Capture, INVALID_VALUE, NOT_FOUND, NOT_READY, Needs,
    OUT_OF_MEMORY, enter, world,
};

/// Defines entry points. Each counts its calls, fails where a test wants it to, and checks what the word before its name
/// says that it needs; the body then says how it ends.
macro_rules! entry_points {
    ($($needs:ident $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            /// # Safety
            /// As NVIDIA's header has it.
            #[unsafe(no_mangle)]
            #[allow(unused_unsafe, reason = "some entry points take no pointers")]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                let body = || -> Answer {
                    enter(stringify!($name), Needs::$needs)?;
                    // SAFETY: pointers are valid for what the driver reads and writes there, by the caller's contract.
                    unsafe { $body }
                };
                body().err().unwrap_or(0)
            }
        )*
    };
}

/// The only context.
const CONTEXT: usize = 0xC0DA;
/// `CU_DEVICE_ATTRIBUTE_MAX_PITCH`.
const MAX_PITCH_ATTRIBUTE: c_int = 11;
const MAX_PITCH: usize = 0x7FFF_FFFF;
/// `CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL`.
const ORDINAL_ATTRIBUTE: c_int = 9;
const MEMORY_HOST: c_uint = 1;
const MEMORY_DEVICE: c_uint = 2;
const BATCH_VERSION: c_int = 12_080;
const ORDER_STREAM: c_uint = 1;
const ORDER_ANY: c_uint = 3;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub struct Copy2D {
    src_x: usize,
    src_y: usize,
    src_type: c_uint,
    src_host: *const c_void,
    src_device: u64,
    src_array: *const c_void,
    src_pitch: usize,
    dst_x: usize,
    dst_y: usize,
    dst_type: c_uint,
    dst_host: *mut c_void,
    dst_device: u64,
    dst_array: *const c_void,
    dst_pitch: usize,
    width: usize,
    height: usize,
}

/// `CUmemcpyAttributes`.
#[repr(C)]
pub struct CopyAttributes {
    order: c_uint,
    source_hint: [c_int; 2],
    destination_hint: [c_int; 2],
    flags: c_uint,
}

entry_points! {
    Nothing cuInit(flags: c_uint) {
        if flags == 0 { Ok(()) } else { Err(INVALID_VALUE) }
    }
    Nothing cuDriverGetVersion(version: *mut c_int) {
        *version = world().lock().version;
        Ok(())
    }
    Nothing cuDeviceGetCount(count: *mut c_int) {
        *count = world().lock().devices;
        Ok(())
    }
    Nothing cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        if !(0..world().lock().devices).contains(&ordinal) {
            return Err(101);
        }
        *device = ordinal;
        Ok(())
    }
    Nothing cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) {
        if attribute != MAX_PITCH_ATTRIBUTE {
            return Err(INVALID_VALUE);
        }
        *value = c_int::MAX;
        Ok(())
    }
    Nothing cuDeviceGetPCIBusId(text: *mut c_char, length: c_int, _device: c_int) {
        let address = c"00FF:1F:1F.7".to_bytes_with_nul();
        if usize::try_from(length).unwrap_or(0) < address.len() {
            return Err(INVALID_VALUE);
        }
        ptr::copy_nonoverlapping(address.as_ptr(), text.cast(), address.len());
        Ok(())
    }
    Nothing cuDevicePrimaryCtxRetain(context: *mut usize, _device: c_int) {
        world().lock().retained += 1;
        *context = CONTEXT;
        Ok(())
    }
    Nothing cuDevicePrimaryCtxRelease_v2(_device: c_int) {
        let mut state = world().lock();
        state.retained = state.retained.checked_sub(1).ok_or(201)?;
        Ok(())
    }
    Nothing cuCtxSetCurrent(context: usize) {
        world::set_current(context)
    }
    Nothing cuCtxPushCurrent_v2(context: usize) {
        world::push_current(context)
    }
    Nothing cuCtxPopCurrent_v2(context: *mut usize) {
        *context = world::pop_current()?;
        Ok(())
    }
    Nothing cuThreadExchangeStreamCaptureMode(mode: *mut c_uint) {
        *mode = world::exchange_mode(*mode);
        Ok(())
    }
    Context cuStreamCreate(stream: *mut usize, _flags: c_uint) {
        *stream = streams::create();
        Ok(())
    }
    Context cuStreamDestroy_v2(stream: usize) {
        streams::destroy(stream)
    }
    Context cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) {
        streams::wait(stream, event)
    }
    Uncaptured cuStreamQuery(stream: usize) {
        if streams::is_idle(stream)? { Ok(()) } else { Err(NOT_READY) }
    }
    Uncaptured cuStreamSynchronize(stream: usize) {
        streams::synchronize(stream)
    }
    Context cuStreamIsCapturing(stream: usize, status: *mut c_uint) {
        let state = world().lock();
        *status = c_uint::from(state.capture.is_some_and(|capture| capture.stream == stream));
        Ok(())
    }
    Context cuEventCreate(event: *mut usize, _flags: c_uint) {
        *event = streams::create_event();
        Ok(())
    }
    Context cuEventDestroy_v2(event: usize) {
        streams::destroy_event(event)
    }
    Context cuEventRecord(event: usize, stream: usize) {
        streams::record(event, stream)
    }
    Uncaptured cuEventQuery(event: usize) {
        if streams::has_passed(event)? { Ok(()) } else { Err(NOT_READY) }
    }
    Nothing cuDeviceGetName(text: *mut c_char, length: c_int, _device: c_int) {
        let name = c"stand-in".to_bytes_with_nul();
        if usize::try_from(length).unwrap_or(0) < name.len() {
            return Err(INVALID_VALUE);
        }
        ptr::copy_nonoverlapping(name.as_ptr(), text.cast(), name.len());
        Ok(())
    }
    Context cuLaunchHostFunc(stream: usize, function: streams::HostFunction, data: usize) {
        streams::call(stream, function, data)
    }
    Uncaptured cuMemAlloc_v2(start: *mut u64, bytes: usize) {
        *start = control::stand_in_alloc(bytes);
        if *start == 0 { Err(OUT_OF_MEMORY) } else { Ok(()) }
    }
    Uncaptured cuMemFree_v2(start: u64) {
        control::stand_in_free(start);
        Ok(())
    }
    Context cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        (*free, *total) = (1 << 34, 1 << 34);
        Ok(())
    }
    Context cuStreamBeginCapture_v2(stream: usize, _mode: c_uint) {
        world().lock().capture = Some(Capture { stream, broken: false });
        Ok(())
    }
    Context cuStreamEndCapture(_stream: usize, graph: *mut usize) {
        *graph = 1;
        let capture = world().lock().capture.take().ok_or(INVALID_VALUE)?;
        if capture.broken { Err(CAPTURE_INVALIDATED) } else { Ok(()) }
    }
    Nothing cuGraphDestroy(_graph: usize) {
        Ok(())
    }
    Context cuPointerGetAttribute(value: *mut c_void, attribute: c_int, address: u64) {
        let state = world().lock();
        if attribute != ORDINAL_ATTRIBUTE || !state.allocated.holds(address, 1) {
            return Err(INVALID_VALUE);
        }
        *value.cast::<c_int>() = state.memory_device;
        Ok(())
    }
    Uncaptured cuMemHostRegister_v2(start: u64, bytes: usize, _flags: c_uint) {
        memory::register(start, bytes)
    }
    Uncaptured cuMemHostUnregister(start: u64) {
        memory::unregister(start)
    }
    Context cuMemcpyHtoDAsync_v2(device: u64, host: u64, bytes: usize, stream: usize) {
        let direction = Direction::HostToDevice;
        streams::copy(stream, CopyList::new(direction, vec![Copy { host, device, bytes }])?)
    }
    Context cuMemcpyDtoHAsync_v2(host: u64, device: u64, bytes: usize, stream: usize) {
        let direction = Direction::DeviceToHost;
        streams::copy(stream, CopyList::new(direction, vec![Copy { host, device, bytes }])?)
    }
    Context cuMemcpy2DAsync_v2(what: *const Copy2D, stream: usize) {
        streams::copy(stream, copy_2d(&*what)?)
    }
    Nothing cuGetProcAddress_v2(
        name: *const c_char,
        found: *mut *mut c_void,
        version: c_int,
        _flags: u64,
        status: *mut c_uint,
    ) {
        let known = CStr::from_ptr(name) == c"cuMemcpyBatchAsync";
        // Later versions have another signature under this name, which is not here.
        if !known || version != BATCH_VERSION || !world().lock().batch {
            *found = ptr::null_mut();
            *status = 1;
            return Err(NOT_FOUND);
        }
        *found = cuMemcpyBatchAsync as *mut c_void;
        *status = 0;
        Ok(())
    }
    Context cuMemcpyBatchAsync(
        destinations: *const u64,
        sources: *const u64,
        sizes: *const usize,
        count: usize,
        attributes: *const CopyAttributes,
        first_of_attributes: *const usize,
        attribute_count: usize,
        _failed: *mut usize,
        stream: usize,
    ) {
        let orders = [ORDER_STREAM, ORDER_ANY];
        if stream == 0
            || count == 0
            || attribute_count != 1
            || *first_of_attributes != 0
            || !orders.contains(&(*attributes).order)
        {
            return Err(INVALID_VALUE);
        }
        let direction = if world().lock().allocated.holds(*sources, 1) {
            Direction::DeviceToHost
        } else {
            Direction::HostToDevice
        };
        let copies = (0..count).map(|index| {
            let (to, from) = (*destinations.add(index), *sources.add(index));
            let (host, device) = match direction {
                Direction::HostToDevice => (from, to),
                Direction::DeviceToHost => (to, from),
            };
            Copy { host, device, bytes: *sizes.add(index) }
        });
        let mut list = CopyList::new(direction, copies.collect())?;
        if (*attributes).order == ORDER_ANY {
            // As early as it may be: now, before anything that is on the stream.
            list.read_source();
        }
        streams::copy(stream, list)
    }
}

fn copy_2d(what: &Copy2D) -> Result<CopyList, c_int> {
    let (direction, host, host_pitch, device, device_pitch) = match (what.src_type, what.dst_type) {
        (MEMORY_HOST, MEMORY_DEVICE) => (
            Direction::HostToDevice,
            what.src_host.expose_provenance(),
            what.src_pitch,
            what.dst_device,
            what.dst_pitch,
        ),
        (MEMORY_DEVICE, MEMORY_HOST) => (
            Direction::DeviceToHost,
            what.dst_host.expose_provenance(),
            what.dst_pitch,
            what.src_device,
            what.src_pitch,
        ),
        _ => return Err(INVALID_VALUE),
    };
    let pitches = what.width..=MAX_PITCH;
    let origin = (what.src_x, what.src_y, what.dst_x, what.dst_y) == (0, 0, 0, 0);
    let arrays = what.src_array.is_null() && what.dst_array.is_null();
    if !origin || !arrays || what.height == 0 {
        return Err(INVALID_VALUE);
    }
    if !pitches.contains(&host_pitch) || !pitches.contains(&device_pitch) {
        return Err(INVALID_VALUE);
    }
    let host = host as u64;
    let row = |index: usize| Copy {
        host: host + (index * host_pitch) as u64,
        device: device + (index * device_pitch) as u64,
        bytes: what.width,
    };
    // All between the first and the last row belongs to the copy, as far as the driver's checks go.
    let last = what.height - 1;
    memory::check(
        host,
        last * host_pitch + what.width,
        device,
        last * device_pitch + what.width,
    )?;
    CopyList::new(direction, (0..what.height).map(row).collect())
}
