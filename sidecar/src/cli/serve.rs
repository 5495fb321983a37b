//! `greenroom serve`: configuration, logging and signals around [`crate::server::run`].

use std::future::pending;
use std::io::{self, Read};
use std::path::PathBuf;
use std::thread;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::CliError;
use crate::config::{Config, Listen, LogFormat, Machine, Settings, log_filter};

#[derive(Debug, clap::Args)]
pub(super) struct ServeArgs {
    /// TOML file with the same settings (with _ for -); flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// End when standard input does, as a private sidecar of the process that started it; no HTTP unless --listen is given
    #[arg(long)]
    until_stdin_closes: bool,
    /// Makes something go wrong on purpose, e.g. server::write::delay=10%sleep(20); can be given more than once (builds with fault points only)
    #[arg(long = "fault", value_name = "NAME=ACTIONS", hide = cfg!(not(feature = "faults")))]
    faults: Vec<String>,
}

pub(super) fn run(args: ServeArgs) -> Result<(), CliError> {
    let mut settings = merged(args.config, args.settings)?;
    if args.until_stdin_closes {
        settings.listen.get_or_insert(Listen::None);
    }
    let config = Config::resolve(settings, &Machine::probe()?)?;
    arm(&args.faults)?;
    start_log(&config);
    if !args.faults.is_empty() {
        tracing::warn!(faults = args.faults.join(" "), "things go wrong on purpose");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    runtime.block_on(async {
        // Handlers stand before anything else does, so that no signal ends the process half-started.
        let terminate = signal(SignalKind::terminate()).map_err(CliError::Runtime)?;
        let interrupt = signal(SignalKind::interrupt()).map_err(CliError::Runtime)?;
        let stdin = args.until_stdin_closes.then(stdin_closes);
        crate::server::run(config, told_to_stop(terminate, interrupt, stdin)).await?;
        Ok(())
    })
}

#[cfg(feature = "faults")]
fn arm(faults: &[String]) -> Result<(), CliError> {
    for fault in faults {
        let Some((name, actions)) = fault.split_once('=') else {
            return Err(CliError::Fault(format!("`{fault}` is not NAME=ACTIONS")));
        };
        let known = kvstore::faults::POINTS
            .iter()
            .find(|point| point.name == name);
        if known.is_some_and(|point| point.place == kvstore::faults::Place::Engine) {
            return Err(CliError::Fault(format!(
                "`{name}` is passed by vLLM's processes and never by the sidecar: arm it there, with \
                 greenroom._native.fault(NAME, ACTIONS)"
            )));
        }
        kvstore::faults::arm(name, actions).map_err(|error| CliError::Fault(error.to_string()))?;
    }
    Ok(())
}

#[cfg(not(feature = "faults"))]
fn arm(faults: &[String]) -> Result<(), CliError> {
    if faults.is_empty() {
        return Ok(());
    }
    Err(CliError::Fault(
        "this build has no fault points; `cargo build --profile faults --features faults -p greenroom-sidecar` makes \
         target/faults/greenroom, which has"
            .to_owned(),
    ))
}

/// File and flags together.
pub(super) fn merged(file: Option<PathBuf>, flags: Settings) -> Result<Settings, CliError> {
    Ok(match file {
        Some(path) => flags.or(Settings::from_file(&path)?),
        None => flags,
    })
}

async fn told_to_stop(
    mut terminate: Signal,
    mut interrupt: Signal,
    stdin: Option<oneshot::Receiver<()>>,
) {
    let stdin = async {
        match stdin {
            // A dropped sender is a thread that has ended, which is the same news.
            Some(closed) => drop(closed.await),
            None => pending().await,
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = stdin => {}
    }
}

/// Resolves when standard input is at its end. A thread of its own reads it, because a blocking read cannot be called off; the thread
/// ends with the process.
fn stdin_closes() -> oneshot::Receiver<()> {
    let (closed, receiver) = oneshot::channel();
    thread::spawn(move || {
        let mut input = io::stdin().lock();
        let mut thrown_away = [0; 512];
        loop {
            match input.read(&mut thrown_away) {
                Ok(0) => break,
                Err(error) if error.kind() != io::ErrorKind::Interrupted => break,
                Ok(_) | Err(_) => {}
            }
        }
        drop(closed);
    });
    receiver
}

/// Log lines go to standard error; if somebody has set up a log already (a test), theirs stays.
fn start_log(config: &Config) {
    // Checked when the configuration was resolved.
    let filter = log_filter(&config.log).unwrap_or_default();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // A line that cannot be written (the disk is full, the pipe closed) is lost. Saying so would fail too, and panic.
        .log_internal_errors(false);
    let started = match config.log_format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().try_init(),
    };
    if let Err(error) = started {
        tracing::debug!(%error, "the log was set up before");
    }
}
