//! The stand-in driver as tests hold it, and engines on it.

#![allow(
    unsafe_code,
    reason = "the stand-in is a foreign library, and its device memory is looked at"
)]

use std::collections::hash_map::RandomState;
use std::ffi::{CString, c_char, c_int};
use std::hash::BuildHasher;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use cuda::conformance::{Compute, DeviceMemory, EngineFactory, PoolShape, RegionShape, Rig};
pub(crate) use cuda::conformance::{arena, cells};
use cuda::{
    ArenaId, ArenaShard, ComputeMark, ComputeMarker, CopyKind, CopyLimits, CopyMethod, CopyThread,
    CudaDevice, CudaEngine, CudaMarker, DevicePool, Direction, Job, JobId, NoCuda, Outcome,
};
use kvstore::{ArenaMap, GpuBlock, SlotId};
use libloading::Library;
use parking_lot::{Mutex, MutexGuard};

pub(crate) const INVALID_VALUE: i32 = 1;
pub(crate) const OUT_OF_MEMORY: i32 = 2;
pub(crate) const LAUNCH_FAILED: i32 = 719;
pub(crate) const NOT_SUPPORTED: i32 = 801;

/// The stand-in's only context.
pub(crate) const CONTEXT: usize = 0xC0DA;

static TURN: Mutex<()> = Mutex::new(());

/// Where Cargo has put the stand-in: beside this test.
pub(crate) fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let library = test.with_file_name("libstand_in_driver.so");
    assert!(library.exists(), "{} is missing", library.display());
    library
}

/// The driver, as if just loaded. One test at a time: it is the others' too.
pub(crate) fn take() -> (MutexGuard<'static, ()>, Arc<Driver>) {
    let turn = TURN.lock();
    // SAFETY: the library's initialisers do nothing.
    let library = unsafe { Library::new(library()) }.unwrap();
    let driver = Driver {
        library: ManuallyDrop::new(library),
    };
    driver.reset();
    keep_log();
    (turn, Arc::new(driver))
}

/// The stand-in's own functions.
pub(crate) struct Driver {
    /// Never unloaded: its threads run in it.
    library: ManuallyDrop<Library>,
}

impl Driver {
    /// Everything as after loading.
    pub(crate) fn reset(&self) {
        // SAFETY: the type is that of the function; nothing of the driver is in use between two tests.
        unsafe {
            let reset = self.library.get::<extern "C" fn()>(b"stand_in_reset");
            reset.unwrap()();
        }
    }

    pub(crate) fn set(&self, name: &str, value: i64) {
        let text = CString::new(name).unwrap();
        // SAFETY: the type is that of the function, and the name is a C string.
        let answer = unsafe {
            type Set = unsafe extern "C" fn(*const c_char, i64) -> i64;
            self.library.get::<Set>(b"stand_in_set").unwrap()(text.as_ptr(), value)
        };
        assert_eq!(answer, 0, "{name}");
    }

    /// A figure, or the calls of an entry point.
    pub(crate) fn get(&self, name: &str) -> u64 {
        let name = CString::new(name).unwrap();
        // SAFETY: as in `set`.
        let value = unsafe {
            type Get = unsafe extern "C" fn(*const c_char) -> i64;
            self.library.get::<Get>(b"stand_in_get").unwrap()(name.as_ptr())
        };
        u64::try_from(value).unwrap()
    }

    /// The `nth` call of `entry` from now ends with `code`.
    pub(crate) fn fail(&self, entry: &str, nth: u64, code: i32) {
        let entry = CString::new(entry).unwrap();
        // SAFETY: as in `set`.
        unsafe {
            type Fail = unsafe extern "C" fn(*const c_char, u64, c_int);
            self.library.get::<Fail>(b"stand_in_fail").unwrap()(entry.as_ptr(), nth, code);
        }
    }

    /// Compute work on a stream, until [`finish`](Self::finish).
    pub(crate) fn launch(&self, stream: usize) {
        // SAFETY: the type is that of the function.
        let code = unsafe {
            type Launch = extern "C" fn(usize) -> c_int;
            self.library.get::<Launch>(b"stand_in_launch").unwrap()(stream)
        };
        assert_eq!(code, 0);
    }

    pub(crate) fn finish(&self) {
        // SAFETY: the type is that of the function.
        unsafe {
            self.library
                .get::<extern "C" fn()>(b"stand_in_finish")
                .unwrap()();
        }
    }

    /// Device memory of zeroes.
    pub(crate) fn memory(self: &Arc<Self>, bytes: u64) -> Arc<Memory> {
        // SAFETY: the type is that of the function.
        let base = unsafe {
            type Alloc = extern "C" fn(usize) -> u64;
            self.library.get::<Alloc>(b"stand_in_alloc").unwrap()(bytes as usize)
        };
        assert_ne!(base, 0);
        Arc::new(Memory {
            driver: Arc::clone(self),
            base,
            bytes,
        })
    }

    /// One of the driver's own calls that takes a handle and nothing else.
    pub(crate) fn call(&self, entry: &str, handle: usize) -> i32 {
        // SAFETY: the callers name entry points of this type.
        unsafe {
            type Call = unsafe extern "C" fn(usize) -> c_int;
            self.library.get::<Call>(entry.as_bytes()).unwrap()(handle)
        }
    }
}

/// Memory of the made-up GPU.
pub(crate) struct Memory {
    driver: Arc<Driver>,
    base: u64,
    bytes: u64,
}

impl Memory {
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    fn cell(&self, offset: u64) -> &AtomicU8 {
        assert!(offset < self.bytes);
        let address = std::ptr::with_exposed_provenance_mut((self.base + offset) as usize);
        // SAFETY: the byte lies in this memory, which is freed when `self` is; the driver writes it behind Rust's back.
        unsafe { AtomicU8::from_ptr(address) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the type is that of the function; engines for this memory are gone by now.
        unsafe {
            type Free = extern "C" fn(u64);
            self.driver.library.get::<Free>(b"stand_in_free").unwrap()(self.base);
        }
    }
}

impl DeviceMemory for Memory {
    fn read(&self, offset: u64, into: &mut [u8]) {
        for (byte, at) in into.iter_mut().zip(offset..) {
            *byte = self.cell(at).load(Ordering::Relaxed);
        }
    }

    fn write(&self, offset: u64, from: &[u8]) {
        for (byte, at) in from.iter().zip(offset..) {
            self.cell(at).store(*byte, Ordering::Relaxed);
        }
    }
}

/// Builds CUDA engines on the stand-in.
pub(crate) struct Factory {
    pub(crate) driver: Arc<Driver>,
    pub(crate) method: CopyMethod,
    /// Bytes of one registration.
    pub(crate) pieces: u64,
    /// Has all registrations of the first arena fail but the first one.
    pub(crate) registers_once: bool,
}

impl Factory {
    pub(crate) fn new(driver: &Arc<Driver>, method: CopyMethod) -> Self {
        Self {
            driver: Arc::clone(driver),
            method,
            pieces: 1 << 30,
            registers_once: false,
        }
    }

    /// An engine with its marker, pool and memory, or why there is none.
    pub(crate) fn engine(&self, shape: &PoolShape) -> Result<Engine, NoCuda> {
        let device = CudaDevice::probe_at(&library(), 0)?;
        let memory = self.driver.memory(shape.bytes);
        let regions = shape.regions_at(memory.base());
        // SAFETY: the regions lie in `memory`, which only the stand-in and atomics of `Memory` touch, and which the users of
        // this function keep until the engine is gone.
        let pool = unsafe { DevicePool::new(regions, shape.blocks) };
        let pool = Arc::new(pool.unwrap());
        let engine = CudaEngine::new(&device, Arc::clone(&pool), self.method)?;
        // SAFETY: tests mark the default stream.
        let marker = unsafe { engine.marker() };
        Ok(Engine {
            engine: engine.with_pieces_of(self.pieces),
            marker,
            pool,
            memory,
        })
    }
}

/// What [`Factory::engine`] makes.
pub(crate) struct Engine {
    pub(crate) engine: CudaEngine,
    pub(crate) marker: CudaMarker,
    pub(crate) pool: Arc<DevicePool>,
    pub(crate) memory: Arc<Memory>,
}

impl EngineFactory for Factory {
    fn build(&self, shape: &PoolShape) -> Rig {
        let Engine {
            engine,
            marker,
            pool,
            memory,
        } = self.engine(shape).unwrap();
        if self.registers_once {
            self.driver.fail("cuMemHostRegister_v2", 2, OUT_OF_MEMORY);
        }
        Rig {
            engine: Box::new(engine),
            pool,
            memory,
            compute: Box::new(DefaultStream {
                driver: Arc::clone(&self.driver),
                marker,
            }),
        }
    }
}

/// Compute work on the default stream, where torch's is.
struct DefaultStream {
    driver: Arc<Driver>,
    marker: CudaMarker,
}

impl Compute for DefaultStream {
    fn launch(&self) -> ComputeMark {
        self.driver.launch(0);
        self.marker.mark(0).unwrap()
    }

    fn finish(&self) {
        self.driver.finish();
    }
}

pub(crate) const ARENA: ArenaId = ArenaId(1);
pub(crate) const BLOCKS: u32 = 32;
pub(crate) const BLOCK: u64 = 256;
pub(crate) const POISON: u8 = 0xEE;

/// What each slot and each block holds before anything is copied: a byte of its own throughout.
const IN_SLOT: u8 = 0x40;
const IN_BLOCK: u8 = 0x80;

/// Both ends of the copies.
pub(crate) struct Sides {
    pub(crate) map: Arc<ArenaMap>,
    memory: Arc<Memory>,
    stride: u64,
}

impl Sides {
    fn fill_slot(&self, slot: u32, byte: u8) {
        self.slot(slot)
            .iter()
            .for_each(|cell| cell.store(byte, Ordering::Relaxed));
    }

    fn slot(&self, slot: u32) -> &[AtomicU8] {
        let start = (u64::from(slot) * BLOCK) as usize;
        &cells(&self.map)[start..start + BLOCK as usize]
    }

    fn fill_block(&self, block: u32, byte: u8) {
        self.memory
            .write(u64::from(block) * self.stride, &[byte; BLOCK as usize]);
    }

    fn fill(&self) {
        for (index, byte) in (0..BLOCKS).zip(0..) {
            self.fill_slot(index, IN_SLOT | byte);
            self.fill_block(index, IN_BLOCK | byte);
        }
    }

    /// Poisons what jobs of this kind write to.
    pub(crate) fn poison(&self, kind: CopyKind, indices: Range<u32>) {
        for index in indices {
            match kind.direction() {
                Direction::HostToDevice => self.fill_block(index, POISON),
                Direction::DeviceToHost => self.fill_slot(index, POISON),
            }
        }
    }

    /// Whether what jobs of this kind write to is still poisoned.
    pub(crate) fn is_poisoned(&self, kind: CopyKind, mut indices: Range<u32>) -> bool {
        indices.all(|index| self.holds(kind, index, POISON))
    }

    /// Whether jobs of this kind have written there what they had to.
    pub(crate) fn arrived(&self, kind: CopyKind, mut indices: Range<u32>) -> bool {
        let source = match kind.direction() {
            Direction::HostToDevice => IN_SLOT,
            Direction::DeviceToHost => IN_BLOCK,
        };
        indices.all(|index| self.holds(kind, index, source | u8::try_from(index).unwrap()))
    }

    fn holds(&self, kind: CopyKind, index: u32, byte: u8) -> bool {
        match kind.direction() {
            Direction::HostToDevice => {
                let mut bytes = [0; BLOCK as usize];
                self.memory.read(u64::from(index) * self.stride, &mut bytes);
                bytes.iter().all(|found| *found == byte)
            }
            Direction::DeviceToHost => self
                .slot(index)
                .iter()
                .all(|cell| cell.load(Ordering::Relaxed) == byte),
        }
    }
}

/// How blocks lie in the made-up GPU and how copies are cut.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    /// Bytes from block to block.
    pub(crate) stride: u64,
    pub(crate) sub_batch: u64,
}

/// Blocks touch, a sub-batch is one of them.
pub(crate) const TOUCHING: Shape = Shape {
    stride: BLOCK,
    sub_batch: BLOCK,
};

/// Blocks do not touch, a sub-batch is four of them.
pub(crate) const SCATTERED: Shape = Shape {
    stride: 2 * BLOCK,
    sub_batch: 4 * BLOCK,
};

/// A copy thread on the made-up GPU: [`BLOCKS`] blocks and an arena of as many slots, in registrations of one page.
pub(crate) struct Setup {
    // Fields drop in this order: the thread before the memory that it copies to.
    pub(crate) thread: CopyThread,
    pub(crate) marker: CudaMarker,
    pub(crate) sides: Sides,
}

impl Setup {
    pub(crate) fn new(driver: &Arc<Driver>, method: CopyMethod) -> Self {
        Self::open(driver, method, TOUCHING).unwrap()
    }

    pub(crate) fn scattered(driver: &Arc<Driver>, method: CopyMethod) -> Self {
        Self::open(driver, method, SCATTERED).unwrap()
    }

    /// As a worker starts; an error is what its user is told.
    pub(crate) fn open(
        driver: &Arc<Driver>,
        method: CopyMethod,
        shape: Shape,
    ) -> Result<Self, String> {
        let factory = Factory {
            pieces: 4096,
            ..Factory::new(driver, method)
        };
        let region = RegionShape {
            offset: 0,
            block_stride: shape.stride,
            block_bytes: BLOCK,
        };
        let made = factory.engine(&PoolShape {
            bytes: shape.stride * u64::from(BLOCKS),
            regions: vec![region],
            blocks: BLOCKS,
        });
        let made = made.map_err(|error| error.to_string())?;
        let limits = CopyLimits {
            sub_batch_bytes: shape.sub_batch,
            ..CopyLimits::default()
        };
        let thread = CopyThread::spawn(Box::new(made.engine), made.pool, limits);
        let setup = Self {
            thread: thread.map_err(|error| error.to_string())?,
            marker: made.marker,
            sides: Sides {
                map: arena(BLOCK * u64::from(BLOCKS)),
                memory: made.memory,
                stride: shape.stride,
            },
        };
        setup.sides.fill();
        let attached = setup.thread.attach(ARENA, shard(&setup.sides.map));
        attached.map_err(|error| error.to_string())?;
        Ok(setup)
    }

    pub(crate) fn submit(&self, id: u64, kind: CopyKind, indices: Range<u32>, after: ComputeMark) {
        self.thread.submit(job(id, kind, indices), after).unwrap();
    }

    pub(crate) fn ends(&self) -> Vec<(u64, Outcome)> {
        let ends = self.thread.take_finished().into_iter();
        let mut ends: Vec<_> = ends.map(|end| (end.id.0, end.outcome)).collect();
        ends.sort_by_key(|(id, _)| *id);
        ends
    }
}

/// All of an arena, for one rank.
pub(crate) fn shard(map: &Arc<ArenaMap>) -> ArenaShard {
    ArenaShard {
        map: Arc::clone(map),
        slot_bytes: BLOCK,
        rank_offset: 0,
    }
}

/// A job of blocks and slots of the same numbers.
pub(crate) fn job(id: u64, kind: CopyKind, indices: Range<u32>) -> Job {
    Job {
        id: JobId(id),
        kind,
        arena: ARENA,
        pairs: indices.map(|n| (SlotId(n), GpuBlock(n))).collect(),
    }
}

/// Waits for something that another thread does.
pub(crate) fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !happened() {
        assert!(Instant::now() < deadline, "waited for {what} in vain");
        std::thread::yield_now();
    }
}

/// What has been logged since the last call.
pub(crate) fn take_log() -> String {
    String::from_utf8(std::mem::take(&mut *LOG.lock())).unwrap()
}

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct ToLog;

impl Write for ToLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Keeps what is logged; the first call of a process decides.
fn keep_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_ansi(false)
            .with_writer(|| ToLog)
            .finish();
        tracing::subscriber::set_global_default(subscriber).unwrap();
    });
    take_log();
}

/// A fresh seed, printed, or that of `GREENROOM_TEST_SEED`.
pub(crate) fn seed() -> u64 {
    let seed = match std::env::var("GREENROOM_TEST_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => RandomState::new().hash_one("greenroom"),
    };
    println!("GREENROOM_TEST_SEED={seed}");
    seed
}
