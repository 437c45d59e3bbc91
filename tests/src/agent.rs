//! The real `formtune`, as a process.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Loaded machines take their time, above all to verify the probe.
const LIMIT: Duration = Duration::from_secs(60);

/// The program, built if this runs below `cargo test`; `cargo xtask test` has built it.
pub fn program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        if let Some(cargo) = std::env::var_os("CARGO") {
            let built = Command::new(cargo)
                .args(["build", "--quiet", "--package", "formtune-agent", "--bin", "formtune"])
                .status();
            assert!(built.is_ok_and(|status| status.success()), "formtune does not build");
        }
        build_folder().join("formtune")
    });
    assert!(program.exists(), "{} is missing: cargo build", program.display());
    program.clone()
}

/// Where the program lies: `target/debug` for a test `target/debug/deps/NAME-0123`.
///
/// # Panics
/// If the running program has no such path.
pub fn build_folder() -> PathBuf {
    let test = std::env::current_exe().expect("the test has a path");
    test.parent().and_then(Path::parent).expect("it lies in target/*/deps").to_owned()
}

/// A folder with a configuration; everything an agent of it writes is below.
#[derive(Debug)]
pub struct Site {
    dir: tempfile::TempDir,
}

impl Site {
    /// `more` is TOML that goes after the folders' keys.
    pub fn new(more: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("site-").tempdir()?;
        let site = Self { dir };
        site.configure(more)?;
        Ok(site)
    }

    /// Writes the configuration anew.
    pub fn configure(&self, more: &str) -> Result<()> {
        let dir = self.dir.path().display();
        let text =
            format!("state_dir = \"{dir}/state\"\nsocket = \"{dir}/formtune.sock\"\n{more}\n");
        Ok(fs::write(self.config(), text)?)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Folder of the journal.
    pub fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.path().join("formtune.toml")
    }

    /// The log of the last agent.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path().join("log")).unwrap_or_default()
    }

    /// A command line on this site.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg("--config").arg(self.config()).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        self.command(args).output().context("failed to start formtune")
    }

    /// Starts `formtune run` with further arguments and waits until it answers.
    pub fn run(&self, args: &[&str]) -> Result<Agent> {
        let command = self.command(&[&["run"], args].concat());
        self.start(command)
    }

    /// Starts a command that becomes `formtune run`, and waits until it answers.
    pub fn start(&self, mut command: Command) -> Result<Agent> {
        let log = File::create(self.path().join("log"))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let mut agent = Agent { child, socket: self.path().join("formtune.sock") };
        let begin = Instant::now();
        while agent.get("/v1/node").is_err() {
            if let Some(status) = agent.child.try_wait()? {
                anyhow::bail!("formtune ended with {status}: {}", self.log().trim());
            }
            ensure!(begin.elapsed() < LIMIT, "formtune is not ready: {}", self.log().trim());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(agent)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // The folder goes, and with it what would tell why a test failed.
        if std::thread::panicking() {
            eprintln!("log of formtune:\n{}", self.log());
        }
    }
}

/// A running agent; dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    socket: PathBuf,
}

impl Agent {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }

    /// Sends a signal and waits for the end.
    pub fn end(mut self, signal: Signal) -> Result<ExitStatus> {
        self.signal(signal)?;
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(begin.elapsed() < LIMIT, "formtune does not end on {signal}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The body of an answer with status 200.
    pub fn get(&self, path: &str) -> Result<String> {
        let (status, body) = self.status(path)?;
        ensure!(status == 200, "{path}: {status} {body}");
        Ok(body)
    }

    /// The value of one series in `/metrics`, e.g. `formtune_vms{a="b"}`; `None` if it is not
    /// there.
    pub fn metric(&self, series: &str) -> Result<Option<f64>> {
        let text = self.get("/metrics")?;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        Ok(line.map(str::parse).transpose()?)
    }

    /// Status and body of an answer.
    pub fn status(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        // HTTP/1.0: the answer ends where the connection does.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split_whitespace().nth(1).context("no HTTP status")?.parse()?;
        Ok((status, body.to_owned()))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs a command as [`mounted`] to its end.
///
/// # Panics
/// When there is no `unshare`.
pub fn with_mounted(source: &Path, target: &str, command: &Command) -> Output {
    mounted(source, target, command).output().unwrap()
}

/// A command in a mount namespace of its own in which `source` lies over `target`.
pub fn mounted(source: &Path, target: &str, command: &Command) -> Command {
    let mut inside = Command::new("unshare");
    inside
        .args(["--mount", "sh", "-c"])
        .arg("mount --bind \"$1\" \"$2\" && shift 2 && exec \"$@\"")
        .arg("sh")
        .arg(source)
        .arg(target)
        .arg(command.get_program())
        .args(command.get_args());
    inside
}
