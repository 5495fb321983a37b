//! Round trips of random bytes at real sizes: every layout of a KV pool × every method, bit by bit.

use std::sync::atomic::Ordering;

use cuda::conformance::{DeviceMemory, PoolShape, RegionShape};
use cuda::{
    ArenaId, ArenaShard, ComputeMark, CopyKind, CopyLimits, CopyThread, Job, JobId, Outcome,
};
use greenroom_tests::random::{Random, seed};
use kvstore::{ArenaMap, GpuBlock, SlotId};

use crate::rig::{Engine, Factory, METHODS, arena, cells, take};

const BLOCKS: u32 = 16;
const RANKS: u64 = 2;

/// How vLLM lays a pool out: its names, L layers, B blocks, N tokens, H heads, C content; the outermost first.
fn layouts() -> Vec<(&'static str, PoolShape)> {
    let blocks = u64::from(BLOCKS);
    // `count` regions, one after the other, in which blocks lie side by side.
    let outer = |count: u64, bytes: u64| {
        let regions = (0..count).map(|number| RegionShape {
            offset: number * blocks * bytes,
            block_stride: bytes,
            block_bytes: bytes,
        });
        PoolShape {
            bytes: count * blocks * bytes,
            regions: regions.collect(),
            blocks: BLOCKS,
        }
    };
    // Layers that lie in one block, with something of another's behind each.
    let gaps = |count: u64, bytes: u64, gap: u64| {
        let stride = count * (bytes + gap);
        let regions = (0..count).map(|number| RegionShape {
            offset: number * (bytes + gap),
            block_stride: stride,
            block_bytes: bytes,
        });
        PoolShape {
            bytes: blocks * stride,
            regions: regions.collect(),
            blocks: BLOCKS,
        }
    };
    vec![
        ("LBNHC and LBHNC, 36 layers of 64 KiB", outer(36, 64 << 10)),
        (
            "LHBNC, 28 layers of 4 heads of 8 KiB",
            outer(28 * 4, 8 << 10),
        ),
        (
            "BLNHC, BLHNC and BHLNC, 2304 KiB",
            outer(1, 36 * (64 << 10)),
        ),
        (
            "keys and values apart, 2 × 16 layers of 16 KiB",
            outer(32, 16 << 10),
        ),
        ("blocks with gaps, 5 × 12,352 bytes", gaps(5, 12_352, 192)),
        ("blocks of odd bytes", gaps(3, 10_007, 1)),
    ]
}

#[test]
fn every_layout_comes_back_bit_by_bit() {
    let Some((_turn, gpu)) = take() else {
        return;
    };
    let seed = seed();
    println!("GREENROOM_SEED={seed}");
    let mut random = Random::new(seed);
    for (name, shape) in layouts() {
        for method in METHODS {
            let Engine {
                engine,
                marker: _marker,
                pool,
                memory,
            } = Factory::new(&gpu, method).engine(&shape);
            let rank_bytes = pool.rank_bytes();
            let map = arena(RANKS * rank_bytes * u64::from(BLOCKS));
            let thread = CopyThread::spawn(Box::new(engine), pool, CopyLimits::default()).unwrap();
            let shard = ArenaShard {
                map: map.clone(),
                slot_bytes: RANKS * rank_bytes,
                rank_offset: rank_bytes,
            };
            thread.attach(ArenaId(1), shard).unwrap();

            let before = noise(&mut random, shape.bytes);
            memory.write(0, &before);
            let arena_before = noise(&mut random, map.bytes());
            fill(&map, &arena_before);
            let slots = shuffled(&mut random);
            let saved = shuffled(&mut random);
            copy(&thread, 1, CopyKind::Save, &slots, &saved);
            // Everything else than the blocks' own bytes is lost, and comes back nowhere else.
            let other = noise(&mut random, shape.bytes);
            memory.write(0, &other);
            let loaded = shuffled(&mut random);
            copy(&thread, 2, CopyKind::Prefetch, &slots, &loaded);

            let mut expected = other;
            let mut expected_arena = arena_before;
            for index in 0..slots.len() {
                let mut at = slots[index] as u64 * RANKS * rank_bytes + rank_bytes;
                for region in &shape.regions {
                    let place = |block: u32| {
                        let start = region.offset + u64::from(block) * region.block_stride;
                        start as usize..(start + region.block_bytes) as usize
                    };
                    let bytes = &before[place(saved[index])];
                    expected[place(loaded[index])].copy_from_slice(bytes);
                    let end = at + region.block_bytes;
                    expected_arena[at as usize..end as usize].copy_from_slice(bytes);
                    at = end;
                }
            }
            let mut found = vec![0; shape.bytes as usize];
            memory.read(0, &mut found);
            assert!(found == expected, "{name} by {method:?}: the pool");
            let cells = cells(&map).iter().map(|cell| cell.load(Ordering::Relaxed));
            assert!(cells.eq(expected_arena), "{name} by {method:?}: the arena");
        }
    }
}

fn copy(thread: &CopyThread, id: u64, kind: CopyKind, slots: &[u32], blocks: &[u32]) {
    let pairs = slots.iter().zip(blocks);
    let job = Job {
        id: JobId(id),
        kind,
        arena: ArenaId(1),
        pairs: pairs
            .map(|(&slot, &block)| (SlotId(slot), GpuBlock(block)))
            .collect(),
    };
    thread.submit(job, ComputeMark::NONE).unwrap();
    thread.wait_idle();
    let ends = thread.take_finished();
    assert_eq!(ends.len(), 1);
    assert_eq!(ends[0].outcome, Outcome::Done);
}

fn shuffled(random: &mut Random) -> Vec<u32> {
    let mut all: Vec<u32> = (0..BLOCKS).collect();
    for last in (1..all.len()).rev() {
        all.swap(last, random.below(last + 1));
    }
    // Not all of them: what is not copied must stay as it is.
    all.truncate(BLOCKS as usize * 3 / 4);
    all
}

fn noise(random: &mut Random, bytes: u64) -> Vec<u8> {
    let words = (0..bytes.div_ceil(8)).flat_map(|_| random.number().to_le_bytes());
    let mut all: Vec<u8> = words.collect();
    all.truncate(bytes as usize);
    all
}

fn fill(map: &ArenaMap, bytes: &[u8]) {
    for (cell, byte) in cells(map).iter().zip(bytes) {
        cell.store(*byte, Ordering::Relaxed);
    }
}
