//! Lines that say what is going on, for everything that may take longer than two seconds.

use crate::demo::interrupt;
use crate::sh;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often a line that is still running is renewed where standard error is no terminal.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// One line that says what runs and, at the end, how long it took.
///
/// On a terminal the line counts the seconds; elsewhere it is printed once, and once more
/// every [`HEARTBEAT`].
pub struct Step {
    label: String,
    start: Instant,
    shown: Instant,
    tty: bool,
}

impl Step {
    /// Prints the line.
    pub fn start(label: impl Into<String>) -> Self {
        let (label, now) = (label.into(), Instant::now());
        let tty = std::io::stderr().is_terminal();
        if tty {
            eprint!("{label} …");
        } else {
            eprintln!("{label} …");
        }
        Self { label, start: now, shown: now, tty }
    }

    /// To be called now and then while it runs.
    pub fn tick(&mut self) {
        let every = if self.tty { Duration::from_secs(1) } else { HEARTBEAT };
        if self.shown.elapsed() < every {
            return;
        }
        self.shown = Instant::now();
        let seconds = self.start.elapsed().as_secs();
        if self.tty {
            eprint!("\r\x1b[K{} … {seconds} s", self.label);
            // A progress line that cannot be shown is no reason to stop.
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{} … {seconds} s", self.label);
        }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Ends the line with what came of it, e.g. `done`.
    pub fn end(self, how: &str) {
        let seconds = self.start.elapsed().as_secs_f64();
        let before = if self.tty { "\r\x1b[K" } else { "" };
        eprintln!("{before}{}: {how}, {seconds:.1} s", self.label);
    }
}

/// Does something under one progress line, which `what` renews by calling its argument.
///
/// # Errors
/// Those of `what`.
pub fn during<T>(label: &str, what: impl FnOnce(&mut dyn FnMut()) -> Result<T>) -> Result<T> {
    let mut step = Step::start(label);
    let result = what(&mut || step.tick());
    step.end(if result.is_ok() { "done" } else { "failed" });
    result
}

/// Where the output of a step goes: `target/log/NAME.log`, emptied first.
///
/// # Errors
/// When the folder cannot be made or the file not written.
pub fn log_file(name: &str) -> Result<(PathBuf, File)> {
    let folder = sh::target().join("log");
    fs::create_dir_all(&folder)
        .with_context(|| format!("failed to make the folder {}", folder.display()))?;
    let path = folder.join(format!("{name}.log"));
    let file =
        File::create(&path).with_context(|| format!("failed to write {}", path.display()))?;
    Ok((path, file))
}

/// Runs a command to its end under one progress line; its output goes to `target/log/NAME.log`.
///
/// # Errors
/// When it cannot be started or does not succeed: the error shows the log's name and its tail.
/// On an interrupt it is killed.
pub fn run(label: &str, log_name: &str, command: &mut Command) -> Result<()> {
    let (path, log) = log_file(log_name)?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("failed to start {}", sh::line(command)))?;
    let mut step = Step::start(label);
    loop {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                step.end("done");
                return Ok(());
            }
            step.end("failed");
            bail!("{} ended with {status}; {}", sh::line(command), tail(&path, 15));
        }
        if let Err(interrupted) = interrupt::check() {
            child.kill()?;
            child.wait()?;
            step.end("interrupted");
            return Err(interrupted);
        }
        std::thread::sleep(Duration::from_millis(20));
        step.tick();
    }
}

/// The log's name and its last lines, for an error.
pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<_> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    format!("the end of {}:\n    {}", path.display(), all[from..].join("\n    "))
}
