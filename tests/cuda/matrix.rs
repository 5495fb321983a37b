//! The fault matrix: every entry point × its first, a middle and its last call × four sorts of error. Whatever fails, no
//! panic, each job ends once, what a fence covers is not touched again, and somebody is told the call and its code.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use cuda::{ArenaId, ComputeMark, ComputeMarker, CopyKind, CopyMethod, Job, JobId, Outcome};

use crate::rig::{
    BLOCK, Driver, INVALID_VALUE, LAUNCH_FAILED, NOT_SUPPORTED, OUT_OF_MEMORY, SCATTERED, Setup,
    Shape, arena, job, shard, take, take_log, until,
};

/// Every entry point, with the method by which it is come to.
const CALLS: [(&str, CopyMethod); 30] = [
    ("cuInit", CopyMethod::Auto),
    ("cuDriverGetVersion", CopyMethod::Auto),
    ("cuDeviceGetCount", CopyMethod::Auto),
    ("cuDeviceGet", CopyMethod::Auto),
    ("cuDeviceGetAttribute", CopyMethod::Auto),
    ("cuDeviceGetPCIBusId", CopyMethod::Auto),
    ("cuDevicePrimaryCtxRetain", CopyMethod::Auto),
    ("cuDevicePrimaryCtxRelease_v2", CopyMethod::Auto),
    ("cuCtxSetCurrent", CopyMethod::Auto),
    ("cuCtxPushCurrent_v2", CopyMethod::Auto),
    ("cuCtxPopCurrent_v2", CopyMethod::Auto),
    ("cuThreadExchangeStreamCaptureMode", CopyMethod::Auto),
    ("cuStreamCreate", CopyMethod::Auto),
    ("cuStreamDestroy_v2", CopyMethod::Auto),
    ("cuStreamWaitEvent", CopyMethod::Auto),
    ("cuStreamQuery", CopyMethod::Auto),
    ("cuStreamSynchronize", CopyMethod::Auto),
    ("cuStreamIsCapturing", CopyMethod::Auto),
    ("cuEventCreate", CopyMethod::Auto),
    ("cuEventDestroy_v2", CopyMethod::Auto),
    ("cuEventRecord", CopyMethod::Auto),
    ("cuEventQuery", CopyMethod::Auto),
    ("cuPointerGetAttribute", CopyMethod::Auto),
    ("cuMemHostRegister_v2", CopyMethod::Auto),
    ("cuMemHostUnregister", CopyMethod::Auto),
    ("cuMemcpyHtoDAsync_v2", CopyMethod::Single),
    ("cuMemcpyDtoHAsync_v2", CopyMethod::Single),
    ("cuMemcpy2DAsync_v2", CopyMethod::Rows),
    ("cuGetProcAddress_v2", CopyMethod::Auto),
    ("cuMemcpyBatchAsync", CopyMethod::Batch),
];

const CODES: [i32; 4] = [OUT_OF_MEMORY, INVALID_VALUE, NOT_SUPPORTED, LAUNCH_FAILED];

/// Two sub-batches a job, of two ranges each.
const SHAPE: Shape = Shape {
    sub_batch: 2 * BLOCK,
    ..SCATTERED
};

/// A job of four blocks, and what has been done to it.
struct Given {
    kind: CopyKind,
    indices: Range<u32>,
    fenced: bool,
}

#[test]
fn each_call_fails_in_each_way() {
    let (_turn, driver) = take();
    for (call, method) in CALLS {
        prepare(&driver, call);
        let told = live(&driver, method);
        let calls = driver.get(call);
        assert!(calls > 0, "the scenario does not come to {call}");
        assert!(call == "cuStreamQuery" || told.is_empty(), "{told:?}");
        let mut nths = vec![1, calls.div_ceil(2), calls];
        nths.dedup();
        for nth in nths {
            for code in CODES {
                prepare(&driver, call);
                let before = driver.get("struck");
                driver.fail(call, nth, code);
                let told = live(&driver, method).join("\n") + &take_log();
                let struck = driver.get("struck") > before;
                assert!(struck || nth > 1, "{call} was not called");
                let text = format!("{call} failed with code {code}");
                assert!(
                    !struck || told.contains(&text),
                    "nobody was told that call {nth} of {text}:\n{told}"
                );
                assert!(!told.contains("panicked"), "{text}:\n{told}");
            }
        }
    }
}

/// A fresh driver, on which a scenario comes to `call`.
fn prepare(driver: &Driver, call: &str) {
    driver.reset();
    take_log();
    if call == "cuStreamQuery" {
        // Streams are asked only where waiting for them has failed.
        driver.fail("cuStreamSynchronize", 1, OUT_OF_MEMORY);
    }
}

/// A worker's life, and what its user is told of failures. Checks what must hold whatever fails.
fn live(driver: &Arc<Driver>, method: CopyMethod) -> Vec<String> {
    let setup = match Setup::open(driver, method, SHAPE) {
        Ok(setup) => setup,
        Err(why) => return vec![why],
    };
    let mut told = Vec::new();
    let mut given = HashMap::new();
    for round in 0..3_u32 {
        driver.launch(0);
        let waits = driver.get("cuStreamWaitEvent");
        let mut ids = Vec::new();
        for (number, kind) in [
            (2 * round, CopyKind::Demand),
            (2 * round + 1, CopyKind::Save),
        ] {
            let indices = 4 * number..4 * number + 4;
            let one = job(u64::from(number), kind, indices.clone());
            if submit(&setup, one, &mut told) {
                ids.push(JobId(u64::from(number)));
                let fenced = round == 1;
                given.insert(
                    u64::from(number),
                    Given {
                        kind,
                        indices,
                        fenced,
                    },
                );
            }
        }
        until("copies behind their mark", || {
            let waiting = driver.get("cuStreamWaitEvent") > waits;
            waiting || setup.thread.in_flight() == 0 || driver.get("struck") > 0
        });
        driver.finish();
        if round == 1 {
            setup.thread.fence(&ids);
            for id in ids {
                let one = &given[&id.0];
                setup.sides.poison(one.kind, one.indices.clone());
            }
            another_arena(&setup, &mut told);
        }
    }
    setup.thread.wait_idle();
    let ends = setup.ends();
    let ids: HashSet<u64> = ends
        .iter()
        .map(|(id, _)| *id)
        .filter(|id| *id != 99)
        .collect();
    assert_eq!(ids, given.keys().copied().collect(), "every job ends");
    assert!(ends.len() <= ids.len() + 1, "no job ends twice");
    for (id, outcome) in ends {
        if let Outcome::Failed(error) = &outcome {
            told.push(error.to_string());
        }
        // The job of the other arena is not among them.
        let Some(one) = given.get(&id) else {
            continue;
        };
        let arrived = setup.sides.arrived(one.kind, one.indices.clone());
        assert!(
            one.fenced || outcome != Outcome::Done || arrived,
            "job {id}"
        );
    }
    let Setup {
        thread,
        marker,
        sides,
    } = setup;
    drop(thread);
    drop(marker);
    for one in given.values().filter(|one| one.fenced) {
        let intact = sides.is_poisoned(one.kind, one.indices.clone());
        assert!(intact, "a copy after its fence");
    }
    told
}

/// Whether it was accepted.
fn submit(setup: &Setup, job: Job, told: &mut Vec<String>) -> bool {
    let mark = setup.marker.mark(0);
    let end = mark.and_then(|mark| setup.thread.submit(job, mark));
    told.extend(end.as_ref().err().map(ToString::to_string));
    end.is_ok()
}

/// A second sidecar comes, is used, and goes.
fn another_arena(setup: &Setup, told: &mut Vec<String>) {
    let map = arena(setup.sides.map.bytes());
    if let Err(error) = setup.thread.attach(ArenaId(2), shard(&map)) {
        told.push(error.to_string());
        return;
    }
    let one = Job {
        arena: ArenaId(2),
        ..job(99, CopyKind::Save, 28..32)
    };
    if let Err(error) = setup.thread.submit(one, ComputeMark::NONE) {
        told.push(error.to_string());
    }
    setup.thread.detach(ArenaId(2));
}
