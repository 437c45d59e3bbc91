//! The real agent, as an operator would run it: release build, configuration file, signals.

use super::{interrupt, libvirtd};
use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use formtune_common::histogram;
use formtune_core::Sample;
use formtune_core::units::{Nanos, VmId};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const READY: Duration = Duration::from_secs(15);
/// Restoring three knobs takes milliseconds; this is for a machine at its limit.
const STOP: Duration = Duration::from_secs(20);

/// Builds the agent in release mode.
///
/// # Errors
/// When cargo fails.
pub fn build() -> Result<PathBuf> {
    progress::run(
        "building formtune",
        "formtune-build",
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(sh::root())
            .args(["build", "--locked", "--release", "--package", "formtune-agent"]),
    )?;
    Ok(sh::target().join("release/formtune"))
}

/// A running agent; stopped (and its knobs restored by itself) when dropped.
pub struct Agent {
    child: Child,
    program: PathBuf,
    config: PathBuf,
    socket: PathBuf,
    log: PathBuf,
}

impl Agent {
    /// Starts `formtune run` and waits until it says that it is ready, calling `tick` now and
    /// then. `folder` takes its state, socket and log; `settings` is the rest of the
    /// configuration file.
    ///
    /// # Errors
    /// When it ends early or does not become ready.
    pub fn start(
        program: &Path,
        folder: &Path,
        settings: &str,
        tick: &mut dyn FnMut(),
    ) -> Result<Self> {
        fs::create_dir_all(folder)
            .with_context(|| format!("failed to make {}", folder.display()))?;
        let config = folder.join("formtune.toml");
        let socket = folder.join("formtune.sock");
        let text = format!(
            "state_dir = '{}'\nsocket = '{}'\n{settings}",
            folder.join("state").display(),
            socket.display(),
        );
        fs::write(&config, text)
            .with_context(|| format!("failed to write {}", config.display()))?;
        let log = folder.join("formtune.log");
        let file = fs::File::create(&log)?;
        let mut command = Command::new(program);
        command
            .arg("run")
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0);
        // Should xtask be killed, the agent ends in order and restores.
        // SAFETY: only makes a system call.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)
                    .map_err(Into::into)
            })
        };
        let child = command.spawn().context("failed to start formtune")?;
        let mut new = Self { child, program: program.to_owned(), config, socket, log };
        interrupt::until(READY, "formtune's being ready", || {
            tick();
            if let Some(status) = new.child.try_wait()? {
                bail!("formtune ended with {status}; {}", progress::tail(&new.log, 10));
            }
            // Not there yet is no error.
            Ok(new.get("/readyz").is_ok().then_some(()))
        })?;
        Ok(new)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its Unix socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The body of an HTTP answer on its socket.
    ///
    /// # Errors
    /// When nobody listens, or the status is not 200.
    pub fn get(&self, path: &str) -> Result<String> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        // HTTP/1.0: the answer ends where the connection does.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        if head.split_whitespace().nth(1) != Some("200") {
            bail!("{path}: {}", head.lines().next().unwrap_or_default());
        }
        Ok(body.to_owned())
    }

    /// What `formtune explain VM` prints.
    ///
    /// # Errors
    /// When it cannot be run or fails.
    pub fn explain(&self, vm: &str) -> Result<String> {
        sh::output(Command::new(&self.program).args(["explain", vm, "--config"]).arg(&self.config))
    }

    /// SIGTERM, then waits, calling `tick` now and then; an error if it did not end with exit
    /// code 0.
    ///
    /// # Errors
    /// See above.
    pub fn stop(mut self, tick: &mut dyn FnMut()) -> Result<()> {
        match libvirtd::stop(&mut self.child, STOP, tick) {
            Some(status) if status.success() => Ok(()),
            Some(status) => {
                bail!("formtune ended with {status}; {}", progress::tail(&self.log, 10))
            }
            None => bail!(
                "formtune did not end within {} s of SIGTERM; {}",
                STOP.as_secs(),
                progress::tail(&self.log, 10)
            ),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            libvirtd::stop(&mut self.child, STOP, &mut || ());
        }
    }
}

/// Run-queue waits of one VM over some time, as formtune recorded them.
#[derive(Clone, Debug, Default)]
pub struct Waits {
    counts: std::collections::BTreeMap<u16, u64>,
}

impl Waits {
    /// Those that the samples taken within `from..=to` hold.
    ///
    /// # Errors
    /// When the recording cannot be read.
    pub fn of(recording: &Path, vm: &VmId, from: Nanos, to: Nanos) -> Result<Self> {
        let file = fs::File::open(recording)
            .with_context(|| format!("failed to open {}", recording.display()))?;
        let mut waits = Self::default();
        // The first line is the header.
        for line in BufReader::new(file).lines().skip(1) {
            let sample: Sample = serde_json::from_str(&line?)
                .with_context(|| format!("a sample in {} is damaged", recording.display()))?;
            // Each sample holds what ended since the one before it.
            if sample.at <= from || sample.at > to {
                continue;
            }
            let runq = sample.vms.get(vm).and_then(|vm| vm.runq.as_ref());
            for &(bucket, count) in runq.iter().flat_map(|runq| &runq.counts) {
                *waits.counts.entry(bucket).or_default() += u64::from(count);
            }
        }
        Ok(waits)
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Upper bound of the bucket (4.4 % wide) that holds the quantile; `None` of nothing.
    pub fn quantile(&self, q: f64) -> Option<Nanos> {
        let rank = ((self.count() as f64 * q).ceil() as u64).max(1);
        let mut seen = 0;
        self.counts.iter().find_map(|(&bucket, &count)| {
            seen += count;
            (seen >= rank).then(|| Nanos(histogram::upper_bound(u32::from(bucket))))
        })
    }
}

/// `CLOCK_MONOTONIC`, the clock of recordings.
///
/// # Errors
/// When the kernel has none.
pub fn monotonic() -> Result<Nanos> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .context("failed to read the clock")?;
    Ok(Nanos(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64))
}
