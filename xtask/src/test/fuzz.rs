//! Tier `fuzz`: every fuzz target (fuzz/fuzz_targets) for a minute, two at a time.
//!
//! The targets are libFuzzer programs. The flags that give it its coverage are stable ones, so
//! cargo alone builds them, with the project's own compiler; cargo-fuzz, which wants a nightly
//! one for its sanitizers, works on the same folder. What was found lies in `target/fuzz`, and
//! the next run begins with it.

use super::Count;
use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The target that the programs are built for; naming it keeps the flags off build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What cargo-fuzz passes, without a sanitizer.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// How long each target runs.
const SECONDS: u64 = 60;
/// It ends by itself well before.
const LIMIT: Duration = Duration::from_secs(SECONDS + 60);
/// One input may take this long, seconds of the clock's: all of them take microseconds, but a
/// busy machine may let a program wait.
const TIMEOUT: u32 = 25;
/// Memory of one program, MiB: it has about 200 of its own after a minute.
const MEMORY: u32 = 1024;
/// Programs at a time.
const AT_ONCE: usize = 2;

/// Builds and runs all targets.
pub fn run() -> Result<Count> {
    let names = names()?;
    progress::run(
        "building the fuzz targets",
        "build-fuzz",
        Command::new("cargo")
            .current_dir(sh::root())
            .args(["build", "--package", "formtune-fuzz", "--bins"])
            .args(["--profile", "fuzz", "--target", TARGET])
            .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", FLAGS.join(" ")),
    )?;
    let mut count = Count::default();
    for names in names.chunks(AT_ONCE) {
        let mut step = progress::Step::start(format!("fuzzing {}", names.join(" and ")));
        let mut running = names.iter().map(|name| Run::start(name)).collect::<Result<Vec<_>>>()?;
        while !running
            .iter_mut()
            .map(Run::has_ended)
            .collect::<Result<Vec<_>>>()?
            .iter()
            .all(|e| *e)
        {
            step.tick();
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut inputs = Vec::new();
        for run in running {
            match run.judge() {
                Ok(executed) => {
                    count.passed += 1;
                    inputs.push(format!("{executed} inputs"));
                }
                Err(error) => {
                    count.failed += 1;
                    inputs.push("failed".into());
                    count.notes.push(format!("{error:#}"));
                }
            }
        }
        step.end(&inputs.join(", "));
    }
    Ok(count)
}

/// The targets, sorted.
fn names() -> Result<Vec<String>> {
    let folder = sh::root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder)
        .with_context(|| format!("failed to list {}", folder.display()))?
        .flatten()
    {
        if let Some(name) = entry.path().file_stem().and_then(|stem| stem.to_str()) {
            names.push(name.to_owned());
        }
    }
    if names.is_empty() {
        bail!("{} holds no fuzz target", folder.display());
    }
    names.sort_unstable();
    Ok(names)
}

/// One target, running. Killed when dropped.
struct Run {
    name: String,
    child: Child,
    log: PathBuf,
    start: Instant,
    ended: bool,
}

impl Run {
    fn start(name: &str) -> Result<Self> {
        let program = sh::target().join(TARGET).join("fuzz").join(name);
        let folder = sh::target().join("fuzz").join(name);
        let corpus = folder.join("corpus");
        fs::create_dir_all(&corpus)?;
        let (path, log) = progress::log_file(&format!("fuzz-{name}"))?;
        let child = Self::command(&program, &folder, &corpus, name, log)
            .spawn()
            .with_context(|| format!("failed to start {}", program.display()))?;
        Ok(Self { name: name.into(), child, log: path, start: Instant::now(), ended: false })
    }

    fn command(program: &Path, folder: &Path, corpus: &Path, name: &str, log: File) -> Command {
        let mut command = Command::new(program);
        command
            // New inputs go to the first folder.
            .arg(corpus)
            .arg(sh::root().join("fuzz/seeds").join(name))
            .arg(format!("-max_total_time={SECONDS}"))
            .arg(format!("-timeout={TIMEOUT}"))
            .arg(format!("-rss_limit_mb={MEMORY}"))
            .arg(format!("-artifact_prefix={}/", folder.display()))
            .arg("-print_final_stats=1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command
    }

    fn has_ended(&mut self) -> Result<bool> {
        self.ended |= self.child.try_wait()?.is_some();
        if !self.ended && self.start.elapsed() > LIMIT {
            self.child.kill()?;
        }
        Ok(self.ended)
    }

    /// Inputs that were tried; what was wrong with the one it ended at is in the log.
    fn judge(mut self) -> Result<u64> {
        let status = self.child.wait()?;
        let text = String::from_utf8_lossy(&fs::read(&self.log)?).into_owned();
        match executed(&text) {
            Some(executed) if status.success() && executed > 0 => Ok(executed),
            _ => bail!(
                "fuzz target {} ended with {status}: {}",
                self.name,
                progress::tail(&self.log, 30)
            ),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // It has ended, or the tier breaks down.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `stat::number_of_executed_units: 123456`
fn executed(log: &str) -> Option<u64> {
    log.lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .and_then(|count| count.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::{executed, names};
    use crate::sh;

    #[test]
    fn the_number_of_inputs_is_read_off_the_log() {
        let log =
            "Done 9 runs in 60 second(s)\nstat::number_of_executed_units: 123456\nstat::x: 1\n";
        assert_eq!(executed(log), Some(123_456));
        assert_eq!(executed("==1== ERROR: libFuzzer: timeout"), None);
    }

    #[test]
    fn every_target_is_a_program_and_has_first_inputs() {
        let manifest = std::fs::read_to_string(sh::root().join("fuzz/Cargo.toml")).unwrap();
        for name in names().unwrap() {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
            let seeds = sh::root().join("fuzz/seeds").join(&name);
            assert!(seeds.read_dir().unwrap().next().is_some(), "{name}");
        }
    }
}
