//! An arena's memory as a GPU reaches it: touched, then registered in pieces.
//!
//! Owns the registrations and a share of the mapping: unregisters before it lets go of it. [`Registered::transfers`] is
//! where ranges become addresses. Must never let a copy cross the border of two registrations, which the driver does not
//! take for one piece of registered memory.

#![allow(
    unsafe_code,
    reason = "registering is right only while the memory stays mapped, which this file sees to"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore::{ArenaError, ArenaMap, u64_from};
use parking_lot::Mutex;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::driver::Context;
use super::place::Place;
use crate::device::DevicePool;
use crate::engine::{CopyError, CopyRange};

/// Bytes registered in one call. The driver keeps every other mmap of the process waiting meanwhile (76 ms per GiB on an H200's host), and
/// some drivers refuse much larger ones.
pub(super) const PIECE_BYTES: u64 = 1 << 30;
/// Threads that touch pages.
const TOUCH_THREADS_MAX: usize = 16;
/// Bytes that are worth a thread.
const TOUCH_BYTES_PER_THREAD: u64 = 64 << 20;
const GIB: f64 = (1 << 30) as f64;

/// Mappings that the driver may still write to: kept until the process ends.
static KEPT: Mutex<Vec<Arc<ArenaMap>>> = Mutex::new(Vec::new());

/// One copy, checked: its host side lies in one mapping and one piece of it, its device side in the pool. Only made by
/// [`Registered::transfers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    /// Address in this process.
    host: u64,
    device: u64,
    bytes: u64,
    /// Which piece of which size; transfers of one job with equal numbers lie in one registration.
    piece: u64,
}

impl Transfer {
    #[cfg(test)]
    pub(super) fn on_paper(host: u64, device: u64, bytes: u64, piece: u64) -> Self {
        Self {
            host,
            device,
            bytes,
            piece,
        }
    }

    pub(super) fn host(&self) -> u64 {
        self.host
    }

    pub(super) fn device(&self) -> u64 {
        self.device
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn piece(&self) -> u64 {
        self.piece
    }
}

/// A mapping of which the first `covered` bytes are registered, all of them unless the driver refused some.
pub(super) struct Registered {
    context: Arc<Context>,
    map: Arc<ArenaMap>,
    base: u64,
    piece_bytes: u64,
    covered: u64,
}

impl Registered {
    /// Touches and registers a mapping. A piece that the driver refuses leaves it and those behind it unregistered.
    ///
    /// Errors: [`CopyError::DeviceLost`].
    pub(super) fn new(
        context: &Arc<Context>,
        map: &Arc<ArenaMap>,
        place: &Place,
        piece_bytes: u64,
    ) -> Result<Self, CopyError> {
        let started = Instant::now();
        if let Err(error) = touch(map, place.cpus.as_ref()) {
            tracing::warn!(%error, "not all of the arena could be touched");
        }
        let touched = started.elapsed();
        let mut registered = Self {
            context: Arc::clone(context),
            map: Arc::clone(map),
            base: u64_from(map.base().as_ptr().expose_provenance()),
            piece_bytes,
            covered: 0,
        };
        let refused = registered.register().err();
        registered.tell(place, touched, started.elapsed(), refused.as_ref());
        match refused {
            Some(error) if error.is_fatal() => Err(error),
            _ => Ok(registered),
        }
    }

    fn register(&mut self) -> Result<(), CopyError> {
        while self.covered < self.map.bytes() {
            let bytes = self.piece_bytes.min(self.map.bytes() - self.covered);
            // SAFETY: the piece lies in the mapping, by whole pages. `self` keeps the mapping until `drop` has unregistered the
            // piece, or for good.
            unsafe { self.context.register(self.base + self.covered, bytes)? };
            self.covered += bytes;
        }
        Ok(())
    }

    /// The one line about what a start costs.
    fn tell(&self, place: &Place, touched: Duration, all: Duration, refused: Option<&CopyError>) {
        let (gib, of_gib) = (self.covered as f64 / GIB, self.map.bytes() as f64 / GIB);
        let (touch, register) = (touched.as_secs_f64(), (all - touched).as_secs_f64());
        let node = place
            .node
            .map_or_else(|| "unknown".to_owned(), |node| node.to_string());
        match refused {
            None => tracing::info!(
                "registered {gib:.2} GiB of arena: {touch:.2} s to touch, {register:.2} s to register, memory node {node}"
            ),
            Some(error) => tracing::warn!(
                "registered {gib:.2} of {of_gib:.2} GiB of arena, then {error}. Copies of the rest go through the driver's own \
                 buffers, several times slower: make the arena smaller, or see the runbook, \"GPU\""
            ),
        }
    }

    #[cfg(feature = "workbench")]
    pub(super) fn is_complete(&self) -> bool {
        self.covered == self.map.bytes()
    }

    /// Whether all that these transfers touch is registered.
    pub(super) fn covers(&self, transfers: &[Transfer]) -> bool {
        transfers
            .iter()
            .all(|one| one.host + one.bytes <= self.base + self.covered)
    }

    /// Appends the copies that make up `range`: one, or as many as it touches pieces.
    ///
    /// Errors: [`CopyError::RangeOutside`] if it is not within this mapping and the pool.
    pub(super) fn transfers(
        &self,
        pool: &DevicePool,
        range: &CopyRange,
        into: &mut Vec<Transfer>,
    ) -> Result<(), CopyError> {
        let end = range.arena_offset.checked_add(range.bytes);
        let inside = end.is_some_and(|end| end <= self.map.bytes());
        if !inside || range.bytes == 0 || !pool.contains(range.device, range.bytes) {
            return Err(CopyError::RangeOutside { range: *range });
        }
        split(range, self.base, self.piece_bytes, into);
        Ok(())
    }

    /// Leaves mapping and registrations in place until the process ends: copies may still be using them.
    pub(super) fn abandon(mut self) {
        self.covered = 0;
        self.keep();
    }

    fn keep(&self) {
        KEPT.lock().push(Arc::clone(&self.map));
    }
}

impl Drop for Registered {
    /// Nothing copies from or to the mapping any more.
    fn drop(&mut self) {
        let mut stays = false;
        while self.covered > 0 {
            let start = (self.covered - 1) / self.piece_bytes * self.piece_bytes;
            if let Err(error) = self.context.unregister(self.base + start) {
                tracing::warn!(%error, "a piece of arena stays registered, and so mapped");
                stays = true;
            }
            self.covered = start;
        }
        if stays {
            self.keep();
        }
    }
}

/// Cuts a range at the borders of pieces.
fn split(range: &CopyRange, base: u64, piece_bytes: u64, into: &mut Vec<Transfer>) {
    let (mut offset, mut device, mut left) = (range.arena_offset, range.device, range.bytes);
    while left > 0 {
        let piece = offset / piece_bytes;
        let bytes = left.min((piece + 1) * piece_bytes - offset);
        into.push(Transfer {
            host: base + offset,
            device,
            bytes,
            piece,
        });
        offset += bytes;
        device += bytes;
        left -= bytes;
    }
}

/// Has every page backed, by several threads on the GPU's memory node.
fn touch(map: &ArenaMap, cpus: Option<&CpuSet>) -> Result<(), ArenaError> {
    let worth = kvstore::usize_from_u64(map.bytes().div_ceil(TOUCH_BYTES_PER_THREAD));
    let most = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = worth.min(most).min(TOUCH_THREADS_MAX);
    let Some(cpus) = cpus else {
        return map.populate(threads);
    };
    // Pages come from the node of whoever touches them, and threads inherit where they may run.
    std::thread::scope(|scope| {
        let near = scope.spawn(|| {
            if let Err(error) = sched_setaffinity(None, cpus) {
                tracing::info!(%error, "the arena's pages are not kept to the GPU's memory node");
            }
            map.populate(threads)
        });
        near.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn cutting_keeps_every_byte_and_crosses_no_border(
            offset in 0..10_000_u64,
            bytes in 1..10_000_u64,
            piece_bytes in 1..5_000_u64,
        ) {
            let (base, device) = (1 << 40, 1 << 50);
            let range = CopyRange { arena_offset: offset, device, bytes };
            let mut parts = Vec::new();
            split(&range, base, piece_bytes, &mut parts);
            let mut next = (base + offset, device);
            for part in &parts {
                prop_assert_eq!((part.host, part.device), next);
                prop_assert!(part.bytes > 0);
                let (first, last) = (part.host - base, part.host - base + part.bytes - 1);
                prop_assert_eq!((first / piece_bytes, last / piece_bytes), (part.piece, part.piece));
                next = (next.0 + part.bytes, next.1 + part.bytes);
            }
            prop_assert_eq!(next, (base + offset + bytes, device + bytes));
            let touched = (offset + bytes - 1) / piece_bytes - offset / piece_bytes + 1;
            prop_assert_eq!(u64_from(parts.len()), touched, "no more parts than pieces");
        }
    }
}
