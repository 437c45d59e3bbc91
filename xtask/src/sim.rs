//! `cargo xtask sim cpu`: the loop over simulated hosts, many seeds, one table.

use crate::figure::{self, Figure};
use anyhow::{Context, Result, bail};
use formtune_core::plant::{Run, Scenario, run as live_through};
use formtune_core::policy::Mode;
use formtune_core::trace::{Header, HostFacts};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Arguments of `sim`.
#[derive(clap::Args)]
pub struct Args {
    /// Which one: cpu
    name: String,
    /// Seeds to run
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(2..=100_000))]
    seeds: u64,
    /// Write the figures here as a JSON list
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Instead of seeds, run one scenario by name and print its decisions
    #[arg(long, value_name = "NAME")]
    scenario: Option<String>,
    /// Write that scenario's trace here
    #[arg(long, value_name = "FILE", requires = "scenario")]
    trace: Option<PathBuf>,
}

/// Longest noise of a random scenario, seconds.
const NEVER: f64 = 45.0;

/// Runs it; exit code 0 when it ran, met or not.
pub fn run(args: Args) -> Result<ExitCode> {
    if args.name != "cpu" {
        bail!("no simulation {:?}; there are: cpu", args.name);
    }
    if let Some(name) = &args.scenario {
        one(name, args.trace.as_deref())?;
        return Ok(ExitCode::SUCCESS);
    }
    let figures = figures(args.seeds);
    figure::print_table(&figures);
    if let Some(path) = args.json {
        fs::write(&path, serde_json::to_vec_pretty(&figures)?)
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Each seed's host with the loop closed and, the same noise, open (the peer: doing nothing).
fn figures(seeds: u64) -> Vec<Figure> {
    let mut progress = Instant::now();
    let mut runs = Vec::new();
    for seed in 0..seeds {
        if progress.elapsed() > Duration::from_secs(2) {
            progress = Instant::now();
            eprintln!("seed {seed} of {seeds}");
        }
        let scenario = Scenario::random(seed);
        let open = live_through(&scenario, Mode::Observe).report;
        runs.push((live_through(&scenario, Mode::Enforce).report, open));
    }
    let ours = |value: &dyn Fn(&formtune_core::plant::Report) -> Option<f64>| -> Vec<f64> {
        runs.iter().filter_map(|(closed, _)| value(closed)).collect()
    };
    let p99: Vec<f64> = runs.iter().map(|(closed, _)| closed.mean_p99.0 as f64 / 1e6).collect();
    let p99_open: Vec<f64> = runs.iter().map(|(_, open)| open.mean_p99.0 as f64 / 1e6).collect();
    let bad = |(bad, all): (u32, u32)| 100.0 * f64::from(bad) / f64::from(all.max(1));
    let bad_closed: Vec<f64> = runs.iter().map(|(closed, _)| bad(closed.bad_windows)).collect();
    let bad_open: Vec<f64> = runs.iter().map(|(_, open)| bad(open.bad_windows)).collect();
    let seconds = |at: Option<formtune_core::units::Nanos>| at.map(|at| at.as_secs_f64());
    // All victims of a host at once; on some hosts the bounds are reached first. A run that
    // never got there counts with the longest noise there is, not as if it had not been.
    let recovery = ours(&|r| Some(r.recovery.map_or(NEVER, |at| at.as_secs_f64())));
    let single = |name, unit, values: Vec<f64>, target| {
        Figure::measured(name, unit, &values, None, None, target)
    };
    vec![
        Figure::measured(
            "sim.cpu.victim_p99",
            "ms",
            &p99,
            Some(&p99_open),
            None,
            Some("ratio_to_peer <= 0.3"),
        ),
        Figure::measured("sim.cpu.bad_windows", "%", &bad_closed, Some(&bad_open), None, None),
        single("sim.cpu.reaction", "s", ours(&|r| seconds(r.reaction)), Some("ours <= 1")),
        single("sim.cpu.recovery", "s", recovery, None),
        single(
            "sim.cpu.direction_changes",
            "1/knob",
            ours(&|r| Some(r.direction_changes.into())),
            Some("ours <= 2"),
        ),
        single("sim.cpu.setpoints", "1/run", ours(&|r| Some(r.setpoints.into())), None),
        single(
            "sim.cpu.left_changed",
            "knobs",
            ours(&|r| Some(r.left_changed.into())),
            Some("ours <= 0"),
        ),
    ]
}

fn one(name: &str, trace: Option<&Path>) -> Result<()> {
    let Some(scenario) = Scenario::named(name) else {
        bail!("no scenario {name:?}; there are: {}", Scenario::NAMED.join(", "));
    };
    let run = live_through(&scenario, Mode::Enforce);
    for plan in &run.plans {
        for setpoint in &plan.setpoints {
            let at = plan.at.since(run.plans[0].at).as_secs_f64();
            println!("{at:6.2} s  {} {} to {}", setpoint.vm, setpoint.from, setpoint.to);
            println!("          {}", setpoint.reason);
        }
    }
    println!("{:#?}", run.report);
    trace.map_or(Ok(()), |path| record(name, &scenario, &run, path))
}

fn record(name: &str, scenario: &Scenario, run: &Run, path: &Path) -> Result<()> {
    let note = format!("simulated: cargo xtask sim cpu --scenario {name}");
    let agent = env!("CARGO_PKG_VERSION").into();
    let host = HostFacts { cpus: scenario.host.cpus, kernel: "simulated".into(), agent, note };
    let mut out = Vec::new();
    serde_json::to_writer(&mut out, &Header::new(host, scenario.policy.clone()))?;
    for sample in &run.samples {
        out.write_all(b"\n")?;
        serde_json::to_writer(&mut out, sample)?;
    }
    out.write_all(b"\n")?;
    fs::write(path, out).with_context(|| format!("failed to write {}", path.display()))
}
