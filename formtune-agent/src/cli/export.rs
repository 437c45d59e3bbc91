//! `formtune export hdr`: what the running agent measures, as an HdrHistogram interval log.

use super::client::{self, At};
use super::{GOOD, Global, print};
use crate::config;
use crate::export::hdr::{Intervals, head};
use crate::export::series::Histograms;
use anyhow::{Context, Result, ensure};
use formtune_core::units::Nanos;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Bounds of `--interval`: the agent's own tick, and a day.
const INTERVALS: std::ops::RangeInclusive<Nanos> =
    Nanos::from_millis(250)..=Nanos::from_secs(86_400);

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Write latencies as an HdrHistogram V2 interval log, until interrupted
    #[command(after_help = "\
Examples:
  formtune export hdr > latency.hlog
  formtune export hdr --for 60s --interval 5s --output latency.hlog
  formtune export hdr --vm web-1 --for 10min --output web-1.hlog

One line per interval, VM and metric, tagged VM:METRIC (web-1:runqueue_latency), values in
nanoseconds. HdrHistogram's tools read it, for example:
  java -cp HdrHistogram.jar org.HdrHistogram.HistogramLogProcessor -i latency.hlog \\
    -tag web-1:runqueue_latency -outputValueUnitRatio 1000

The agent can also keep such a log by itself: see `hdr_log` in the configuration.")]
    Hdr(HdrArgs),
}

/// Arguments of `formtune export hdr`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct HdrArgs {
    /// Length of an interval, 250ms to 24h
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = config::duration)]
    interval: Nanos,
    /// Stop after this time [default: when interrupted]
    #[arg(long = "for", value_name = "TIME", value_parser = config::duration)]
    length: Option<Nanos>,
    /// One VM only
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Write to this file [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    at: At,
}

/// Asks and writes.
///
/// # Errors
/// The agent cannot be asked, or the file cannot be written.
pub(super) fn run(global: &Global, command: &Command) -> Result<ExitCode> {
    let Command::Hdr(args) = command;
    ensure!(INTERVALS.contains(&args.interval), "--interval must be 250ms to 24h");
    let socket = args.at.socket(global)?;
    let mut output = Output::open(args.output.as_deref())?;
    let mut path = "/v1/histograms".to_owned();
    if let Some(vm) = &args.vm {
        path = format!("{path}?vm={}", client::segment(vm));
    }
    let mut wait = Wait::new()?;
    let mut intervals = Intervals::default();
    let began = Instant::now();
    let length = args.length.map(|length| Duration::from_nanos(length.0));
    let interval = Duration::from_nanos(args.interval.0);
    let mut next = began;
    let mut last = false;
    loop {
        let now: Histograms = client::get(&socket, &path)?;
        let mut text = if intervals.has_begun() { Vec::new() } else { head(&now)? };
        text.extend(intervals.lines(&now)?);
        output.write(&text)?;
        intervals.begin(now);
        if last {
            return Ok(GOOD);
        }
        next += interval;
        let end = length.map(|length| began + length);
        last = end.is_some_and(|end| next >= end);
        let until = end.filter(|_| last).unwrap_or(next);
        // Interrupted, the log ends with what has been counted of the interval.
        last |= wait.until(until);
    }
}

/// A file or standard output.
enum Output {
    File(PathBuf, File),
    Standard,
}

impl Output {
    fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::Standard) };
        let file = File::create(path);
        let file = file.with_context(|| format!("failed to make {}", path.display()))?;
        Ok(Self::File(path.to_owned(), file))
    }

    fn write(&mut self, text: &[u8]) -> Result<()> {
        match self {
            Self::File(path, file) => {
                file.write_all(text).with_context(|| format!("failed to write {}", path.display()))
            }
            Self::Standard => Ok(print(String::from_utf8_lossy(text))?),
        }
    }
}

/// Waits for the time or for a signal.
struct Wait {
    runtime: tokio::runtime::Runtime,
    signals: [Signal; 2],
}

impl Wait {
    fn new() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let signals = {
            let _entered = runtime.enter();
            [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?]
        };
        Ok(Self { runtime, signals })
    }

    /// Whether it was a signal.
    fn until(&mut self, time: Instant) -> bool {
        let [interrupt, terminate] = &mut self.signals;
        self.runtime.block_on(async {
            tokio::select! {
                () = tokio::time::sleep_until(time.into()) => false,
                _ = interrupt.recv() => true,
                _ = terminate.recv() => true,
            }
        })
    }
}
