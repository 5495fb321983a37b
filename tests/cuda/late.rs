//! Copies that come late: nothing that waits for a job returns before its last byte has moved.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cuda::conformance::{PoolShape, RegionShape};
use cuda::{
    ComputeMark, ComputeMarker, CopyBatch, CopyEngine, CopyKind, CopyMethod, CopyRange, Direction,
    JobId, Outcome, Poll,
};

use crate::rig::{ARENA, CONTEXT, Engine, Factory, Setup, arena, job, take, until};

/// Runs `call` on another thread, lets the copies go only when it has `begun` and had time to return too early, and says
/// whether it did.
fn returned_early(
    call: impl FnOnce() + Send,
    begun: impl FnMut() -> bool,
    let_go: impl FnOnce(),
) -> bool {
    let returned = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            call();
            returned.store(true, Ordering::SeqCst);
        });
        until("the call has begun", begun);
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        let early = returned.load(Ordering::SeqCst);
        let_go();
        early
    })
}

#[test]
fn a_fence_waits_for_what_is_on_the_stream() {
    for method in [CopyMethod::Single, CopyMethod::Batch, CopyMethod::Rows] {
        for kind in CopyKind::ALL {
            let (_turn, driver) = take();
            let setup = Setup::new(&driver, method);
            driver.set("held", 1);
            setup.submit(1, kind, 0..8, ComputeMark::NONE);
            until("two parts at the driver", || {
                driver.get("cuMemcpyHtoDAsync_v2") + driver.get("cuMemcpyDtoHAsync_v2") == 2
                    || driver.get("cuMemcpyBatchAsync") == 2
            });
            // The driver has none of this one: it ends as soon as the fence has cancelled it.
            setup.submit(2, kind, 9..10, ComputeMark::NONE);
            let fence = || {
                setup.thread.fence(&[JobId(1), JobId(2)]);
                setup.sides.poison(kind, 0..8);
            };
            let begun = || setup.thread.in_flight() == 1;
            let early = returned_early(fence, begun, || driver.set("held", 0));
            assert!(!early, "{kind:?} by {method:?}: the fence did not wait");
            let cancelled = Outcome::Cancelled;
            assert_eq!(setup.ends(), [(1, cancelled.clone()), (2, cancelled)]);
            // Whatever is still to come on either stream comes before the end of these.
            setup.submit(3, kind, 8..9, ComputeMark::NONE);
            setup.submit(4, kind, 10..11, ComputeMark::NONE);
            setup.thread.wait_idle();
            let intact = setup.sides.is_poisoned(kind, 0..8);
            assert!(intact, "{kind:?} by {method:?}: a late copy");
            assert!(setup.sides.arrived(kind, 8..9) && setup.sides.arrived(kind, 10..11));
        }
    }
}

#[test]
fn a_fence_waits_for_copies_that_wait_for_compute() {
    let (_turn, driver) = take();
    let setup = Setup::new(&driver, CopyMethod::Auto);
    driver.launch(0);
    let mark = setup.marker.mark(0).unwrap();
    for id in 1..=3 {
        let block = id as u32 - 1;
        setup.submit(id, CopyKind::Save, block..block + 1, mark);
    }
    until("two parts at the driver", || {
        driver.get("cuMemcpyDtoHAsync_v2") == 2
    });
    assert_eq!(driver.get("copies"), 0, "it began before its mark");
    // The driver has none of the third: it ends as soon as the fence has cancelled it.
    let fence = || {
        setup.thread.fence(&[JobId(1), JobId(3)]);
        setup.sides.poison(CopyKind::Save, 0..1);
    };
    let begun = || setup.thread.in_flight() == 2;
    assert!(!returned_early(fence, begun, || driver.finish()));
    setup.thread.wait_idle();
    assert_eq!(driver.get("copies"), 2);
    assert!(setup.sides.is_poisoned(CopyKind::Save, 0..1));
}

#[test]
fn dropping_the_thread_waits() {
    let (_turn, driver) = take();
    let Setup {
        thread,
        marker: _marker,
        sides,
    } = Setup::new(&driver, CopyMethod::Auto);
    driver.set("held", 1);
    let all = job(1, CopyKind::Save, 0..8);
    thread.submit(all, ComputeMark::NONE).unwrap();
    until("two parts at the driver", || {
        driver.get("cuMemcpyDtoHAsync_v2") == 2
    });
    // Nothing shows from outside that a drop has begun.
    let begun = || true;
    assert!(!returned_early(
        || drop(thread),
        begun,
        || driver.set("held", 0)
    ));
    assert_eq!(Arc::strong_count(&sides.map), 1, "the mapping is let go");
    assert_eq!(driver.get("registered"), 0);
}

/// An engine whose owner drops it in the middle of things, as one does that has failed.
#[test]
fn dropping_the_engine_waits_for_its_streams() {
    let (_turn, driver) = take();
    let shape = PoolShape {
        bytes: 4096,
        regions: vec![RegionShape {
            offset: 0,
            block_stride: 4096,
            block_bytes: 4096,
        }],
        blocks: 1,
    };
    let made = Factory::new(&driver, CopyMethod::Auto).engine(&shape);
    let Engine {
        mut engine,
        marker,
        pool,
        memory: _memory,
    } = made.unwrap();
    engine.start().unwrap();
    let map = arena(4096);
    engine.attach(ARENA, &map).unwrap();
    driver.launch(0);
    let mut batch = CopyBatch {
        direction: Direction::HostToDevice,
        arena: ARENA,
        ranges: vec![CopyRange {
            arena_offset: 0,
            device: pool.regions()[0].base,
            bytes: 4096,
        }],
        after: marker.mark(0).unwrap(),
    };
    let load = engine.submit(&batch).unwrap();
    batch.direction = Direction::DeviceToHost;
    engine.submit(&batch).unwrap();
    assert_eq!(engine.poll(load), Poll::Pending);
    // As on the owner's thread, whose context it is.
    let drop_it = || {
        assert_eq!(driver.call("cuCtxPushCurrent_v2", CONTEXT), 0);
        drop(engine);
    };
    let begun = || true;
    assert!(!returned_early(drop_it, begun, || driver.finish()));
    assert_eq!(driver.get("copies"), 2, "both had been accepted");
    assert_eq!(Arc::strong_count(&map), 1);
    drop(marker);
    for left in ["streams", "events", "registered", "retained"] {
        assert_eq!(driver.get(left), 0, "{left} were left behind");
    }
}
