//! The entry points of the CUDA driver: their names, their types, and how they are found.
//!
//! The declarations are cudarc's. Its functions are not called: they panic when the library or a symbol is missing, they
//! prefer a toolkit's link-time stub (`libcuda.so`) to the driver (`libcuda.so.1`), and they return an enum of which the codes
//! of newer drivers are no part. Here every symbol is looked up once, a missing one is an error, results are numbers, and the
//! compiler checks each signature against cudarc's.

#![allow(
    unsafe_code,
    reason = "a symbol has the type that is said of it, which nothing can check at run time"
)]

use std::ffi::{c_char, c_int, c_uint, c_void};

use cudarc::driver::sys;
use libloading::Library;

use super::probe::NoCuda;

/// A table of entry points: each one's symbol and the types of its arguments.
macro_rules! entry_points {
    ($table:ident: $($symbol:ident($($argument:ty),* $(,)?);)*) => {
        #[allow(non_snake_case, reason = "the driver's own names")]
        pub(super) struct $table {
            $(pub(super) $symbol: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }
        // cudarc's functions differ in what they return: the same number, as an enum.
        $(const _: unsafe fn($($argument),*) -> sys::CUresult = sys::$symbol;)*

        impl $table {
            /// Looks every entry point up.
            pub(super) fn find(library: &Library) -> Result<Self, NoCuda> {
                Ok(Self {
                    $($symbol: {
                        let symbol = stringify!($symbol);
                        // SAFETY: the type is that of the driver's header, by way of cudarc's bindings (checked above).
                        let found = unsafe { library.get(symbol.as_bytes()) };
                        *found.map_err(|_| NoCuda::MissingSymbol(symbol))?
                    },)*
                })
            }
        }
    };
}

const _: () = assert!(size_of::<sys::CUresult>() == size_of::<c_int>());

entry_points! {
    Table:
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut sys::CUdevice, c_int);
    cuDeviceGetAttribute(*mut c_int, sys::CUdevice_attribute, sys::CUdevice);
    cuDeviceGetPCIBusId(*mut c_char, c_int, sys::CUdevice);
    cuDevicePrimaryCtxRetain(*mut sys::CUcontext, sys::CUdevice);
    cuDevicePrimaryCtxRelease_v2(sys::CUdevice);
    cuCtxSetCurrent(sys::CUcontext);
    cuCtxPushCurrent_v2(sys::CUcontext);
    cuCtxPopCurrent_v2(*mut sys::CUcontext);
    cuThreadExchangeStreamCaptureMode(*mut sys::CUstreamCaptureMode);
    cuStreamCreate(*mut sys::CUstream, c_uint);
    cuStreamDestroy_v2(sys::CUstream);
    cuStreamWaitEvent(sys::CUstream, sys::CUevent, c_uint);
    cuStreamQuery(sys::CUstream);
    cuStreamSynchronize(sys::CUstream);
    cuStreamIsCapturing(sys::CUstream, *mut sys::CUstreamCaptureStatus);
    cuEventCreate(*mut sys::CUevent, c_uint);
    cuEventDestroy_v2(sys::CUevent);
    cuEventRecord(sys::CUevent, sys::CUstream);
    cuEventQuery(sys::CUevent);
    cuPointerGetAttribute(*mut c_void, sys::CUpointer_attribute, sys::CUdeviceptr);
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
    cuMemcpyHtoDAsync_v2(sys::CUdeviceptr, *const c_void, usize, sys::CUstream);
    cuMemcpyDtoHAsync_v2(*mut c_void, sys::CUdeviceptr, usize, sys::CUstream);
    cuMemcpy2DAsync_v2(*const sys::CUDA_MEMCPY2D, sys::CUstream);
    cuGetProcAddress_v2(
        *const c_char,
        *mut *mut c_void,
        c_int,
        sys::cuuint64_t,
        *mut sys::CUdriverProcAddressQueryResult,
    );
}

#[cfg(feature = "workbench")]
entry_points! {
    WorkbenchTable:
    cuDeviceGetName(*mut c_char, c_int, sys::CUdevice);
    cuGraphDestroy(sys::CUgraph);
    cuLaunchHostFunc(sys::CUstream, sys::CUhostFn, *mut c_void);
    cuMemAlloc_v2(*mut sys::CUdeviceptr, usize);
    cuMemFree_v2(sys::CUdeviceptr);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuStreamBeginCapture_v2(sys::CUstream, sys::CUstreamCaptureMode);
    cuStreamEndCapture(sys::CUstream, *mut sys::CUgraph);
}

/// `cuMemcpyBatchAsync` as of 12.8.
pub(super) type BatchCopy = unsafe extern "C" fn(
    *mut sys::CUdeviceptr,
    *mut sys::CUdeviceptr,
    *mut usize,
    usize,
    *mut sys::CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> c_int;
const _: () = assert!(size_of::<sys::CUmemcpyAttributes>() == 24);
