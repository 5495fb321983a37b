//! The one owner of the store and the sessions: a single task that takes one event after the other.
//!
//! Everything that happens to the sidecar is an [`Event`] on one bounded queue: what engines say, what clients ask, the
//! end of a process, the passing of time. Nothing here waits: an answer that depends on an engine is kept open
//! ([`hints`]) and has a deadline.

mod engines;
mod handle;
mod hints;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvstore::{
    BlockHash, Counts, Effects, Geometry, Owner, Presence, Store, StoreConfig, StoreError, Term,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

pub use self::engines::{Admitted, ConnectionId};
pub use self::handle::Handle;

use self::engines::Engines;
use self::handle::{Command, Shared};
use self::hints::Hints;
use crate::commands::{CommandError, EngineView, SessionName, SessionView, StatusView};
use crate::config::Config;
use crate::engine::frames::{Hello, ToEngine, ToSidecar, Wish};
use crate::engine::server::Outbox;
use crate::metrics::{EvictReason, Metrics, SlotState};
use crate::planner::sessions::{Session, SessionKey, Sessions};

/// Events that may wait for the actor.
const EVENTS_MAX: usize = 4096;
/// Leases and reservations at a time.
const LEASES_MAX: usize = 65_536;
/// Namespaces at a time.
const NAMESPACES_MAX: usize = 256;
/// Shortest time between two audits of the store, which builds with `strict` make: an audit looks at every slot.
const AUDIT_EVERY: Duration = Duration::from_millis(1);
/// The states that the API counts sessions by.
const STATES: [&str; 8] = [
    "new", "active", "hold", "shadow", "host", "loading", "ready", "dropped",
];

/// Before the first engine has fixed the size of a slot.
const NO_SLOTS: Counts = Counts {
    total: 0,
    free: 0,
    filling: 0,
    committed: 0,
    draining: 0,
    leased: 0,
    pinned: 0,
    evictable: 0,
    leases: 0,
    pins: 0,
};

/// Everything that can happen.
pub enum Event {
    /// A connection wants to be an engine's.
    Hello {
        /// The connection.
        connection: ConnectionId,
        /// What it says of itself.
        hello: Hello,
        /// Frames to it.
        outbox: Outbox,
        /// The process behind it.
        process: u32,
        /// Admitted, or why not.
        reply: oneshot::Sender<Result<Admitted, String>>,
    },
    /// An engine's message.
    Message {
        /// Over which connection.
        connection: ConnectionId,
        /// Its number.
        sequence: u64,
        /// The message.
        message: Box<ToSidecar>,
        /// The sender's place in the queue, free when the message has been taken.
        place: OwnedSemaphorePermit,
    },
    /// A connection is gone.
    Lost(ConnectionId),
    /// A process that had the arena has exited.
    Exited(u32),
    /// A client's command.
    #[expect(private_interfaces, reason = "only the handle makes commands")]
    Command(Command),
    /// Shutting down: answer when no copy depends on this process any more.
    Drain(oneshot::Sender<()>),
}

/// The arena as the actor sees it: how it is cut, and what is in it.
struct Cut {
    slot_bytes: u64,
    store: Store,
}

/// The task's state.
struct Actor {
    config: ActorConfig,
    shared: Arc<Shared>,
    cut: Option<Cut>,
    sessions: Sessions,
    engines: Engines,
    hints: Hints,
    /// Last want told to an engine, per session.
    wants: HashMap<SessionKey, Told>,
    next_want: u64,
    /// When a session's want changes by itself.
    changes: BTreeSet<(Instant, SessionKey)>,
    drain: Option<oneshot::Sender<()>>,
}

/// What the actor needs of the configuration.
#[derive(Clone, Debug)]
struct ActorConfig {
    boot: u64,
    arena_bytes: u64,
    pin_budget: f64,
    lease_ttl: Duration,
}

/// A want that an engine was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Told {
    number: u64,
    wish: Wish,
    /// When the want changes by itself: its entry in [`Actor::changes`].
    change: Option<Instant>,
}

/// Starts the actor; it ends when every handle is gone.
pub fn start(config: &Config, boot: u64, metrics: Arc<Metrics>) -> Handle {
    let (events, queue) = mpsc::channel(EVENTS_MAX);
    metrics.set_arena_bytes(config.memory);
    let shared = Arc::new(Shared {
        boot_id: format!("{boot:016x}"),
        engines: AtomicUsize::new(0),
        draining: AtomicBool::new(false),
        metrics,
    });
    tokio::spawn(Actor::new(config, boot, shared.clone()).run(queue));
    Handle { events, shared }
}

impl Handle {
    /// Queues an engine's event; waits for room, so that a flood from one engine slows that engine down.
    pub(crate) async fn deliver(&self, event: Event) {
        // A closed queue means that the actor has ended: there is nobody to tell.
        self.events.send(event).await.unwrap_or_default();
    }

    /// As [`Self::deliver`], from a thread outside the runtime.
    pub(crate) fn deliver_blocking(&self, event: Event) {
        self.events.blocking_send(event).unwrap_or_default();
    }

    /// Begins the shutdown and waits until no lease is live, for `patience` at most.
    pub(crate) async fn drain(&self, patience: Duration) {
        self.shared.draining.store(true, Ordering::Relaxed);
        let (done, drained) = oneshot::channel();
        self.deliver(Event::Drain(done)).await;
        if tokio::time::timeout(patience, drained).await.is_err() {
            tracing::warn!(
                "copies were still running when the sidecar went; their engines finish them on their own"
            );
        }
    }
}

impl Actor {
    fn new(config: &Config, boot: u64, shared: Arc<Shared>) -> Self {
        Self {
            config: ActorConfig {
                boot,
                arena_bytes: config.memory,
                pin_budget: config.pin_budget,
                lease_ttl: config.lease_ttl,
            },
            shared,
            cut: None,
            sessions: Sessions::new(config.sessions_max),
            engines: Engines::default(),
            hints: Hints::default(),
            wants: HashMap::new(),
            next_want: 0,
            changes: BTreeSet::new(),
            drain: None,
        }
    }

    async fn run(mut self, mut queue: mpsc::Receiver<Event>) {
        let mut audited = Instant::now();
        loop {
            let deadline = self.next_deadline();
            let sleep = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = queue.recv() => match event {
                    Some(event) => self.take(event, Instant::now()),
                    None => return,
                },
                () = sleep => {}
            }
            self.pass(Instant::now());
            if cfg!(feature = "strict")
                && let Some(cut) = &self.cut
                && audited.elapsed() >= AUDIT_EVERY
            {
                cut.store.check_invariants();
                audited = Instant::now();
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let expiry = self.cut.as_ref().and_then(|cut| cut.store.next_expiry());
        let change = self.changes.first().map(|(at, _)| *at);
        [expiry, change, self.hints.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    fn take(&mut self, event: Event, now: Instant) {
        match event {
            Event::Hello {
                connection,
                hello,
                outbox,
                process,
                reply,
            } => {
                let answer = self.admit(connection, &hello, outbox, process);
                // A connection that is gone already reports its own loss.
                if reply.send(answer).is_ok() {
                    self.workers_changed(&hello.engine);
                }
            }
            Event::Message {
                connection,
                sequence,
                message,
                place: _,
            } => self.message(connection, sequence, *message, now),
            Event::Lost(connection) => self.lost(connection),
            Event::Exited(process) => self.exited(process),
            Event::Command(command) => self.command(command, now),
            Event::Drain(done) => self.drain = Some(done),
        }
    }

    /// What is due by time alone.
    fn pass(&mut self, now: Instant) {
        if let Some(cut) = &mut self.cut {
            let effects = cut.store.expire(now);
            self.count(effects);
        }
        for session in self.sessions.take_evicted() {
            self.unpin_session(session.key);
            self.tell_nothing(&session, &[]);
        }
        while let Some((at, key)) = self.changes.first().copied()
            && at <= now
        {
            self.changes.pop_first();
            self.push_want(key, now);
        }
        for (reply, results) in self.hints.overdue(now) {
            self.shared.answer_hints(reply, results);
        }
        let idle = self
            .cut
            .as_ref()
            .is_none_or(|cut| cut.store.counts().leases == 0);
        if idle && let Some(done) = self.drain.take() {
            // Whoever asked may have run out of patience.
            done.send(()).unwrap_or_default();
        }
    }

    fn command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Status(reply) => answer(reply, Ok(self.status())),
            Command::Sessions(reply) => {
                let mut views: Vec<_> = self
                    .sessions
                    .iter()
                    .map(|session| self.view(session, now))
                    .collect();
                views.sort_by(|a, b| a.name.cmp(&b.name));
                answer(reply, Ok(views));
            }
            Command::Session(name, reply) => {
                let view = self
                    .sessions
                    .find(&name)
                    .map(|session| self.view(session, now));
                answer(reply, view.ok_or(CommandError::UnknownSession));
            }
            Command::Retire(name, reply) => answer(reply, self.retire(&name)),
            Command::ToolStart(name, start, reply) => {
                let key = self.sessions.tool_start(&name, start, now);
                answer(reply, key.map(|key| self.push_want(key, now)));
            }
            Command::ToolProgress(name, progress, reply) => {
                let key = self.sessions.tool_progress(&name, &progress, now);
                answer(reply, key.map(|key| self.push_want(key, now)));
            }
            Command::ToolEnd(name, end, reply) => {
                let key = self.sessions.tool_end(&name, &end, now);
                answer(reply, key.map(|key| self.push_want(key, now)));
            }
            Command::Hints(envelope, reply) => self.hint(envelope, reply, now),
            Command::PrefetchCompat(items, reply) => self.prefetch_compat(&items, reply, now),
            Command::PinCompat(items, reply) => {
                let results = self.pin_compat(&items, now);
                answer(reply, Ok(results));
            }
            Command::BreakPins(reply) => answer(reply, Ok(self.break_pins())),
        }
    }

    fn retire(&mut self, name: &SessionName) -> Result<u64, CommandError> {
        let key = self
            .sessions
            .find(name)
            .map(|session| session.key)
            .ok_or(CommandError::UnknownSession)?;
        self.unpin_session(key);
        let Some((session, shared)) = self.sessions.retire(key) else {
            return Err(CommandError::UnknownSession);
        };
        let own = &session.chain[shared.min(session.chain.len())..];
        self.tell_nothing(&session, own);
        let namespace = session.home.and_then(|(_, id)| self.engines.namespace(id));
        let (Some(cut), Some(namespace)) = (&mut self.cut, namespace) else {
            return Ok(0);
        };
        let effects = cut.store.retire(namespace, own);
        self.count(effects);
        Ok(u64::try_from(effects.freed).unwrap_or(u64::MAX))
    }

    /// The session is gone: whatever an engine was told of it no longer holds, and `useless` blocks may go.
    pub(in crate::actor) fn tell_nothing(&mut self, session: &Session, useless: &[BlockHash]) {
        let told = self.forget_want(session.key);
        if let Some((engine, _)) = session.home
            && (told.is_some_and(|told| told.wish != Wish::Nothing) || !useless.is_empty())
        {
            self.next_want += 1;
            let want = nothing(session.key, self.next_want, useless);
            self.engines.send(engine, 0, &want);
        }
    }

    /// Tells a session's engine how much it is wanted now, if that is news. Returns the want's number.
    fn push_want(&mut self, key: SessionKey, now: Instant) {
        self.push_want_numbered(key, now);
    }

    fn push_want_numbered(&mut self, key: SessionKey, now: Instant) -> Option<u64> {
        let want = self.sessions.want(key, now);
        let told = self.forget_want(key);
        if want.wish == Wish::Nothing && told.is_none_or(|told| told.wish == Wish::Nothing) {
            return None;
        }
        let session = self.sessions.get(key)?;
        let (engine, id) = session.home?;
        let chain = session.chain.clone();
        let owner = self.engines.owner(engine)?;
        self.next_want += 1;
        let number = self.next_want;
        let mut message = ToEngine::Want {
            session: key.0,
            want: number,
            wish: want.wish,
            priority: want.priority,
            expected_ms: want
                .expected
                .map(|at| to_ms(at.saturating_duration_since(now))),
            hold_ms: to_ms(want.hold),
            hashes: crate::engine::frames::Hashes(Vec::new()),
            lease: None,
            slots: Vec::new(),
            ttl_ms: 0,
        };
        if let ToEngine::Want {
            hashes,
            lease,
            slots,
            ttl_ms,
            ..
        } = &mut message
            && want.wish != Wish::Nothing
        {
            if want.wish == Wish::Now {
                let namespace = self.engines.namespace(id);
                (*lease, *slots) = self.lease(owner, namespace, &chain, now);
                *ttl_ms = to_ms(self.config.lease_ttl);
            }
            hashes.0 = chain;
        }
        self.engines.send(engine, 0, &message);
        let change = self.sessions.next_change(key).filter(|at| *at > now);
        self.changes.extend(change.map(|at| (at, key)));
        let told = Told {
            number,
            wish: want.wish,
            change,
        };
        self.wants.insert(key, told);
        Some(number)
    }

    /// What an engine was told of a session no longer counts; nor does the moment at which that would have changed, or
    /// an idle engine would be woken for nothing.
    fn forget_want(&mut self, key: SessionKey) -> Option<Told> {
        let told = self.wants.remove(&key)?;
        if let Some(at) = told.change {
            self.changes.remove(&(at, key));
        }
        Some(told)
    }

    /// Leases the longest committed prefix; nothing while draining, or when the store has no room for leases.
    fn lease(
        &mut self,
        owner: Owner,
        namespace: Option<kvstore::Namespace>,
        hashes: &[kvstore::BlockHash],
        now: Instant,
    ) -> (Option<u64>, Vec<u32>) {
        let (Some(cut), Some(namespace), None) = (&mut self.cut, namespace, &self.drain) else {
            return (None, Vec::new());
        };
        let term = Term {
            now,
            ttl: self.config.lease_ttl,
        };
        match cut.store.lease_prefix(owner, namespace, hashes, term) {
            Ok(Some(lease)) => (
                Some(lease.id.0),
                lease.slots.iter().map(|slot| slot.0).collect(),
            ),
            Ok(None) => (None, Vec::new()),
            Err(error) => {
                tracing::warn!(%error, "no lease");
                (None, Vec::new())
            }
        }
    }

    /// Cuts the arena into slots of an engine's size, if it can be.
    fn cut_for(&mut self, geometry: &Geometry) -> Result<u64, String> {
        geometry.validate().map_err(|error| error.to_string())?;
        let slot_bytes = geometry.slot_bytes();
        if let Some(cut) = &self.cut {
            if cut.slot_bytes == slot_bytes {
                return Ok(slot_bytes);
            }
            if !self.engines.is_empty() {
                return Err(format!(
                    "the arena is cut into slots of {} bytes and this engine needs {slot_bytes}: start a sidecar of its \
                     own for it",
                    cut.slot_bytes
                ));
            }
            tracing::info!(
                before = cut.slot_bytes,
                now = slot_bytes,
                "another model: the arena is cut anew, its content is gone"
            );
        }
        let slots = geometry.slots_in(self.config.arena_bytes);
        let config = StoreConfig {
            slots,
            pin_budget_slots: share(slots, self.config.pin_budget),
            lease_ttl_max: self.config.lease_ttl,
            leases_max: LEASES_MAX,
            namespaces_max: NAMESPACES_MAX,
        };
        let store = Store::new(config).map_err(|error| match error {
            StoreError::BadConfig { .. } => format!(
                "an arena of {} bytes holds no slot of {slot_bytes}: give the sidecar more memory",
                self.config.arena_bytes
            ),
            other => other.to_string(),
        })?;
        let store = match Presence::create(slots) {
            Ok(presence) => store.shown_in(presence),
            Err(error) => {
                tracing::warn!(%error, "no presence filter; engines ask for every request");
                store
            }
        };
        self.cut = Some(Cut { slot_bytes, store });
        self.engines.forget_namespaces();
        Ok(slot_bytes)
    }

    /// How many of its leading blocks are stored, of those in `chain`.
    fn stored(&self, session: &Session, chain: &[BlockHash]) -> usize {
        let namespace = session.home.and_then(|(_, id)| self.engines.namespace(id));
        match (&self.cut, namespace) {
            (Some(cut), Some(namespace)) => cut.store.match_prefix(namespace, chain),
            _ => 0,
        }
    }

    /// One of [`STATES`]. Only the store knows what was dropped.
    fn state(&self, session: &Session) -> &'static str {
        let first = &session.chain[..session.chain.len().min(1)];
        match session.state() {
            "host" if self.stored(session, first) == 0 => "dropped",
            state => state,
        }
    }

    fn view(&self, session: &Session, now: Instant) -> SessionView {
        let stored = self.stored(session, &session.chain);
        let expected = self.sessions.expected_return(session.key, now);
        let engine = session
            .home
            .and_then(|(engine, _)| self.engines.get(engine));
        let block_tokens = engine.map_or(0, |engine| u64::from(engine.block_tokens));
        SessionView {
            name: session.name.as_str().to_owned(),
            state: self.state(session),
            tokens: u64::try_from(session.chain.len()).unwrap_or(u64::MAX) * block_tokens,
            gpu_blocks: session.gpu_blocks,
            host_blocks: u64::try_from(stored).unwrap_or(u64::MAX),
            pinned_blocks: self.hints.pinned(session.key),
            tool: session.tool().map(str::to_owned),
            expected_return_ms: expected.map(|at| signed_ms(at, now)),
            engine: engine.map(|engine| engine.id.clone()),
            turns: session.turns,
        }
    }

    fn status(&mut self) -> StatusView {
        let mut states: Vec<(&'static str, u64)> = STATES.iter().map(|state| (*state, 0)).collect();
        for session in self.sessions.iter() {
            if let Some((_, count)) = states
                .iter_mut()
                .find(|(state, _)| *state == self.state(session))
            {
                *count += 1;
            }
        }
        let counts = self.cut.as_ref().map_or(NO_SLOTS, |cut| cut.store.counts());
        let metrics = &self.shared.metrics;
        metrics.set_sessions(&states);
        let used = count(counts.committed) + count(counts.filling);
        for (state, slots) in [
            (SlotState::Free, count(counts.free)),
            (SlotState::Used, used),
            (SlotState::Pinned, count(counts.pinned)),
            (SlotState::Leased, count(counts.leased)),
            (SlotState::Draining, count(counts.draining)),
        ] {
            metrics.set_slots(state, slots);
        }
        StatusView {
            boot_id: self.shared.boot_id.clone(),
            arena_bytes: self.config.arena_bytes,
            slots_total: count(counts.total),
            slots_used: used,
            slots_pinned: count(counts.pinned),
            slots_leased: count(counts.leased),
            slots_draining: count(counts.draining),
            engines: self
                .engines
                .views(self.cut.as_ref().map_or(0, |cut| cut.slot_bytes)),
            sessions: states,
        }
    }

    /// Puts the store's effects into the metrics.
    fn count(&self, effects: Effects) {
        let metrics = &self.shared.metrics;
        for (reason, blocks) in [
            (EvictReason::Lru, effects.evicted.lru),
            (EvictReason::Demoted, effects.evicted.demoted),
            (EvictReason::Retired, effects.evicted.retired),
            (EvictReason::Reset, effects.evicted.reset),
        ] {
            if blocks > 0 {
                metrics.evicted(reason, count(blocks));
            }
        }
        let expired = effects.expired_leases + effects.expired_reservations;
        if expired > 0 {
            metrics.expired_leases(count(expired));
        }
    }
}

fn nothing(session: SessionKey, want: u64, useless: &[BlockHash]) -> ToEngine {
    ToEngine::Want {
        session: session.0,
        want,
        wish: Wish::Nothing,
        priority: 0,
        expected_ms: None,
        hold_ms: 0,
        hashes: crate::engine::frames::Hashes(useless.to_vec()),
        lease: None,
        slots: Vec::new(),
        ttl_ms: 0,
    }
}

/// Answers a command; whoever asked may be gone.
fn answer<T>(reply: handle::Reply<T>, result: Result<T, CommandError>) {
    reply.send(result).map_err(drop).unwrap_or_default();
}

fn to_ms(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn signed_ms(at: Instant, now: Instant) -> i64 {
    let ahead = i64::try_from(at.saturating_duration_since(now).as_millis()).unwrap_or(i64::MAX);
    let behind = i64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(i64::MAX);
    ahead - behind
}

fn count(n: impl TryInto<u64>) -> u64 {
    n.try_into().unwrap_or(u64::MAX)
}

fn share(slots: u32, ratio: f64) -> u32 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the configuration checks 0 <= ratio <= 1"
    )]
    let part = (f64::from(slots) * ratio) as u32;
    part
}

impl EngineView {
    /// A view with nothing connected yet.
    fn of(engine: &engines::Engine, slot_bytes: u64) -> Self {
        Self {
            id: engine.id.clone(),
            workers: engine.workers_ready(),
            ranks: engine.ranks,
            gpu_blocks_total: u64::from(engine.gpu_blocks),
            gpu_blocks_free: u64::from(engine.gpu_free),
            slot_bytes,
            block_tokens: engine.block_tokens,
        }
    }
}
