//! What arrives from the sidecar: a connection made or lost, answers to lookups, grants, wants.

use std::time::{Duration, Instant};

use kvstore::{BlockHash, PresenceView, SlotId};

use super::stored::Stored;
use super::turns::{LeasedRun, Lookup};
use super::watch::NewWant;
use super::{Connection, RETIRED_BLOCKS, SchedulerHooks};
use crate::engine::client::{Inbound, Outbox};
use crate::engine::frames::{ToEngine, ToSidecar, Wish};

/// Messages taken in at once; a sidecar that never stops sending must not hold up a step.
const MESSAGES_MAX: usize = if cfg!(feature = "models") { 1 } else { 256 };

impl SchedulerHooks {
    /// Takes in what has arrived, or the first of it: then more is due.
    pub(super) fn receive(&mut self) {
        let epoch = self.link.epoch();
        if epoch == self.seen {
            return;
        }
        self.work_due = true;
        for _ in 0..MESSAGES_MAX {
            let Some(inbound) = self.link.receive() else {
                self.seen = epoch;
                return;
            };
            match inbound {
                Inbound::Connected {
                    boot,
                    outbox,
                    presence,
                } => self.connected(boot, outbox, presence),
                Inbound::Refused(reason) => {
                    tracing::error!(reason, "the sidecar refuses this engine")
                }
                Inbound::Lost => self.disconnected(),
                Inbound::Message {
                    sequence,
                    message,
                    at,
                } => self.message(sequence, message, at),
            }
        }
    }

    pub(super) fn connected(&mut self, boot: u64, outbox: Outbox, presence: Option<PresenceView>) {
        self.connection = Connection {
            number: self.connection.number + 1,
            boot: Some(boot),
            outbox: Some(outbox),
            stored: Stored::shown_by(presence),
            ..Connection::default()
        };
        if let Some(id) = self.namespace {
            self.enter_namespace(id);
        }
        self.send_fenced();
    }

    /// Every lease is void now; the sidecar keeps their slots until [`ToSidecar::Fenced`] or this process is gone.
    pub(super) fn disconnected(&mut self) {
        self.connection.boot = None;
        self.connection.outbox = None;
        self.connection.stored = Stored::default();
        self.connection.workers_ready = false;
        self.saves.disconnect();
        // Void with the connection: there is nobody to give them back to.
        self.watch.clear();
        for turn in self.turns.iter_mut() {
            turn.lookup = Lookup::Idle;
            turn.session = None;
        }
    }

    /// Tells the sidecar, once per connection, that no copy of an earlier connection runs any more.
    pub(super) fn send_fenced(&mut self) {
        if !self.connection.fenced && !self.jobs.any_before(self.connection.number) {
            self.connection.fenced = self.send(&ToSidecar::Fenced).is_some();
        }
    }

    fn message(&mut self, sequence: u64, message: ToEngine, at: Instant) {
        self.connection.stored.answered(sequence);
        if self.connection.opening.is_some() && self.is_stale(sequence, &message) {
            return;
        }
        match message {
            ToEngine::Workers { ready } => self.connection.workers_ready = ready,
            ToEngine::Match {
                turn,
                for_session,
                session,
                lease,
                slots,
                ttl_ms,
            } => {
                let slots = slots.into_iter().map(SlotId).collect();
                let expires = at + millis(ttl_ms);
                let run = lease.map(|lease| LeasedRun {
                    lease,
                    from: 0,
                    slots,
                    expires,
                });
                if for_session {
                    let released = self.watch.found(turn, sequence, run);
                    self.release(released.as_slice());
                } else {
                    self.matched(sequence, (turn, session), run);
                }
            }
            ToEngine::Reserved {
                lease,
                slots,
                ttl_ms,
            } => {
                if !self
                    .saves
                    .answered(sequence, lease, &slots, at + millis(ttl_ms))
                    && let Some(lease) = lease
                {
                    self.abort(lease);
                }
            }
            ToEngine::Want {
                session,
                want,
                wish,
                priority,
                expected_ms,
                hold_ms,
                hashes,
                lease,
                slots,
                ttl_ms,
            } => {
                let slots = slots.into_iter().map(SlotId).collect();
                let expires = at + millis(ttl_ms);
                if wish == Wish::Nothing {
                    self.retire(&hashes.0);
                }
                let new = NewWant {
                    want,
                    wish,
                    priority,
                    expected: expected_ms.map(|ms| at + millis(ms)),
                    hold_until: at + millis(hold_ms),
                    chain: hashes.0,
                    lease: lease.map(|lease| LeasedRun {
                        lease,
                        from: 0,
                        slots,
                        expires,
                    }),
                };
                let released = self.watch.want(session, new, at);
                self.release(&released);
            }
            ToEngine::NamespaceOpen => {}
            ToEngine::Welcome { .. } | ToEngine::Refused { .. } => {
                tracing::warn!("a second welcome from the sidecar is ignored");
            }
        }
    }

    /// A session has ended for good and no other has these blocks of its.
    fn retire(&mut self, hashes: &[BlockHash]) {
        self.saves.forget(hashes);
        self.retired.extend(hashes);
        let excess = self.retired.len().saturating_sub(RETIRED_BLOCKS);
        self.retired.drain(..excess);
    }

    /// While a namespace is being opened: whether a message speaks of an earlier one. Its lease is given back.
    fn is_stale(&mut self, sequence: u64, message: &ToEngine) -> bool {
        match message {
            ToEngine::NamespaceOpen => {
                if self.connection.opening == Some(sequence) {
                    self.connection.opening = None;
                }
                true
            }
            ToEngine::Match { lease, .. } | ToEngine::Want { lease, .. } => {
                self.release(lease.as_slice());
                true
            }
            ToEngine::Reserved { lease, .. } => {
                if let Some(lease) = *lease {
                    self.abort(lease);
                }
                true
            }
            ToEngine::Workers { .. } | ToEngine::Welcome { .. } | ToEngine::Refused { .. } => false,
        }
    }

    /// The answer to a request's lookup; a late one gives its lease back.
    fn matched(&mut self, sequence: u64, (ticket, session): (u64, u64), run: Option<LeasedRun>) {
        let Some(turn) = self.turns.by_ticket_mut(ticket) else {
            return self.release(run.map(|run| run.lease).as_slice());
        };
        if turn.session.is_none() {
            turn.session = Some(session);
            let (fetched, late) = self.watch.turn_begins(session);
            turn.prefetched = fetched;
            if turn.begun {
                // It did not wait for this answer.
                self.figures.prefetch_used += turn.take_used();
                self.figures.prefetch_wasted += turn.take_wasted();
            }
            self.figures.prefetch_late += u64::try_from(late).unwrap_or(u64::MAX);
        }
        let late = match turn.lookup {
            Lookup::Waiting {
                sequence: waiting,
                from,
                ..
            } if waiting == sequence => {
                turn.lookup = match run {
                    Some(run) => Lookup::Ready(LeasedRun { from, ..run }),
                    None => Lookup::Nothing { from },
                };
                None
            }
            _ => run,
        };
        self.release(late.map(|run| run.lease).as_slice());
    }
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(u64::from(ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::client::SchedulerLink;
    use crate::engine::frames::{Hello, Role};
    use crate::hooks::HooksConfig;
    use crate::hooks::testkit::{config, given_back, late_match, step};

    #[test]
    fn what_one_step_does_not_take_in_is_taken_in_by_the_next() {
        let HooksConfig {
            engine,
            rank_bytes,
            ranks,
            block_tokens,
            gpu_blocks,
            socket,
            ..
        } = config();
        let hello = Hello {
            role: Role::Scheduler,
            engine,
            rank_bytes,
            ranks,
            block_tokens,
            gpu_blocks,
        };
        let (link, sidecar) = SchedulerLink::pair(socket, hello, Box::new(|| {}));
        let (outbox, frames) = sidecar.outbox();
        let mut hooks = SchedulerHooks::over(link, config());
        let connected = Inbound::Connected {
            boot: 1,
            outbox,
            presence: None,
        };
        sidecar.deliver(connected).expect("room in the inbox");
        let mut leases = 0..2 * MESSAGES_MAX as u64;
        for lease in leases.clone() {
            sidecar
                .deliver(late_match(lease))
                .expect("room in the inbox");
        }
        // The hooks wait for it when they go.
        drop(sidecar);
        // Before the first lease comes the connection.
        for taken in [MESSAGES_MAX - 1, MESSAGES_MAX, 1] {
            assert!(hooks.pending(false), "there is more");
            step(&mut hooks);
            let next: Vec<u64> = leases.by_ref().take(taken).collect();
            assert_eq!(given_back(&frames), next);
        }
        assert_eq!(leases.next(), None);
        assert!(!hooks.pending(false), "all has been taken in");
    }
}
