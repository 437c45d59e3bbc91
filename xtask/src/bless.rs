//! `cargo xtask bless`.

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Arguments of `bless`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs it.
pub fn run(_args: Args) -> Result<ExitCode> {
    bail!("bless is not there yet")
}
