//! The `greenroom` command. Everything it does is in the library's `cli`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    sidecar::cli::run(std::env::args_os())
}
