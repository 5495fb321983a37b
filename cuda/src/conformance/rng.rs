//! Random choices that a seed repeats.

use kvstore::{u64_from, usize_from_u64};

/// SplitMix64: small, seeded, good enough to choose layouts.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// An index below `limit`, which is not 0.
    pub(crate) fn index(&mut self, limit: usize) -> usize {
        usize_from_u64(self.below(u64_from(limit)))
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    pub(super) fn shuffled(&mut self, count: u32) -> Vec<u32> {
        let mut out: Vec<u32> = (0..count).collect();
        for last in (1..out.len()).rev() {
            out.swap(last, self.index(last + 1));
        }
        out
    }
}
