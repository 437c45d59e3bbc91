//! `cargo xtask test`: every tier of tests that this machine allows, one line for each.

mod binaries;
mod e2e;
mod kernels;

use crate::setup::{self, Purpose};
use crate::sh;
use anyhow::Result;
use binaries::Binaries;
use std::fmt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Arguments of `test`.
#[derive(clap::Args)]
pub struct Args {
    /// Only this tier; may be given more than once
    #[arg(long, value_name = "TIER", value_enum)]
    only: Vec<Tier>,
    /// As root, a tier that is not run is a failure; set by a variable CI in the environment
    #[arg(long)]
    ci: bool,
}

/// A set of tests with the same demands on the machine, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Tier {
    /// Formatting and clippy
    Lint,
    /// Unit, property and replay tests: no root
    Unit,
    /// The real programs on this machine's kernel: root
    Native,
    /// SIGKILL, EIO and ENOSPC at every step of a write: root
    Crash,
    /// A static test program on Debian's kernels 5.10, 6.1, 6.12 and the newest
    Vm,
    /// The agent in a machine with systemd and libvirt
    E2e,
    /// The demo, as a user runs it: root
    Demo,
}

impl Tier {
    /// Without the demo, which judges latencies, under TCG where there is no KVM: a figure
    /// for people, and no test that must hold on a busy machine. `--only demo` runs it.
    const ALL: &[Self] = &[Self::Lint, Self::Unit, Self::Native, Self::Crash, Self::Vm, Self::E2e];

    fn purposes(self) -> &'static [Purpose] {
        match self {
            Self::Lint => &[Purpose::Build, Purpose::Lint],
            Self::Unit => &[Purpose::Build],
            Self::Native | Self::Crash => &[Purpose::Build, Purpose::Native],
            Self::Vm => &[Purpose::Build, Purpose::Vm],
            Self::E2e => &[Purpose::Build, Purpose::E2e],
            Self::Demo => &[Purpose::Build, Purpose::Demo],
        }
    }

    fn needs_root(self) -> bool {
        matches!(self, Self::Native | Self::Crash | Self::E2e | Self::Demo)
    }

    fn needs_binaries(self) -> bool {
        matches!(self, Self::Unit | Self::Native | Self::Crash | Self::E2e)
    }

    fn run(self, binaries: Option<&Binaries>) -> Result<Count> {
        // Built before whenever a tier that needs them was chosen.
        let binaries = || binaries.expect("the test programs were built");
        match self {
            Self::Lint => Ok(lint()),
            Self::Unit => binaries().run(self, binaries::unit),
            Self::Native => binaries().run(self, binaries::native),
            Self::Crash => binaries().run(self, binaries::crash),
            Self::Vm => kernels::run(),
            Self::E2e => e2e::run(binaries()),
            Self::Demo => Ok(demo()),
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Lint => "lint",
            Self::Unit => "unit",
            Self::Native => "native",
            Self::Crash => "crash",
            Self::Vm => "vm",
            Self::E2e => "e2e",
            Self::Demo => "demo",
        })
    }
}

/// How many tests of a tier passed and failed, and what to show of the failures.
#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u32,
    failed: u32,
    ignored: u32,
    /// Names of failed tests, log files and their tails.
    notes: Vec<String>,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.notes.extend(other.notes);
    }

    /// Counts one command as one test.
    fn command(&mut self, label: &str, log_name: &str, command: &mut Command) {
        match crate::progress::run(label, log_name, command) {
            Ok(()) => self.passed += 1,
            Err(error) => {
                self.failed += 1;
                self.notes.push(format!("{error:#}"));
            }
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.ignored > 0 {
            write!(f, ", {} ignored", self.ignored)?;
        }
        Ok(())
    }
}

/// What became of a tier.
enum Outcome {
    Run { took: Duration, count: Count },
    NotRun(String),
}

/// Runs the tiers; exit code 1 when a test failed.
pub fn run(args: Args) -> Result<ExitCode> {
    let ci = args.ci || std::env::var_os("CI").is_some_and(|value| !value.is_empty());
    let root = nix::unistd::geteuid().is_root();
    let mut tiers = if args.only.is_empty() { Tier::ALL.to_vec() } else { args.only };
    tiers.sort_unstable();
    tiers.dedup();

    let purposes: Vec<Purpose> = tiers.iter().flat_map(|tier| tier.purposes()).copied().collect();
    if setup::can_install() {
        setup::ensure(&purposes)?;
    } else {
        // Without these nothing at all can run; what else is missing costs its own tiers only.
        let essential = |purpose: &Purpose| matches!(purpose, Purpose::Build | Purpose::Lint);
        setup::ensure(&purposes.iter().copied().filter(essential).collect::<Vec<_>>())?;
    }

    let runnable = |tier: Tier| why_not(tier, root).is_none();
    let binaries = if tiers.iter().any(|tier| tier.needs_binaries() && runnable(*tier)) {
        Some(Binaries::build()?)
    } else {
        None
    };
    let mut outcomes = Vec::new();
    for tier in tiers {
        let outcome = match why_not(tier, root) {
            Some(why) => Outcome::NotRun(why),
            None => run_tier(tier, binaries.as_ref()),
        };
        print_line(tier, &outcome);
        outcomes.push((tier, outcome));
    }
    Ok(summary(&outcomes, ci && root))
}

/// Why this machine does not allow a tier.
fn why_not(tier: Tier, root: bool) -> Option<String> {
    if tier.needs_root() && !root {
        return Some("not root".to_owned());
    }
    let missing = setup::missing(tier.purposes());
    (!missing.is_empty())
        .then(|| format!("missing {}; `cargo xtask setup` says how", missing.join(", ")))
}

fn run_tier(tier: Tier, binaries: Option<&Binaries>) -> Outcome {
    let start = Instant::now();
    // A tier that breaks down has failed; the others still run.
    let count = tier.run(binaries).unwrap_or_else(|error| Count {
        failed: 1,
        notes: vec![format!("{error:#}")],
        ..Count::default()
    });
    for note in &count.notes {
        eprintln!("{note}");
    }
    Outcome::Run { took: start.elapsed(), count }
}

fn print_line(tier: Tier, outcome: &Outcome) {
    match outcome {
        Outcome::Run { took, count } => {
            println!("{tier:<7} run     {:>7.1} s  {count}", took.as_secs_f64());
        }
        Outcome::NotRun(why) => println!("{tier:<7} not run: {why}"),
    }
}

/// The lines of all tiers once more, and the sum as the last line.
fn summary(outcomes: &[(Tier, Outcome)], strict: bool) -> ExitCode {
    let mut total = Count::default();
    if outcomes.len() > 1 {
        println!();
    }
    for (tier, outcome) in outcomes {
        if outcomes.len() > 1 {
            print_line(*tier, outcome);
        }
        match outcome {
            Outcome::Run { count, .. } => {
                total.passed += count.passed;
                total.failed += count.failed;
            }
            Outcome::NotRun(why) if strict => {
                eprintln!("{tier}: not run as root, which counts as a failure here: {why}");
                total.failed += 1;
            }
            Outcome::NotRun(_) => {}
        }
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn lint() -> Count {
    let mut count = Count::default();
    let cargo = |arguments: &[&str]| {
        let mut command = Command::new("cargo");
        command.current_dir(sh::root()).args(arguments);
        command
    };
    count.command("cargo fmt", "fmt", &mut cargo(&["fmt", "--all", "--check"]));
    count.command(
        "cargo clippy",
        "clippy",
        &mut cargo(&["clippy", "--all-targets", "--", "--deny", "warnings"]),
    );
    count
}

/// The demo judges itself: exit code 0 when the victim recovered and every knob is back.
fn demo() -> Count {
    let mut count = Count::default();
    match std::env::current_exe() {
        Ok(xtask) => count.command("demo", "demo", Command::new(xtask).arg("demo")),
        Err(error) => {
            count.failed += 1;
            count.notes.push(format!("failed to find this program: {error}"));
        }
    }
    count
}
