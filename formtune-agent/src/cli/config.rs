//! `formtune config check` and `formtune config show`.

use super::{GOOD, Global, print};
use crate::config::{self, ConfigError, Notice};
use anyhow::Result;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Read the configuration, report what cannot be honoured; exit code 2 if it is refused
    #[command(after_help = "\
Examples:
  formtune config check
  formtune --config ./formtune.toml config check --json")]
    Check,
    /// Print the configuration in effect, defaults included, as TOML
    #[command(after_help = "\
Example:
  formtune config show > effective.toml")]
    Show,
}

/// What `config check --json` prints.
#[derive(Serialize)]
struct Checked {
    file: Option<PathBuf>,
    good: bool,
    error: Option<String>,
    notices: Vec<Notice>,
}

pub(super) fn run(global: &Global, command: &Command) -> Result<ExitCode> {
    let config = config::load(global.config.as_deref());
    match command {
        Command::Check => check(global, config),
        Command::Show => {
            let config = config?;
            match global.json {
                true => {
                    print(format_args!("{}\n", serde_json::to_string(&config::table(&config))?))?
                }
                false => print(config::show(&config))?,
            }
            Ok(GOOD)
        }
    }
}

fn check(global: &Global, config: Result<config::Config, ConfigError>) -> Result<ExitCode> {
    let file = config::path(global.config.as_deref());
    if global.json {
        let (error, notices) = match config {
            Ok(config) => (None, config.notices),
            Err(error) => (Some(format!("{:#}", anyhow::Error::from(error))), Vec::new()),
        };
        let code = match &error {
            Some(error) => {
                super::fail(error);
                super::error()
            }
            None => GOOD,
        };
        let checked = Checked { file, good: error.is_none(), error, notices };
        print(format_args!("{}\n", serde_json::to_string(&checked)?))?;
        return Ok(code);
    }
    let config = config?;
    for notice in &config.notices {
        print(format_args!("{}\n", super::OneLine(notice)))?;
    }
    match file {
        Some(file) => print(format_args!("{}: good\n", file.display()))?,
        None => print(format_args!("no {}: defaults\n", config::DEFAULT_PATH))?,
    }
    Ok(GOOD)
}
