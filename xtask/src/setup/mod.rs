//! `cargo xtask setup`.

pub mod apt;

use anyhow::{Result, bail};
use std::process::ExitCode;

/// Arguments of `setup`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs it.
pub fn run(_args: Args) -> Result<ExitCode> {
    bail!("setup is not there yet")
}
