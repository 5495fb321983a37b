//! The module's log lines: to standard error, where vLLM's own are. Python's logging would need Python on our threads.

use tracing::Level;

/// Starts the log, unless the process has one.
pub(crate) fn start() {
    let log = tracing_subscriber::fmt()
        .with_max_level(Level::INFO)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        // A line that cannot be written is lost. Saying so would fail too, and panic: in vLLM's scheduler, for one.
        .log_internal_errors(false);
    // An error means that somebody else's log is in place: theirs stays.
    log.try_init().unwrap_or_default();
}
