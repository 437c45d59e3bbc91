//! Arguments, output and exit codes. A command's work is done in its room; its file here
//! only reads arguments and prints.

mod advice;
pub mod client;
mod config;
pub mod doctor;
pub mod explain;
mod export;
mod replay;
mod restore;
mod run;
pub mod state;
pub mod status;
pub mod style;
mod tcp;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use std::fmt::{self, Display};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Good.
pub const GOOD: ExitCode = ExitCode::SUCCESS;

/// There are findings, or something asked for is not met.
pub fn findings() -> ExitCode {
    ExitCode::from(1)
}

/// An error, which one line on standard error has named.
pub fn error() -> ExitCode {
    ExitCode::from(2)
}

/// Adaptive tuning of KVM hosts: measures each VM's scheduling latency and moves CPU weight
/// to those that wait.
#[derive(Debug, Parser)]
#[command(
    name = "formtune",
    version,
    after_help = "\
Examples:
  formtune run                      decide and log, turn no knob
  formtune run --mode enforce       decide and write
  formtune status                   what the running agent sees
  formtune explain web-1            why a VM is as it is
  formtune restore                  put every knob back, without the agent

Exit codes: 0 good, 1 findings or not met, 2 error."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Arguments of every command.
#[derive(Debug, Clone, clap::Args)]
pub struct Global {
    /// Configuration file [default: /etc/formtune/formtune.toml, if there is one]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON, for machines
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent until it is stopped; SIGTERM and SIGINT put every knob back
    #[command(after_help = "\
Examples:
  formtune run
  formtune run --mode enforce
  formtune run --mode observe --record night.trace
  formtune run --json 2> formtune.log       the log as JSON

The log goes to standard error; FORMTUNE_LOG=debug says more. A second signal ends the agent
at once, and `formtune restore` or the next start puts the knobs back.")]
    Run(run::Args),
    /// Show what the running agent sees and does; exit code 1 while it is not ready
    #[command(after_help = "\
Examples:
  formtune status
  formtune status --json | jq '.vms[] | {id, state}'
  watch -n 2 formtune status")]
    Status(status::Args),
    /// Show why a VM is as it is, and what would change it
    #[command(after_help = "\
Examples:
  formtune explain web-1
  formtune explain 3c976cf6-5f19-4b7e-a26f-04b361a82e5a
  formtune explain web-1 --json")]
    Explain(explain::Args),
    /// Check whether this node is fit for formtune; exit code 1 if something is to be done
    #[command(after_help = "\
Examples:
  formtune doctor
  formtune --config ./formtune.toml doctor
  formtune doctor --json | jq '.checks[] | select(.verdict == \"finding\")'")]
    Doctor,
    /// Print the plans that a recorded run leads to, the same each time
    #[command(after_help = "\
Examples:
  formtune run --record night.trace
  formtune replay night.trace
  formtune replay night.trace --json > plans.jsonl")]
    Replay(replay::Args),
    /// Write what the running agent measures, for other tools
    #[command(subcommand)]
    Export(export::Command),
    /// Check or show the configuration
    #[command(subcommand)]
    Config(config::Command),
    /// Put every knob back as it was found, without the agent; exit code 1 if one could not be
    Restore(restore::Args),
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match cli.command {
        Command::Run(args) => run::run(&cli.global, args),
        Command::Status(args) => status::run(&cli.global, &args),
        Command::Explain(args) => explain::run(&cli.global, &args),
        Command::Doctor => doctor::run(&cli.global),
        Command::Export(command) => export::run(&cli.global, &command),
        Command::Replay(args) => replay::run(&cli.global, &args),
        Command::Config(command) => config::run(&cli.global, &command),
        Command::Restore(args) => restore::run(&cli.global, &args),
    };
    result.unwrap_or_else(|failure| {
        fail(chain(&failure));
        error()
    })
}

/// The error and its causes, less what is already said: some errors name their cause, as
/// their text also stands alone in logs and outcomes.
fn chain(failure: &anyhow::Error) -> String {
    failure.chain().fold(String::new(), |said, cause| match cause.to_string() {
        cause if said.is_empty() => cause,
        cause if said.contains(&cause) => said,
        cause => format!("{said}: {cause}"),
    })
}

/// Help and version go to standard output; anything else is one line on standard error.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            return GOOD;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
        }
        _ => {
            let text = error.to_string();
            let lines = text.lines().map(str::trim);
            let said: Vec<&str> = lines
                .take_while(|line| !line.starts_with("Usage:"))
                .filter(|line| !line.is_empty())
                .collect();
            let said = said.join(" ");
            fail(format_args!("{}; see `formtune --help`", said.trim_start_matches("error: ")));
        }
    }
    self::error()
}

/// Writes `formtune: …` on standard error, always as one line.
pub fn fail(what: impl Display) {
    eprintln!("formtune: {}", OneLine(what));
}

/// Escapes control characters: text that came from a file or the system cannot break a
/// line, nor drive the terminal.
pub struct OneLine<T>(pub T);

impl<T: Display> Display for OneLine<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Escape<'a, 'b>(&'a mut fmt::Formatter<'b>);
        impl fmt::Write for Escape<'_, '_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                for c in text.chars() {
                    match c.is_control() {
                        true => write!(self.0, "{}", c.escape_default())?,
                        false => fmt::Write::write_char(self.0, c)?,
                    }
                }
                Ok(())
            }
        }
        fmt::Write::write_fmt(&mut Escape(f), format_args!("{}", self.0))
    }
}

/// Writes to standard output. A reader that has gone away (`formtune … | head`) is no error.
pub fn print(text: impl Display) -> io::Result<()> {
    match write!(io::stdout().lock(), "{text}").and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn control_characters_cannot_break_a_line() {
        assert_eq!(OneLine("a\nb\x1b[31m ✓").to_string(), "a\\nb\\u{1b}[31m ✓");
    }
}
