//! `formtune run`.

use super::{GOOD, Global};
use crate::config;
use crate::daemon::{self, Format, Options};
use anyhow::Result;
use formtune_core::policy::Mode;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `formtune run`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How far to go, for all knobs, in place of the configuration's `mode`
    #[arg(long, value_enum, value_name = "MODE")]
    mode: Option<ModeArg>,
    /// Record every sample to a trace, for `formtune replay`
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ModeArg {
    /// Measure only
    Observe,
    /// Decide, log and export, write nothing
    Shadow,
    /// Decide and write
    Enforce,
}

pub(super) fn run(global: &Global, args: Args) -> Result<ExitCode> {
    let config_path = config::path(global.config.as_deref());
    let mut config = config::load(global.config.as_deref())?;
    if let Some(mode) = args.mode {
        config.policy.modes.cpu_weight = match mode {
            ModeArg::Observe => Mode::Observe,
            ModeArg::Shadow => Mode::Shadow,
            ModeArg::Enforce => Mode::Enforce,
        };
    }
    if args.record.is_some() {
        config.record = args.record;
    }
    let format = if global.json { Format::Json } else { Format::Text };
    daemon::run(Options { config, config_path, format })?;
    Ok(GOOD)
}
