//! `cargo xtask test`: every tier of tests that this machine allows, one line for each.

mod binaries;
mod e2e;
mod fuzz;
mod guest;
mod kernels;
mod readme;

use crate::demo::interrupt;
use crate::setup::{self, Purpose};
use crate::sh;
use crate::vm::kernel::{self, Series};
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
    /// In the tier `vm`, only this kernel; may be given more than once
    #[arg(long, value_name = "SERIES", value_parser = kernel::series)]
    kernel: Vec<Series>,
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
    /// A minute of damaged input for each parser: no root
    Fuzz,
    /// The real programs on this machine's kernel: root
    Native,
    /// SIGKILL, EIO and ENOSPC at every step of a write: root
    Crash,
    /// A static test program on Debian's kernels 5.10, 6.1, 6.12 and the newest
    Vm,
    /// Guests with a Linux of their own, on this machine's kernel: root
    Guest,
    /// The agent in a machine with systemd and libvirt
    E2e,
    /// The demo, as a user runs it: root
    Demo,
}

impl Tier {
    /// Those that run unless others were asked for.
    const ALL: &[Self] = &[
        Self::Lint,
        Self::Unit,
        Self::Fuzz,
        Self::Native,
        Self::Crash,
        Self::Vm,
        Self::Guest,
        Self::E2e,
    ];
    /// Those that only run when asked for. The demo judges latencies, under TCG where there is
    /// no KVM: a figure for people, and no test that must hold on a busy machine.
    const ON_REQUEST: &[Self] = &[Self::Demo];

    fn purposes(self) -> &'static [Purpose] {
        match self {
            Self::Lint => &[Purpose::Build, Purpose::Lint],
            Self::Unit | Self::Fuzz => &[Purpose::Build],
            Self::Native | Self::Crash => &[Purpose::Build, Purpose::Native],
            Self::Vm => &[Purpose::Build, Purpose::Vm],
            Self::Guest => &[Purpose::Build, Purpose::Native, Purpose::Vm],
            Self::E2e => &[Purpose::Build, Purpose::E2e],
            Self::Demo => &[Purpose::Build, Purpose::Demo],
        }
    }

    fn needs_root(self) -> bool {
        matches!(self, Self::Native | Self::Crash | Self::Guest | Self::E2e | Self::Demo)
    }

    fn needs_binaries(self) -> bool {
        matches!(self, Self::Unit | Self::Native | Self::Crash | Self::Guest | Self::E2e)
    }

    fn run(self, binaries: Option<&Binaries>, kernels: &[Series]) -> Result<Count> {
        // Built before whenever a tier that needs them was chosen.
        let binaries = || binaries.expect("the test programs were built");
        match self {
            Self::Lint => Ok(lint()),
            Self::Unit => binaries().run(self, binaries::unit),
            Self::Fuzz => fuzz::run(),
            Self::Native => native(binaries()),
            Self::Crash => binaries().run(self, binaries::crash),
            Self::Vm => kernels::run(kernels),
            Self::Guest => guest::run(binaries()),
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
            Self::Fuzz => "fuzz",
            Self::Native => "native",
            Self::Crash => "crash",
            Self::Vm => "vm",
            Self::Guest => "guest",
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
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Run {
        took: Duration,
        count: Count,
    },
    /// The machine does not allow it, for this reason.
    NotRun(String),
    /// Nobody asked for it, and nobody has to.
    OnRequest,
}

/// Runs the tiers; exit code 1 when a test failed.
pub fn run(args: Args) -> Result<ExitCode> {
    let start = Instant::now();
    let ci = args.ci || std::env::var_os("CI").is_some_and(|value| !value.is_empty());
    let root = nix::unistd::geteuid().is_root();
    let on_request = if args.only.is_empty() { Tier::ON_REQUEST } else { &[] };
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
    interrupt::catch()?;

    let why_not = |tier: Tier| why_not(tier, root, &setup::missing(tier.purposes()));
    let binaries = if tiers.iter().any(|tier| tier.needs_binaries() && why_not(*tier).is_none()) {
        Some(Binaries::build()?)
    } else {
        None
    };
    let kernels = if args.kernel.is_empty() { kernel::TESTED } else { &args.kernel };
    let mut outcomes = Vec::new();
    for tier in tiers {
        let outcome = match why_not(tier) {
            Some(why) => Outcome::NotRun(why),
            None => run_tier(tier, binaries.as_ref(), kernels),
        };
        interrupt::check()?;
        println!("{}", line(tier, &outcome));
        outcomes.push((tier, outcome));
    }
    outcomes.extend(on_request.iter().map(|tier| (*tier, Outcome::OnRequest)));
    let total = total(&outcomes, ci && root);
    println!("\n{}", summary(&outcomes, &total, start.elapsed()));
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Why this machine does not allow a tier that misses these things.
fn why_not(tier: Tier, root: bool, missing: &[&str]) -> Option<String> {
    if tier.needs_root() && !root {
        return Some("not root".to_owned());
    }
    (!missing.is_empty())
        .then(|| format!("missing {}; `cargo xtask setup` says how", missing.join(", ")))
}

fn run_tier(tier: Tier, binaries: Option<&Binaries>, kernels: &[Series]) -> Outcome {
    let start = Instant::now();
    // A tier that breaks down has failed; the others still run.
    let count = tier.run(binaries, kernels).unwrap_or_else(|error| Count {
        failed: 1,
        notes: vec![format!("{error:#}")],
        ..Count::default()
    });
    for note in &count.notes {
        eprintln!("{note}");
    }
    Outcome::Run { took: start.elapsed(), count }
}

/// What became of a tier, on one line.
fn line(tier: Tier, outcome: &Outcome) -> String {
    match outcome {
        Outcome::Run { took, count } => {
            format!("{tier:<7} run     {:>7.1} s  {count}", took.as_secs_f64())
        }
        Outcome::NotRun(why) => format!("{tier:<7} not run: {why}"),
        Outcome::OnRequest => {
            format!("{tier:<7} not run: on request (cargo xtask test --only {tier})")
        }
    }
}

/// The sum of all tiers. In strict mode (as root, in CI) what was left out counts as failed:
/// a tier that did not run, and every test that is marked to be ignored.
fn total(outcomes: &[(Tier, Outcome)], strict: bool) -> Count {
    let mut total = Count::default();
    for (tier, outcome) in outcomes {
        match outcome {
            Outcome::Run { count, .. } => {
                total.passed += count.passed;
                total.failed += count.failed;
                if strict && count.ignored > 0 {
                    total.failed += count.ignored;
                    let note = format!("{tier}: ignored tests count as failed in CI as root");
                    total.notes.push(note);
                } else {
                    total.ignored += count.ignored;
                }
            }
            Outcome::NotRun(why) if strict => {
                total.failed += 1;
                total.notes.push(format!("{tier}: not run, which counts as failed: {why}"));
            }
            Outcome::NotRun(_) | Outcome::OnRequest => {}
        }
    }
    total
}

/// The lines of all tiers once more, what failed and what else counts, and the sum as the last
/// line: who sees only the end of a log still learns what to look at.
fn summary(outcomes: &[(Tier, Outcome)], total: &Count, took: Duration) -> String {
    let mut lines: Vec<String> =
        outcomes.iter().map(|(tier, outcome)| line(*tier, outcome)).collect();
    for (tier, outcome) in outcomes {
        if let Outcome::Run { count, .. } = outcome {
            // The whole of a note was shown when its tier ended.
            let first = count.notes.iter().filter_map(|note| note.lines().next());
            lines.extend(
                first.filter(|line| !line.is_empty()).map(|line| format!("{tier}: {line}")),
            );
        }
    }
    lines.extend(total.notes.iter().cloned());
    lines.push(format!("{total} in {:.0} s", took.as_secs_f64()));
    lines.join("\n")
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

/// The root tests on this machine's kernel, which has a row of the README's table.
fn native(binaries: &Binaries) -> Result<Count> {
    let mut count = binaries.run(Tier::Native, binaries::native)?;
    count.add(kernels::natively(&binaries.output(binaries::native)?)?);
    Ok(count)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(passed: u32, failed: u32, ignored: u32) -> Outcome {
        let count = Count { passed, failed, ignored, notes: vec!["failed: a\nits log".into()] };
        Outcome::Run { took: Duration::from_secs(2), count }
    }

    #[test]
    fn every_tier_has_its_line() {
        let mut all: Vec<Tier> = [Tier::ALL, Tier::ON_REQUEST].concat();
        all.sort_unstable();
        let values = <Tier as clap::ValueEnum>::value_variants();
        assert_eq!(all, values);
        let outcomes: Vec<_> = all.iter().map(|tier| (*tier, Outcome::OnRequest)).collect();
        let text = summary(&outcomes, &total(&outcomes, true), Duration::from_secs(61));
        assert!(text.lines().count() == all.len() + 1 && text.ends_with("0 failed in 61 s"));
        let demo = "demo    not run: on request (cargo xtask test --only demo)";
        assert!(text.lines().any(|line| line == demo), "{text}");
    }

    #[test]
    fn what_was_left_out_fails_only_where_all_must_run() {
        let outcomes = [
            (Tier::Unit, ran(5, 0, 2)),
            (Tier::Vm, Outcome::NotRun("missing depmod".into())),
            (Tier::Demo, Outcome::OnRequest),
        ];
        let lax = total(&outcomes, false);
        assert_eq!((lax.passed, lax.failed, lax.ignored), (5, 0, 2));
        assert!(lax.notes.is_empty(), "{lax:?}");
        let strict = total(&outcomes, true);
        assert_eq!((strict.passed, strict.failed, strict.ignored), (5, 3, 0));
        let text = summary(&outcomes, &strict, Duration::from_secs(2));
        assert!(text.contains("unit: ignored tests") && text.contains("vm: not run, which"));
        assert!(text.contains("unit: failed: a\n") && !text.contains("its log"), "{text}");
        assert!(text.ends_with("5 passed, 3 failed in 2 s"), "{text}");
    }

    #[test]
    fn a_failure_is_one_in_any_mode() {
        for strict in [false, true] {
            assert_eq!(total(&[(Tier::Crash, ran(1, 1, 0))], strict).failed, 1);
        }
    }

    #[test]
    fn what_a_tier_lacks_is_said() {
        assert_eq!(why_not(Tier::Unit, false, &[]), None);
        assert_eq!(why_not(Tier::Native, true, &[]), None);
        assert_eq!(why_not(Tier::Native, false, &["strace"]).unwrap(), "not root");
        let why = why_not(Tier::Vm, false, &["lz4", "zstd"]).unwrap();
        assert_eq!(why, "missing lz4, zstd; `cargo xtask setup` says how");
    }
}
