//! Graph captures: vLLM's must not be broken by copies, and copies must not become a part of them.

use cuda::{ArenaId, ComputeMark, ComputeMarker, CopyError, CopyKind, CopyMethod, Outcome};

use crate::rig::{CONTEXT, Setup, arena, shard, take};

const STREAM: i64 = 0;
const UNSUPPORTED: i32 = 900;

#[test]
fn copies_do_not_break_a_capture() {
    for method in [CopyMethod::Single, CopyMethod::Batch, CopyMethod::Rows] {
        let (_turn, driver) = take();
        let setup = Setup::new(&driver, method);
        driver.set("capture", STREAM);
        for (id, kind) in [(1, CopyKind::Demand), (2, CopyKind::Save)] {
            setup.submit(id, kind, 0..8, ComputeMark::NONE);
        }
        setup.thread.wait_idle();
        assert_eq!(setup.ends(), [(1, Outcome::Done), (2, Outcome::Done)]);
        // A sidecar that comes back while vLLM captures.
        let again = arena(setup.sides.map.bytes());
        setup.thread.attach(ArenaId(2), shard(&again)).unwrap();
        setup.thread.detach(ArenaId(2));
        drop(setup);
        assert_eq!(driver.get("capture_broken"), 0, "{method:?}");
    }
}

/// The stand-in does see calls that break a capture.
#[test]
fn another_thread_would_break_it() {
    let (_turn, driver) = take();
    let _setup = Setup::new(&driver, CopyMethod::Auto);
    driver.set("capture", STREAM);
    assert_eq!(driver.call("cuCtxPushCurrent_v2", CONTEXT), 0);
    assert_eq!(driver.call("cuStreamQuery", 0), UNSUPPORTED);
    assert_eq!(driver.get("capture_broken"), 1);
}

#[test]
fn what_is_being_captured_is_not_marked() {
    let (_turn, driver) = take();
    let setup = Setup::new(&driver, CopyMethod::Auto);
    driver.set("capture", STREAM);
    let refused = CopyError::Driver {
        operation: "cuStreamIsCapturing",
        code: UNSUPPORTED,
    };
    assert_eq!(setup.marker.mark(0), Err(refused));
    assert_eq!(driver.get("cuEventRecord"), 0);
    assert_eq!(driver.get("capture_broken"), 0);
    driver.set("capture", -1);
    let mark = setup.marker.mark(0).unwrap();
    setup.submit(1, CopyKind::Demand, 0..1, mark);
    setup.thread.wait_idle();
    assert_eq!(setup.ends(), [(1, Outcome::Done)]);
}
