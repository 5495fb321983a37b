//! The KV pool as copies see it: strided regions of device memory. Raw device addresses enter the crate here and nowhere else.
//!
//! Owns descriptions only; it never reads or writes the memory it describes.

#![allow(
    unsafe_code,
    reason = "the constructor is where the caller vouches for raw device addresses"
)]

use crate::engine::CopyError;

/// One strided piece of the KV pool: block `b` lies at `base + b * block_stride`, `block_bytes` long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRegion {
    /// Device address of block 0.
    pub base: u64,
    /// Bytes from one block to the next, at least `block_bytes`.
    pub block_stride: u64,
    /// Bytes of one block in this region.
    pub block_bytes: u64,
}

/// The regions that together hold one rank's share of every block. In a slot they lie one after the other, in this order.
#[derive(Debug, PartialEq, Eq)]
pub struct DevicePool {
    regions: Vec<DeviceRegion>,
    blocks: u32,
    rank_bytes: u64,
    /// What copies may touch: sorted, neither overlapping nor adjacent, as (first address, address past the end).
    spans: Vec<(u64, u64)>,
}

impl DevicePool {
    /// Regions of one pool; a pool that calls for more has been described wrongly.
    pub const REGIONS_MAX: usize = 4096;

    /// Describes a pool of `blocks` blocks.
    ///
    /// Errors: [`CopyError::BadConfig`] when there are no regions or blocks, a block is empty or longer than its stride,
    /// or an address overflows.
    ///
    /// # Safety
    /// From each region's `base` to the end of its last block, gaps between blocks included, lies memory of one
    /// allocation that the engine it is given to may read and write at any time while the pool lives, no part of an arena. For host engines
    /// the addresses are pointers whose provenance has been exposed, and nobody holds Rust references into them.
    pub unsafe fn new(regions: Vec<DeviceRegion>, blocks: u32) -> Result<Self, CopyError> {
        if regions.is_empty() || regions.len() > Self::REGIONS_MAX {
            return Err(CopyError::BadConfig("number of regions"));
        }
        if blocks == 0 {
            return Err(CopyError::BadConfig("blocks"));
        }
        let mut rank_bytes = 0_u64;
        let mut spans = Vec::with_capacity(regions.len());
        for region in &regions {
            spans.push(span(region, blocks)?);
            rank_bytes = rank_bytes
                .checked_add(region.block_bytes)
                .ok_or(CopyError::BadConfig("block_bytes"))?;
        }
        Ok(Self {
            regions,
            blocks,
            rank_bytes,
            spans: joined(spans),
        })
    }

    /// The regions, in slot order.
    pub fn regions(&self) -> &[DeviceRegion] {
        &self.regions
    }

    /// Blocks in the pool.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes of one block over all regions: this rank's share of a slot.
    pub fn rank_bytes(&self) -> u64 {
        self.rank_bytes
    }

    /// Whether `bytes` from `device` on lie inside the memory that the pool's creator vouched for.
    pub fn contains(&self, device: u64, bytes: u64) -> bool {
        let Some(end) = device.checked_add(bytes) else {
            return false;
        };
        let after = self.spans.partition_point(|&(first, _)| first <= device);
        after > 0 && end <= self.spans[after - 1].1
    }
}

fn span(region: &DeviceRegion, blocks: u32) -> Result<(u64, u64), CopyError> {
    if region.block_bytes == 0 {
        return Err(CopyError::BadConfig("block_bytes is 0"));
    }
    if region.block_stride < region.block_bytes {
        return Err(CopyError::BadConfig(
            "block_stride is smaller than block_bytes",
        ));
    }
    let end = u64::from(blocks - 1)
        .checked_mul(region.block_stride)
        .and_then(|last| last.checked_add(region.block_bytes))
        .and_then(|length| length.checked_add(region.base))
        .ok_or(CopyError::BadConfig("a region ends past the address space"))?;
    Ok((region.base, end))
}

/// Joins spans that touch, so that a range merged across two regions is still inside one span.
fn joined(mut spans: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    spans.sort_unstable();
    let mut out: Vec<(u64, u64)> = Vec::with_capacity(spans.len());
    for (first, end) in spans {
        match out.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(end),
            _ => out.push((first, end)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(regions: &[(u64, u64, u64)], blocks: u32) -> Result<DevicePool, CopyError> {
        let regions = regions
            .iter()
            .map(|&(base, block_stride, block_bytes)| DeviceRegion {
                base,
                block_stride,
                block_bytes,
            })
            .collect();
        // SAFETY: nothing in these tests copies, so the addresses are only numbers.
        unsafe { DevicePool::new(regions, blocks) }
    }

    #[test]
    fn contradicting_pools_are_refused() {
        for bad in [
            pool(&[], 4),
            pool(&[(0, 8, 8)], 0),
            pool(&[(0, 8, 0)], 4),
            pool(&[(0, 7, 8)], 4),
            pool(&[(u64::MAX - 15, 8, 8)], 3),
            pool(&[(0, u64::MAX, 8)], 3),
        ] {
            assert!(matches!(bad, Err(CopyError::BadConfig(_))), "{bad:?}");
        }
        let edge = pool(&[(u64::MAX - 16, 8, 8)], 2).expect("ends exactly at the last address");
        assert!(edge.contains(u64::MAX - 16, 16));
        assert!(!edge.contains(u64::MAX - 16, 17));
    }

    #[test]
    fn contains_joins_neighbours_and_excludes_gaps() {
        let pool = pool(&[(1000, 10, 10), (1100, 10, 10), (2000, 100, 10)], 10).expect("valid");
        assert_eq!(pool.rank_bytes(), 30);
        assert!(
            pool.contains(1000, 200),
            "two adjacent regions are one span"
        );
        assert!(!pool.contains(1000, 201));
        assert!(!pool.contains(999, 1));
        assert!(pool.contains(2000, 910));
        assert!(!pool.contains(2000, 911));
        assert!(!pool.contains(1500, 1));
        assert!(!pool.contains(u64::MAX, 2));
    }
}
