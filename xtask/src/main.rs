//! Project tasks: `cargo xtask <command>`. One file per command; no product code.

mod bench;
mod bless;
mod demo;
mod figure;
mod progress;
mod setup;
mod sh;
mod sim;
mod stats;
mod test;
mod vm;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "formtune's project tasks")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install or find everything the project needs on this machine
    Setup(setup::Args),
    /// Watch real guests: two hurt a third, formtune sees it, acts, and restores
    Demo(demo::Args),
    /// Run every test tier that this machine allows
    Test(test::Args),
    /// Measure a figure (or `all`) against a peer or a floor
    Bench(bench::Args),
    /// Run a seeded simulation
    Sim(sim::Args),
    /// Accept changed plans of the committed traces
    BlessTraces(bless::Args),
}

fn main() -> std::process::ExitCode {
    let result = sh::keep_temporary_files().and_then(|()| match Cli::parse().command {
        Command::Setup(args) => setup::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Test(args) => test::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Sim(args) => sim::run(args),
        Command::BlessTraces(args) => bless::run(args),
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            std::process::ExitCode::from(2)
        }
    }
}
