//! The test programs: built in one go, so that nothing is compiled twice for another choice of
//! features, then run one by one with a time limit.

use super::{Count, Tier};
use crate::demo::interrupt;
use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The package of the tests that need root.
const ROOT_TESTS: &str = "formtune-tests";

/// No test program may take longer.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// One test program.
#[derive(Debug)]
pub struct Binary {
    package: String,
    /// Folder of its package.
    folder: PathBuf,
    /// Name of the target, e.g. `crash_journal`.
    name: String,
    file: PathBuf,
}

/// All of them, and the programs they test.
pub struct Binaries {
    tests: Vec<Binary>,
    programs: Vec<(String, PathBuf)>,
}

/// Tests that need nothing: those of every package but the one of the root tests.
pub fn unit(binary: &Binary) -> bool {
    binary.package != ROOT_TESTS
}

/// Root tests on this machine's kernel.
pub fn native(binary: &Binary) -> bool {
    !unit(binary) && !crash(binary) && !guest(binary)
}

/// Root tests with a guest that has a Linux of its own.
pub fn guest(binary: &Binary) -> bool {
    !unit(binary) && binary.name.starts_with("guest_")
}

/// Root tests that break off writes.
pub fn crash(binary: &Binary) -> bool {
    !unit(binary) && binary.name.starts_with("crash_")
}

impl Binaries {
    /// Builds everything that the default members hold.
    ///
    /// # Errors
    /// When something does not compile.
    pub fn build() -> Result<Self> {
        let (path, log) = progress::log_file("build")?;
        let mut step = progress::Step::start("building");
        let mut child = Command::new("cargo")
            .current_dir(sh::root())
            .args(["build", "--all-targets", "--message-format", "json-render-diagnostics"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("failed to start cargo")?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            std::thread::sleep(Duration::from_millis(50));
            step.tick();
        };
        if !status.success() {
            step.end("failed");
            bail!("cargo build --all-targets ended with {status}; {}", diagnostics(&path)?);
        }
        step.end("done");
        let mut all = Self { tests: Vec::new(), programs: Vec::new() };
        for line in std::fs::read_to_string(&path)?.lines() {
            if let Ok(message) = serde_json::from_str::<Value>(line) {
                all.take(&message);
            }
        }
        Ok(all)
    }

    /// Notes what cargo says of one artifact.
    fn take(&mut self, message: &Value) {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let (Some(file), Some(name), Some(manifest)) = (
            text(&message["executable"]),
            text(&message["target"]["name"]),
            text(&message["manifest_path"]),
        ) else {
            return;
        };
        if message["profile"]["test"] == true {
            let folder = Path::new(&manifest).parent().unwrap_or(Path::new("/")).to_owned();
            // `path+file:///…/formtune-core#0.1.0`, or `…/tests#formtune-tests@0.1.0`
            let id = message["package_id"].as_str().unwrap_or_default();
            self.tests.push(Binary { package: package_name(id), folder, name, file: file.into() });
        } else {
            self.programs.push((name, file.into()));
        }
    }

    /// A program that was built, e.g. `formtune`.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn program(&self, name: &str) -> Result<&Path> {
        self.programs
            .iter()
            .find(|(program, _)| program == name)
            .map(|(_, file)| file.as_path())
            .with_context(|| format!("the workspace has no program {name}"))
    }

    /// The program of one root test, e.g. `act_cgroup`.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn root_test(&self, name: &str) -> Result<&Path> {
        self.tests
            .iter()
            .find(|binary| !unit(binary) && binary.name == name)
            .map(|binary| binary.file.as_path())
            .with_context(|| format!("{ROOT_TESTS} has no test {name}"))
    }

    /// What those that `choose` takes printed when they last ran.
    ///
    /// # Errors
    /// When one did not.
    pub fn output(&self, choose: fn(&Binary) -> bool) -> Result<String> {
        let chosen = self.tests.iter().filter(|binary| choose(binary));
        chosen.map(|binary| run_log(&binary.log_name())).collect()
    }

    /// Runs those that `choose` takes; doc tests go with the unit tests.
    pub fn run(&self, tier: Tier, choose: fn(&Binary) -> bool) -> Result<Count> {
        self.run_with(tier, choose, &[])
    }

    /// The same, with these variables in their environment.
    pub fn run_with(
        &self,
        tier: Tier,
        choose: fn(&Binary) -> bool,
        variables: &[(&str, &Path)],
    ) -> Result<Count> {
        let mut count = Count::default();
        for binary in self.tests.iter().filter(|binary| choose(binary)) {
            let mut command = Command::new(&binary.file);
            command.current_dir(&binary.folder).env("CARGO_MANIFEST_DIR", &binary.folder);
            command.envs(variables.iter().copied());
            if tier != Tier::Unit {
                // Root tests change the machine: one after the other.
                command.arg("--test-threads=1");
            }
            if tier == Tier::Native {
                // What they have seen is wanted, too: `Binaries::output`.
                command.arg("--show-output");
            }
            count.add(run_tests(&binary.log_name(), &mut command)?);
        }
        if tier == Tier::Unit {
            let mut command = Command::new("cargo");
            command.current_dir(sh::root()).args(["test", "--doc"]);
            count.add(run_tests("doc", &mut command)?);
        }
        if count == Count::default() {
            bail!("there is no test in tier {tier}");
        }
        Ok(count)
    }
}

impl Binary {
    fn log_name(&self) -> String {
        format!("{}-{}", self.package, self.name)
    }
}

/// The compiler's messages in a build log, without the lines for programs.
fn diagnostics(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path)?;
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('{')).collect();
    let from = lines.len().saturating_sub(40);
    Ok(format!("{}:\n    {}", path.display(), lines[from..].join("\n    ")))
}

/// Name in a package id of cargo.
fn package_name(id: &str) -> String {
    let (path, version) = id.rsplit_once('#').unwrap_or((id, ""));
    match version.split_once('@') {
        Some((name, _)) => name.to_owned(),
        None => path.rsplit('/').next().unwrap_or(path).to_owned(),
    }
}

/// The output of a test program's last run.
fn run_log(name: &str) -> Result<String> {
    let path = sh::target().join(format!("log/test-{name}.log"));
    let bytes = std::fs::read(&path).with_context(|| format!("no {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Runs one test program to its end and counts.
fn run_tests(name: &str, command: &mut Command) -> Result<Count> {
    let (path, log) = progress::log_file(&format!("test-{name}"))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .with_context(|| format!("failed to start {}", sh::line(command)))?;
    let start = Instant::now();
    // Most end within a moment and need no line of their own.
    let mut step: Option<progress::Step> = None;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        let interrupted = interrupt::check();
        if interrupted.is_err() || start.elapsed() > LIMIT {
            killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL)?;
            child.wait()?;
            interrupted?;
            break None;
        }
        if start.elapsed() > Duration::from_secs(1) {
            step.get_or_insert_with(|| progress::Step::start(format!("tests of {name}"))).tick();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let text = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
    let mut count = parse(&text);
    let good = status.is_some_and(|status| status.success());
    if !good && count.failed == 0 {
        // Killed, or it ended before it could say what failed.
        count.failed = 1;
        let how =
            status.map_or("took too long".to_owned(), |status| format!("ended with {status}"));
        count.notes.push(format!("{name} {how}"));
    }
    if count.failed > 0 {
        count.notes.push(progress::tail(&path, 40));
    }
    if let Some(step) = step {
        step.end(&count.to_string());
    }
    Ok(count)
}

/// Counts in the output of Rust's test harness, several programs in a row.
fn parse(text: &str) -> Count {
    let mut count = Count::default();
    for line in text.lines() {
        if let Some(result) = line.strip_prefix("test result: ") {
            let of = |word: &str| {
                result
                    .split([';', '.'])
                    .find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<u32>().ok())
                    .unwrap_or(0)
            };
            count.passed += of("passed");
            count.failed += of("failed");
            count.ignored += of("ignored");
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            count.notes.push(format!("failed: {name}"));
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::{package_name, parse};

    #[test]
    fn counts_are_summed_and_failures_named() {
        let text = "running 3 tests\ntest a ... ok\ntest b::c ... FAILED\n\
            test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; \
            finished in 0.00s\n\
            test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let count = parse(text);
        assert_eq!((count.passed, count.failed, count.ignored), (13, 1, 1));
        assert_eq!(count.notes, ["failed: b::c"]);
        assert_eq!(parse("Segmentation fault").passed, 0);
    }

    #[test]
    fn package_ids_of_both_kinds_are_understood() {
        assert_eq!(package_name("path+file:///a/formtune-core#0.1.0"), "formtune-core");
        assert_eq!(package_name("path+file:///a/tests#formtune-tests@0.1.0"), "formtune-tests");
    }
}
