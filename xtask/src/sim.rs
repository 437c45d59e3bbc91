//! `cargo xtask sim`.

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Arguments of `sim`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs it.
pub fn run(_args: Args) -> Result<ExitCode> {
    bail!("sim is not there yet")
}
