//! `cargo xtask bench step`: one decision step for 1,000 and 10,000 active VMs. Runs an
//! example of core in a release build, whatever this program was built as.

use crate::figure::Figure;
use crate::sh;
use anyhow::{Context, Result};
use std::process::Command;

/// VMs and target.
const SIZES: [(u32, &str); 2] = [(1_000, "ours <= 1"), (10_000, "ours <= 12")];

/// Measures.
pub fn run() -> Result<Vec<Figure>> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(sh::root());
    cargo.args(["run", "--quiet", "--release", "--package", "formtune-core"]);
    cargo.args(["--features", "plant", "--example", "bench_step"]);
    eprintln!("step: building and running in release");
    let text = sh::output(&mut cargo)?;
    let mut rounds: Vec<(u32, f64, f64)> = Vec::new();
    for line in text.lines() {
        let mut fields = line.split(' ');
        let mut next = || fields.next().with_context(|| format!("bench_step printed {line:?}"));
        rounds.push((next()?.parse()?, next()?.parse()?, next()?.parse()?));
    }
    let figure = |(vms, target): (u32, &str)| {
        let of_size: Vec<_> = rounds.iter().filter(|round| round.0 == vms).collect();
        let ours: Vec<f64> = of_size.iter().map(|round| round.1).collect();
        let floor: Vec<f64> = of_size.iter().map(|round| round.2).collect();
        let name = format!("step.vms_{vms}");
        Figure::measured(&name, "ms/step", &ours, None, Some(&floor), Some(target))
    };
    Ok(SIZES.map(figure).into())
}
