//! The host engine: copies with `memcpy`, for CPU builds of the inference engine and for tests.
//!
//! Owns the batches it was given and nothing else; runs no thread. A batch is copied by the `poll` of its ticket, on the
//! owner thread, so between polls nothing moves. [`HostSwitch`] holds and fails copies on purpose; production leaves it alone.

#![allow(
    unsafe_code,
    reason = "this engine is the memcpy between two mappings that no Rust reference covers"
)]

use std::collections::{HashMap, VecDeque};
use std::ptr;
use std::sync::Arc;

use kvstore::{ArenaMap, usize_from_u64};
use parking_lot::{Condvar, Mutex};

use crate::device::DevicePool;
use crate::engine::{
    ArenaId, ComputeMark, ComputeMarker, CopyBatch, CopyEngine, CopyError, CopyRange, Direction,
    Poll, Ticket,
};

/// Copies between arenas and a pool in this process's own memory.
pub struct HostEngine {
    pool: Arc<DevicePool>,
    switch: HostSwitch,
    arenas: HashMap<ArenaId, Arc<ArenaMap>>,
    /// Submitted and not ended, oldest first.
    pending: VecDeque<(Ticket, CopyBatch)>,
    tickets: u64,
}

impl HostEngine {
    /// An engine that copies for `pool`.
    pub fn new(pool: Arc<DevicePool>) -> Self {
        Self::with_switch(pool, HostSwitch::default())
    }

    /// An engine that a test steers by `switch`.
    pub fn with_switch(pool: Arc<DevicePool>, switch: HostSwitch) -> Self {
        Self {
            pool,
            switch,
            arenas: HashMap::new(),
            pending: VecDeque::new(),
            tickets: 0,
        }
    }

    fn check(&self, map: &ArenaMap, range: &CopyRange) -> Result<(), CopyError> {
        let in_arena = range
            .arena_offset
            .checked_add(range.bytes)
            .is_some_and(|end| end <= map.bytes());
        if in_arena && range.bytes > 0 && self.pool.contains(range.device, range.bytes) {
            return Ok(());
        }
        Err(CopyError::RangeOutside { range: *range })
    }

    fn map(&self, id: ArenaId) -> Result<&Arc<ArenaMap>, CopyError> {
        self.arenas.get(&id).ok_or(CopyError::UnknownArena(id))
    }

    /// Copies the pending batch at `position` and forgets it.
    fn end(&mut self, position: usize) -> Poll {
        let Some((_, batch)) = self.pending.remove(position) else {
            panic!("the caller found the batch at this position");
        };
        match self.copy(&batch) {
            Ok(()) => Poll::Done,
            Err(error) => Poll::Failed(error),
        }
    }

    fn copy(&self, batch: &CopyBatch) -> Result<(), CopyError> {
        if kvstore::fault!("host::copy::fail") {
            return Err(INJECTED);
        }
        let map = self.map(batch.arena)?;
        for (nth, range) in batch.ranges.iter().enumerate() {
            if nth + 1 == batch.ranges.len() {
                kvstore::fault_delay!("host::copy::delay");
            }
            let bytes = usize_from_u64(range.bytes);
            let device = ptr::with_exposed_provenance_mut::<u8>(usize_from_u64(range.device));
            // SAFETY: `submit` has checked that the range lies inside the mapping, which `self.arenas` keeps alive, and
            // inside the pool, whose creator vouched for its memory. Arena and pool are different mappings, so the two
            // sides do not overlap, and neither is covered by a Rust reference. That nobody else writes these bytes
            // meanwhile is the store's lease on the slot and the scheduler's reference on the block.
            unsafe {
                let host = map.base().as_ptr().add(usize_from_u64(range.arena_offset));
                match batch.direction {
                    Direction::HostToDevice => ptr::copy_nonoverlapping(host, device, bytes),
                    Direction::DeviceToHost => ptr::copy_nonoverlapping(device, host, bytes),
                }
            }
        }
        Ok(())
    }
}

impl CopyEngine for HostEngine {
    fn name(&self) -> &'static str {
        "host"
    }

    fn attach(&mut self, id: ArenaId, map: &Arc<ArenaMap>) -> Result<(), CopyError> {
        if self.arenas.contains_key(&id) {
            return Err(CopyError::AlreadyAttached(id));
        }
        self.arenas.insert(id, Arc::clone(map));
        Ok(())
    }

    fn detach(&mut self, id: ArenaId) {
        assert!(
            self.pending.iter().all(|(_, batch)| batch.arena != id),
            "detached with copies outstanding"
        );
        self.arenas.remove(&id);
    }

    fn submit(&mut self, batch: &CopyBatch) -> Result<Ticket, CopyError> {
        let map = self.map(batch.arena)?;
        for range in &batch.ranges {
            self.check(map, range)?;
        }
        self.switch.submitting()?;
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.pending.push_back((ticket, batch.clone()));
        Ok(ticket)
    }

    fn poll(&mut self, ticket: Ticket) -> Poll {
        let found = self.pending.iter().position(|(id, _)| *id == ticket);
        let Some(position) = found else {
            panic!("polled a ticket that has ended");
        };
        let newest = position + 1 == self.pending.len();
        match self.switch.polled(self.pending[position].1.after, newest) {
            Verdict::Wait => Poll::Pending,
            Verdict::Copy => self.end(position),
            Verdict::Fail(error) => {
                // Half a batch, as a failing device would leave it.
                self.pending[position].1.ranges.truncate(1);
                match self.end(position) {
                    Poll::Done => Poll::Failed(error),
                    other => other,
                }
            }
        }
    }
}

/// Marks for an engine whose compute work is over when its call returns: there is never anything to wait for.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostMarker;

impl ComputeMarker for HostMarker {
    fn mark(&self, _stream: u64) -> Result<ComputeMark, CopyError> {
        Ok(ComputeMark::NONE)
    }
}

/// What a [`HostSwitch`] can make go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `submit` refuses the batch.
    SubmitFails,
    /// `submit` panics.
    SubmitPanics,
    /// The batch ends as failed, half copied.
    CopyFails,
    /// The batch ends as failed and the engine says that it is dead.
    CopyKills,
    /// `poll` panics.
    PollPanics,
}

impl Fault {
    fn strikes_submit(self) -> bool {
        matches!(self, Fault::SubmitFails | Fault::SubmitPanics)
    }
}

/// Steers a [`HostEngine`] from a test: clones share one state. Untouched, it changes nothing.
#[derive(Clone, Default)]
pub struct HostSwitch {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<SwitchState>,
    submitted: Condvar,
}

#[derive(Default)]
struct SwitchState {
    held: bool,
    /// Copies that may pass although held.
    steps: u64,
    newest_first: bool,
    submits: u64,
    ends: u64,
    /// With the value of `submits` or `ends` at which each one strikes.
    faults: Vec<(Fault, u64)>,
    /// Compute marks handed out and passed.
    launched: u64,
    finished: u64,
}

enum Verdict {
    Wait,
    Copy,
    Fail(CopyError),
}

/// What an injected fault reads like.
const INJECTED: CopyError = CopyError::Driver {
    operation: "injected fault",
    code: -1,
};

impl HostSwitch {
    /// From now on no copy starts.
    pub fn hold(&self) {
        let mut state = self.shared.state.lock();
        state.held = true;
        state.steps = 0;
    }

    /// Copies go on.
    pub fn release(&self) {
        self.shared.state.lock().held = false;
    }

    /// Lets one more batch end while held.
    pub fn step(&self) {
        self.shared.state.lock().steps += 1;
    }

    /// From now on the newest outstanding batch ends first, which turns pairs of completions around.
    pub fn newest_first(&self) {
        self.shared.state.lock().newest_first = true;
    }

    /// Makes the `nth` submit or end from now (1 is the next one) go wrong.
    pub fn inject(&self, fault: Fault, nth: u64) {
        assert!(nth > 0, "the next one is number 1");
        let mut state = self.shared.state.lock();
        let so_far = if fault.strikes_submit() {
            state.submits
        } else {
            state.ends
        };
        state.faults.push((fault, so_far + nth));
    }

    /// A mark behind compute work that runs until [`finish`](Self::finish).
    pub fn launch(&self) -> ComputeMark {
        let mut state = self.shared.state.lock();
        state.launched += 1;
        ComputeMark(state.launched)
    }

    /// Ends all compute work launched so far.
    pub fn finish(&self) {
        let mut state = self.shared.state.lock();
        state.finished = state.launched;
    }

    /// Batches that the engine has been given so far, refused ones included.
    pub fn submits(&self) -> u64 {
        self.shared.state.lock().submits
    }

    /// Blocks until the engine has been given `count` batches.
    pub fn wait_submits(&self, count: u64) {
        let mut state = self.shared.state.lock();
        while state.submits < count {
            self.shared.submitted.wait(&mut state);
        }
    }

    fn submitting(&self) -> Result<(), CopyError> {
        let mut state = self.shared.state.lock();
        state.submits += 1;
        self.shared.submitted.notify_all();
        let count = state.submits;
        match state.strike(count, Fault::strikes_submit) {
            Some(Fault::SubmitPanics) => panic!("injected panic in submit"),
            Some(_) => Err(INJECTED),
            None => Ok(()),
        }
    }

    fn polled(&self, after: ComputeMark, newest: bool) -> Verdict {
        let mut state = self.shared.state.lock();
        let blocked = state.held && state.steps == 0;
        if blocked || after.0 > state.finished || (state.newest_first && !newest) {
            return Verdict::Wait;
        }
        state.steps = state.steps.saturating_sub(1);
        state.ends += 1;
        let count = state.ends;
        match state.strike(count, |fault| !fault.strikes_submit()) {
            Some(Fault::PollPanics) => panic!("injected panic in poll"),
            Some(Fault::CopyKills) => Verdict::Fail(CopyError::EngineDead),
            Some(_) => Verdict::Fail(INJECTED),
            None => Verdict::Copy,
        }
    }
}

impl SwitchState {
    fn strike(&mut self, count: u64, at: impl Fn(Fault) -> bool) -> Option<Fault> {
        let struck = |&(fault, when): &(Fault, u64)| at(fault) && when == count;
        let index = self.faults.iter().position(struck)?;
        Some(self.faults.swap_remove(index).0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{EngineFactory, PoolShape, RegionShape, Rig};
    use crate::testkit::{HostFactory, arena};

    /// An engine over one block of 16 bytes, a batch for it, and the switch.
    fn setup() -> (Rig, CopyBatch, HostSwitch) {
        let factory = HostFactory::default();
        let mut rig = factory.build(&PoolShape {
            bytes: 16,
            regions: vec![RegionShape {
                offset: 0,
                block_stride: 16,
                block_bytes: 16,
            }],
            blocks: 1,
        });
        rig.engine
            .attach(ArenaId(1), &arena(4096))
            .expect("attached");
        let range = |n: u64| CopyRange {
            arena_offset: 8 * n,
            device: rig.pool.regions()[0].base + 8 * n,
            bytes: 8,
        };
        let batch = CopyBatch {
            direction: Direction::HostToDevice,
            arena: ArenaId(1),
            ranges: vec![range(0), range(1)],
            after: ComputeMark::NONE,
        };
        (rig, batch, factory.switch)
    }

    #[test]
    fn newest_first_turns_completions_around() {
        let (mut rig, batch, switch) = setup();
        switch.newest_first();
        let first = rig.engine.submit(&batch).expect("accepted");
        let second = rig.engine.submit(&batch).expect("accepted");
        assert_eq!(rig.engine.poll(first), Poll::Pending);
        assert_eq!(rig.engine.poll(second), Poll::Done);
        assert_eq!(rig.engine.poll(first), Poll::Done);
    }

    #[test]
    fn held_copies_pass_step_by_step() {
        let (mut rig, batch, switch) = setup();
        switch.hold();
        let tickets: Vec<_> = (0..3).map(|_| rig.engine.submit(&batch)).collect();
        let tickets: Vec<_> = tickets
            .into_iter()
            .map(|it| it.expect("accepted"))
            .collect();
        assert_eq!(rig.engine.poll(tickets[0]), Poll::Pending);
        switch.step();
        assert_eq!(rig.engine.poll(tickets[0]), Poll::Done);
        assert_eq!(rig.engine.poll(tickets[1]), Poll::Pending);
        switch.release();
        assert_eq!(rig.engine.poll(tickets[1]), Poll::Done);
        assert_eq!(rig.engine.poll(tickets[2]), Poll::Done);
        assert_eq!(switch.submits(), 3);
    }

    #[test]
    fn a_failed_copy_leaves_half_a_batch() {
        let (mut rig, batch, switch) = setup();
        rig.memory.write(0, &[9; 16]);
        switch.inject(Fault::CopyFails, 2);
        for expected in [Poll::Done, Poll::Failed(INJECTED), Poll::Done] {
            rig.memory.write(0, &[9; 16]);
            let ticket = rig.engine.submit(&batch).expect("accepted");
            assert_eq!(rig.engine.poll(ticket), expected);
            let mut bytes = [0; 16];
            rig.memory.read(0, &mut bytes);
            let copied = bytes.iter().filter(|byte| **byte == 0).count();
            assert_eq!(copied, if expected == Poll::Done { 16 } else { 8 });
        }
    }

    #[test]
    #[should_panic(expected = "polled a ticket that has ended")]
    fn polling_after_the_end_is_a_programmer_error() {
        let (mut rig, batch, _) = setup();
        let ticket = rig.engine.submit(&batch).expect("accepted");
        assert_eq!(rig.engine.poll(ticket), Poll::Done);
        assert_eq!(rig.engine.poll(ticket), Poll::Done);
    }

    #[test]
    #[should_panic(expected = "detached with copies outstanding")]
    fn detaching_under_a_copy_is_a_programmer_error() {
        let (mut rig, batch, _) = setup();
        assert!(rig.engine.submit(&batch).is_ok());
        rig.engine.detach(ArenaId(1));
    }
}
