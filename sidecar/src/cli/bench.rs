//! `greenroom bench`: how fast this machine does what Greenroom lives by.

mod chart;
mod copy;

use clap::Subcommand;

use super::CliError;

#[derive(Debug, clap::Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Block copies beside plain copies of the same bytes
    Copy(copy::CopyArgs),
}

pub(super) fn run(args: BenchArgs) -> Result<(), CliError> {
    match args.what {
        What::Copy(args) => copy::run(&args),
    }
}
