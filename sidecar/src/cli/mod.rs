//! The `greenroom` command: one file per subcommand, and what they share.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.

mod bench;
mod doctor;
mod hint;
mod http;
mod out;
mod serve;
mod sessions;
mod status;

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::ConfigError;
use crate::server::ServeError;

/// The room where an agent's KV cache waits while its tools run.
#[derive(Debug, Parser)]
#[command(name = "greenroom", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the sidecar until SIGTERM or SIGINT, which drain it
    Serve(serve::ServeArgs),
    /// What the sidecar holds and who uses it
    Status(status::StatusArgs),
    /// The sessions that the sidecar knows
    Sessions(sessions::SessionsArgs),
    /// Send one hint or tool event by hand
    Hint(hint::HintArgs),
    /// Say what would go wrong on this machine, and what to do about it
    Doctor(doctor::DoctorArgs),
    /// Measure this machine
    Bench(bench::BenchArgs),
}

/// Why a subcommand did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// Bad configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The sidecar could not start or go on.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A fault point that there is not, or not in this build.
    #[error("--fault: {0}")]
    Fault(String),
    /// The asynchronous runtime or the signal handlers could not be set up.
    #[error("cannot start: {0}")]
    Runtime(io::Error),
    /// Nobody answers.
    #[error("no sidecar answers at {url}: {reason}; is `greenroom serve` running?")]
    NoAnswer {
        /// Where one was expected.
        url: String,
        /// What happened.
        reason: String,
    },
    /// The sidecar said no.
    #[error("{message} ({code})")]
    Refused {
        /// The code of the error.
        code: String,
        /// Its text.
        message: String,
    },
    /// What answered is not a sidecar.
    #[error("the answer of {url} is not one of a Greenroom sidecar: {reason}")]
    Strange {
        /// Who answered.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The answer was written, and it is bad news.
    #[error("{0}")]
    BadNews(String),
    /// Nothing could be measured.
    #[error(transparent)]
    Bench(#[from] cuda::bench::BenchError),
    /// Standard output is gone.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
}

impl CliError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Fault(_) | Self::Serve(ServeError::Config(_)) => 2,
            // The reader has seen enough (`greenroom sessions | head`).
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            _ => 1,
        }
    }
}

/// Runs the command line; `arguments` begin with the program's name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(told) => {
            let code = if told.use_stderr() { 2 } else { 0 };
            return match told.print() {
                Ok(()) => ExitCode::from(code),
                Err(_) => ExitCode::from(1),
            };
        }
    };
    let done = match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Status(args) => status::run(&args),
        Command::Sessions(args) => sessions::run(&args),
        Command::Hint(args) => hint::run(&args),
        Command::Doctor(args) => doctor::run(args),
        Command::Bench(args) => bench::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.exit_code();
            if code != 0 {
                out::complain(&error.to_string());
            }
            ExitCode::from(code)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exit_codes_follow_the_contract() {
        let run = |line: &str| run(line.split(' ').map(OsString::from));
        assert_eq!(run("greenroom --version"), ExitCode::SUCCESS);
        for usage in [
            "greenroom",
            "greenroom nonsense",
            "greenroom serve --memory lots",
            "greenroom serve --listen here",
        ] {
            assert_eq!(run(usage), ExitCode::from(2), "{usage}");
        }
        for config in [
            "greenroom serve --pin-budget 7",
            "greenroom serve --config /nowhere.toml",
            "greenroom serve --listen 0.0.0.0:0",
        ] {
            assert_eq!(run(config), ExitCode::from(2), "{config}");
        }
        let nobody = "greenroom status --url http://127.0.0.1:1";
        assert_eq!(run(nobody), ExitCode::from(1));
    }
}
