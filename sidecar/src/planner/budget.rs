//! The rules under which blocks may be taken out of the engine's pool (invariant 3 of the architecture).
//!
//! A chunk that is fetched takes blocks out of the free list while it is copied. It is submitted only if what is left
//! covers everything that vLLM itself is about to need: computed from the requests there are, not guessed as a share of the
//! pool. A demand load takes all of its request's blocks before the request has computed anything, and starts only if those
//! that hold blocks already can grow beside it.

/// State of the engine's pool at one step, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolFacts {
    /// Blocks in the pool.
    pub total: usize,
    /// Blocks on the free list, cached ones included.
    pub free: usize,
    /// Blocks that running, loading and startable requests still need, plus the next step's decode blocks.
    pub reserve: usize,
}

/// One session that should come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Blocks missing on the GPU.
    pub missing: usize,
    /// Leading blocks that are on the GPU and on the free list: fetching the rest must not evict them.
    pub kept: usize,
    /// Most blocks to fetch at once.
    pub chunk: usize,
}

/// What may be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Fetch this many blocks (at least one, at most the chunk).
    Fetch(usize),
    /// Nothing now; later, when requests have ended.
    Later,
    /// Never in full: the whole does not fit beside the reserve even in an otherwise empty pool.
    TooLarge,
}

/// Share of the pool that may be referenced before prefetches for sessions that are not due yet stop (in percent).
pub const BUSY_PERCENT: usize = 80;

/// How many blocks may be fetched now: `free − kept − chunk ≥ reserve`.
pub fn admit(pool: PoolFacts, demand: Demand) -> Admission {
    assert!(demand.missing > 0 && demand.chunk > 0, "nothing to admit");
    let given_away = usize::from(kvstore::fault!("budget::admit::one_less"));
    let room = pool
        .free
        .saturating_sub(pool.reserve.saturating_sub(given_away))
        .saturating_sub(demand.kept);
    let fetch = demand.missing.min(demand.chunk).min(room);
    if fetch > 0 {
        Admission::Fetch(fetch)
    } else if demand.missing + demand.kept > pool.total.saturating_sub(1) {
        Admission::TooLarge
    } else {
        Admission::Later
    }
}

/// Most blocks by which each request that holds some is taken to grow before one of them ends.
///
/// Of the same arrivals in a pool so small that requests fall (`python -m harness.arrivals`, 20 seeds, 66 preemptions
/// without Greenroom), those with loads fell 101 times without this rule, those with loads and fetches 60 times with two
/// blocks each, 57 with three, 38 to 47 with four.
pub const GROWTH_BLOCKS: usize = 4;

/// The requests that hold blocks of the engine's pool: those that run, and those whose load is being copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// How many there are.
    pub count: usize,
    /// Most that may run at a time.
    pub seats: usize,
    /// Blocks that they still need for the tokens they have.
    pub missing: usize,
    /// Blocks beyond those that they, and the request that would join them, are taken to grow by: each as far as it may,
    /// and by [`GROWTH_BLOCKS`] at most.
    pub growth: usize,
    /// Blocks on the free list, cached ones included.
    pub free: usize,
}

/// Whether a demand load may start that leaves its request with `own` blocks more: it finds a seat when it has ended, and
/// `free − own ≥ missing + growth`. Beside nobody it always may.
pub fn admits_load(own: usize, holders: Holders) -> bool {
    let Holders {
        count,
        seats,
        missing,
        growth,
        free,
    } = holders;
    count == 0 || (count < seats && free >= own + missing + growth)
}

/// Whether so much of the pool is in use that only sessions that are due are brought back.
pub fn is_busy(pool: PoolFacts) -> bool {
    (pool.total - pool.free) * 100 > pool.total * BUSY_PERCENT
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POOL: PoolFacts = PoolFacts {
        total: 400,
        free: 300,
        reserve: 50,
    };

    #[test]
    fn the_chunk_leaves_the_reserve_and_the_kept_prefix_alone() {
        assert_eq!(
            admit(
                POOL,
                Demand {
                    missing: 90,
                    kept: 0,
                    chunk: 64
                }
            ),
            Admission::Fetch(64)
        );
        assert_eq!(
            admit(
                POOL,
                Demand {
                    missing: 20,
                    kept: 0,
                    chunk: 64
                }
            ),
            Admission::Fetch(20)
        );
        assert_eq!(
            admit(
                POOL,
                Demand {
                    missing: 90,
                    kept: 240,
                    chunk: 64
                }
            ),
            Admission::Fetch(10)
        );
        assert_eq!(
            admit(
                POOL,
                Demand {
                    missing: 90,
                    kept: 250,
                    chunk: 64
                }
            ),
            Admission::Later
        );
        let tight = PoolFacts {
            reserve: 300,
            ..POOL
        };
        assert_eq!(
            admit(
                tight,
                Demand {
                    missing: 1,
                    kept: 0,
                    chunk: 64
                }
            ),
            Admission::Later
        );
        assert_eq!(
            admit(
                tight,
                Demand {
                    missing: 500,
                    kept: 0,
                    chunk: 64
                }
            ),
            Admission::TooLarge
        );
    }

    #[test]
    fn busy_is_more_than_four_fifths_referenced() {
        assert!(!is_busy(PoolFacts { free: 80, ..POOL }));
        assert!(is_busy(PoolFacts { free: 79, ..POOL }));
    }

    #[test]
    fn a_load_waits_for_a_seat_and_for_room_to_grow() {
        let holders = Holders {
            count: 3,
            seats: 4,
            missing: 5,
            growth: 8,
            free: 33,
        };
        assert!(admits_load(20, holders));
        assert!(!admits_load(21, holders));
        assert!(!admits_load(
            20,
            Holders {
                seats: 3,
                ..holders
            }
        ));
        let nearly_done = Holders {
            growth: 1,
            ..holders
        };
        assert!(admits_load(27, nearly_done));
        assert!(!admits_load(28, nearly_done));
        let nobody = Holders::default();
        assert!(admits_load(20, nobody), "who else would make room?");
    }

    proptest! {
        #[test]
        fn never_below_the_reserve(total in 1usize..5000, free in 0usize..5000, reserve in 0usize..6000,
                                   missing in 1usize..6000, kept in 0usize..3000, chunk in 1usize..512) {
            let free = free.min(total);
            if let Admission::Fetch(n) = admit(PoolFacts { total, free, reserve }, Demand { missing, kept, chunk }) {
                prop_assert!(n >= 1 && n <= chunk && n <= missing);
                prop_assert!(free - n >= reserve + kept);
            }
        }
    }
}
