//! What each sort of failure costs: one batch, one method, or the engine.

use std::sync::Arc;

use cuda::{ArenaId, ComputeMark, ComputeMarker, CopyError, CopyKind, CopyMethod, JobId, Outcome};

use crate::rig::{
    ARENA, INVALID_VALUE, LAUNCH_FAILED, NOT_SUPPORTED, OUT_OF_MEMORY, Setup, arena, job, shard,
    take, take_log, until,
};

const KINDS: [CopyKind; 2] = [CopyKind::Demand, CopyKind::Save];

/// The entry point of one copy.
fn single(kind: CopyKind) -> &'static str {
    match kind {
        CopyKind::Demand | CopyKind::Prefetch => "cuMemcpyHtoDAsync_v2",
        CopyKind::Save => "cuMemcpyDtoHAsync_v2",
    }
}

fn failed(operation: &'static str, code: i32) -> Outcome {
    Outcome::Failed(CopyError::Driver { operation, code })
}

#[test]
fn a_driver_that_takes_no_batches_gets_single_copies() {
    for kind in KINDS {
        let (_turn, driver) = take();
        let setup = Setup::new(&driver, CopyMethod::Batch);
        driver.fail("cuMemcpyBatchAsync", 1, NOT_SUPPORTED);
        setup.submit(1, kind, 0..8, ComputeMark::NONE);
        setup.thread.wait_idle();
        assert_eq!(setup.ends(), [(1, Outcome::Done)]);
        assert!(setup.sides.arrived(kind, 0..8));
        assert_eq!(driver.get("cuMemcpyBatchAsync"), 1, "it was tried once");
        let log = take_log();
        assert!(
            log.contains("cuMemcpyBatchAsync failed with code 801"),
            "{log}"
        );
    }
}

#[test]
fn a_refused_copy_fails_its_job_only() {
    for kind in KINDS {
        for nth in 1..=4 {
            let (_turn, driver) = take();
            let setup = Setup::new(&driver, CopyMethod::Single);
            driver.fail(single(kind), nth, INVALID_VALUE);
            setup.submit(1, kind, 0..4, ComputeMark::NONE);
            setup.thread.wait_idle();
            setup.submit(2, kind, 4..8, ComputeMark::NONE);
            setup.thread.wait_idle();
            let refused = failed(single(kind), INVALID_VALUE);
            assert_eq!(setup.ends(), [(1, refused), (2, Outcome::Done)]);
            assert!(setup.sides.arrived(kind, 4..8));
        }
    }
}

/// Of the four ranges of a sub-batch the driver takes the first only, which must have ended before the job has.
#[test]
fn half_a_batch_ends_before_its_job_does() {
    for kind in KINDS {
        let (_turn, driver) = take();
        let setup = Setup::scattered(&driver, CopyMethod::Single);
        driver.fail(single(kind), 2, OUT_OF_MEMORY);
        driver.set("held", 1);
        setup.submit(1, kind, 0..4, ComputeMark::NONE);
        until("the refusal", || driver.get("struck") == 1);
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        assert_eq!(setup.ends(), [], "the first copy has not been made yet");
        driver.set("held", 0);
        setup.thread.wait_idle();
        assert_eq!(setup.ends(), [(1, failed(single(kind), OUT_OF_MEMORY))]);
        assert_eq!(driver.get("copies"), 1);
    }
}

#[test]
fn rows_that_the_driver_refuses_are_copied_one_by_one() {
    for code in [INVALID_VALUE, NOT_SUPPORTED] {
        for kind in KINDS {
            let (_turn, driver) = take();
            let setup = Setup::scattered(&driver, CopyMethod::Rows);
            driver.fail("cuMemcpy2DAsync_v2", 1, code);
            setup.submit(1, kind, 0..8, ComputeMark::NONE);
            setup.thread.wait_idle();
            assert_eq!(setup.ends(), [(1, Outcome::Done)]);
            assert!(setup.sides.arrived(kind, 0..8));
            assert_eq!(driver.get("cuMemcpy2DAsync_v2"), 1, "it was tried once");
        }
    }
}

#[test]
fn a_lost_context_ends_everything_and_says_why() {
    for kind in KINDS {
        let (_turn, driver) = take();
        let setup = Setup::new(&driver, CopyMethod::Auto);
        driver.fail("copy", 3, LAUNCH_FAILED);
        setup.submit(1, kind, 0..8, ComputeMark::NONE);
        setup.submit(2, kind, 8..16, ComputeMark::NONE);
        until("the loss", || driver.get("struck") == 1);
        setup.thread.fence(&[JobId(1), JobId(2)]);
        setup.sides.poison(kind, 0..16);
        let ends = setup.ends();
        assert_eq!(ends.len(), 2);
        until("the end of the engine", || setup.thread.is_dead());
        let refused = setup
            .thread
            .submit(job(3, kind, 0..1), ComputeMark::NONE)
            .unwrap_err();
        let CopyError::DeviceLost { code, .. } = refused else {
            panic!("{refused}");
        };
        assert_eq!(code, LAUNCH_FAILED);
        for (id, outcome) in ends {
            let named = outcome == Outcome::Failed(refused.clone());
            assert!(named || outcome == Outcome::Cancelled, "{id}: {outcome:?}");
        }
        assert!(setup.marker.mark(0).is_err());
        let map = Arc::clone(&setup.sides.map);
        let dead = setup.thread.attach(ARENA, shard(&map)).unwrap_err();
        assert!(dead.is_fatal());
        let intact = setup.sides.is_poisoned(kind, 0..16);
        assert!(intact, "a copy after the fence");
        drop(setup);
        assert!(
            Arc::strong_count(&map) > 1,
            "the driver did not say that copies have ended: the mapping stays"
        );
        let log = take_log();
        assert!(log.contains("the arena stays mapped"), "{log}");
    }
}

/// The first way to wait fails, the second does not: nothing has to be kept.
#[test]
fn a_stream_that_cannot_be_waited_for_is_asked() {
    let (_turn, driver) = take();
    let setup = Setup::new(&driver, CopyMethod::Auto);
    driver.set("held", 1);
    setup.submit(1, CopyKind::Save, 0..1, ComputeMark::NONE);
    until("a part at the driver", || {
        driver.get(single(CopyKind::Save)) == 1
    });
    // The engine dies of not being told, and waits for the streams then.
    for of_saves in [3, 4] {
        driver.fail("cuStreamSynchronize", of_saves, OUT_OF_MEMORY);
    }
    driver.fail("cuEventQuery", 1, OUT_OF_MEMORY);
    until("the question", || driver.get("cuStreamQuery") > 3);
    assert_eq!(setup.ends(), [], "the copy may still be made");
    driver.set("held", 0);
    setup.thread.wait_idle();
    let lost = CopyError::DeviceLost {
        operation: "cuEventQuery",
        code: OUT_OF_MEMORY,
    };
    assert_eq!(setup.ends(), [(1, Outcome::Failed(lost))]);
    let map = Arc::clone(&setup.sides.map);
    drop(setup);
    assert_eq!(Arc::strong_count(&map), 1);
    assert_eq!(driver.get("registered"), 0);
}

#[test]
fn a_mapping_that_stays_registered_stays_mapped() {
    let (_turn, driver) = take();
    let setup = Setup::new(&driver, CopyMethod::Auto);
    driver.fail("cuMemHostUnregister", 1, INVALID_VALUE);
    setup.thread.detach(ARENA);
    until("the detaching", || driver.get("cuMemHostUnregister") == 2);
    let other = arena(setup.sides.map.bytes());
    setup.thread.attach(ArenaId(2), shard(&other)).unwrap();
    let map = Arc::clone(&setup.sides.map);
    drop(setup);
    // A thread of its own lets go of the detached shard, and with it of this test's other reference.
    until("only the engine keeps it, for good", || {
        Arc::strong_count(&map) == 2
    });
    let log = take_log();
    assert!(
        log.contains("cuMemHostUnregister failed with code 1"),
        "{log}"
    );
}

#[test]
fn marks_are_bounded_and_come_back() {
    let (_turn, driver) = take();
    let setup = Setup::new(&driver, CopyMethod::Auto);
    driver.launch(0);
    let made = (0..)
        .map(|_| setup.marker.mark(0))
        .take_while(Result::is_ok)
        .count();
    assert_eq!(made, 256);
    assert_eq!(setup.marker.mark(0), Err(CopyError::Busy));
    driver.finish();
    let before = driver.get("events");
    until("the GPU", || setup.marker.mark(0).is_ok());
    for _ in 0..1000 {
        until("the GPU", || setup.marker.mark(0).is_ok());
    }
    assert_eq!(driver.get("events"), before, "events are used again");
}

#[test]
fn a_mark_that_cannot_be_made_says_why() {
    for call in [
        "cuCtxPushCurrent_v2",
        "cuStreamIsCapturing",
        "cuEventCreate",
        "cuEventRecord",
    ] {
        let (_turn, driver) = take();
        let setup = Setup::new(&driver, CopyMethod::Auto);
        driver.fail(call, 1, OUT_OF_MEMORY);
        let error = setup.marker.mark(0).unwrap_err();
        assert_eq!(error.to_string(), format!("{call} failed with code 2"));
        let mark = setup.marker.mark(0).unwrap();
        setup.submit(1, CopyKind::Demand, 0..4, mark);
        setup.thread.wait_idle();
        assert_eq!(setup.ends(), [(1, Outcome::Done)], "after {call}");
    }
}

#[test]
fn what_could_not_be_registered_is_copied_slowly_and_said_once() {
    for kind in KINDS {
        let (_turn, driver) = take();
        driver.set("pageable", 1);
        driver.fail("cuMemHostRegister_v2", 2, OUT_OF_MEMORY);
        let setup = Setup::new(&driver, CopyMethod::Auto);
        assert_eq!(driver.get("registered"), 1, "of two pages");
        driver.launch(0);
        let mark = setup.marker.mark(0).unwrap();
        // The last blocks lie in the second page. The driver would wait for them, so it must not have them yet.
        setup.submit(1, kind, 24..32, mark);
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        assert_eq!(driver.get(single(kind)), 0);
        assert_eq!(setup.thread.in_flight(), 1);
        driver.finish();
        setup.thread.wait_idle();
        assert_eq!(setup.ends(), [(1, Outcome::Done)]);
        assert!(setup.sides.arrived(kind, 24..32));
        let log = take_log();
        assert_eq!(log.matches("several times slower").count(), 1, "{log}");
        assert!(
            log.contains("cuMemHostRegister_v2 failed with code 2"),
            "{log}"
        );
    }
}
