//! The way to the actor: a bounded queue, and one answer for every command.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::{mpsc, oneshot};

use super::Event;
use crate::commands::{
    ActionResult, CommandError, CompatItem, CompatResult, HintEnvelope, SessionName, SessionView,
    StatusView, ToolEnd, ToolProgress, ToolStart,
};
use crate::metrics::Metrics;

/// Where an answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, CommandError>>;

/// A client's command on its way to the actor.
pub(super) enum Command {
    Status(Reply<StatusView>),
    Sessions(Reply<Vec<SessionView>>),
    Session(SessionName, Reply<SessionView>),
    Retire(SessionName, Reply<u64>),
    ToolStart(SessionName, ToolStart, Reply<()>),
    ToolProgress(SessionName, ToolProgress, Reply<()>),
    ToolEnd(SessionName, ToolEnd, Reply<()>),
    Hints(HintEnvelope, Reply<Vec<ActionResult>>),
    PrefetchCompat(Vec<CompatItem>, Reply<Vec<CompatResult>>),
    PinCompat(Vec<CompatItem>, Reply<Vec<CompatResult>>),
    BreakPins(Reply<u64>),
}

/// What the actor shares with everybody.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) boot_id: String,
    pub(super) engines: AtomicUsize,
    pub(super) draining: AtomicBool,
    pub(super) metrics: Arc<Metrics>,
}

/// A client's end of the actor. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    pub(super) events: mpsc::Sender<Event>,
    pub(super) shared: Arc<Shared>,
}

impl Handle {
    /// Identifies this start of the sidecar.
    pub fn boot_id(&self) -> &str {
        &self.shared.boot_id
    }

    /// Connected engines.
    pub fn engines(&self) -> usize {
        self.shared.engines.load(Ordering::Relaxed)
    }

    /// Whether the sidecar is shutting down.
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::Relaxed)
    }

    /// The figures of this sidecar.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, CommandError> {
        if self.is_draining() {
            return Err(CommandError::Draining);
        }
        if kvstore::fault!("handle::ask::busy") {
            return Err(CommandError::Busy);
        }
        let (reply, answer) = oneshot::channel();
        self.events
            .try_send(Event::Command(command(reply)))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => CommandError::Busy,
                mpsc::error::TrySendError::Closed(_) => CommandError::Draining,
            })?;
        answer.await.unwrap_or(Err(CommandError::Draining))
    }

    /// Tiers, engines, sessions per state. Brings the gauges up to date as well.
    ///
    /// # Errors
    /// [`CommandError::Busy`], [`CommandError::Draining`].
    pub async fn status(&self) -> Result<StatusView, CommandError> {
        self.ask(Command::Status).await
    }

    /// All sessions, by name.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn sessions(&self) -> Result<Vec<SessionView>, CommandError> {
        self.ask(Command::Sessions).await
    }

    /// One session.
    ///
    /// # Errors
    /// As [`Self::status`], and [`CommandError::UnknownSession`].
    pub async fn session(&self, name: SessionName) -> Result<SessionView, CommandError> {
        self.ask(|reply| Command::Session(name, reply)).await
    }

    /// Forgets a session and frees what only it had; returns how many blocks of the host tier.
    ///
    /// # Errors
    /// As [`Self::session`].
    pub async fn retire(&self, name: SessionName) -> Result<u64, CommandError> {
        self.ask(|reply| Command::Retire(name, reply)).await
    }

    /// Ends all pins, whoever took them; returns how many.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn break_pins(&self) -> Result<u64, CommandError> {
        self.ask(Command::BreakPins).await
    }

    /// A tool call began.
    ///
    /// # Errors
    /// As [`Self::status`], [`CommandError::TooManySessions`], [`CommandError::TooManyCalls`].
    pub async fn tool_start(
        &self,
        name: SessionName,
        start: ToolStart,
    ) -> Result<(), CommandError> {
        self.ask(|reply| Command::ToolStart(name, start, reply))
            .await
    }

    /// News of a tool call.
    ///
    /// # Errors
    /// As [`Self::session`], [`CommandError::UnknownCall`].
    pub async fn tool_progress(
        &self,
        name: SessionName,
        progress: ToolProgress,
    ) -> Result<(), CommandError> {
        self.ask(|reply| Command::ToolProgress(name, progress, reply))
            .await
    }

    /// A tool call ended.
    ///
    /// # Errors
    /// As [`Self::tool_progress`].
    pub async fn tool_end(&self, name: SessionName, end: ToolEnd) -> Result<(), CommandError> {
        self.ask(|reply| Command::ToolEnd(name, end, reply)).await
    }

    /// A hint envelope; one result for each action, in order.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn hints(&self, envelope: HintEnvelope) -> Result<Vec<ActionResult>, CommandError> {
        self.ask(|reply| Command::Hints(envelope, reply)).await
    }

    /// BatchAgent's prefetch.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn prefetch_compat(
        &self,
        items: Vec<CompatItem>,
    ) -> Result<Vec<CompatResult>, CommandError> {
        self.ask(|reply| Command::PrefetchCompat(items, reply))
            .await
    }

    /// BatchAgent's pin.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn pin_compat(
        &self,
        items: Vec<CompatItem>,
    ) -> Result<Vec<CompatResult>, CommandError> {
        self.ask(|reply| Command::PinCompat(items, reply)).await
    }
}
