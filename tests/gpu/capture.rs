//! Graph captures, in the mode in which torch captures: copies go on and do not break them.

use cuda::conformance::{PoolShape, RegionShape};
use cuda::{
    ArenaId, ArenaShard, ComputeMark, ComputeMarker, CopyError, CopyKind, CopyLimits, CopyThread,
    Job, JobId, Outcome,
};
use kvstore::{GpuBlock, SlotId};

use crate::rig::{Engine, Factory, METHODS, arena, take};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 256;

#[test]
fn copies_do_not_break_a_capture() {
    let Some((_turn, gpu)) = take() else {
        return;
    };
    for method in METHODS {
        let made = Factory::new(&gpu, method).engine(&shape());
        let Engine {
            engine,
            marker,
            pool,
            memory: _memory,
        } = made;
        let thread = CopyThread::spawn(Box::new(engine), pool, CopyLimits::default()).unwrap();
        let shard = || ArenaShard {
            map: arena(BLOCK * u64::from(BLOCKS)),
            slot_bytes: BLOCK,
            rank_offset: 0,
        };
        thread.attach(ArenaId(1), shard()).unwrap();
        let captured = gpu.bench.capture(|_| {
            for (id, kind) in [(1, CopyKind::Demand), (2, CopyKind::Save)] {
                // In an order in which nothing merges, and more than one sub-batch.
                let pairs = (0..BLOCKS).map(|index| (SlotId(index), GpuBlock(index * 7 % BLOCKS)));
                let job = Job {
                    id: JobId(id),
                    kind,
                    arena: ArenaId(1),
                    pairs: pairs.collect(),
                };
                thread.submit(job, ComputeMark::NONE).unwrap();
            }
            thread.wait_idle();
            // A sidecar that comes back while vLLM captures.
            thread.attach(ArenaId(2), shard()).unwrap();
            thread.detach(ArenaId(2));
            // Its registration has ended when there is room for another one of its name.
            while thread.attach(ArenaId(2), shard()) == Err(CopyError::Busy) {
                std::thread::yield_now();
            }
        });
        assert_eq!(captured, Ok(()), "{method:?}");
        let ends: Vec<_> = thread.take_finished();
        assert_eq!(ends.len(), 2);
        assert!(
            ends.iter().all(|end| end.outcome == Outcome::Done),
            "{method:?}"
        );
        drop(thread);
        drop(marker);
    }
}

/// The capture is one that a call of another sort does break.
#[test]
fn a_forbidden_call_would_break_it() {
    let Some((_turn, gpu)) = take() else {
        return;
    };
    let mut refused = None;
    let captured = gpu
        .bench
        .capture(|_| refused = gpu.bench.memory(4096).err());
    assert!(
        matches!(
            captured,
            Err(CopyError::Driver { .. } | CopyError::DeviceLost { .. })
        ),
        "{captured:?}, {refused:?}"
    );
}

/// Copies must not become a part of a graph, as they would if they waited for a mark on the captured stream.
#[test]
fn what_is_being_captured_is_not_marked() {
    let Some((_turn, gpu)) = take() else {
        return;
    };
    let marker = Factory::new(&gpu, METHODS[0]).engine(&shape()).marker;
    // One that has not been found to have passed: looking now would break the capture.
    marker.mark(0).unwrap();
    let mut refused = None;
    let captured = gpu
        .bench
        .capture(|stream| refused = marker.mark(stream).err());
    let expected = CopyError::Driver {
        operation: "cuStreamIsCapturing",
        code: 900,
    };
    assert_eq!((captured, refused), (Ok(()), Some(expected)));
    marker.mark(0).unwrap();
}

fn shape() -> PoolShape {
    PoolShape {
        bytes: BLOCK * u64::from(BLOCKS),
        regions: vec![RegionShape {
            offset: 0,
            block_stride: BLOCK,
            block_bytes: BLOCK,
        }],
        blocks: BLOCKS,
    }
}
