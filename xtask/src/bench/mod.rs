//! `cargo xtask bench NAME --json FILE`: figures, each with a peer or a floor in one run.

mod agent;
mod block;
mod collect;
mod crowd;
mod disk;
mod load;
mod reaction;
mod runq;
mod scrape;
mod step;
mod tap;

use crate::figure::{self, Figure};
use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// Arguments of `bench`.
#[derive(clap::Args)]
pub struct Args {
    /// Which one: runq, block, tap, step, reaction, agent, collect, scrape, or all
    name: String,
    /// Write the figures here as a JSON list
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What a benchmark does.
type Bench = fn() -> Result<Vec<Figure>>;

/// A benchmark's name and what it measures. New benchmarks go here.
const BENCHES: &[(&str, Bench)] = &[
    ("runq", runq::run),
    ("block", block::run),
    ("step", step::run),
    ("reaction", reaction::run),
    ("agent", agent::run),
    ("collect", collect::run),
    ("scrape", scrape::run),
    ("tap", tap::run),
];

/// Runs one or all; exit code 0 when it could be measured, met or not.
pub fn run(args: Args) -> Result<ExitCode> {
    let chosen: Vec<_> =
        BENCHES.iter().filter(|(name, _)| args.name == "all" || args.name == *name).collect();
    if chosen.is_empty() {
        let names: Vec<_> = BENCHES.iter().map(|(name, _)| *name).collect();
        bail!("no benchmark {:?}; there are: {}, all", args.name, names.join(", "));
    }
    let mut figures = Vec::new();
    for (name, bench) in chosen {
        figures.extend(bench().with_context(|| format!("bench {name}"))?);
    }
    figure::print_table(&figures);
    if let Some(path) = args.json {
        fs::write(&path, serde_json::to_vec_pretty(&figures)?)
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds a program of the tests', optimised as the agent is when released.
fn build(name: &str) -> Result<PathBuf> {
    progress::run(
        &format!("building {name}"),
        &format!("bench-{name}-build"),
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(sh::root())
            .args(["build", "--locked", "--release", "--package", "formtune-tests"])
            .args(["--bin", name]),
    )?;
    Ok(sh::target().join("release").join(name))
}
