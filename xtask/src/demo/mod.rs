//! `cargo xtask demo`.

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Arguments of `demo`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs it.
pub fn run(_args: Args) -> Result<ExitCode> {
    bail!("demo is not there yet")
}
