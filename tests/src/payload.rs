//! What the programs that run inside test machines share: checks that print one line of
//! JSON each, and the agent as a process.

use crate::wait::eventually;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

/// The victim is promised what it cannot have beside a spinning neighbour on one CPU, and the
/// neighbour is entitled to less than it uses.
pub const CONTENDED: &str = r#"
[cpu]
cooldown = "1s"

[[rules]]
vms = ["web-*"]
class = "web"

[[rules]]
vms = ["batch-*"]
class = "batch"

[classes.web]
priority = "high"

[classes.web.slo]
threshold = "100us"
min_samples = 5

[classes.batch]
priority = "low"
cpu_weight = 20
slo = "off"
"#;

/// What a check that passed has to say.
#[derive(Debug)]
pub struct Passed {
    /// What was measured, as a sentence.
    pub detail: String,
    /// The one figure of it that stands for the rest in a table, if there is one.
    pub figure: Option<String>,
}

impl From<String> for Passed {
    fn from(detail: String) -> Self {
        Self { detail, figure: None }
    }
}

/// Checks run so far. `cargo xtask test` reads what they print.
#[derive(Debug, Default)]
pub struct Checks {
    failed: u32,
}

impl Checks {
    /// Runs one check; it says what it measured, or what went wrong.
    pub fn run<P: Into<Passed>>(&mut self, name: &str, check: impl FnOnce() -> Result<P>) {
        let result = check().map(Into::into);
        let ok = result.is_ok();
        let Passed { detail, figure } = result.unwrap_or_else(|error| {
            self.failed += 1;
            format!("{error:#}").into()
        });
        println!("{}", line(name, ok, &detail, figure.as_deref()));
    }

    /// 0 when all passed.
    pub fn exit_code(self) -> ExitCode {
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Says what a test has shown, for the README's table of kernels: `cargo xtask test --only
/// native` reads it as it reads [`Checks`].
pub fn shown(check: &str, figure: Option<&str>) {
    println!("{}", line(check, true, "", figure));
}

fn line(check: &str, ok: bool, detail: &str, figure: Option<&str>) -> String {
    let line = serde_json::json!({ "check": check, "ok": ok, "detail": detail, "figure": figure });
    format!("CHECK {line}")
}

/// A running `formtune run`. Killed when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    folder: PathBuf,
}

impl Agent {
    /// Starts it with everything it writes below `folder`; `settings` is the rest of its
    /// configuration.
    ///
    /// # Errors
    /// When it ends, or does not become ready: the message holds the end of its log.
    pub fn start(program: &Path, folder: &Path, settings: &str) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let config = folder.join("formtune.toml");
        let text = format!(
            "state_dir = \"{0}/state\"\nsocket = \"{0}/formtune.sock\"\nlisten = \"off\"\n{settings}",
            folder.display()
        );
        fs::write(&config, text)?;
        let log = File::create(folder.join("formtune.log"))?;
        let child = Command::new(program)
            .args(["run", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("failed to start {}", program.display()))?;
        let mut agent = Self { child, folder: folder.to_owned() };
        let ready = eventually(Duration::from_secs(60), "readiness", || {
            if let Some(status) = agent.child.try_wait()? {
                bail!("formtune ended with {status}");
            }
            // Nobody listens yet, or it says that it is not ready: ask again.
            Ok(agent.get("/readyz").ok())
        });
        match ready {
            Ok(_) => Ok(agent),
            Err(error) => Err(error.context(agent.log_tail())),
        }
    }

    /// The body of an answer with status 200 on its socket.
    ///
    /// # Errors
    /// When nobody listens or the status is another one.
    pub fn get(&self, path: &str) -> Result<String> {
        let mut stream = UnixStream::connect(self.folder.join("formtune.sock"))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        // HTTP/1.0: the answer ends where the connection does.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.lines().next().unwrap_or_default();
        if status.split(' ').nth(1) != Some("200") {
            bail!("{path}: {status}");
        }
        Ok(body.to_owned())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended before.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal)
            .with_context(|| format!("failed to send {signal} to formtune"))
    }

    /// Waits for it to end by itself after a signal.
    ///
    /// # Errors
    /// When it does not within 30 s.
    pub fn wait(&mut self) -> Result<std::process::ExitStatus> {
        eventually(Duration::from_secs(30), "end of formtune", || Ok(self.child.try_wait()?))
    }

    /// The last lines of its log, in one line.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.folder.join("formtune.log")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        format!("formtune's log ends: {}", lines[lines.len().saturating_sub(6)..].join(" | "))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended before, which is what most checks are about.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
