//! Which memory the driver knows, and lists of copies between two sorts of it.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::ptr;

use crate::world::{Answer, INVALID_VALUE, world};

const ALREADY_REGISTERED: c_int = 712;
const NOT_REGISTERED: c_int = 713;
const PAGE: u64 = 4096;

/// Ranges of addresses that do not overlap: each one's start and length.
#[derive(Default)]
pub(crate) struct Ranges(BTreeMap<u64, usize>);

impl Ranges {
    /// Whether one of the ranges holds all `bytes` from `start` on.
    pub(crate) fn holds(&self, start: u64, bytes: usize) -> bool {
        let below = self.0.range(..=start).next_back();
        below.is_some_and(|(first, length)| {
            start
                .checked_add(bytes as u64)
                .is_some_and(|end| end <= first + *length as u64)
        })
    }

    fn touches(&self, start: u64, bytes: usize) -> bool {
        let end = start + bytes as u64;
        let below = self.0.range(..end).next_back();
        below.is_some_and(|(first, length)| first + *length as u64 > start)
    }

    pub(crate) fn insert(&mut self, start: u64, bytes: usize) {
        self.0.insert(start, bytes);
    }

    pub(crate) fn remove(&mut self, start: u64) -> Option<usize> {
        self.0.remove(&start)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

pub(crate) fn register(start: u64, bytes: usize) -> Answer {
    let mut state = world().lock();
    if !start.is_multiple_of(PAGE) || bytes == 0 {
        return Err(INVALID_VALUE);
    }
    if state.registered.touches(start, bytes) {
        return Err(ALREADY_REGISTERED);
    }
    state.registered.insert(start, bytes);
    Ok(())
}

pub(crate) fn unregister(start: u64) -> Answer {
    let removed = world().lock().registered.remove(start);
    removed.map(|_| ()).ok_or(NOT_REGISTERED)
}

/// Which way a copy goes; its number is that of its copy engine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    HostToDevice = 0,
    DeviceToHost = 1,
}

/// One contiguous copy.
#[derive(Clone, Copy)]
pub(crate) struct Copy {
    pub(crate) host: u64,
    pub(crate) device: u64,
    pub(crate) bytes: usize,
}

impl Copy {
    fn ends(&self, direction: Direction) -> (u64, u64) {
        match direction {
            Direction::HostToDevice => (self.host, self.device),
            Direction::DeviceToHost => (self.device, self.host),
        }
    }
}

/// Copies that were accepted as one piece of work.
pub(crate) struct CopyList {
    pub(crate) direction: Direction,
    copies: Vec<Copy>,
    /// Whether all of its host memory is registered.
    pub(crate) registered: bool,
    /// The source's bytes, if they were read early.
    early: Option<Vec<Vec<u8>>>,
}

impl CopyList {
    /// Checks every copy.
    pub(crate) fn new(direction: Direction, copies: Vec<Copy>) -> Result<Self, c_int> {
        let mut registered = true;
        for copy in &copies {
            if copy.bytes == 0 {
                return Err(INVALID_VALUE);
            }
            registered &= check(copy.host, copy.bytes, copy.device, copy.bytes)?;
        }
        Ok(Self {
            direction,
            copies,
            registered,
            early: None,
        })
    }

    /// Reads the source now, whatever is still to be done before the copy.
    pub(crate) fn read_source(&mut self) {
        let read = |copy: &Copy| {
            let mut bytes = vec![0; copy.bytes];
            let (source, _) = copy.ends(self.direction);
            // SAFETY: `new` has checked that the range is memory that the driver knows.
            unsafe { ptr::copy_nonoverlapping(address(source), bytes.as_mut_ptr(), copy.bytes) };
            bytes
        };
        self.early = Some(self.copies.iter().map(read).collect());
    }

    /// Makes the copies; of a `torn` list only the first half.
    pub(crate) fn run(&self, torn: bool) {
        let count = if torn {
            self.copies.len() / 2
        } else {
            self.copies.len()
        };
        for (index, copy) in self.copies[..count].iter().enumerate() {
            let (source, destination) = copy.ends(self.direction);
            let source = match &self.early {
                Some(early) => early[index].as_ptr(),
                None => address(source).cast_const(),
            };
            // SAFETY: `new` has checked both ranges. That they stay is the business of the driver's user, as with a real one.
            unsafe { ptr::copy_nonoverlapping(source, address(destination), copy.bytes) };
            std::thread::yield_now();
        }
    }
}

fn address(number: u64) -> *mut u8 {
    ptr::with_exposed_provenance_mut(usize::try_from(number).unwrap_or(0))
}

/// Checks one host range and one device range; whether the host's is registered. One that is not is refused unless the test
/// allows it, and so is one that reaches over two registrations.
pub(crate) fn check(
    host: u64,
    host_bytes: usize,
    device: u64,
    device_bytes: usize,
) -> Result<bool, c_int> {
    let state = world().lock();
    if !state.allocated.holds(device, device_bytes) || state.allocated.touches(host, host_bytes) {
        return Err(INVALID_VALUE);
    }
    let registered = state.registered.holds(host, host_bytes);
    let split = !registered && state.registered.touches(host, host_bytes);
    if split || !(registered || state.pageable) {
        return Err(INVALID_VALUE);
    }
    Ok(registered)
}
