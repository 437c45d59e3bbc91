//! `cargo xtask bless-traces`: expected plans are rewritten from what core does now.

use crate::sh;
use anyhow::{Context, Result, bail};
use formtune_core::plan::Plan;
use formtune_core::trace::{Header, VERSION};
use formtune_core::{Sample, replay};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Arguments of `bless-traces`.
#[derive(clap::Args)]
pub struct Args {
    /// Say what would change, write nothing; exit code 1 if anything would
    #[arg(long)]
    check: bool,
}

/// Changed plans shown per trace; the rest is in the diff.
const SHOWN: usize = 3;

/// Rewrites what changed, and says what.
pub fn run(args: Args) -> Result<ExitCode> {
    let folder = sh::root().join("formtune-core/traces");
    let mut changed = 0;
    let traces = traces(&folder)?;
    for path in &traces {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let plans = plans(path)?;
        let expected_path = path.with_extension("plans.jsonl");
        let expected = match fs::read_to_string(&expected_path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                let path = expected_path.display();
                return Err(error).with_context(|| format!("failed to read {path}"));
            }
        };
        let found: String = plans
            .iter()
            .map(|plan| Ok(serde_json::to_string(plan)? + "\n"))
            .collect::<Result<_>>()?;
        if found == expected {
            println!("{name}: unchanged ({} plans)", plans.len());
            continue;
        }
        changed += 1;
        describe(&name, &plans, &expected);
        if !args.check {
            fs::write(&expected_path, found)
                .with_context(|| format!("failed to write {}", expected_path.display()))?;
        }
    }
    println!("{changed} of {} traces changed", traces.len());
    Ok(if args.check && changed > 0 { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

fn traces(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries =
        fs::read_dir(folder).with_context(|| format!("failed to read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.to_string_lossy();
        if name.ends_with(".jsonl") && !name.ends_with(".plans.jsonl") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn plans(path: &Path) -> Result<Vec<Plan>> {
    let text =
        fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    let mut lines = text.lines().enumerate();
    let at = |n: usize| format!("{}:{}", path.display(), n + 1);
    let (_, first) = lines.next().with_context(|| format!("{}: empty", path.display()))?;
    let header: Header = serde_json::from_str(first).with_context(|| at(0))?;
    if header.version != VERSION {
        bail!("{}: version {}, this is {VERSION}", at(0), header.version);
    }
    let samples: Vec<Sample> = lines
        .map(|(n, line)| serde_json::from_str(line).with_context(|| at(n)))
        .collect::<Result<_>>()?;
    Ok(replay(&header, &samples).collect())
}

/// The first plans that differ, by what they do rather than by their bytes.
fn describe(name: &str, plans: &[Plan], expected: &str) {
    let expected: Vec<Option<Plan>> =
        expected.lines().map(|line| serde_json::from_str(line).ok()).collect();
    let differ: Vec<usize> = (0..plans.len().max(expected.len()))
        .filter(|&n| plans.get(n) != expected.get(n).and_then(Option::as_ref))
        .collect();
    println!("{name}: {} of {} plans changed", differ.len(), plans.len());
    for &n in differ.iter().take(SHOWN) {
        let before = expected.get(n).and_then(Option::as_ref);
        println!("  plan {}", n + 1);
        println!("    before: {}", before.map_or("none".into(), writes));
        println!("    now:    {}", plans.get(n).map_or("none".into(), writes));
        let decisions = plans.get(n).map_or(&[][..], |plan| &plan.decisions);
        for decision in decisions {
            let old = before.and_then(|plan| plan.decisions.iter().find(|d| d.vm == decision.vm));
            if let Some(old) = old.filter(|old| old.reason != decision.reason) {
                println!("    {}: {}", decision.vm, old.reason);
                println!("      now: {}", decision.reason);
            }
        }
    }
}

fn writes(plan: &Plan) -> String {
    if plan.setpoints.is_empty() {
        return "no writes".into();
    }
    let writes = plan.setpoints.iter().map(|s| format!("{} {} to {}", s.vm, s.from, s.to));
    writes.collect::<Vec<_>>().join(", ")
}
