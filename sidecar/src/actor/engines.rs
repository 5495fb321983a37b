//! Connected engines: who they are, which processes can still touch the arena, and what they say.

mod messages;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvstore::{ArenaFile, Geometry, Namespace, NamespaceId, Owner};

use super::{Actor, count};
use crate::commands::EngineView;
use crate::engine::frames::{Hello, Role, ToEngine, encode};
use crate::engine::server::Outbox;
use crate::planner::sessions::{EngineKey, SessionKey};

/// Engines at a time, those included whose processes have not all exited.
const ENGINES_MAX: usize = 64;
/// Requests remembered per engine so that hints can name them.
const REQUESTS_MAX: usize = 4096;

/// Names a connection; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// What a welcome says.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// Identifies this start of the sidecar.
    pub boot: u64,
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// The presence filter, if there is one.
    pub presence_file: Option<Arc<ArenaFile>>,
    /// Whether the process is new: somebody has to tell when it has exited.
    pub watch: bool,
}

struct Worker {
    connection: ConnectionId,
    outbox: Outbox,
    ready: bool,
}

struct Scheduler {
    connection: ConnectionId,
    outbox: Outbox,
    /// Owner of this connection's leases.
    owner: Owner,
    namespace: Option<Namespace>,
    id: Option<NamespaceId>,
    turns: HashMap<u64, SessionKey>,
    workers_told: bool,
}

/// One engine: a scheduler side and its workers, known by the id that they share.
pub(super) struct Engine {
    pub(super) id: String,
    pub(super) ranks: u32,
    pub(super) block_tokens: u32,
    pub(super) gpu_blocks: u32,
    pub(super) gpu_free: u32,
    rank_bytes: u64,
    scheduler: Option<Scheduler>,
    workers: HashMap<u32, Worker>,
    /// Worker processes that have mapped the arena and not exited yet.
    processes: HashSet<u32>,
    /// Owners of earlier connections: their slots drain until the engine says that it is fenced, or has exited.
    draining: Vec<Owner>,
    requests: HashMap<String, SessionKey>,
    /// Their ids, the oldest first.
    request_order: VecDeque<String>,
}

impl Engine {
    /// So that hints can name it; the oldest is forgotten for it.
    fn remember_request(&mut self, request: String, session: SessionKey) {
        if self.requests.insert(request.clone(), session).is_some() {
            return;
        }
        self.request_order.push_back(request);
        if self.request_order.len() > REQUESTS_MAX
            && let Some(oldest) = self.request_order.pop_front()
        {
            self.requests.remove(&oldest);
        }
    }

    pub(super) fn workers_ready(&self) -> u32 {
        u32::try_from(self.workers.values().filter(|worker| worker.ready).count())
            .unwrap_or(u32::MAX)
    }
}

/// All engines.
#[derive(Default)]
pub(super) struct Engines {
    table: HashMap<EngineKey, Engine>,
    connections: HashMap<ConnectionId, (EngineKey, Role)>,
    /// Current epoch of each namespace that an engine has opened.
    namespaces: HashMap<NamespaceId, Namespace>,
    next: u64,
}

impl Engines {
    pub(super) fn get(&self, key: EngineKey) -> Option<&Engine> {
        self.table.get(&key)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Owner of the leases of an engine's scheduler side, if that is connected and its namespace is closed.
    pub(super) fn owner(&self, key: EngineKey) -> Option<Owner> {
        self.table
            .get(&key)?
            .scheduler
            .as_ref()
            .map(|scheduler| scheduler.owner)
    }

    /// The one connected engine with a closed namespace, if there is exactly one.
    pub(super) fn only(&self) -> Option<(EngineKey, NamespaceId)> {
        let mut open = self
            .table
            .iter()
            .filter_map(|(key, engine)| Some((*key, engine.scheduler.as_ref()?.id?)));
        let first = open.next()?;
        open.next().is_none().then_some(first)
    }

    pub(super) fn namespace(&self, id: NamespaceId) -> Option<Namespace> {
        self.namespaces.get(&id).copied()
    }

    /// The arena was cut anew: nothing of before is there.
    pub(super) fn forget_namespaces(&mut self) {
        self.namespaces.clear();
    }

    /// The session of a request that an engine has seen.
    pub(super) fn session_of(&self, request: &str) -> Option<SessionKey> {
        self.table
            .values()
            .find_map(|engine| engine.requests.get(request).copied())
    }

    /// Sends to an engine's scheduler side.
    pub(super) fn send(&mut self, key: EngineKey, sequence: u64, message: &ToEngine) {
        let Some(scheduler) = self
            .table
            .get_mut(&key)
            .and_then(|engine| engine.scheduler.as_mut())
        else {
            return;
        };
        match encode(sequence, message) {
            Ok(frame) => scheduler.outbox.send(frame),
            Err(error) => tracing::error!(%error, "message to an engine not sent"),
        }
    }

    pub(super) fn views(&self, slot_bytes: u64) -> Vec<EngineView> {
        let connected = self
            .table
            .values()
            .filter(|engine| engine.scheduler.is_some());
        let mut views: Vec<_> = connected
            .map(|engine| EngineView::of(engine, slot_bytes))
            .collect();
        views.sort_by(|a, b| a.id.cmp(&b.id));
        views
    }

    fn connected(&self) -> usize {
        self.table
            .values()
            .filter(|engine| engine.scheduler.is_some())
            .count()
    }

    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Actor {
    /// Takes a connection in, or says why not.
    pub(super) fn admit(
        &mut self,
        connection: ConnectionId,
        hello: &Hello,
        outbox: Outbox,
        process: u32,
    ) -> Result<Admitted, String> {
        let geometry = Geometry {
            rank_bytes: hello.rank_bytes,
            ranks: hello.ranks,
            block_tokens: hello.block_tokens,
        };
        let strange = hello.engine.chars().any(char::is_control);
        if hello.engine.is_empty() || hello.engine.len() > 128 || strange {
            return Err("an engine's id has 1 to 128 bytes and no control characters".to_owned());
        }
        let known = self
            .engines
            .table
            .iter()
            .find(|(_, engine)| engine.id == hello.engine)
            .map(|(key, _)| *key);
        if known.is_none() && self.engines.table.len() >= ENGINES_MAX {
            return Err(format!(
                "{ENGINES_MAX} engines are connected; that is the limit"
            ));
        }
        if let Role::Worker { rank } = hello.role
            && rank >= hello.ranks
        {
            return Err(format!("rank {rank} of {} does not exist", hello.ranks));
        }
        let slot_bytes = self.cut_for(&geometry)?;
        let key = known.unwrap_or_else(|| EngineKey(self.engines.next()));
        let engine = self
            .engines
            .table
            .entry(key)
            .or_insert_with(|| Engine::new(hello));
        if (engine.rank_bytes, engine.ranks, engine.block_tokens)
            != (hello.rank_bytes, hello.ranks, hello.block_tokens)
        {
            return Err(format!(
                "the processes of engine {} differ in the size or number of their shards",
                hello.engine
            ));
        }
        let mut watch = false;
        match hello.role {
            Role::Scheduler if engine.scheduler.is_some() => {
                return Err(format!(
                    "engine {} has a scheduler connected already",
                    hello.engine
                ));
            }
            Role::Scheduler => {
                let owner = Owner(connection.0);
                engine.scheduler = Some(Scheduler {
                    connection,
                    outbox,
                    owner,
                    namespace: None,
                    id: None,
                    turns: HashMap::new(),
                    workers_told: false,
                });
                engine.gpu_blocks = hello.gpu_blocks;
            }
            Role::Worker { rank } => {
                engine.workers.insert(
                    rank,
                    Worker {
                        connection,
                        outbox,
                        ready: false,
                    },
                );
                watch = engine.processes.insert(process);
            }
        }
        self.engines
            .connections
            .insert(connection, (key, hello.role));
        self.engines_changed();
        tracing::info!(engine = %hello.engine, role = ?hello.role, process, "engine connected");
        let presence = self.cut.as_ref().and_then(|cut| cut.store.presence());
        Ok(Admitted {
            boot: self.config.boot,
            slot_bytes,
            presence_file: presence.map(|presence| presence.file().clone()),
            watch,
        })
    }

    fn engines_changed(&self) {
        let connected = self.engines.connected();
        self.shared.engines.store(connected, Ordering::Relaxed);
        self.shared.metrics.set_engines(count(connected));
    }

    /// Tells the scheduler side whether every worker has the arena, if that has changed.
    pub(super) fn workers_changed(&mut self, id: &str) {
        let Some((key, engine)) = self
            .engines
            .table
            .iter_mut()
            .find(|(_, engine)| engine.id == id)
        else {
            return;
        };
        let (key, ready) = (*key, engine.workers_ready() == engine.ranks);
        if let Some(scheduler) = engine.scheduler.as_mut()
            && scheduler.workers_told != ready
        {
            scheduler.workers_told = ready;
            self.engines.send(key, 0, &ToEngine::Workers { ready });
        }
    }

    /// A connection is gone.
    pub(super) fn lost(&mut self, connection: ConnectionId) {
        let Some((key, role)) = self.engines.connections.remove(&connection) else {
            return;
        };
        let Some(engine) = self.engines.table.get_mut(&key) else {
            return;
        };
        let id = engine.id.clone();
        match role {
            Role::Scheduler => {
                if engine
                    .scheduler
                    .as_ref()
                    .is_some_and(|scheduler| scheduler.connection == connection)
                {
                    let owner = engine.scheduler.take().map(|scheduler| scheduler.owner);
                    engine.draining.extend(owner);
                    engine.requests.clear();
                    engine.request_order.clear();
                    if let (Some(owner), Some(cut)) = (owner, &mut self.cut) {
                        let effects = cut.store.owner_left(owner);
                        self.count(effects);
                    }
                    self.sessions.engine_left(key);
                    let gone: Vec<SessionKey> = self.sessions.of_engine(key).collect();
                    for session in gone {
                        self.forget_want(session);
                    }
                }
            }
            Role::Worker { rank } => {
                if engine
                    .workers
                    .get(&rank)
                    .is_some_and(|worker| worker.connection == connection)
                {
                    engine.workers.remove(&rank);
                }
                self.workers_changed(&id);
            }
        }
        tracing::info!(engine = %id, ?role, "engine disconnected");
        self.engines_changed();
        self.forget_if_gone(key);
    }

    /// A process that had mapped the arena has exited: it copies nothing any more.
    pub(super) fn exited(&mut self, process: u32) {
        let keys: Vec<EngineKey> = self
            .engines
            .table
            .iter()
            .filter(|(_, e)| e.processes.contains(&process))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            if let Some(engine) = self.engines.table.get_mut(&key) {
                engine.processes.remove(&process);
            }
            self.forget_if_gone(key);
        }
    }

    /// With no worker process left, an engine's draining slots are free; with nobody connected, so is its name.
    fn forget_if_gone(&mut self, key: EngineKey) {
        let Some(engine) = self.engines.table.get_mut(&key) else {
            return;
        };
        if !engine.processes.is_empty() {
            return;
        }
        let owners = std::mem::take(&mut engine.draining);
        let gone = engine.scheduler.is_none() && engine.workers.is_empty();
        if gone {
            self.engines.table.remove(&key);
        }
        self.owners_gone(&owners);
    }

    fn owners_gone(&mut self, owners: &[Owner]) {
        for owner in owners {
            if let Some(cut) = &mut self.cut {
                let effects = cut.store.owner_gone(*owner);
                self.count(effects);
            }
        }
    }
}

impl Engine {
    fn new(hello: &Hello) -> Self {
        Self {
            id: hello.engine.clone(),
            ranks: hello.ranks,
            block_tokens: hello.block_tokens,
            gpu_blocks: hello.gpu_blocks,
            gpu_free: hello.gpu_blocks,
            rank_bytes: hello.rank_bytes,
            scheduler: None,
            workers: HashMap::new(),
            processes: HashSet::new(),
            draining: Vec::new(),
            requests: HashMap::new(),
            request_order: VecDeque::new(),
        }
    }
}
