//! Hints: what clients ask for a session's KV, answered with what really became of it.
//!
//! A prefetch is answered by the engine. Until then the envelope stays open, with a deadline; after it the truth is that
//! the engine has not got round to it: `deferred`.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use kvstore::{BlockHash, Namespace, PIN_TTL_MAX, PinId, Term};
use sha2::{Digest, Sha256};

use super::handle::{Reply, Shared};
use super::{Actor, answer, count};
use crate::commands::{
    ActionResult, CompatItem, CompatResult, HintAction, HintEnvelope, HintVerb, Outcome,
    SessionName, Target,
};
use crate::engine::frames::{WantOutcome, Wish};
use crate::planner::sessions::SessionKey;

/// How long an engine may take to say what it did about a prefetch.
const OUTCOME_WAIT: Duration = Duration::from_millis(100);
/// Envelopes whose answers are remembered, so that a repeated message is answered alike.
const REMEMBERED_MAX: usize = 4096;
/// How long a pin lasts if the hint does not say.
const PIN_TTL: Duration = Duration::from_secs(300);
/// Pins of one session or chain.
const PINS_PER_TARGET: usize = 16;
/// Sessions or chains with pins.
const PINNED_MAX: usize = 4096;
/// Why an action on stored blocks did nothing.
const NOT_STORED: &str = "nothing of it is stored";

/// An envelope or a BatchAgent call that waits for engines.
struct Open {
    asker: Asker,
    results: Vec<ActionResult>,
    pairs: Vec<Vec<(u32, u32)>>,
    missing: usize,
    deadline: Instant,
}

/// Who waits for the results.
pub(super) enum Asker {
    /// A client's envelope.
    Envelope {
        message_id: String,
        replies: Vec<Reply<Vec<ActionResult>>>,
    },
    /// BatchAgent.
    Compat {
        keys: Vec<String>,
        reply: Reply<Vec<CompatResult>>,
    },
    /// An envelope that came with a request: nobody waits.
    Nobody,
}

/// Results on their way to whoever asked.
pub(super) struct Results {
    results: Vec<ActionResult>,
    pairs: Vec<Vec<(u32, u32)>>,
    verbs: Vec<HintVerb>,
}

/// One pin that was taken.
struct Pin {
    id: PinId,
    blocks: u64,
    expires: Instant,
}

/// What pins were taken for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Pinned {
    Session(SessionKey),
    Chain(BlockHash),
}

/// Open and remembered hints.
#[derive(Default)]
pub(super) struct Hints {
    open: HashMap<u64, Open>,
    next: u64,
    /// Engine answers that are awaited: (session, want) → (envelope, action).
    awaited: HashMap<(SessionKey, u64), Vec<(u64, usize)>>,
    verbs: HashMap<u64, Vec<HintVerb>>,
    remembered: HashMap<String, Remembered>,
    order: VecDeque<String>,
    pins: HashMap<Pinned, Vec<Pin>>,
}

enum Remembered {
    Open(u64),
    Done(Vec<ActionResult>),
}

impl Hints {
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.open.values().map(|open| open.deadline).min()
    }

    /// Blocks pinned for a session.
    pub(super) fn pinned(&self, session: SessionKey) -> u64 {
        self.pins
            .get(&Pinned::Session(session))
            .map_or(0, |pins| pins.iter().map(|pin| pin.blocks).sum())
    }

    /// Envelopes whose engines have not answered in time.
    pub(super) fn overdue(&mut self, now: Instant) -> Vec<(Asker, Results)> {
        let late: Vec<u64> = self
            .open
            .iter()
            .filter(|(_, open)| open.deadline <= now)
            .map(|(id, _)| *id)
            .collect();
        late.into_iter().filter_map(|id| self.close(id)).collect()
    }

    /// Takes an envelope off the table and remembers its answer.
    fn close(&mut self, id: u64) -> Option<(Asker, Results)> {
        let open = self.open.remove(&id)?;
        let verbs = self.verbs.remove(&id).unwrap_or_default();
        self.awaited.retain(|_, who| {
            who.retain(|(envelope, _)| *envelope != id);
            !who.is_empty()
        });
        if let Asker::Envelope { message_id, .. } = &open.asker {
            self.remembered
                .insert(message_id.clone(), Remembered::Done(open.results.clone()));
        }
        Some((
            open.asker,
            Results {
                results: open.results,
                pairs: open.pairs,
                verbs,
            },
        ))
    }

    fn remember(&mut self, message_id: &str, id: u64) {
        if self.order.len() >= REMEMBERED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.remembered.remove(&oldest);
        }
        self.order.push_back(message_id.to_owned());
        self.remembered
            .insert(message_id.to_owned(), Remembered::Open(id));
    }
}

impl Shared {
    /// Counts the outcomes and answers whoever asked.
    pub(super) fn answer_hints(&self, asker: Asker, done: Results) {
        for (result, verb) in done.results.iter().zip(&done.verbs) {
            self.metrics.hint(Some(*verb), result.outcome);
        }
        match asker {
            Asker::Envelope { replies, .. } => {
                for reply in replies {
                    answer(reply, Ok(done.results.clone()));
                }
            }
            Asker::Compat { keys, reply } => {
                let results = keys.into_iter().zip(done.results).zip(done.pairs);
                let results = results.map(|((kv_key, result), pairs)| CompatResult {
                    kv_key,
                    outcome: result.outcome,
                    pairs,
                });
                answer(reply, Ok(results.collect()));
            }
            Asker::Nobody => {}
        }
    }
}

impl Actor {
    /// A client's envelope. A message that was seen before is answered as it was the first time.
    pub(super) fn hint(
        &mut self,
        envelope: HintEnvelope,
        reply: Reply<Vec<ActionResult>>,
        now: Instant,
    ) {
        match self.hints.remembered.get(&envelope.message_id) {
            Some(Remembered::Done(results)) => return answer(reply, Ok(results.clone())),
            Some(Remembered::Open(id)) => {
                if let Some(Open {
                    asker: Asker::Envelope { replies, .. },
                    ..
                }) = self.hints.open.get_mut(id)
                {
                    replies.push(reply);
                    return;
                }
            }
            None => {}
        }
        let message_id = envelope.message_id;
        self.hints.remember(&message_id, self.hints.next + 1);
        self.open(
            Asker::Envelope {
                message_id,
                replies: vec![reply],
            },
            envelope.actions,
            now,
        );
    }

    /// An envelope that came with a request.
    pub(super) fn engine_hint(&mut self, json: &str, now: Instant) {
        match crate::api::parse::envelope(json.as_bytes()) {
            Ok(envelope) => self.open(Asker::Nobody, envelope.command.actions, now),
            // The text may quote what the client wrote.
            Err(error) => {
                tracing::info!(
                    code = error.code().0,
                    "a request's hints were not understood"
                );
                tracing::debug!(%error, "what was wrong with them");
            }
        }
    }

    /// BatchAgent's prefetch: each item names a session, or nothing that we know.
    pub(super) fn prefetch_compat(
        &mut self,
        items: &[CompatItem],
        reply: Reply<Vec<CompatResult>>,
        now: Instant,
    ) {
        let keys = items.iter().map(|item| item.kv_key.clone()).collect();
        let actions = items
            .iter()
            .map(|item| compat_action(item, HintVerb::Prefetch))
            .collect();
        self.open(Asker::Compat { keys, reply }, actions, now);
    }

    /// BatchAgent's pin.
    pub(super) fn pin_compat(&mut self, items: &[CompatItem], now: Instant) -> Vec<CompatResult> {
        let of = |item: &CompatItem| compat_action(item, HintVerb::Pin);
        let outcomes: Vec<Outcome> = items
            .iter()
            .map(|item| self.act(&of(item), now).0.outcome)
            .collect();
        for outcome in &outcomes {
            self.shared.metrics.hint(Some(HintVerb::Pin), *outcome);
        }
        let results = items.iter().zip(outcomes);
        results
            .map(|(item, outcome)| CompatResult {
                kv_key: item.kv_key.clone(),
                outcome,
                pairs: Vec::new(),
            })
            .collect()
    }

    fn open(&mut self, asker: Asker, actions: Vec<HintAction>, now: Instant) {
        self.hints.next += 1;
        let id = self.hints.next;
        let mut open = Open {
            asker,
            results: Vec::with_capacity(actions.len()),
            pairs: vec![Vec::new(); actions.len()],
            missing: 0,
            deadline: now + OUTCOME_WAIT,
        };
        for (index, action) in actions.iter().enumerate() {
            let (result, awaited) = self.act(action, now);
            open.results.push(result);
            if let Some(awaited) = awaited {
                open.missing += 1;
                self.hints
                    .awaited
                    .entry(awaited)
                    .or_default()
                    .push((id, index));
            }
        }
        let complete = open.missing == 0;
        self.hints.open.insert(id, open);
        self.hints
            .verbs
            .insert(id, actions.iter().map(|action| action.verb).collect());
        if complete {
            self.finish_hints(id);
        }
    }

    fn finish_hints(&mut self, id: u64) {
        if let Some((asker, results)) = self.hints.close(id) {
            self.shared.answer_hints(asker, results);
        }
    }

    /// An engine says what became of a want.
    pub(super) fn wanted(
        &mut self,
        session: SessionKey,
        want: u64,
        (outcome, blocks): (WantOutcome, u32),
        pairs: &[(u32, u32)],
    ) {
        let Some(awaited) = self.hints.awaited.remove(&(session, want)) else {
            return;
        };
        let (outcome, detail) = match outcome {
            WantOutcome::Accepted => (Outcome::Accepted, ""),
            WantOutcome::Clipped => (
                Outcome::Clipped,
                "part of it is on its way; the rest when there is room",
            ),
            WantOutcome::Deferred => (Outcome::Deferred, "no room in the engine's pool now"),
            WantOutcome::Missing => (Outcome::Missing, "neither tier has it any more"),
        };
        for (id, index) in awaited {
            let Some(open) = self.hints.open.get_mut(&id) else {
                continue;
            };
            if let Some(result) = open.results.get_mut(index) {
                (result.outcome, result.detail, result.blocks) =
                    (outcome, detail.to_owned(), Some(u64::from(blocks)));
            }
            if let Some(slot) = open.pairs.get_mut(index) {
                *slot = pairs.to_vec();
            }
            open.missing -= 1;
            if open.missing == 0 {
                self.finish_hints(id);
            }
        }
    }

    /// Carries an action out. The second part says whose engine answer the result waits for; until then it says
    /// `deferred`.
    fn act(
        &mut self,
        action: &HintAction,
        now: Instant,
    ) -> (ActionResult, Option<(SessionKey, u64)>) {
        let say = |outcome, detail: &str, blocks| ActionResult {
            action_id: action.action_id.clone(),
            outcome,
            detail: detail.to_owned(),
            blocks,
        };
        let Some((key, chain, namespace)) = self.resolve(&action.target, action.verb, now) else {
            return (
                say(
                    Outcome::Missing,
                    "no session, request or stored blocks of that name",
                    None,
                ),
                None,
            );
        };
        let found = |any: bool, blocks: u64, nothing: &str| {
            let (outcome, detail) = if any {
                (Outcome::Accepted, "")
            } else {
                (Outcome::Missing, nothing)
            };
            (say(outcome, detail, Some(blocks)), None)
        };
        match action.verb {
            HintVerb::Prefetch => match key {
                Some(key) => self.prefetch(key, action, now),
                None => (
                    say(Outcome::Missing, "no engine to bring the blocks to", None),
                    None,
                ),
            },
            HintVerb::Pin => (self.pin((key, &chain, namespace), action, now), None),
            HintVerb::Unpin => {
                let broken = self.unpin(&pinned_as(key, &chain));
                found(broken > 0, broken, "nothing was pinned")
            }
            HintVerb::Retain => {
                if let Some(key) = key {
                    self.sessions.retain(key, now);
                }
                let stored = self.with_store(namespace, |store, namespace| {
                    store.touch(namespace, &chain, now);
                    store.match_prefix(namespace, &chain)
                });
                // A session counts as used even while nothing of it is stored.
                found(key.is_some() || stored > 0, count(stored), NOT_STORED)
            }
            HintVerb::Demote => {
                let demoted = self.with_store(namespace, |store, namespace| {
                    store.demote(namespace, &chain)
                });
                found(demoted > 0, count(demoted), NOT_STORED)
            }
        }
    }

    fn prefetch(
        &mut self,
        key: SessionKey,
        action: &HintAction,
        now: Instant,
    ) -> (ActionResult, Option<(SessionKey, u64)>) {
        let say = |outcome, detail: &str| ActionResult {
            action_id: action.action_id.clone(),
            outcome,
            detail: detail.to_owned(),
            blocks: None,
        };
        let session = self.sessions.get(key);
        if session.is_some_and(crate::planner::sessions::Session::is_active) {
            return (
                say(
                    Outcome::Accepted,
                    "a request of this session is being served",
                ),
                None,
            );
        }
        let engine = session.and_then(|session| session.home);
        if engine.is_none_or(|(engine, _)| self.engines.owner(engine).is_none()) {
            return (
                say(
                    Outcome::Missing,
                    "no connected engine has served this session",
                ),
                None,
            );
        }
        let eta = action.eta.unwrap_or_default();
        self.sessions.expect(key, eta, action.priority, now);
        // Asked for again before the engine has answered: one answer serves all.
        let told = self
            .wants
            .get(&key)
            .filter(|told| told.wish == Wish::Now)
            .map(|told| told.number);
        let number = told
            .filter(|number| self.hints.awaited.contains_key(&(key, *number)))
            .or_else(|| self.push_want_numbered(key, now));
        match number {
            Some(number) => (
                say(
                    Outcome::Deferred,
                    "the engine is busy and has not answered yet",
                ),
                Some((key, number)),
            ),
            None => (
                say(
                    Outcome::Missing,
                    "no connected engine has served this session",
                ),
                None,
            ),
        }
    }

    fn pin(
        &mut self,
        (key, chain, namespace): (Option<SessionKey>, &[BlockHash], Option<Namespace>),
        action: &HintAction,
        now: Instant,
    ) -> ActionResult {
        // Those whose time was up are gone in the store already.
        self.hints.pins.retain(|_, pins| {
            pins.retain(|pin| pin.expires > now);
            !pins.is_empty()
        });
        let what = pinned_as(key, chain);
        let taken = self.hints.pins.get(&what).map_or(0, Vec::len);
        let full = taken >= PINS_PER_TARGET || (taken == 0 && self.hints.pins.len() >= PINNED_MAX);
        let term = Term {
            now,
            ttl: action.ttl.unwrap_or(PIN_TTL),
        };
        let done = match (&mut self.cut, namespace) {
            (Some(cut), Some(namespace)) if !full => Some(cut.store.pin(namespace, chain, term)),
            _ => None,
        };
        let (pinned, clipped) = done
            .as_ref()
            .map_or((0, 0), |done| (done.pinned, done.clipped));
        if let Some(id) = done.and_then(|done| done.id) {
            self.hints.pins.entry(what).or_default().push(Pin {
                id,
                blocks: count(pinned),
                expires: now + term.ttl.min(PIN_TTL_MAX),
            });
        }
        let (outcome, detail) = match (pinned, clipped) {
            _ if full => (Outcome::Rejected, "too many pins: unpin something first"),
            (0, 0) => (Outcome::Missing, "nothing of it is stored"),
            (pinned, _) if pinned == chain.len() => (Outcome::Accepted, ""),
            (_, 0) => (Outcome::Clipped, "the rest is not stored"),
            _ => (Outcome::Clipped, "the pin budget is used up"),
        };
        ActionResult {
            action_id: action.action_id.clone(),
            outcome,
            detail: detail.to_owned(),
            blocks: Some(count(pinned)),
        }
    }

    /// Takes a session's pins back.
    pub(super) fn unpin_session(&mut self, key: SessionKey) {
        self.unpin(&Pinned::Session(key));
    }

    /// Ends everybody's pins; returns how many there were.
    pub(super) fn break_pins(&mut self) -> u64 {
        self.hints.pins.clear();
        let Some(cut) = &mut self.cut else { return 0 };
        let effects = cut.store.break_pins();
        self.count(effects);
        count(effects.voided_pins)
    }

    fn unpin(&mut self, what: &Pinned) -> u64 {
        let pins = self.hints.pins.remove(what).unwrap_or_default();
        let mut blocks = 0;
        for pin in pins {
            if let Some(cut) = &mut self.cut
                && let Ok(effects) = cut.store.unpin(pin.id)
            {
                self.count(effects);
                blocks += pin.blocks;
            }
        }
        blocks
    }

    fn with_store(
        &mut self,
        namespace: Option<Namespace>,
        f: impl FnOnce(&mut kvstore::Store, Namespace) -> usize,
    ) -> usize {
        match (&mut self.cut, namespace) {
            (Some(cut), Some(namespace)) => f(&mut cut.store, namespace),
            _ => 0,
        }
    }

    /// The session, chain and namespace that a target means. Blocks that are to be prefetched become a session of their
    /// own on the one engine that there is.
    fn resolve(
        &mut self,
        target: &Target,
        verb: HintVerb,
        now: Instant,
    ) -> Option<(Option<SessionKey>, Vec<BlockHash>, Option<Namespace>)> {
        let key = match target {
            Target::Session(name) => self.sessions.find(name)?.key,
            Target::Request(request) => self.engines.session_of(request)?,
            Target::Blocks(chain) => {
                let home = self.engines.only();
                let namespace = home.and_then(|(_, id)| self.engines.namespace(id));
                let (Some(home), HintVerb::Prefetch) = (home, verb) else {
                    return Some((None, chain.clone(), namespace));
                };
                // Named by all of it: another chain with the same last block is another session.
                let digest: [u8; 32] = Sha256::digest(bytemuck::cast_slice::<_, u8>(chain)).into();
                let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
                let name = SessionName::new(&format!("blocks-{name}")).ok()?;
                let key = self.sessions.adopt(name, home, chain, now).ok()?;
                return Some((Some(key), chain.clone(), namespace));
            }
        };
        let session = self.sessions.get(key)?;
        let namespace = session.home.and_then(|(_, id)| self.engines.namespace(id));
        Some((Some(key), session.chain.clone(), namespace))
    }
}

fn pinned_as(key: Option<SessionKey>, chain: &[BlockHash]) -> Pinned {
    match (key, chain.last()) {
        (Some(key), _) => Pinned::Session(key),
        (None, Some(last)) => Pinned::Chain(*last),
        (None, None) => Pinned::Chain(BlockHash([0; 32])),
    }
}

fn compat_action(item: &CompatItem, verb: HintVerb) -> HintAction {
    let target = match &item.session {
        Some(session) => Target::Session(session.clone()),
        None => Target::Request(item.kv_key.clone()),
    };
    HintAction {
        action_id: item.kv_key.clone(),
        verb,
        target,
        ttl: None,
        priority: item.priority,
        eta: item.eta,
    }
}
