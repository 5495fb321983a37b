//! Which blocks are readable, roughly, in memory that engines see: whoever finds that a block is not there need not ask.
//!
//! A counting Bloom filter (Fan et al., "Summary Cache", 1998) over the hashes of all namespaces: each block counts in
//! [`CELLS_PER_BLOCK`] of [`CELLS_PER_SLOT`] bytes for each slot, so that a full arena says "perhaps" of one absent block
//! in 417, by (1 - e^(-k/m))^k. It never says "no" of a readable block that its reader can know of: what is published
//! before a message is sent is seen by whoever has received the message.
//!
//! The store's process writes, in [`Presence`]; engines read, in [`PresenceView`]. The file is mapped before it is sealed
//! (FUTURE_WRITE), so that nobody else can write it. Here is the one `unsafe` that shows the bytes as atomics.
#![allow(unsafe_code, reason = "shared memory is shown as atomics")]

use std::hash::Hasher;
use std::os::fd::{AsFd, OwnedFd};
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::SealFlags;
use rustix::mm::ProtFlags;

use crate::arena::{ArenaFile, ArenaMap, PageSize, check_seals};
use crate::error::ArenaError;
use crate::ids::{BlockHash, low_half, usize_from_u64};
use crate::index::DigestHasher;

// Where a block counts is agreed between two processes: what changes it, here or in `DigestHasher`, changes the engine
// protocol, whose number must rise.

/// Counters for each slot: m.
const CELLS_PER_SLOT: u64 = 16;
/// Counters that one block adds to: k.
const CELLS_PER_BLOCK: u64 = 4;
/// Nobody who has no mapping yet can write, and that stays.
const NO_OTHER_WRITER: SealFlags = SealFlags::FUTURE_WRITE.union(SealFlags::SEAL);
/// A counter that has got there stays: how many it stands for is forgotten.
const FULL: u8 = u8::MAX;

/// The filter, as its one writer has it.
#[derive(Debug)]
pub struct Presence {
    cells: Cells,
    file: Arc<ArenaFile>,
}

impl Presence {
    /// An empty filter for a store of so many slots.
    ///
    /// # Errors
    /// `OutOfMemory`, `System`.
    pub fn create(slots: u32) -> Result<Self, ArenaError> {
        let pages = PageSize::Base4K;
        let bytes = (u64::from(slots.max(1)) * CELLS_PER_SLOT).next_multiple_of(pages.bytes());
        let file = ArenaFile::unsealed("greenroom-presence", bytes, pages)?;
        let map = ArenaMap::over(file.fd(), bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        // Now, where a lack of memory is an error: later it would be a SIGBUS.
        map.populate(1)?;
        file.seal(NO_OTHER_WRITER)?;
        Ok(Self {
            cells: Cells { map },
            file: Arc::new(file),
        })
    }

    /// Its file, to be sent to those who read it.
    pub fn file(&self) -> &Arc<ArenaFile> {
        &self.file
    }

    pub(crate) fn add(&self, hash: &BlockHash) {
        for cell in self.cells.of(hash) {
            // There is no other writer.
            let count = cell.load(Ordering::Relaxed);
            cell.store(count.saturating_add(1), Ordering::Relaxed);
        }
    }

    pub(crate) fn remove(&self, hash: &BlockHash) {
        for cell in self.cells.of(hash) {
            let count = cell.load(Ordering::Relaxed);
            if count != FULL {
                assert!(count > 0, "{hash:?} was never counted as present");
                cell.store(count - 1, Ordering::Relaxed);
            }
        }
    }

    /// Recounts it; for the audit.
    ///
    /// # Panics
    /// If it does not count exactly these blocks.
    pub(crate) fn check<'a>(&self, readable: impl Iterator<Item = &'a BlockHash>) {
        let cells = self.cells.all();
        let mut counts = vec![0_u8; cells.len()];
        for position in readable.flat_map(|hash| self.cells.positions(hash)) {
            counts[position] = counts[position].saturating_add(1);
        }
        for (position, (cell, count)) in cells.iter().zip(counts).enumerate() {
            let cell = cell.load(Ordering::Relaxed);
            assert!(
                cell == count || cell == FULL,
                "cell {position} of the presence filter counts {cell} blocks and {count} are readable"
            );
        }
    }
}

/// The filter of another process.
#[derive(Debug)]
pub struct PresenceView {
    cells: Cells,
}

impl PresenceView {
    /// Maps a filter of which somebody sent the descriptor, to read it.
    ///
    /// # Errors
    /// As [`ArenaMap::map`].
    pub fn open(fd: OwnedFd, bytes: u64) -> Result<Self, ArenaError> {
        check_seals(fd.as_fd(), NO_OTHER_WRITER, SealFlags::empty())?;
        let map = ArenaMap::over(fd.as_fd(), bytes, ProtFlags::READ)?;
        Ok(Self {
            cells: Cells { map },
        })
    }

    /// Whether the block may be readable, in some namespace. False: it is not.
    pub fn may_have(&self, hash: &BlockHash) -> bool {
        let mut cells = self.cells.of(hash);
        cells.all(|cell| cell.load(Ordering::Relaxed) > 0)
    }
}

#[derive(Debug)]
struct Cells {
    map: ArenaMap,
}

impl Cells {
    fn of(&self, hash: &BlockHash) -> impl Iterator<Item = &AtomicU8> {
        let cells = self.all();
        self.positions(hash).map(|position| &cells[position])
    }

    /// Double hashing (Kirsch and Mitzenmacher, 2006): the digest, and its sum with multiples of its turned self, each as a
    /// fraction of one, times the number of cells.
    fn positions(&self, hash: &BlockHash) -> impl Iterator<Item = usize> + use<> {
        // Not by `Hash`: what that feeds a hasher may differ between two compilers.
        let mut hasher = DigestHasher::default();
        hasher.write(&hash.0);
        let digest = hasher.finish();
        let cells = u128::from(self.map.bytes());
        (0..CELLS_PER_BLOCK).map(move |n| {
            let fraction = digest.wrapping_add(n.wrapping_mul(digest.rotate_left(32)));
            usize_from_u64(low_half((u128::from(fraction) * cells) >> 64))
        })
    }

    fn all(&self) -> &[AtomicU8] {
        let (base, len) = (self.map.base(), usize_from_u64(self.map.bytes()));
        // SAFETY: the bytes are mapped while `self.map` lives, and `AtomicU8` is laid out like `u8`. The mapping is this
        // value's own, so that nobody in this process sees the bytes as anything but atomics; the one process that writes
        // uses atomics too. A `PresenceView`'s mapping is read-only: it only loads, relaxed, which std allows there.
        unsafe { slice::from_raw_parts(base.as_ptr().cast::<AtomicU8>(), len) }
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;
    use rustix::mm::MprotectFlags;

    use super::*;

    fn hash(n: u32) -> BlockHash {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b1).to_le_bytes());
        bytes[8..12].copy_from_slice(&n.to_be_bytes());
        BlockHash(bytes)
    }

    fn pair(slots: u32) -> (Presence, PresenceView) {
        let writer = Presence::create(slots).unwrap();
        let reader = view(writer.file()).unwrap();
        (writer, reader)
    }

    fn view(file: &ArenaFile) -> Result<PresenceView, ArenaError> {
        PresenceView::open(file.fd().try_clone_to_owned().unwrap(), file.bytes())
    }

    #[test]
    fn a_reader_sees_what_comes_and_goes() {
        let (writer, reader) = pair(8);
        assert!(!reader.may_have(&hash(1)));
        writer.add(&hash(1));
        writer.add(&hash(1));
        writer.remove(&hash(1));
        assert!(
            reader.may_have(&hash(1)),
            "of two namespaces one still has it"
        );
        writer.remove(&hash(1));
        assert!(!reader.may_have(&hash(1)));
    }

    /// By the formula of [`Cells::positions`], computed apart. If this fails, raise the number of the engine protocol.
    #[test]
    fn blocks_count_where_every_build_looks_for_them() {
        let (writer, _) = pair(1024);
        let rising = BlockHash(std::array::from_fn(|n| u8::try_from(n).unwrap()));
        let falling = BlockHash(rising.0.map(|byte| 255 - byte));
        let positions = |hash| writer.cells.positions(hash).collect::<Vec<_>>();
        assert_eq!(positions(&rising), [14_856, 9_905, 4_954, 2]);
        assert_eq!(positions(&falling), [11_202, 14_465, 1_344, 4_607]);
    }

    #[test]
    fn a_full_arena_says_perhaps_of_few_absent_blocks() {
        let slots = 20_000;
        let (writer, reader) = pair(slots);
        (0..slots).for_each(|n| writer.add(&hash(n)));
        assert!((0..slots).all(|n| reader.may_have(&hash(n))));
        let perhaps = (slots..2 * slots).filter(|n| reader.may_have(&hash(*n)));
        assert!(perhaps.count() < 80, "one in 417 is 48");
        writer.check((0..slots).map(hash).collect::<Vec<_>>().iter());
        (0..slots).for_each(|n| writer.remove(&hash(n)));
        assert!(!(0..slots).any(|n| reader.may_have(&hash(n))));
    }

    #[test]
    fn nobody_else_can_write() {
        let presence = Presence::create(8).unwrap();
        let file = presence.file();
        let mapped = ArenaMap::over(file.fd(), file.bytes(), ProtFlags::READ | ProtFlags::WRITE);
        assert!(
            matches!(mapped, Err(ArenaError::System { .. })),
            "{mapped:?}"
        );
        assert_eq!(rustix::io::pwrite(file.fd(), &[1], 0), Err(Errno::PERM));
        let reader = view(file).unwrap();
        let address = reader.cells.map.base().as_ptr().cast();
        let (len, write) = (usize_from_u64(file.bytes()), MprotectFlags::WRITE);
        // SAFETY: the range is the reader's mapping; nothing is unmapped, and it is refused.
        let opened = unsafe { rustix::mm::mprotect(address, len, write) };
        assert_eq!(opened, Err(Errno::ACCESS));
    }

    #[test]
    fn an_arena_is_no_filter() {
        let arena = ArenaFile::create(PageSize::Base4K.bytes(), PageSize::Base4K).unwrap();
        let opened = view(&arena);
        assert!(matches!(opened, Err(ArenaError::NotSealed)), "{opened:?}");
    }

    #[test]
    fn a_counter_that_is_full_stays() {
        let (writer, reader) = pair(1);
        (0..300).for_each(|_| writer.add(&hash(1)));
        (0..300).for_each(|_| writer.remove(&hash(1)));
        assert!(reader.may_have(&hash(1)));
        writer.check(std::iter::empty());
    }

    #[test]
    #[should_panic(expected = "counts 1 blocks and 0 are readable")]
    fn a_block_that_was_not_taken_out_is_found() {
        let (writer, _) = pair(1);
        writer.add(&hash(1));
        writer.check(std::iter::empty());
    }
}
