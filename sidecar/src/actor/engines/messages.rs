//! What engines say: each message carried out on the store and the session table, and answered where it asks.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use kvstore::{LeaseId, Namespace, NamespaceId, Owner, Term};

use super::ConnectionId;
use crate::actor::{Actor, to_ms};
use crate::commands::{CommandError, SessionName};
use crate::engine::frames::{CopyClass, Figures, Hashes, Hook, Role, ToEngine, ToSidecar};
use crate::metrics::{self, CopyCause, CopyDirection, PrefetchEnd};
use crate::planner::sessions::{EngineKey, SessionKey};

impl Actor {
    /// An engine's message.
    pub(in crate::actor) fn message(
        &mut self,
        connection: ConnectionId,
        sequence: u64,
        message: ToSidecar,
        now: Instant,
    ) {
        let Some((key, role)) = self.engines.connections.get(&connection).copied() else {
            return;
        };
        if let Role::Worker { rank } = role {
            return self.worker_message(key, rank, &message);
        }
        match message {
            ToSidecar::OpenNamespace { id } => {
                self.open_namespace(key, sequence, NamespaceId(id), now);
            }
            ToSidecar::TurnStarted {
                turn,
                request,
                identity,
                hashes,
            } => {
                self.turn_started((key, sequence, turn), (request, identity), &hashes, now);
            }
            ToSidecar::Lookup {
                turn,
                for_session,
                hashes,
            } => {
                let (lease, slots) = self.lease_for(key, &hashes, now);
                let ttl_ms = to_ms(self.config.lease_ttl);
                let answer = ToEngine::Match {
                    turn,
                    for_session,
                    session: 0,
                    lease,
                    slots,
                    ttl_ms,
                };
                self.engines.send(key, sequence, &answer);
            }
            ToSidecar::Reserve { hashes } => self.reserve(key, sequence, &hashes, now),
            ToSidecar::Settle { lease, commit } => self.settle(key, LeaseId(lease), commit, now),
            ToSidecar::Release { lease } => {
                if let (Some(owner), Some(cut)) = (self.engines.owner(key), &mut self.cut) {
                    match cut.store.release(owner, LeaseId(lease)) {
                        Ok(effects) => self.count(effects),
                        Err(error) => tracing::debug!(%error, lease, "lease not released"),
                    }
                }
            }
            ToSidecar::TurnEnded { turn, hashes } => self.turn_ended(key, turn, &hashes, now),
            ToSidecar::Hints { json } => self.engine_hint(&json, now),
            ToSidecar::Outcome {
                session,
                want,
                outcome,
                blocks,
                pairs,
            } => {
                self.wanted(SessionKey(session), want, (outcome, blocks), &pairs);
            }
            ToSidecar::News(news) => {
                for item in news {
                    self.sessions.moved(
                        SessionKey(item.session),
                        item.residence,
                        u64::from(item.gpu_blocks),
                    );
                }
            }
            ToSidecar::Figures(figures) => self.figures(key, &figures),
            ToSidecar::Reset => self.reset(key),
            ToSidecar::Fenced => {
                let owners = self
                    .engines
                    .table
                    .get_mut(&key)
                    .map(|e| std::mem::take(&mut e.draining))
                    .unwrap_or_default();
                self.owners_gone(&owners);
            }
            ToSidecar::Hello(_) | ToSidecar::ArenaReady => {
                tracing::warn!("a message that only comes first is ignored")
            }
        }
    }

    fn worker_message(&mut self, key: EngineKey, rank: u32, message: &ToSidecar) {
        let Some(engine) = self.engines.table.get_mut(&key) else {
            return;
        };
        let id = engine.id.clone();
        match (message, engine.workers.get_mut(&rank)) {
            (ToSidecar::ArenaReady, Some(worker)) => {
                worker.ready = true;
                self.workers_changed(&id);
            }
            // Workers may say nothing else: whoever does is cut off.
            (_, Some(worker)) => worker.outbox.cut_off(),
            (_, None) => {}
        }
    }

    fn open_namespace(&mut self, key: EngineKey, sequence: u64, id: NamespaceId, now: Instant) {
        let Some(cut) = &mut self.cut else { return };
        let namespace = match cut.store.open_namespace(id) {
            Ok(namespace) => namespace,
            Err(error) => {
                return tracing::error!(%error, "an engine's namespace was not opened; it will only miss");
            }
        };
        self.engines.namespaces.insert(id, namespace);
        if let Some(scheduler) = self
            .engines
            .table
            .get_mut(&key)
            .and_then(|engine| engine.scheduler.as_mut())
        {
            scheduler.namespace = Some(namespace);
            scheduler.id = Some(id);
        }
        // Before the wants that follow: whatever came earlier speaks of another namespace.
        self.engines.send(key, sequence, &ToEngine::NamespaceOpen);
        // Sessions of the same weights whose engine is gone belong to this one from now on.
        let connected: HashSet<EngineKey> = self
            .engines
            .table
            .iter()
            .filter(|(_, e)| e.scheduler.is_some())
            .map(|(key, _)| *key)
            .collect();
        for session in self.sessions.rehome(id, key, &connected) {
            self.push_want(session, now);
        }
    }

    fn namespace_of(&self, key: EngineKey) -> Option<(Owner, Namespace)> {
        let scheduler = self.engines.table.get(&key)?.scheduler.as_ref()?;
        Some((scheduler.owner, scheduler.namespace?))
    }

    fn lease_for(
        &mut self,
        key: EngineKey,
        hashes: &Hashes,
        now: Instant,
    ) -> (Option<u64>, Vec<u32>) {
        match self.namespace_of(key) {
            Some((owner, namespace)) => self.lease(owner, Some(namespace), &hashes.0, now),
            None => (None, Vec::new()),
        }
    }

    fn turn_started(
        &mut self,
        (key, sequence, turn): (EngineKey, u64, u64),
        (request, identity): (String, Option<String>),
        hashes: &Hashes,
        now: Instant,
    ) {
        let name = identity.and_then(|identity| SessionName::new(&identity).ok());
        let id = self
            .engines
            .table
            .get(&key)
            .and_then(|engine| engine.scheduler.as_ref()?.id);
        // A session that comes from another engine is not wanted there any more.
        let before = name.as_ref().and_then(|name| self.sessions.find(name));
        if let Some(before) = before
            .filter(|s| s.home.is_some_and(|(home, _)| home != key))
            .cloned()
        {
            self.tell_nothing(&before, &[]);
        }
        let started = id.map(|id| self.sessions.turn_started(name, (key, id), &hashes.0, now));
        let session = match started {
            Some(Ok(session)) => Some(session),
            Some(Err(CommandError::TooManySessions)) | None => None,
            Some(Err(error)) => return tracing::error!(%error, "a turn was not counted"),
        };
        if let (Some(session), Some(engine)) = (session, self.engines.table.get_mut(&key)) {
            if let Some(scheduler) = &mut engine.scheduler {
                scheduler.turns.insert(turn, session);
            }
            engine.remember_request(request, session);
        }
        let (lease, slots) = self.lease_for(key, hashes, now);
        let ttl_ms = to_ms(self.config.lease_ttl);
        let session_number = session.map_or(0, |session| session.0);
        let answer = ToEngine::Match {
            turn,
            for_session: false,
            session: session_number,
            lease,
            slots,
            ttl_ms,
        };
        // The match first: it moves what was prefetched for the session to the request, before the want is withdrawn.
        self.engines.send(key, sequence, &answer);
        if let Some(session) = session {
            self.push_want(session, now);
        }
    }

    fn turn_ended(&mut self, key: EngineKey, turn: u64, hashes: &Hashes, now: Instant) {
        let scheduler = self
            .engines
            .table
            .get_mut(&key)
            .and_then(|engine| engine.scheduler.as_mut());
        let Some(session) = scheduler.and_then(|scheduler| scheduler.turns.remove(&turn)) else {
            return;
        };
        self.sessions.turn_ended(session, &hashes.0, now);
        if let (Some((_, namespace)), Some(cut)) = (self.namespace_of(key), &mut self.cut) {
            cut.store.touch(namespace, &hashes.0, now);
        }
        self.push_want(session, now);
    }

    fn reserve(&mut self, key: EngineKey, sequence: u64, hashes: &Hashes, now: Instant) {
        let term = Term {
            now,
            ttl: self.config.lease_ttl,
        };
        let mut answer = ToEngine::Reserved {
            lease: None,
            slots: Vec::new(),
            ttl_ms: to_ms(term.ttl),
        };
        if let (Some((owner, namespace)), Some(cut), None) =
            (self.namespace_of(key), &mut self.cut, &self.drain)
        {
            match cut.store.reserve(owner, namespace, &hashes.0, term) {
                Ok(Some(reservation)) => {
                    let at: HashMap<_, _> = hashes.0.iter().zip(0u32..).collect();
                    let granted = reservation
                        .slots
                        .iter()
                        .filter_map(|(hash, slot)| Some((*at.get(hash)?, slot.0)));
                    answer = ToEngine::Reserved {
                        lease: Some(reservation.id.0),
                        slots: granted.collect(),
                        ttl_ms: to_ms(term.ttl),
                    };
                    self.count(reservation.effects);
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "no slots reserved"),
            }
        }
        self.engines.send(key, sequence, &answer);
    }

    fn settle(&mut self, key: EngineKey, lease: LeaseId, commit: bool, now: Instant) {
        if kvstore::fault!("actor::settle::lost") {
            return;
        }
        let (Some(owner), Some(cut)) = (self.engines.owner(key), &mut self.cut) else {
            return;
        };
        let settled = if commit {
            cut.store.commit(owner, lease, now)
        } else {
            cut.store.abort(owner, lease)
        };
        match settled {
            Ok(effects) => self.count(effects),
            Err(error) => {
                tracing::info!(%error, lease = lease.0, "a save came too late and was dropped")
            }
        }
    }

    /// Weights have changed or the engine slept: the namespace's content is void for everybody who uses it.
    fn reset(&mut self, key: EngineKey) {
        let Some((_, namespace)) = self.namespace_of(key) else {
            return;
        };
        let Some(cut) = &mut self.cut else { return };
        let (fresh, effects) = cut.store.reset_namespace(namespace);
        self.count(effects);
        let id = self
            .engines
            .table
            .get(&key)
            .and_then(|engine| engine.scheduler.as_ref()?.id);
        let Some(id) = id else { return };
        self.engines.namespaces.insert(id, fresh);
        let same = self
            .engines
            .table
            .values_mut()
            .filter_map(|engine| engine.scheduler.as_mut());
        same.filter(|scheduler| scheduler.id == Some(id))
            .for_each(|scheduler| scheduler.namespace = Some(fresh));
        for session in self.sessions.forget_chains(id) {
            self.forget_want(session);
        }
    }

    fn figures(&mut self, key: EngineKey, figures: &Figures) {
        if let Some(engine) = self.engines.table.get_mut(&key) {
            engine.gpu_free = figures.gpu_free;
        }
        let metrics = &self.shared.metrics;
        for copy in &figures.copies {
            let (direction, cause) = match copy.kind {
                CopyClass::Demand => (CopyDirection::HostToDevice, CopyCause::Demand),
                CopyClass::Prefetch => (CopyDirection::HostToDevice, CopyCause::Prefetch),
                CopyClass::Save => (CopyDirection::DeviceToHost, CopyCause::Save),
            };
            if copy.ok {
                let took = Duration::from_micros(copy.micros);
                metrics.copied(direction, cause, copy.bytes, took);
            } else {
                metrics.copy_failed(direction, cause);
            }
        }
        for sample in &figures.hooks {
            let hook = match sample.hook {
                Hook::TurnStarted => metrics::Hook::TurnStarted,
                Hook::MatchPrefix => metrics::Hook::MatchPrefix,
                Hook::Plan => metrics::Hook::Plan,
                Hook::CopiesDone => metrics::Hook::CopiesDone,
                Hook::TurnEnded => metrics::Hook::TurnEnded,
            };
            metrics.hook(hook, Duration::from_micros(u64::from(sample.micros)));
        }
        metrics.hook_timeouts(figures.timeouts);
        metrics.fenced(figures.fenced);
        metrics.match_blocks(figures.match_hits, figures.match_misses);
        for (end, blocks) in [
            (PrefetchEnd::Used, figures.prefetch_used),
            (PrefetchEnd::Wasted, figures.prefetch_wasted),
            (PrefetchEnd::Late, figures.prefetch_late),
            (PrefetchEnd::Cancelled, figures.prefetch_cancelled),
        ] {
            metrics.prefetch_blocks(end, blocks);
        }
    }
}
