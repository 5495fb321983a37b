//! The epoch word under interleavings that a scheduler chooses: real hooks on a real inbox; the reader reads no socket.
//!
//! The engine of the model sleeps as vLLM's does: on a queue into which the waker puts an item. A message left unseen and
//! a wake that is lost both end with an engine that sleeps for good, which Shuttle reports ("deadlock!") with the schedule
//! that led there. `GREENROOM_SCHEDULES=n` tries more.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::{Condvar as Bell, Mutex as Counted};
use shuttle::thread;

use super::*;
use crate::engine::frames::Role;
use crate::hooks::SchedulerHooks;
use crate::hooks::testkit::{config, given_back, late_match, step};

/// Orders that each of the two schedulers tries of a model.
const SCHEDULES: usize = 4000;
/// How many surprises the second scheduler looks for at once.
const PCT_DEPTH: usize = 3;
/// Bytes of a model's thread: debug builds and panics are deeper than Shuttle's default.
const STACK_BYTES: usize = 512 << 10;
/// A schedule of this many steps goes in circles.
const STEPS_MAX: usize = 100_000;

/// Leases that the sidecar of the model grants to requests that are gone: the hooks give each back when they see it.
const LEASES: u64 = 4;

fn explore(model: impl Fn() + Clone + Send + Sync + 'static) {
    let asked = std::env::var("GREENROOM_SCHEDULES").ok();
    let schedules = asked.map_or(SCHEDULES, |n| n.parse().expect("a number of schedules"));
    let mut config = shuttle::Config::new();
    config.stack_size = STACK_BYTES;
    config.max_steps = shuttle::MaxSteps::FailAfter(STEPS_MAX);
    config.silence_warnings = true;
    config
        .ungraceful_shutdown_config
        .immediately_return_on_panic = true;
    let random = RandomScheduler::new(schedules);
    shuttle::Runner::new(random, config.clone()).run(model.clone());
    let pct = PctScheduler::new(PCT_DEPTH, schedules);
    shuttle::Runner::new(pct, config).run(model);
}

/// What an idle engine sleeps on: items pile up, and each time it sleeps it takes one.
#[derive(Default)]
struct InputQueue {
    items: Counted<u32>,
    rung: Bell,
}

impl InputQueue {
    fn put(&self) {
        *self.items.lock().unwrap() += 1;
        self.rung.notify_one();
    }

    fn get(&self) {
        let mut items = self.items.lock().unwrap();
        while *items == 0 {
            items = self.rung.wait(items).unwrap();
        }
        *items -= 1;
    }
}

fn hello() -> Hello {
    Hello {
        role: Role::Scheduler,
        engine: "engine".into(),
        rank_bytes: 4096,
        ranks: 1,
        block_tokens: 16,
        gpu_blocks: 8,
    }
}

type Deliver = fn(&Supervisor, Inbound) -> io::Result<()>;

/// Whether the engine of a model is paused at first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pause {
    None,
    /// It goes on at any moment.
    Some,
    /// It goes on when everything has arrived, which is more than the inbox takes.
    Long,
}

/// An engine that has nothing to do but what arrives.
fn idle_engine(deliver: Deliver, pause: Pause) {
    let queue = Arc::new(InputQueue::default());
    let waker: Waker = Box::new({
        let queue = queue.clone();
        move || queue.put()
    });
    let (link, supervisor) = SchedulerLink::pair(PathBuf::new(), hello(), waker);
    let (outbox, frames) = supervisor.outbox();
    let mut hooks = SchedulerHooks::over(link, config());
    let reader = thread::spawn(move || {
        let connected = Inbound::Connected {
            boot: 1,
            outbox,
            presence: None,
        };
        deliver(&supervisor, connected).unwrap();
        for lease in 0..LEASES {
            deliver(&supervisor, late_match(lease)).unwrap();
        }
    });
    let paused = Arc::new(Counted::new(pause != Pause::None));
    let resuming = thread::spawn({
        let (queue, paused) = (queue.clone(), paused.clone());
        move || {
            if pause == Pause::Long {
                reader.join().unwrap();
            }
            if pause != Pause::None {
                *paused.lock().unwrap() = false;
                queue.put();
            }
        }
    });
    let (mut returned, mut steps) = (Vec::new(), 0);
    while returned.len() < kvstore::usize_from_u64(LEASES) || steps == 0 {
        let paused = *paused.lock().unwrap();
        if hooks.pending(paused) {
            step(&mut hooks);
            steps += 1;
        } else {
            queue.get();
        }
        returned.extend(given_back(&frames));
    }
    assert_eq!(returned, (0..LEASES).collect::<Vec<u64>>());
    resuming.join().unwrap();
}

/// The engine leaves while its reader has more to deliver than the inbox takes.
fn leaving() {
    let (mut link, supervisor) = SchedulerLink::pair(PathBuf::new(), hello(), Box::new(|| {}));
    link.supervisor = Some(thread::spawn(move || {
        for lease in 0..LEASES {
            supervisor.deliver(late_match(lease)).unwrap();
        }
        supervisor.deliver(Inbound::Lost).unwrap();
    }));
    let mut hooks = SchedulerHooks::over(link, config());
    step(&mut hooks);
    hooks.close();
}

#[test]
fn no_message_is_left_unseen_and_no_wake_is_lost() {
    explore(|| idle_engine(Supervisor::deliver, Pause::None));
}

#[test]
fn what_arrives_while_paused_is_acted_on_later() {
    for pause in [Pause::Some, Pause::Long] {
        explore(move || idle_engine(Supervisor::deliver, pause));
    }
}

#[test]
fn closing_ends_a_reader_that_a_full_inbox_holds() {
    explore(leaving);
}

/// The two ways of getting [`Supervisor::deliver`] wrong.
#[test]
fn broken_variants_are_caught() {
    let epoch_first: Deliver = |supervisor, inbound| {
        supervisor.shared.epoch.fetch_add(1, Ordering::Release);
        supervisor.inbox.send(inbound).unwrap();
        (supervisor.waker)();
        Ok(())
    };
    let wake_first: Deliver = |supervisor, inbound| {
        supervisor.inbox.send(inbound).unwrap();
        (supervisor.waker)();
        supervisor.shared.epoch.fetch_add(1, Ordering::Release);
        Ok(())
    };
    for (name, deliver) in [("epoch first", epoch_first), ("wake first", wake_first)] {
        let model = move || idle_engine(deliver, Pause::None);
        let found = catch_unwind(AssertUnwindSafe(|| explore(model))).is_err();
        assert!(found, "{name} went unnoticed");
    }
}
