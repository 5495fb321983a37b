//! Sessions: who is in a turn, who waits for a tool, and how much each one's KV is wanted on the GPU.
//!
//! Owns the session table and the tool statistics. Takes `now`, returns values; never touches the store or an engine.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use kvstore::{BlockHash, NamespaceId};

use super::durations::{Durations, is_human};
use crate::commands::{CommandError, SessionName, ToolEnd, ToolProgress, ToolStart};
use crate::engine::frames::{Residence, Wish};

/// Parallel tool calls of one session.
pub const CALLS_MAX: usize = 64;
/// How long after a turn its blocks are held when nobody said what comes next.
const HOLD_UNKNOWN: Duration = Duration::from_secs(2);
/// Longest hold (policy: the fast head of the tool distribution; the rest is brought back by event).
const HOLD_MAX: Duration = Duration::from_secs(10);
/// How long a session that is due stays wanted when its request does not come.
const DUE_MAX: Duration = Duration::from_secs(30);

/// Names a session inside the sidecar and on the engine protocol; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey(pub u64);

/// Names an engine connection's owner inside the sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineKey(pub u64);

/// A running tool call.
#[derive(Clone, Debug)]
struct Call {
    id: Option<String>,
    tool: String,
    started: Instant,
    /// The client's word on when it ends.
    due: Option<Instant>,
}

/// Why a session that runs no tool is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// Nothing is known.
    Unknown,
    /// Its tools have ended, or a hint said so: the next request is due.
    Due {
        /// When it was said.
        since: Instant,
        /// When it is expected.
        at: Instant,
        /// See [`Want::priority`].
        priority: i32,
    },
}

/// One agent run or conversation.
#[derive(Clone, Debug)]
pub struct Session {
    /// Its key.
    pub key: SessionKey,
    /// Its name; made up for sessions that no client named.
    pub name: SessionName,
    /// The engine and namespace of its last turn.
    pub home: Option<(EngineKey, NamespaceId)>,
    /// Full blocks of its last turn.
    pub chain: Vec<BlockHash>,
    /// How many of them were prompt.
    pub prompt_blocks: usize,
    /// Turns so far.
    pub turns: u64,
    /// Where its blocks are, as the engine last said.
    pub residence: Residence,
    /// Leading blocks on the GPU, as the engine last said.
    pub gpu_blocks: u64,
    running: u32,
    turn_ended: Option<Instant>,
    calls: Vec<Call>,
    expected: Expected,
    last_used: Instant,
}

/// What an engine should do for one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// How much.
    pub wish: Wish,
    /// Order among sessions that are due, higher first; in thousandths.
    pub priority: i32,
    /// When it is expected back.
    pub expected: Option<Instant>,
    /// How long from now its blocks should be held.
    pub hold: Duration,
}

impl Session {
    /// Whether a request of it is being served.
    pub fn is_active(&self) -> bool {
        self.running > 0
    }

    /// The tool that it waits for, if any; the first of several.
    pub fn tool(&self) -> Option<&str> {
        self.calls.first().map(|call| call.tool.as_str())
    }

    /// The state that the API shows.
    pub fn state(&self) -> &'static str {
        if self.is_active() {
            return "active";
        }
        match (self.home, self.residence) {
            (None, _) => "new",
            (_, Residence::Hold) => "hold",
            (_, Residence::Shadow) => "shadow",
            (_, Residence::Host) => "host",
            (_, Residence::Loading) => "loading",
            (_, Residence::Ready) => "ready",
        }
    }

    fn waits_for_person(&self) -> bool {
        self.calls.iter().any(|call| is_human(&call.tool))
    }
}

/// The session table.
#[derive(Debug)]
pub struct Sessions {
    /// Sessions remembered; beyond it the least recently used one goes, first those that wait for nothing.
    limit: usize,
    table: HashMap<SessionKey, Session>,
    names: HashMap<SessionName, SessionKey>,
    /// Last full prompt block → session, for requests that name no session.
    prompts: HashMap<BlockHash, SessionKey>,
    durations: Durations,
    next_key: u64,
    evicted: Vec<Session>,
}

impl Sessions {
    /// An empty table for at most `limit` sessions.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            table: HashMap::new(),
            names: HashMap::new(),
            prompts: HashMap::new(),
            durations: Durations::default(),
            next_key: 0,
            evicted: Vec::new(),
        }
    }

    /// Sessions that had to go for others since the last call: engines may have been told of them.
    pub fn take_evicted(&mut self) -> Vec<Session> {
        std::mem::take(&mut self.evicted)
    }

    /// The session of that key.
    pub fn get(&self, key: SessionKey) -> Option<&Session> {
        self.table.get(&key)
    }

    /// The session of that name.
    pub fn find(&self, name: &SessionName) -> Option<&Session> {
        self.table.get(self.names.get(name)?)
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Session> {
        self.table.values()
    }

    /// A request began. Without a name it joins the session whose last prompt is the longest prefix of this one and
    /// which is not in a turn, else it begins a session of its own.
    ///
    /// # Errors
    /// [`CommandError::TooManySessions`] when all that are remembered are in use.
    pub fn turn_started(
        &mut self,
        name: Option<SessionName>,
        home: (EngineKey, NamespaceId),
        chain: &[BlockHash],
        now: Instant,
    ) -> Result<SessionKey, CommandError> {
        let found = match &name {
            Some(name) => self.names.get(name).copied(),
            None => self.longest_prompt(home.1, chain),
        };
        let key = match found {
            Some(key) => key,
            None => self.create(name, now)?,
        };
        self.unlink_prompt(key);
        if let Some(session) = self.table.get_mut(&key) {
            session.home = Some(home);
            session.chain = chain.to_vec();
            session.prompt_blocks = chain.len();
            session.running += 1;
            session.turns += 1;
            session.calls.clear();
            session.expected = Expected::Unknown;
            session.last_used = now;
        }
        if let Some(last) = chain.last() {
            self.prompts.insert(*last, key);
        }
        Ok(key)
    }

    /// A request ended with these full blocks.
    pub fn turn_ended(&mut self, key: SessionKey, chain: &[BlockHash], now: Instant) {
        let Some(session) = self.table.get_mut(&key) else {
            return;
        };
        session.running = session.running.saturating_sub(1);
        // A request that was aborted early computed less than its prompt: the session is no shorter for that.
        if chain.len() >= session.prompt_blocks {
            session.chain = chain.to_vec();
        }
        session.turn_ended = Some(now);
        session.last_used = now;
        session.residence = Residence::Hold;
        session.gpu_blocks = u64::try_from(chain.len()).unwrap_or(u64::MAX);
    }

    /// An engine is gone: its sessions are in no turn any more and have nothing on the GPU.
    pub fn engine_left(&mut self, engine: EngineKey) {
        for session in self
            .table
            .values_mut()
            .filter(|s| s.home.is_some_and(|(home, _)| home == engine))
        {
            session.running = 0;
            session.residence = Residence::Host;
            session.gpu_blocks = 0;
        }
    }

    /// Sessions of an engine's last turns.
    pub fn of_engine(&self, engine: EngineKey) -> impl Iterator<Item = SessionKey> {
        let at_home = move |s: &&Session| s.home.is_some_and(|(home, _)| home == engine);
        self.table.values().filter(at_home).map(|s| s.key)
    }

    /// Hands the sessions of a namespace whose engine is not among the `connected` to another; returns them.
    pub fn rehome(
        &mut self,
        id: NamespaceId,
        to: EngineKey,
        connected: &HashSet<EngineKey>,
    ) -> Vec<SessionKey> {
        let orphans = self.table.values_mut().filter_map(|session| {
            let (engine, namespace) = session.home?;
            if namespace != id || (engine != to && connected.contains(&engine)) {
                return None;
            }
            session.home = Some((to, id));
            Some(session.key)
        });
        orphans.collect()
    }

    /// A namespace was reset: its chains name nothing any more. Returns the sessions concerned.
    pub fn forget_chains(&mut self, id: NamespaceId) -> Vec<SessionKey> {
        let keys: Vec<SessionKey> = self
            .table
            .values()
            .filter(|s| s.home.is_some_and(|(_, home)| home == id))
            .map(|s| s.key)
            .collect();
        for key in &keys {
            self.unlink_prompt(*key);
            if let Some(session) = self.table.get_mut(key).filter(|s| !s.is_active()) {
                session.chain.clear();
                session.prompt_blocks = 0;
                session.gpu_blocks = 0;
                session.residence = Residence::Host;
            }
        }
        keys
    }

    /// A chain that a client names by its hashes becomes a session that has had its turn.
    ///
    /// # Errors
    /// [`CommandError::TooManySessions`].
    pub fn adopt(
        &mut self,
        name: SessionName,
        home: (EngineKey, NamespaceId),
        chain: &[BlockHash],
        now: Instant,
    ) -> Result<SessionKey, CommandError> {
        let key = match self.names.get(&name) {
            Some(key) => *key,
            None => self.create(Some(name), now)?,
        };
        if let Some(session) = self.table.get_mut(&key) {
            session.home = Some(home);
            session.chain = chain.to_vec();
            session.last_used = now;
        }
        Ok(key)
    }

    /// The engine's news of a session.
    pub fn moved(&mut self, key: SessionKey, residence: Residence, gpu_blocks: u64) {
        if let Some(session) = self.table.get_mut(&key) {
            session.residence = residence;
            session.gpu_blocks = gpu_blocks;
        }
    }

    /// A tool began; an unknown session is created.
    ///
    /// # Errors
    /// [`CommandError::TooManySessions`], [`CommandError::TooManyCalls`].
    pub fn tool_start(
        &mut self,
        name: &SessionName,
        start: ToolStart,
        now: Instant,
    ) -> Result<SessionKey, CommandError> {
        let key = match self.names.get(name) {
            Some(key) => *key,
            None => self.create(Some(name.clone()), now)?,
        };
        let session = self
            .table
            .get_mut(&key)
            .ok_or(CommandError::UnknownSession)?;
        // The same call said twice is one call: a harness may retry.
        session
            .calls
            .retain(|call| call.id.is_none() || call.id != start.call_id);
        if session.calls.len() == CALLS_MAX {
            return Err(CommandError::TooManyCalls);
        }
        let due = start.eta.map(|eta| now + eta);
        session.calls.push(Call {
            id: start.call_id,
            tool: start.tool,
            started: now,
            due,
        });
        session.expected = Expected::Unknown;
        session.last_used = now;
        Ok(key)
    }

    /// News of a running tool.
    ///
    /// # Errors
    /// [`CommandError::UnknownSession`], [`CommandError::UnknownCall`].
    pub fn tool_progress(
        &mut self,
        name: &SessionName,
        progress: &ToolProgress,
        now: Instant,
    ) -> Result<SessionKey, CommandError> {
        let key = *self.names.get(name).ok_or(CommandError::UnknownSession)?;
        let session = self
            .table
            .get_mut(&key)
            .ok_or(CommandError::UnknownSession)?;
        let call = session
            .calls
            .iter_mut()
            .rev()
            .find(|call| progress.call_id.is_none() || call.id == progress.call_id)
            .ok_or(CommandError::UnknownCall)?;
        if let Some(eta) = progress.eta {
            call.due = Some(now + eta);
        } else if let Some(fraction) = progress.fraction.filter(|f| *f > 0.0) {
            // Remaining = e·(1 − p)/p: the work so far extrapolated.
            let elapsed = now.saturating_duration_since(call.started);
            call.due = Some(now + elapsed.mul_f64(((1.0 - fraction) / fraction).clamp(0.0, 1e6)));
        }
        session.last_used = now;
        Ok(key)
    }

    /// A tool ended. With the last one the session is due.
    ///
    /// # Errors
    /// [`CommandError::UnknownSession`], [`CommandError::UnknownCall`].
    pub fn tool_end(
        &mut self,
        name: &SessionName,
        end: &ToolEnd,
        now: Instant,
    ) -> Result<SessionKey, CommandError> {
        let key = *self.names.get(name).ok_or(CommandError::UnknownSession)?;
        let session = self
            .table
            .get_mut(&key)
            .ok_or(CommandError::UnknownSession)?;
        let at = session
            .calls
            .iter()
            .rposition(|call| end.call_id.is_none() || call.id == end.call_id);
        match at {
            Some(at) => {
                let call = session.calls.remove(at);
                self.durations
                    .observe(&call.tool, now.saturating_duration_since(call.started));
            }
            // An end without a start still says that the agent comes back; an unknown id among known ones does not.
            None if end.call_id.is_none() && !session.is_active() => {}
            None => return Err(CommandError::UnknownCall),
        }
        if session.calls.is_empty() {
            session.expected = Expected::Due {
                since: now,
                at: now,
                priority: 0,
            };
        }
        session.last_used = now;
        Ok(key)
    }

    /// A prefetch hint: the session is due in `eta`, and comes before others of a lower `priority`.
    pub fn expect(&mut self, key: SessionKey, eta: Duration, priority: i32, now: Instant) {
        if let Some(session) = self.table.get_mut(&key) {
            session.expected = Expected::Due {
                since: now,
                at: now + eta,
                priority,
            };
            session.last_used = now;
        }
    }

    /// A retain hint: the session counts as just used.
    pub fn retain(&mut self, key: SessionKey, now: Instant) {
        if let Some(session) = self.table.get_mut(&key) {
            session.last_used = now;
        }
    }

    /// Forgets a session; returns it and how many of its leading blocks another session shares.
    pub fn retire(&mut self, key: SessionKey) -> Option<(Session, usize)> {
        self.unlink_prompt(key);
        let session = self.table.remove(&key)?;
        self.names.remove(&session.name);
        let namespace = session.home.map(|(_, namespace)| namespace);
        let shared = self
            .table
            .values()
            .filter(|other| other.home.map(|(_, namespace)| namespace) == namespace)
            .map(|other| common_prefix(&session.chain, &other.chain))
            .max()
            .unwrap_or(0);
        Some((session, shared))
    }

    /// When the session is expected back; `None` when nobody knows or a person is asked.
    pub fn expected_return(&self, key: SessionKey, now: Instant) -> Option<Instant> {
        let session = self.table.get(&key)?;
        if session.waits_for_person() {
            return None;
        }
        // Parallel calls: the session returns with the last of them.
        let of_calls = session.calls.iter().map(|call| {
            call.due.unwrap_or_else(|| {
                now + self
                    .durations
                    .remaining(&call.tool, now.saturating_duration_since(call.started))
            })
        });
        match session.expected {
            Expected::Due { at, .. } => Some(at),
            Expected::Unknown => of_calls.max(),
        }
    }

    /// What the engine should do for it now.
    pub fn want(&self, key: SessionKey, now: Instant) -> Want {
        const NOTHING: Want = Want {
            wish: Wish::Nothing,
            priority: 0,
            expected: None,
            hold: Duration::ZERO,
        };
        /// Neither held nor brought back; the engine says when its blocks are gone.
        const LOOKED_AFTER: Want = Want {
            wish: Wish::Keep,
            ..NOTHING
        };
        let Some(session) = self
            .table
            .get(&key)
            .filter(|s| !s.is_active() && s.home.is_some() && !s.chain.is_empty())
        else {
            return NOTHING;
        };
        let since_turn = session
            .turn_ended
            .map_or(HOLD_MAX, |at| now.saturating_duration_since(at));
        let hold = |longest: Duration| longest.saturating_sub(since_turn);
        match session.expected {
            Expected::Due {
                since,
                at,
                priority,
            } => {
                if now.saturating_duration_since(since.max(at)) >= DUE_MAX {
                    return LOOKED_AFTER;
                }
                Want {
                    wish: Wish::Now,
                    priority,
                    expected: Some(at),
                    hold: at.saturating_duration_since(now) + HOLD_MAX,
                }
            }
            Expected::Unknown if session.waits_for_person() => LOOKED_AFTER,
            Expected::Unknown if !session.calls.is_empty() => Want {
                wish: Wish::WhenRoom,
                priority: 0,
                expected: self.expected_return(key, now),
                hold: hold(HOLD_MAX),
            },
            Expected::Unknown => Want {
                wish: Wish::Keep,
                priority: 0,
                expected: None,
                hold: hold(HOLD_UNKNOWN),
            },
        }
    }

    /// When a want changes by the mere passing of time: the end of a due session's patience.
    pub fn next_change(&self, key: SessionKey) -> Option<Instant> {
        match self.table.get(&key)?.expected {
            Expected::Due { since, at, .. } => Some(since.max(at) + DUE_MAX),
            Expected::Unknown => None,
        }
    }

    fn longest_prompt(&self, namespace: NamespaceId, chain: &[BlockHash]) -> Option<SessionKey> {
        chain.iter().rev().find_map(|hash| {
            let session = self.table.get(self.prompts.get(hash)?)?;
            let fits =
                !session.is_active() && session.home.is_some_and(|(_, home)| home == namespace);
            fits.then_some(session.key)
        })
    }

    fn unlink_prompt(&mut self, key: SessionKey) {
        let last = self
            .table
            .get(&key)
            .and_then(|s| s.chain.get(s.prompt_blocks.checked_sub(1)?).copied());
        if let Some(last) = last
            && self.prompts.get(&last) == Some(&key)
        {
            self.prompts.remove(&last);
        }
    }

    fn create(
        &mut self,
        name: Option<SessionName>,
        now: Instant,
    ) -> Result<SessionKey, CommandError> {
        if self.table.len() >= self.limit {
            // First who waits for nothing; then whoever was heard of least recently: calls may never end.
            let idle = self.table.values().filter(|s| !s.is_active());
            let oldest = idle
                .min_by_key(|s| (!s.calls.is_empty(), s.last_used))
                .map(|s| s.key)
                .ok_or(CommandError::TooManySessions)?;
            let evicted = self.retire(oldest).map(|(session, _)| session);
            self.evicted.extend(evicted);
        }
        self.next_key += 1;
        let key = SessionKey(self.next_key);
        let name = match name {
            Some(name) => name,
            None => SessionName::new(&format!("unnamed-{}", key.0))
                .map_err(|_| CommandError::UnknownSession)?,
        };
        self.names.insert(name.clone(), key);
        self.table.insert(
            key,
            Session {
                key,
                name,
                home: None,
                chain: Vec::new(),
                prompt_blocks: 0,
                turns: 0,
                residence: Residence::Host,
                gpu_blocks: 0,
                running: 0,
                turn_ended: None,
                calls: Vec::new(),
                expected: Expected::Unknown,
                last_used: now,
            },
        );
        Ok(key)
    }
}

/// Length of the longest common prefix of two hash chains: equal at a position means equal before it.
fn common_prefix(a: &[BlockHash], b: &[BlockHash]) -> usize {
    let (mut low, mut high) = (0, a.len().min(b.len()));
    while low < high {
        let middle = low.midpoint(high);
        if a[middle] == b[middle] {
            low = middle + 1
        } else {
            high = middle
        }
    }
    low
}

#[cfg(test)]
mod tests;
