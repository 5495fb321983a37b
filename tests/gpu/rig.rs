//! The GPU as tests hold it, and engines on it.

#![allow(unsafe_code, reason = "a pool is described by its device addresses")]

use std::sync::{Arc, OnceLock};

use cuda::conformance::{Compute, DeviceMemory, EngineFactory, PoolShape, Rig};
pub(crate) use cuda::conformance::{arena, cells};
use cuda::{
    ComputeMark, ComputeMarker, CopyMethod, CudaDevice, CudaEngine, CudaMarker, DevicePool,
    GpuMemory, Workbench,
};
use parking_lot::{Mutex, MutexGuard};

pub(crate) const METHODS: [CopyMethod; 4] = [
    CopyMethod::Auto,
    CopyMethod::Single,
    CopyMethod::Batch,
    CopyMethod::Rows,
];

/// Kept until the process ends, and with it the context, which takes long to make.
pub(crate) struct Gpu {
    pub(crate) device: CudaDevice,
    pub(crate) bench: Workbench,
}

static GPU: OnceLock<Result<Arc<Gpu>, String>> = OnceLock::new();
static TURN: Mutex<()> = Mutex::new(());

fn find() -> Result<Arc<Gpu>, String> {
    let device = CudaDevice::probe(0).map_err(|why| why.to_string())?;
    let bench = Workbench::new(&device).map_err(|why| why.to_string())?;
    println!("{}, driver {}", bench.name(), device.driver_version());
    Ok(Arc::new(Gpu { device, bench }))
}

/// The GPU, for this test alone; none if there is none.
pub(crate) fn take() -> Option<(MutexGuard<'static, ()>, Arc<Gpu>)> {
    let turn = TURN.lock();
    match GPU.get_or_init(find) {
        Ok(gpu) => Some((turn, Arc::clone(gpu))),
        Err(why) => {
            let required = std::env::var("REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(!required, "REQUIRE_GPU=1, but {why}");
            eprintln!("not tested: {why}");
            None
        }
    }
}

/// Builds engines on the GPU.
pub(crate) struct Factory {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) method: CopyMethod,
    /// Bytes of one registration.
    pub(crate) pieces: u64,
}

/// What [`Factory::engine`] makes.
pub(crate) struct Engine {
    pub(crate) engine: CudaEngine,
    pub(crate) marker: CudaMarker,
    pub(crate) pool: Arc<DevicePool>,
    pub(crate) memory: Arc<Looked>,
}

impl Factory {
    pub(crate) fn new(gpu: &Arc<Gpu>, method: CopyMethod) -> Self {
        Self {
            gpu: Arc::clone(gpu),
            method,
            pieces: 1 << 30,
        }
    }

    pub(crate) fn engine(&self, shape: &PoolShape) -> Engine {
        let memory = self.gpu.bench.memory(shape.bytes).unwrap();
        let regions = shape.regions_at(memory.base());
        // SAFETY: the regions lie in `memory`, which the users of this function keep until the engine is gone.
        let pool = unsafe { DevicePool::new(regions, shape.blocks) };
        let pool = Arc::new(pool.unwrap());
        let engine = CudaEngine::new(&self.gpu.device, Arc::clone(&pool), self.method).unwrap();
        // SAFETY: tests mark the default stream.
        let marker = unsafe { engine.marker() };
        Engine {
            engine: engine.with_pieces_of(self.pieces),
            marker,
            pool,
            memory: Arc::new(Looked(memory)),
        }
    }
}

impl EngineFactory for Factory {
    fn build(&self, shape: &PoolShape) -> Rig {
        let made = self.engine(shape);
        Rig {
            engine: Box::new(made.engine),
            pool: made.pool,
            memory: made.memory,
            compute: Box::new(DefaultStream {
                gpu: Arc::clone(&self.gpu),
                marker: made.marker,
            }),
        }
    }
}

/// Device memory for the suite.
pub(crate) struct Looked(GpuMemory);

impl DeviceMemory for Looked {
    fn read(&self, offset: u64, into: &mut [u8]) {
        self.0.read(offset, into).unwrap();
    }

    fn write(&self, offset: u64, from: &[u8]) {
        self.0.write(offset, from).unwrap();
    }
}

/// Compute work on the default stream, where torch's is.
struct DefaultStream {
    gpu: Arc<Gpu>,
    marker: CudaMarker,
}

impl Compute for DefaultStream {
    fn launch(&self) -> ComputeMark {
        self.gpu.bench.compute().unwrap();
        self.marker.mark(0).unwrap()
    }

    fn finish(&self) {
        self.gpu.bench.end_compute();
    }
}
