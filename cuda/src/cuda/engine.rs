//! The CUDA engine: asynchronous copies on streams of its own in vLLM's context.
//!
//! Owns the streams, the registrations of attached arenas and an event for each batch. Runs on the copy thread alone and
//! never waits there, but for memory that could not be registered and at its own end. What it must never do: say that a batch
//! has ended while the GPU may still move its bytes.
//!
//! How failures end:
//! - nothing of a batch was enqueued: `submit` refuses it with the driver's code, and others may work;
//! - some of it was: the batch fails when what was enqueued has ended;
//! - the driver does not answer what runs, or its context is lost: [`CopyError::DeviceLost`]. The owner then drops the
//!   engine, and dropping it waits for the streams.

#![allow(
    unsafe_code,
    reason = "the engine keeps mappings alive for the copies it enqueues"
)]

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::Arc;

use kvstore::ArenaMap;
use rustix::thread::set_current_timer_slack;

use super::codes::DriverError;
use super::driver::{Context, Event, Stream};
use super::marker::{CudaMarker, Marks};
use super::methods::{CopyMethod, Methods, enqueue_single};
use super::place::Place;
use super::probe::{CudaDevice, NoCuda};
use super::registered::{PIECE_BYTES, Registered, Transfer};
use crate::device::DevicePool;
use crate::engine::{
    ArenaId, ComputeMark, CopyBatch, CopyEngine, CopyError, Direction, Poll, Ticket,
};

/// How much later than asked the kernel may end a sleep of the copy thread.
const TIMER_SLACK_NS: u64 = 1000;

/// Copies between registered arenas and a KV pool on a GPU.
pub struct CudaEngine {
    pool: Arc<DevicePool>,
    context: Arc<Context>,
    place: Place,
    piece_bytes: u64,
    marks: Arc<Marks>,
    methods: Methods,
    /// `None` until the engine is started.
    streams: Option<Streams>,
    arenas: HashMap<ArenaId, Registered>,
    flights: HashMap<Ticket, Flight>,
    /// Events that no batch uses.
    events: Vec<Event>,
    tickets: u64,
}

/// Streams of one direction, taken in turns: as many as the sub-batches that are outstanding by default. A copy engine leaves a
/// stream only when that has run empty, and vLLM's own small copies would wait for all of a job that keeps one stream full.
const STREAMS: usize = 2;

struct Streams {
    loads: Turns,
    saves: Turns,
}

impl Streams {
    fn of(&mut self, direction: Direction) -> &mut Turns {
        match direction {
            Direction::HostToDevice => &mut self.loads,
            Direction::DeviceToHost => &mut self.saves,
        }
    }
}

struct Turns {
    streams: [Stream; STREAMS],
    next: usize,
}

impl Turns {
    fn new(context: &Arc<Context>) -> Result<Self, DriverError> {
        Ok(Self {
            streams: [context.stream()?, context.stream()?],
            next: 0,
        })
    }

    fn next(&mut self) -> &Stream {
        self.next = (self.next + 1) % STREAMS;
        &self.streams[self.next]
    }
}

/// A batch that has not ended.
enum Flight {
    /// Some of its memory is not registered. Given such a copy, the driver may wait for all that is on the stream, so it is
    /// not given one before the mark has passed.
    Waiting(Work),
    /// On its stream, up to `event`.
    Running {
        arena: ArenaId,
        event: Event,
        /// Why it will have failed.
        failure: Option<CopyError>,
    },
}

/// A batch whose ranges have been checked.
struct Work {
    direction: Direction,
    arena: ArenaId,
    transfers: Vec<Transfer>,
    after: ComputeMark,
}

impl CudaEngine {
    /// An engine that copies for `pool`, which is memory of `device`. Takes a share in the device's primary context, which is
    /// torch's.
    ///
    /// Errors: [`NoCuda::WrongMemory`] and [`NoCuda::Driver`].
    pub fn new(
        device: &CudaDevice,
        pool: Arc<DevicePool>,
        method: CopyMethod,
    ) -> Result<Self, NoCuda> {
        let max_pitch = device.device.max_pitch()?;
        let context = device.device.primary_context()?;
        check_memory(&context, device.ordinal(), &pool)?;
        Ok(Self {
            pool,
            place: device.place().clone(),
            piece_bytes: PIECE_BYTES,
            marks: Arc::new(Marks::new(Arc::clone(&context))),
            methods: Methods::new(method, device.has_batch_copies(), max_pitch),
            context,
            streams: None,
            arenas: HashMap::new(),
            flights: HashMap::new(),
            events: Vec::new(),
            tickets: 0,
        })
    }

    /// The same engine with registrations of another size, so that tests meet their borders.
    #[cfg(any(test, feature = "conformance"))]
    #[must_use]
    pub fn with_pieces_of(mut self, bytes: u64) -> Self {
        self.piece_bytes = bytes;
        self
    }

    /// Whether all of an attached arena is registered.
    #[cfg(feature = "workbench")]
    pub fn is_registered(&self, arena: ArenaId) -> bool {
        self.arenas.get(&arena).is_some_and(Registered::is_complete)
    }

    /// What makes the marks that this engine's copies wait for.
    ///
    /// # Safety
    /// It is given live streams of this engine's device only, as torch names them (0: the default one).
    pub unsafe fn marker(&self) -> CudaMarker {
        // SAFETY: by the contract of this function.
        unsafe { CudaMarker::new(Arc::clone(&self.marks)) }
    }

    /// Enqueues the copies of one batch. An error means that nothing of it was.
    fn launch(&mut self, work: &Work, registered: bool) -> Result<Flight, CopyError> {
        let streams = self.streams.as_mut();
        let stream = streams
            .ok_or(CopyError::BadConfig("the engine has not been started"))?
            .of(work.direction)
            .next();
        let event = match self.events.pop() {
            Some(event) => event,
            None => self.context.event()?,
        };
        self.marks.order(work.after, stream)?;
        // SAFETY: the transfers are of an attached arena. Its mapping goes when it is detached, which the contract allows only
        // when none of its batches is outstanding, or in `drop`, which waits for the streams.
        let enqueued = unsafe {
            if registered {
                let methods = &mut self.methods;
                methods.enqueue(stream, work.direction, &work.transfers, &self.pool)
            } else {
                enqueue_single(stream, work.direction, &work.transfers)
            }
        };
        let failure = match enqueued {
            Ok(()) => None,
            Err(broken) => {
                let error = CopyError::from(broken.error);
                if !broken.begun || error.is_fatal() {
                    return Err(error);
                }
                Some(error)
            }
        };
        event.record(stream).map_err(DriverError::fatal)?;
        Ok(Flight::Running {
            arena: work.arena,
            event,
            failure,
        })
    }
}

/// Whether every region of the pool is memory of this device.
fn check_memory(context: &Context, ordinal: u32, pool: &DevicePool) -> Result<(), NoCuda> {
    context.within(|| {
        for region in pool.regions() {
            let found = match context.device_of(region.base) {
                Ok(device) if u32::try_from(device) == Ok(ordinal) => continue,
                Ok(device) => format!("it is on device {device}"),
                Err(error) if error.is_invalid() => format!("it is no memory of CUDA's ({error})"),
                Err(error) => return Err(error.into()),
            };
            return Err(NoCuda::WrongMemory {
                address: region.base,
                ordinal,
                found,
            });
        }
        Ok(())
    })
}

impl CopyEngine for CudaEngine {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn start(&mut self) -> Result<(), CopyError> {
        self.context.bind()?;
        self.context.ignore_captures()?;
        self.streams = Some(Streams {
            loads: Turns::new(&self.context)?,
            saves: Turns::new(&self.context)?,
        });
        // Copies take tenths of a millisecond: the kernel's usual 0.05 ms of leeway for a sleep is too much between polls.
        if let Err(error) = set_current_timer_slack(NonZeroU64::new(TIMER_SLACK_NS)) {
            tracing::info!(%error, "the copy thread polls less often than it could");
        }
        Ok(())
    }

    fn attach(&mut self, id: ArenaId, map: &Arc<ArenaMap>) -> Result<(), CopyError> {
        if self.arenas.contains_key(&id) {
            return Err(CopyError::AlreadyAttached(id));
        }
        let registered = Registered::new(&self.context, map, &self.place, self.piece_bytes)?;
        self.arenas.insert(id, registered);
        Ok(())
    }

    fn detach(&mut self, id: ArenaId) {
        let unused = self.flights.values().all(|flight| match flight {
            Flight::Waiting(Work { arena, .. }) | Flight::Running { arena, .. } => *arena != id,
        });
        assert!(unused, "detached with copies outstanding");
        self.arenas.remove(&id);
    }

    fn submit(&mut self, batch: &CopyBatch) -> Result<Ticket, CopyError> {
        let arena = self
            .arenas
            .get(&batch.arena)
            .ok_or(CopyError::UnknownArena(batch.arena))?;
        let mut transfers = Vec::with_capacity(batch.ranges.len());
        for range in &batch.ranges {
            arena.transfers(&self.pool, range, &mut transfers)?;
        }
        let registered = arena.covers(&transfers);
        let work = Work {
            direction: batch.direction,
            arena: batch.arena,
            transfers,
            after: batch.after,
        };
        let flight = if registered {
            self.launch(&work, registered)?
        } else {
            Flight::Waiting(work)
        };
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.flights.insert(ticket, flight);
        Ok(ticket)
    }

    fn poll(&mut self, ticket: Ticket) -> Poll {
        let Some(flight) = self.flights.remove(&ticket) else {
            panic!("polled a ticket that has ended");
        };
        let flight = match flight {
            Flight::Waiting(work) => {
                let launched = match self.marks.passed(work.after) {
                    Ok(true) => self.launch(&work, false),
                    Ok(false) => Ok(Flight::Waiting(work)),
                    Err(error) => Err(error),
                };
                match launched {
                    Ok(flight) => flight,
                    Err(error) => return Poll::Failed(error),
                }
            }
            Flight::Running {
                arena,
                event,
                failure,
            } => match event.passed() {
                Ok(false) => Flight::Running {
                    arena,
                    event,
                    failure,
                },
                Ok(true) => {
                    self.events.push(event);
                    return failure.map_or(Poll::Done, Poll::Failed);
                }
                Err(error) => return Poll::Failed(error.fatal()),
            },
        };
        self.flights.insert(ticket, flight);
        Poll::Pending
    }
}

impl Drop for CudaEngine {
    /// Waits until its streams have nothing left. If the driver does not tell, which it does not once the context is lost,
    /// nothing more can be asked: the arenas then stay mapped and registered until the process ends, so that a copy which
    /// still runs reaches memory of its own arena and no other. vLLM cannot compute in such a context either and ends.
    fn drop(&mut self) {
        let Some(streams) = &self.streams else {
            return;
        };
        let all = streams.loads.streams.iter().chain(&streams.saves.streams);
        let ends: Vec<_> = all.map(Stream::finish).collect();
        for error in ends.iter().filter_map(|end| end.as_ref().err()) {
            tracing::error!(
                %error,
                "the driver does not tell whether copies have ended: the arena stays mapped until this process ends. Restart vLLM"
            );
        }
        if ends.iter().any(Result::is_err) {
            for (_, arena) in self.arenas.drain() {
                arena.abandon();
            }
        }
    }
}
