//! The suite that every engine passes, for each method and under what may differ from one machine to the next.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use cuda::CopyMethod;
use cuda::conformance::run_all;

use crate::rig::{Factory, seed, take};

#[test]
fn automatic() {
    let (_turn, driver) = take();
    run_all(&Factory::new(&driver, CopyMethod::Auto), seed());
    for call in [
        "cuMemcpyBatchAsync",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
    ] {
        assert!(driver.get(call) > 0, "{call} was not called");
    }
    for left in ["streams", "events", "registered", "retained"] {
        assert_eq!(driver.get(left), 0, "{left} were left behind");
    }
}

#[test]
fn one_by_one() {
    let (_turn, driver) = take();
    run_all(&Factory::new(&driver, CopyMethod::Single), seed());
    assert_eq!(driver.get("cuMemcpyBatchAsync"), 0);
    assert_eq!(driver.get("cuMemcpy2DAsync_v2"), 0);
}

#[test]
fn rows() {
    let (_turn, driver) = take();
    run_all(&Factory::new(&driver, CopyMethod::Rows), seed());
    assert!(driver.get("cuMemcpy2DAsync_v2") > 0, "no rows were copied");
    assert_eq!(driver.get("cuMemcpyBatchAsync"), 0);
}

#[test]
fn on_a_driver_without_batches() {
    let (_turn, driver) = take();
    driver.set("batch", 0);
    driver.set("version", 12_040);
    run_all(&Factory::new(&driver, CopyMethod::Auto), seed());
    assert!(driver.get("cuMemcpy2DAsync_v2") > 0, "no rows were copied");
    assert_eq!(driver.get("cuMemcpyBatchAsync"), 0);
}

/// Arenas have several pages here, so that most slots lie on a border.
#[test]
fn with_registrations_of_one_page() {
    for method in [CopyMethod::Single, CopyMethod::Batch, CopyMethod::Rows] {
        let (_turn, driver) = take();
        let factory = Factory {
            pieces: 4096,
            ..Factory::new(&driver, method)
        };
        run_all(&factory, seed());
        assert!(driver.get("cuMemHostRegister_v2") > 100);
        assert_eq!(driver.get("registered"), 0);
    }
}

#[test]
fn with_an_arena_that_is_registered_in_part() {
    let (_turn, driver) = take();
    driver.set("pageable", 1);
    let factory = Factory {
        pieces: 4096,
        registers_once: true,
        ..Factory::new(&driver, CopyMethod::Auto)
    };
    run_all(&factory, seed());
    assert!(driver.get("struck") > 10, "few registrations failed");
    assert_eq!(driver.get("registered"), 0);
}

/// Copies stop and go at random moments, so that fences and drops meet every state of a batch.
#[test]
fn while_copies_stop_and_go() {
    let (_turn, driver) = take();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                driver.set("held", 1);
                for _ in 0..3 {
                    std::thread::yield_now();
                    driver.set("steps", 1);
                }
                driver.set("held", 0);
                std::thread::yield_now();
            }
        });
        let end = catch_unwind(AssertUnwindSafe(|| {
            run_all(&Factory::new(&driver, CopyMethod::Auto), seed());
        }));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = end {
            resume_unwind(panic);
        }
    });
}
