//! The arena: a sealed memfd that the sidecar owns, and a shared mapping of it in every process that copies.
//!
//! Owns the descriptor and the mapping. Never reads or writes a block: other processes write this memory, so there is no
//! safe slice of it to hand out; copy engines take the base address and argue themselves.
//!
//! Seals: SHRINK and GROW, so that no page of a mapping can vanish under a reader (SIGBUS), and SEAL, so that nobody adds
//! WRITE or FUTURE_WRITE: workers need writable mappings. Workers are trusted with each other's blocks.
#![allow(unsafe_code, reason = "mapping memory is what this file is for")]

use std::ffi::c_void;
use std::fs;
use std::hint::black_box;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::error::ArenaError;
use crate::ids::{u64_from, usize_from_u64};

/// Bytes of a small page.
const BASE_PAGE: u64 = 4096;

/// No page of a mapping can vanish.
const FIXED_SIZE: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;

/// What populating threads take at a time, in bytes: large enough to be few calls, small enough to share the work evenly.
const POPULATE_CHUNK: u64 = 64 << 20;

/// Most threads that populate one mapping.
const POPULATE_THREADS_MAX: usize = 64;

/// Where the kernel says how many huge pages there are.
const HUGE_PAGES_DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Size of the pages behind an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB: always there.
    Base4K,
    /// 2 MiB: fewer TLB misses and quicker registering, but the machine must have reserved them.
    Huge2M,
}

impl PageSize {
    /// Bytes of one page.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Base4K => BASE_PAGE,
            Self::Huge2M => HUGE_PAGE,
        }
    }
}

/// The file behind the arena. Lives as long as the sidecar, or any process that maps it.
#[derive(Debug)]
pub struct ArenaFile {
    fd: OwnedFd,
    bytes: u64,
}

impl ArenaFile {
    /// A sealed file of zeroes. No page is touched yet; huge pages are only promised when it is mapped.
    ///
    /// # Errors
    /// `BadSize`, `NoHugePages`, `OutOfMemory`, `System`.
    pub fn create(bytes: u64, pages: PageSize) -> Result<Self, ArenaError> {
        let file = Self::unsealed("greenroom-arena", bytes, pages)?;
        file.seal(SealFlags::SEAL)?;
        Ok(file)
    }

    /// The same, of fixed size, for its caller to seal further. `/proc/*/maps` shows the name.
    pub(crate) fn unsealed(name: &str, bytes: u64, pages: PageSize) -> Result<Self, ArenaError> {
        if bytes == 0 || !bytes.is_multiple_of(pages.bytes()) {
            return Err(ArenaError::BadSize {
                bytes,
                page_bytes: pages.bytes(),
            });
        }
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if pages == PageSize::Huge2M {
            HugePages::read().check(bytes)?;
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = rustix::fs::memfd_create(name, flags)
            .map_err(|errno| refused(errno, "memfd_create", bytes))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(|errno| refused(errno, "ftruncate", bytes))?;
        let file = Self { fd, bytes };
        file.seal(FIXED_SIZE)?;
        Ok(file)
    }

    pub(crate) fn seal(&self, seals: SealFlags) -> Result<(), ArenaError> {
        rustix::fs::fcntl_add_seals(&self.fd, seals)
            .map_err(|errno| system(errno, "sealing the arena"))
    }

    /// The descriptor, to send to those who map it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// One shared mapping of the whole file in this process. Not inherited by forked children, gone on drop.
#[derive(Debug)]
pub struct ArenaMap {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; `ArenaMap` gives out its address and size only, and reads or
// writes through it are the unsafe business of whoever makes them.
unsafe impl Send for ArenaMap {}
// SAFETY: as above; no method changes anything that another thread could see half-way.
unsafe impl Sync for ArenaMap {}

impl ArenaMap {
    /// Maps an arena of which somebody sent the descriptor. The mapping keeps the memory alive, the descriptor is closed.
    ///
    /// # Errors
    /// `NotSealed` and `WrongSize` if it is not the arena that was announced, else `NoHugePages`, `OutOfMemory`, `System`.
    pub fn map(fd: OwnedFd, bytes: u64) -> Result<Self, ArenaError> {
        let forbidden = SealFlags::WRITE | SealFlags::FUTURE_WRITE;
        check_seals(fd.as_fd(), SealFlags::SEAL, forbidden)?;
        Self::over(fd.as_fd(), bytes, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// As [`Self::map`], for any file of fixed size.
    pub(crate) fn over(
        fd: BorrowedFd<'_>,
        bytes: u64,
        prot: ProtFlags,
    ) -> Result<Self, ArenaError> {
        check_seals(fd, FIXED_SIZE, SealFlags::empty())?;
        let stat = rustix::fs::fstat(fd).map_err(|errno| system(errno, "fstat of the arena"))?;
        let actual = u64::try_from(stat.st_size).unwrap_or(0);
        if actual != bytes || bytes == 0 {
            return Err(ArenaError::WrongSize {
                expected: bytes,
                actual,
            });
        }
        let len = usize_from_u64(bytes);
        // SAFETY: a new mapping at an address the kernel picks replaces none of ours. The file can neither shrink nor grow
        // (checked above), so every byte of it stays backed.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, 0) };
        let address = address.map_err(|errno| refused_map(errno, fd, bytes))?;
        let Some(base) = NonNull::new(address.cast::<u8>()) else {
            return Err(system(Errno::FAULT, "mmap of the arena"));
        };
        let map = Self { base, len };
        // SAFETY: the range is exactly the mapping just made. A forked child must not inherit it: copy-on-write of pages that
        // a device writes would tear the parent's arena apart.
        unsafe { rustix::mm::madvise(address, len, Advice::LinuxDontFork) }
            .map_err(|errno| system(errno, "keeping the arena from forked children"))?;
        Ok(map)
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        u64_from(self.len)
    }

    /// First byte. Valid for `bytes()` bytes while this mapping lives; other processes write there too.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Has the kernel back every page now, with so many threads (with one, on the caller's), so that the first copies do
    /// not pay for it and a lack of memory shows at start. Changes no content.
    ///
    /// # Errors
    /// `OutOfMemory`, `System`.
    pub fn populate(&self, threads: usize) -> Result<(), ArenaError> {
        let threads = threads.clamp(1, POPULATE_THREADS_MAX);
        let chunk = usize_from_u64(POPULATE_CHUNK);
        if threads == 1 {
            let mut starts = (0..self.len).step_by(chunk);
            return starts
                .try_for_each(|start| self.populate_chunk(start, chunk.min(self.len - start)));
        }
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|first| {
                    scope.spawn(move || {
                        let mut starts = (first * chunk..self.len).step_by(threads * chunk);
                        starts.try_for_each(|start| {
                            self.populate_chunk(start, chunk.min(self.len - start))
                        })
                    })
                })
                .collect();
            workers
                .into_iter()
                .try_for_each(|worker| match worker.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
        })
    }

    fn populate_chunk(&self, start: usize, len: usize) -> Result<(), ArenaError> {
        assert!(
            start + len <= self.len,
            "populating beyond the end of the arena"
        );
        // SAFETY: the range lies in the mapping (asserted), and populating changes no content.
        let outcome = unsafe {
            let address = self.base.add(start).as_ptr().cast::<c_void>();
            rustix::mm::madvise(address, len, Advice::LinuxPopulateWrite)
        };
        match outcome {
            Ok(()) => Ok(()),
            Err(Errno::INVAL) => {
                self.touch_chunk(start, len);
                Ok(())
            }
            // EFAULT: the page could not be had where touching it would have been a SIGBUS.
            Err(Errno::NOMEM | Errno::FAULT) => Err(ArenaError::OutOfMemory {
                bytes: self.bytes(),
            }),
            Err(errno) => Err(system(errno, "populating the arena")),
        }
    }

    /// For kernels before 5.14: an atomic write of what is there already backs the page without changing it.
    fn touch_chunk(&self, start: usize, len: usize) {
        for offset in (start..start + len).step_by(usize_from_u64(BASE_PAGE)) {
            // SAFETY: the byte lies in the mapping, which is writable where it is populated; atomics have no alignment
            // beyond one byte here.
            let byte = unsafe { AtomicU8::from_ptr(self.base.add(offset).as_ptr()) };
            // A zero the optimiser cannot see: it makes a load, or nothing at all, of one it can.
            byte.fetch_or(black_box(0), Ordering::Relaxed);
        }
    }
}

impl Drop for ArenaMap {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping, made in `over` and never changed; whoever uses the address keeps
        // the `ArenaMap` alive, as `base` demands.
        let outcome = unsafe { rustix::mm::munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
        assert!(outcome.is_ok(), "unmapping the arena failed: {outcome:?}");
    }
}

/// Refuses a file that lacks a required seal or has a forbidden one.
pub(crate) fn check_seals(
    fd: BorrowedFd<'_>,
    required: SealFlags,
    forbidden: SealFlags,
) -> Result<(), ArenaError> {
    let seals = match rustix::fs::fcntl_get_seals(fd) {
        Ok(seals) => seals,
        Err(Errno::INVAL) => return Err(ArenaError::NotSealed),
        Err(errno) => return Err(system(errno, "reading the arena's seals")),
    };
    if seals.contains(required) && !seals.intersects(forbidden) {
        return Ok(());
    }
    Err(ArenaError::NotSealed)
}

fn system(errno: Errno, operation: &'static str) -> ArenaError {
    ArenaError::System {
        operation,
        source: errno.into(),
    }
}

fn refused(errno: Errno, operation: &'static str, bytes: u64) -> ArenaError {
    match errno {
        Errno::NOMEM | Errno::NOSPC | Errno::FBIG => ArenaError::OutOfMemory { bytes },
        errno => system(errno, operation),
    }
}

/// Mapping is what takes huge pages from the machine's reserve, so a race for the last ones ends here.
fn refused_map(errno: Errno, fd: BorrowedFd<'_>, bytes: u64) -> ArenaError {
    let huge =
        rustix::fs::fstat(fd).is_ok_and(|stat| u64::try_from(stat.st_blksize) == Ok(HUGE_PAGE));
    match (errno, huge) {
        (Errno::NOMEM, true) => HugePages::read().lacking(bytes),
        (errno, _) => refused(errno, "mmap of the arena", bytes),
    }
}

/// The machine's 2 MiB pages.
#[derive(Clone, Copy, Debug)]
struct HugePages {
    reserved: u64,
    available: u64,
}

impl HugePages {
    /// None where the kernel does not say: it has no huge pages then.
    fn read() -> Self {
        let figure = |name: &str| {
            let text = fs::read_to_string(format!("{HUGE_PAGES_DIR}/{name}")).unwrap_or_default();
            text.trim().parse::<u64>().unwrap_or(0)
        };
        let promised = figure("resv_hugepages");
        Self {
            reserved: figure("nr_hugepages"),
            available: figure("free_hugepages").saturating_sub(promised),
        }
    }

    fn check(self, bytes: u64) -> Result<(), ArenaError> {
        if self.available >= bytes.div_ceil(HUGE_PAGE) {
            Ok(())
        } else {
            Err(self.lacking(bytes))
        }
    }

    fn lacking(self, bytes: u64) -> ArenaError {
        let needed = bytes.div_ceil(HUGE_PAGE);
        let advised = self.reserved + needed.saturating_sub(self.available);
        ArenaError::NoHugePages {
            needed,
            available: self.available,
            reserved: self.reserved,
            advised,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 3 * BASE_PAGE;

    fn mapped(file: &ArenaFile) -> ArenaMap {
        ArenaMap::map(file.fd().try_clone_to_owned().unwrap(), file.bytes()).unwrap()
    }

    fn write(map: &ArenaMap, offset: usize, byte: u8) {
        assert!(offset < map.len);
        // SAFETY: in bounds (asserted), and only this test has the arena.
        unsafe { map.base().add(offset).write(byte) }
    }

    fn read(map: &ArenaMap, offset: usize) -> u8 {
        assert!(offset < map.len);
        // SAFETY: as in `write`.
        unsafe { map.base().add(offset).read() }
    }

    #[test]
    fn two_mappings_show_the_same_bytes_and_outlive_the_file() {
        let file = ArenaFile::create(BYTES, PageSize::Base4K).unwrap();
        let (one, other) = (mapped(&file), mapped(&file));
        drop(file);
        assert_eq!(one.bytes(), BYTES);
        write(&one, 12_287, 42);
        assert_eq!(read(&other, 12_287), 42);
        drop(one);
        assert_eq!(read(&other, 12_287), 42);
    }

    #[test]
    fn nobody_can_resize_a_live_arena() {
        let file = ArenaFile::create(BYTES, PageSize::Base4K).unwrap();
        assert_eq!(rustix::fs::ftruncate(file.fd(), 0), Err(Errno::PERM));
        assert_eq!(
            rustix::fs::ftruncate(file.fd(), 2 * BYTES),
            Err(Errno::PERM)
        );
        let more = rustix::fs::fcntl_add_seals(file.fd(), SealFlags::WRITE);
        assert_eq!(more, Err(Errno::PERM), "sealed against further seals");
    }

    #[test]
    fn a_file_that_is_not_an_arena_is_refused() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let unsealed = rustix::fs::memfd_create("unsealed", flags).unwrap();
        rustix::fs::ftruncate(&unsealed, BYTES).unwrap();
        assert!(matches!(
            ArenaMap::map(unsealed, BYTES),
            Err(ArenaError::NotSealed)
        ));
        let read_only = rustix::fs::memfd_create("read-only", flags).unwrap();
        rustix::fs::ftruncate(&read_only, BYTES).unwrap();
        rustix::fs::fcntl_add_seals(
            &read_only,
            FIXED_SIZE | SealFlags::SEAL | SealFlags::FUTURE_WRITE,
        )
        .unwrap();
        assert!(matches!(
            ArenaMap::map(read_only, BYTES),
            Err(ArenaError::NotSealed)
        ));
        let plain: OwnedFd = fs::File::open("/dev/null").unwrap().into();
        assert!(matches!(
            ArenaMap::map(plain, BYTES),
            Err(ArenaError::NotSealed)
        ));
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let file = ArenaFile::create(BYTES, PageSize::Base4K).unwrap();
        let outcome = ArenaMap::map(file.fd().try_clone_to_owned().unwrap(), BYTES + BASE_PAGE);
        assert!(matches!(
            outcome,
            Err(ArenaError::WrongSize {
                expected: 16_384,
                actual: 12_288
            })
        ));
    }

    #[test]
    fn sizes_are_whole_pages() {
        for (bytes, pages) in [
            (0, PageSize::Base4K),
            (4097, PageSize::Base4K),
            (4096, PageSize::Huge2M),
        ] {
            let outcome = ArenaFile::create(bytes, pages);
            assert!(
                matches!(outcome, Err(ArenaError::BadSize { .. })),
                "{bytes} bytes of {pages:?}: {outcome:?}"
            );
        }
    }

    #[test]
    fn populating_backs_every_page_and_changes_nothing() {
        let bytes = 2 * POPULATE_CHUNK + 5 * BASE_PAGE;
        let file = ArenaFile::create(bytes, PageSize::Base4K).unwrap();
        let map = mapped(&file);
        let last = usize_from_u64(bytes) - 1;
        write(&map, last, 7);
        map.populate(3).unwrap();
        assert_eq!((read(&map, 0), read(&map, last)), (0, 7));
        let backed = u64::try_from(rustix::fs::fstat(file.fd()).unwrap().st_blocks).unwrap() * 512;
        assert_eq!(backed, bytes);
    }

    #[test]
    fn the_way_for_old_kernels_backs_every_page_and_changes_nothing() {
        let file = ArenaFile::create(BYTES, PageSize::Base4K).unwrap();
        let map = mapped(&file);
        write(&map, 4096, 9);
        map.touch_chunk(0, map.len);
        assert_eq!((read(&map, 0), read(&map, 4096)), (0, 9));
        let backed = u64::try_from(rustix::fs::fstat(file.fd()).unwrap().st_blocks).unwrap() * 512;
        assert_eq!(backed, BYTES);
    }

    #[test]
    fn a_lack_of_huge_pages_says_what_to_do() {
        let machine = HugePages {
            reserved: 100,
            available: 40,
        };
        assert!(machine.check(40 * HUGE_PAGE).is_ok());
        let text = machine.check(50 * HUGE_PAGE).unwrap_err().to_string();
        for part in [
            "needs 50",
            "40 are available of the 100",
            "vm.nr_hugepages=110",
        ] {
            assert!(text.contains(part), "{part:?} is missing in {text:?}");
        }
    }

    /// More than any machine of today reserves; whether it has none or some, the answer is the same error.
    #[test]
    fn an_arena_of_huge_pages_that_nobody_has_is_refused() {
        let outcome = ArenaFile::create(1 << 50, PageSize::Huge2M);
        assert!(
            matches!(
                outcome,
                Err(ArenaError::NoHugePages {
                    needed: 536_870_912,
                    ..
                })
            ),
            "{outcome:?}"
        );
    }

    #[test]
    fn forked_children_do_not_get_the_mapping() {
        let file = ArenaFile::create(BYTES, PageSize::Base4K).unwrap();
        let map = mapped(&file);
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", map.base().as_ptr().addr());
        let entry: Vec<&str> = smaps
            .lines()
            .skip_while(|line| !line.starts_with(&start))
            .collect();
        let flags = entry
            .iter()
            .find(|line| line.starts_with("VmFlags:"))
            .unwrap();
        assert!(flags.split_whitespace().any(|flag| flag == "dc"), "{flags}");
    }
}
