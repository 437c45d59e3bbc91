//! `cargo xtask test`.

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Arguments of `test`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs it.
pub fn run(_args: Args) -> Result<ExitCode> {
    bail!("test is not there yet")
}
