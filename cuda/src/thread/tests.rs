//! Tests of the copy thread, on a host engine whose copies can be held, failed and slowed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kvstore::ArenaMap;
use parking_lot::Mutex;

use super::*;
use crate::conformance::{DeviceMemory, EngineFactory, PoolShape, RegionShape, Rig};
use crate::engine::{CopyBatch, Poll, Ticket};
use crate::host::{Fault, HostSwitch};
use crate::jobs::Outcome;
use crate::testkit::{HostFactory, arena};

const BLOCK: u64 = 64;
const BLOCKS: u32 = 32;
const ARENA: ArenaId = ArenaId(1);
const DEAD: Outcome = Outcome::Failed(CopyError::EngineDead);

/// One region of 32 blocks and an arena of 64 slots, all of 64 bytes; parts are one block.
struct Setup {
    // Fields drop in this order: the thread before the memory it copies to.
    thread: CopyThread,
    switch: HostSwitch,
    memory: Arc<dyn DeviceMemory>,
    map: Arc<ArenaMap>,
}

fn rig() -> (Rig, HostSwitch) {
    let factory = HostFactory::default();
    let region = RegionShape {
        offset: 0,
        block_stride: BLOCK,
        block_bytes: BLOCK,
    };
    let shape = PoolShape {
        bytes: BLOCK * u64::from(BLOCKS),
        regions: vec![region],
        blocks: BLOCKS,
    };
    (factory.build(&shape), factory.switch)
}

fn limits() -> CopyLimits {
    CopyLimits {
        sub_batch_bytes: BLOCK,
        save_every: Duration::from_secs(3600),
        ..CopyLimits::default()
    }
}

fn setup(limits: CopyLimits) -> Setup {
    setup_with(limits, |engine| engine)
}

fn setup_with(
    limits: CopyLimits,
    wrap: impl FnOnce(Box<dyn CopyEngine>) -> Box<dyn CopyEngine>,
) -> Setup {
    let (rig, switch) = rig();
    let thread = CopyThread::spawn(wrap(rig.engine), rig.pool, limits).expect("a thread");
    let map = arena(64 * BLOCK);
    thread.attach(ARENA, shard(&map)).expect("attached");
    Setup {
        thread,
        switch,
        memory: rig.memory,
        map,
    }
}

fn shard(map: &Arc<ArenaMap>) -> ArenaShard {
    ArenaShard {
        map: Arc::clone(map),
        slot_bytes: BLOCK,
        rank_offset: 0,
    }
}

/// A job of `count` blocks from block and slot `first` on.
fn job(id: u64, kind: CopyKind, first: u32, count: u32) -> Job {
    let pairs = (first..first + count).map(|n| (SlotId(n), GpuBlock(n)));
    Job {
        id: JobId(id),
        kind,
        arena: ARENA,
        pairs: pairs.collect(),
    }
}

/// A test that fails while copies are held should fail, not wait for them.
impl Drop for Setup {
    fn drop(&mut self) {
        self.switch.release();
        self.switch.finish();
    }
}

impl Setup {
    fn submit(&self, job: Job) {
        self.thread
            .submit(job, ComputeMark::NONE)
            .expect("accepted");
    }

    fn ends(&self) -> Vec<(u64, Outcome)> {
        let ends = self.thread.take_finished();
        ends.into_iter()
            .map(|end| (end.id.0, end.outcome))
            .collect()
    }

    fn device(&self) -> Vec<u8> {
        let mut bytes = vec![0; kvstore::usize_from_u64(BLOCK * u64::from(BLOCKS))];
        self.memory.read(0, &mut bytes);
        bytes
    }
}

#[test]
fn urgent_jobs_overtake_and_saves_wait_for_loads() {
    let setup = setup(CopyLimits {
        outstanding_per_direction: 1,
        ..limits()
    });
    setup.switch.hold();
    setup.submit(job(1, CopyKind::Prefetch, 0, 4));
    setup.switch.wait_submits(1);
    setup.submit(job(2, CopyKind::Save, 4, 4));
    setup.submit(job(3, CopyKind::Prefetch, 8, 4));
    setup.submit(job(4, CopyKind::Demand, 12, 4));
    setup.submit(job(5, CopyKind::Demand, 16, 1));
    assert_eq!(setup.thread.in_flight(), 5);
    setup.switch.release();
    setup.thread.wait_idle();
    let order: Vec<u64> = setup.ends().iter().map(|(id, _)| *id).collect();
    // The running prefetch yields after the part that was at the engine already.
    assert_eq!(order, [4, 5, 1, 3, 2]);
}

#[test]
fn a_waiting_save_gets_its_share() {
    let setup = setup(CopyLimits {
        save_every: Duration::ZERO,
        ..limits()
    });
    setup.switch.hold();
    setup.submit(job(1, CopyKind::Demand, 0, 8));
    setup.switch.wait_submits(2);
    setup.submit(job(2, CopyKind::Save, 8, 1));
    // Loads are outstanding and stay so: only the quota lets a third batch through.
    setup.switch.wait_submits(3);
    setup.switch.release();
    setup.thread.wait_idle();
    assert_eq!(setup.ends().len(), 2);
}

#[test]
fn a_full_queue_is_busy_until_ends_are_collected() {
    let setup = setup(CopyLimits {
        queue_jobs: 2,
        ..limits()
    });
    setup.switch.hold();
    setup.submit(job(1, CopyKind::Save, 0, 1));
    setup.submit(job(2, CopyKind::Save, 1, 1));
    let third = || {
        setup
            .thread
            .submit(job(3, CopyKind::Save, 2, 1), ComputeMark::NONE)
    };
    assert_eq!(third(), Err(CopyError::Busy));
    setup.switch.release();
    setup.thread.wait_idle();
    assert_eq!(
        third(),
        Err(CopyError::Busy),
        "nobody has collected the ends"
    );
    assert_eq!(setup.ends(), [(1, Outcome::Done), (2, Outcome::Done)]);
    assert_eq!(third(), Ok(()));
    setup.thread.wait_idle();
    assert_eq!(setup.ends(), [(3, Outcome::Done)]);
}

#[test]
fn bad_jobs_are_refused_before_anything_is_queued() {
    let setup = setup(limits());
    let refused = |job| setup.thread.submit(job, ComputeMark::NONE);
    let mut bad = job(1, CopyKind::Demand, 0, 4);
    bad.pairs.push((SlotId(64), GpuBlock(0)));
    let slot = SlotId(64);
    assert_eq!(
        refused(bad),
        Err(CopyError::SlotOutOfRange { slot, slots: 64 })
    );
    let bad = job(1, CopyKind::Demand, BLOCKS - 1, 2);
    let block = GpuBlock(BLOCKS);
    let blocks = BLOCKS;
    assert_eq!(
        refused(bad),
        Err(CopyError::BlockOutOfRange { block, blocks })
    );
    let arena = ArenaId(5);
    let bad = Job {
        arena,
        ..job(1, CopyKind::Demand, 0, 1)
    };
    assert_eq!(refused(bad), Err(CopyError::UnknownArena(arena)));
    assert_eq!((setup.thread.in_flight(), setup.switch.submits()), (0, 0));
    setup.switch.hold();
    setup.submit(job(1, CopyKind::Demand, 0, 1));
    let duplicate = refused(job(1, CopyKind::Save, 4, 1));
    assert_eq!(duplicate, Err(CopyError::DuplicateJob(JobId(1))));
    setup.switch.release();
    setup.thread.wait_idle();
    assert_eq!(setup.ends(), [(1, Outcome::Done)]);
}

#[test]
fn a_job_without_blocks_is_done_at_once() {
    let setup = setup(limits());
    setup.switch.hold();
    setup.submit(job(1, CopyKind::Save, 0, 0));
    assert_eq!(setup.ends(), [(1, Outcome::Done)]);
}

#[test]
fn cancel_drops_what_the_engine_does_not_have() {
    let setup = setup(limits());
    setup.switch.hold();
    setup.submit(job(1, CopyKind::Demand, 0, 8));
    setup.submit(job(2, CopyKind::Demand, 8, 8));
    setup.switch.wait_submits(2);
    setup.thread.cancel(&[JobId(2), JobId(77)]);
    assert_eq!(
        setup.ends(),
        [(2, Outcome::Cancelled)],
        "none of it was at the engine"
    );
    setup.thread.cancel(&[JobId(1)]);
    assert_eq!((setup.ends(), setup.thread.in_flight()), (vec![], 1));
    setup.switch.release();
    setup.thread.wait_idle();
    let ends = setup.thread.take_finished();
    assert_eq!((ends.len(), &ends[0].outcome), (1, &Outcome::Cancelled));
    assert_eq!(ends[0].bytes, 2 * BLOCK);
    assert_eq!(setup.switch.submits(), 2, "the other parts were dropped");
}

#[test]
fn a_fence_waits_for_copies_at_the_engine() {
    let setup = setup(limits());
    setup.switch.hold();
    setup.submit(job(1, CopyKind::Demand, 0, 8));
    setup.submit(job(2, CopyKind::Demand, 8, 8));
    setup.switch.wait_submits(2);
    let returned = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            setup.thread.fence(&[JobId(1), JobId(2), JobId(3)]);
            returned.store(true, Ordering::SeqCst);
            // The arena holds zeroes: a copy that came later would show.
            setup
                .memory
                .write(0, &setup.device().iter().map(|_| 0xEE).collect::<Vec<u8>>());
        });
        // Job 2 ends as soon as the fence has cancelled it, job 1 cannot.
        while setup.thread.in_flight() > 1 {
            std::thread::yield_now();
        }
        for _ in 0..100 {
            std::thread::yield_now();
        }
        let early = returned.load(Ordering::SeqCst);
        setup.switch.release();
        assert!(!early, "job 1 was still at the engine");
    });
    setup.submit(job(4, CopyKind::Save, 0, 1));
    setup.thread.wait_idle();
    assert!(setup.device().iter().all(|byte| *byte == 0xEE));
    assert_eq!(setup.switch.submits(), 3);
    let cancelled = Outcome::Cancelled;
    let expected = [(2, cancelled.clone()), (1, cancelled), (4, Outcome::Done)];
    assert_eq!(setup.ends(), expected);
}

#[test]
fn a_failed_part_fails_its_job_only() {
    for fault in [Fault::SubmitFails, Fault::CopyFails] {
        for nth in 1..=6 {
            let setup = setup(limits());
            setup.switch.inject(fault, nth);
            for id in 0..2 {
                setup.submit(job(id, CopyKind::Demand, 0, 3));
                setup.thread.wait_idle();
            }
            let ends = setup.ends();
            assert_eq!(ends.len(), 2, "{fault:?} {nth}");
            for (id, outcome) in ends {
                let hit = if nth <= 3 { 0 } else { 1 };
                match outcome {
                    Outcome::Failed(CopyError::Driver { .. }) => assert_eq!(id, hit),
                    outcome => assert_eq!((id, outcome), (1 - hit, Outcome::Done)),
                }
            }
            setup.submit(job(9, CopyKind::Save, 0, 3));
            setup.thread.wait_idle();
            assert_eq!(setup.ends(), [(9, Outcome::Done)], "it still serves");
        }
    }
}

/// Notes when the engine is dropped, and when arenas are let go.
struct Watched {
    inner: Box<dyn CopyEngine>,
    dropped: Arc<AtomicBool>,
    outstanding: u64,
    detached_busy: Arc<AtomicU64>,
}

impl CopyEngine for Watched {
    fn name(&self) -> &'static str {
        "watched"
    }
    fn attach(&mut self, id: ArenaId, map: &Arc<ArenaMap>) -> Result<(), CopyError> {
        if id == ArenaId(13) {
            return Err(CopyError::Driver {
                operation: "register",
                code: 2,
            });
        }
        self.inner.attach(id, map)
    }
    fn detach(&mut self, id: ArenaId) {
        self.detached_busy
            .fetch_add(self.outstanding, Ordering::SeqCst);
        self.inner.detach(id);
    }
    fn submit(&mut self, batch: &CopyBatch) -> Result<Ticket, CopyError> {
        let ticket = self.inner.submit(batch)?;
        self.outstanding += 1;
        Ok(ticket)
    }
    fn poll(&mut self, ticket: Ticket) -> Poll {
        let poll = self.inner.poll(ticket);
        self.outstanding -= u64::from(poll != Poll::Pending);
        poll
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_dead_engine_ends_every_job_after_it_is_gone() {
    for fault in [Fault::SubmitPanics, Fault::PollPanics, Fault::CopyKills] {
        let dropped = Arc::new(AtomicBool::new(false));
        let setup = setup_with(limits(), |inner| {
            Box::new(Watched {
                inner,
                dropped: Arc::clone(&dropped),
                outstanding: 0,
                detached_busy: Arc::default(),
            })
        });
        setup.switch.hold();
        setup.submit(job(1, CopyKind::Demand, 0, 4));
        setup.submit(job(2, CopyKind::Prefetch, 4, 4));
        setup.submit(job(3, CopyKind::Save, 8, 4));
        setup.switch.wait_submits(2);
        setup.switch.inject(fault, 1);
        setup.switch.release();
        setup.thread.fence(&[JobId(2)]);
        setup.thread.wait_idle();
        let mut ends = setup.ends();
        ends.sort_by_key(|(id, _)| *id);
        assert_eq!(ends.len(), 3, "{fault:?}");
        assert_eq!(
            (ends[0].1.clone(), ends[2].1.clone()),
            (DEAD, DEAD),
            "{fault:?}"
        );
        assert!(setup.thread.is_dead() && dropped.load(Ordering::SeqCst));
        let submitted = setup
            .thread
            .submit(job(4, CopyKind::Demand, 0, 1), ComputeMark::NONE);
        assert_eq!(submitted, Err(CopyError::EngineDead));
        let attached = setup.thread.attach(ArenaId(2), shard(&setup.map));
        assert_eq!(attached, Err(CopyError::EngineDead));
        setup.thread.detach(ARENA);
        let map = Arc::clone(&setup.map);
        drop(setup);
        assert_eq!(Arc::strong_count(&map), 1, "the mapping is let go");
    }
}

#[test]
fn an_arena_is_let_go_after_its_jobs() {
    let detached_busy = Arc::new(AtomicU64::new(0));
    let setup = setup_with(limits(), |inner| {
        Box::new(Watched {
            inner,
            dropped: Arc::default(),
            outstanding: 0,
            detached_busy: Arc::clone(&detached_busy),
        })
    });
    setup.switch.hold();
    setup.submit(job(1, CopyKind::Demand, 0, 4));
    setup.thread.detach(ARENA);
    setup.thread.detach(ArenaId(99));
    let late = setup
        .thread
        .submit(job(2, CopyKind::Demand, 4, 4), ComputeMark::NONE);
    assert_eq!(late, Err(CopyError::UnknownArena(ARENA)));
    let attach = || setup.thread.attach(ARENA, shard(&setup.map));
    assert_eq!(attach(), Err(CopyError::Busy), "its job still runs");
    setup.switch.release();
    setup.thread.wait_idle();
    assert_eq!(setup.ends(), [(1, Outcome::Done)], "the job ran to its end");
    while attach() == Err(CopyError::Busy) {
        std::thread::yield_now();
    }
    assert_eq!(attach(), Err(CopyError::AlreadyAttached(ARENA)));
    assert_eq!(detached_busy.load(Ordering::SeqCst), 0);
}

#[test]
fn attaching_fails_cleanly() {
    let setup = setup_with(limits(), |inner| {
        Box::new(Watched {
            inner,
            dropped: Arc::default(),
            outstanding: 0,
            detached_busy: Arc::default(),
        })
    });
    let attach = |id| setup.thread.attach(ArenaId(id), shard(&setup.map));
    assert!(matches!(attach(13), Err(CopyError::Driver { .. })));
    let narrow = ArenaShard {
        rank_offset: 1,
        ..shard(&setup.map)
    };
    let narrow = setup.thread.attach(ArenaId(2), narrow);
    assert!(matches!(narrow, Err(CopyError::BadConfig(_))));
    for id in 0..15 {
        assert_eq!(attach(100 + id), Ok(()));
    }
    let limit = ARENAS_MAX;
    assert_eq!(attach(200), Err(CopyError::TooManyArenas { limit }));
    setup.submit(job(1, CopyKind::Demand, 0, 4));
    setup.thread.wait_idle();
    assert_eq!(setup.ends(), [(1, Outcome::Done)], "it still serves");
}

struct CannotStart(bool);

impl CopyEngine for CannotStart {
    fn name(&self) -> &'static str {
        "cannot start"
    }
    fn start(&mut self) -> Result<(), CopyError> {
        assert!(!self.0, "start panics");
        Err(CopyError::Driver {
            operation: "cuInit",
            code: 100,
        })
    }
    fn attach(&mut self, _: ArenaId, _: &Arc<ArenaMap>) -> Result<(), CopyError> {
        unreachable!("never started")
    }
    fn detach(&mut self, _: ArenaId) {}
    fn submit(&mut self, _: &CopyBatch) -> Result<Ticket, CopyError> {
        unreachable!("never started")
    }
    fn poll(&mut self, _: Ticket) -> Poll {
        unreachable!("never started")
    }
}

#[test]
fn an_engine_that_cannot_start_says_why() {
    let spawn = |panics, limits| {
        let (rig, _) = rig();
        CopyThread::spawn(Box::new(CannotStart(panics)), rig.pool, limits).err()
    };
    let refused = CopyError::Driver {
        operation: "cuInit",
        code: 100,
    };
    assert_eq!(spawn(false, limits()), Some(refused));
    assert_eq!(spawn(true, limits()), Some(CopyError::EngineDead));
    let bad = CopyLimits {
        queue_jobs: 0,
        ..limits()
    };
    assert!(matches!(spawn(false, bad), Some(CopyError::BadConfig(_))));
}

#[test]
fn jobs_wait_for_their_own_mark() {
    let setup = setup(limits());
    let mark = setup.switch.launch();
    let save = job(1, CopyKind::Save, 0, 4);
    setup.thread.submit(save, mark).expect("accepted");
    setup.switch.wait_submits(2);
    setup.submit(job(2, CopyKind::Demand, 4, 4));
    while setup.thread.in_flight() > 1 {
        std::thread::yield_now();
    }
    assert_eq!(
        setup.ends(),
        [(2, Outcome::Done)],
        "it has nothing to wait for"
    );
    setup.switch.finish();
    setup.thread.wait_idle();
    assert_eq!(setup.ends(), [(1, Outcome::Done)]);
}

/// Lets time pass: as much as 500 jobs of another thread take, each of them longer than a poll interval.
fn pass_time() {
    let busy = setup(limits());
    for id in 0..500 {
        busy.submit(job(id, CopyKind::Save, 0, 8));
        busy.thread.wait_idle();
        assert_eq!(busy.ends().len(), 1);
    }
}

/// How often the owner looked for work while [time passed](pass_time). On its way to sleep it looks a few times more,
/// however late it runs; one that looked in every poll interval would have done so 500 times.
fn rounds_meanwhile(thread: &CopyThread) -> u64 {
    let rounds = thread.rounds();
    pass_time();
    thread.rounds() - rounds
}

#[test]
fn an_idle_thread_sleeps() {
    let setup = setup(limits());
    setup.submit(job(1, CopyKind::Save, 0, 8));
    setup.thread.wait_idle();
    let rounds = rounds_meanwhile(&setup.thread);
    assert!(rounds < 10, "it looked for work unasked: {rounds}");
}

#[test]
fn between_polls_the_thread_sleeps_and_still_listens() {
    let setup = setup(CopyLimits {
        poll_interval: Duration::from_secs(3600),
        ..limits()
    });
    setup.switch.hold();
    setup.submit(job(1, CopyKind::Save, 0, 1));
    let rounds = rounds_meanwhile(&setup.thread);
    assert!(rounds < 10, "it polled before its time: {rounds}");
    setup.switch.release();
    // A call wakes it: it takes the new job and polls the old one on the way.
    setup.submit(job(2, CopyKind::Demand, 1, 1));
    setup.thread.wait_idle();
    assert_eq!(setup.ends().len(), 2);
}

#[test]
fn many_callers_get_every_end_once() {
    let setup = setup(limits());
    let ends = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let (setup, ends) = (&setup, &ends);
            scope.spawn(move || {
                for n in 0..100 {
                    let id = caller * 100 + n;
                    setup.submit(job(
                        id,
                        CopyKind::ALL[kvstore::usize_from_u64(id % 3)],
                        0,
                        2,
                    ));
                    if n % 7 == 0 {
                        setup.thread.fence(&[JobId(id)]);
                    }
                    ends.lock().extend(setup.thread.take_finished());
                }
            });
        }
    });
    setup.thread.wait_idle();
    let mut ids: Vec<u64> = ends.into_inner().iter().map(|end| end.id.0).collect();
    ids.extend(setup.ends().iter().map(|(id, _)| *id));
    ids.sort_unstable();
    assert_eq!(ids, (0..400).collect::<Vec<u64>>());
}
