//! `cargo xtask bench scrape`: how long `/metrics` takes for 1,000 VMs that all run, do block I/O
//! and have a tap device, in both forms, from the first byte of the request on the Unix socket to
//! the last of the answer.

use super::crowd::{Crowd, VMS};
use crate::demo::agent::{self, Agent};
use crate::demo::interrupt;
use crate::figure::Figure;
use crate::progress;
use crate::setup::{self, Purpose};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const ROUNDS: usize = 30;
/// Each VM wakes up ten times a second, so that there are some hundred waits of each by then.
const FILL: Duration = Duration::from_secs(40);
/// Longer than the agent uses a snapshot again: every scrape pays for its own.
const PAUSE: Duration = Duration::from_millis(330);

/// What a Prometheus with native histograms asks for.
const PROTOBUF: &str = "application/vnd.google.protobuf";
const OPTIONS: &str = ";proto=io.prometheus.client.MetricFamily;encoding=delimited";

/// Measures both figures.
///
/// # Errors
/// When the load cannot be set up or the agent fails.
pub fn run() -> Result<Vec<Figure>> {
    setup::ensure(&[Purpose::Build, Purpose::Bench])?;
    interrupt::catch()?;
    let program = agent::build()?;
    let folder = tempfile::Builder::new().prefix("bench-").tempdir()?;
    let crowd = Crowd::start()?;
    let settings = format!(
        "listen = 'off'\nlibvirt = 'off'\ncgroups = ['{}']\nmax_vms = 1024\n\
         mode.cpu_weight = 'shadow'\n",
        crowd.pattern()
    );
    let mut step = progress::Step::start("starting formtune, filling its histograms");
    let agent = Agent::start(&program, folder.path(), &settings, &mut || step.tick())?;
    interrupt::wait(FILL, || step.tick())?;
    // The first answers of an agent that has just found its VMs may come late.
    let filled = interrupt::until(Duration::from_secs(30), "histograms of all VMs", || {
        step.tick();
        Ok(filled(&agent).ok())
    })?;
    step.end("done");
    eprintln!("scrape: {filled:.0} buckets filled per histogram");

    let mut step = progress::Step::start(format!("bench scrape: {ROUNDS} rounds"));
    let mut forms = [Form::new("text/plain", ";version=0.0.4"), Form::new(PROTOBUF, OPTIONS)];
    // The first scrape of each is not counted.
    for round in 0..=ROUNDS {
        for turn in 0..2 {
            interrupt::wait(PAUSE, || step.tick())?;
            let form = &mut forms[(round + turn) % 2];
            let ms = form.scrape(agent.socket())?;
            if round > 0 {
                form.ms.push(ms);
            }
        }
    }
    step.end("done");
    let [text, protobuf] = &forms;
    eprintln!("scrape: {} bytes of text, {} of protobuf", text.bytes, protobuf.bytes);
    let late = late(&agent)?;
    eprintln!("scrape: {late} ticks were late since the agent's start");
    agent.stop(&mut || {})?;
    drop(crowd);
    let figure =
        |name, form: &Form| Figure::measured(name, "ms", &form.ms, None, None, Some("ours <= 25"));
    Ok(vec![figure("scrape.text", text), figure("scrape.protobuf", protobuf)])
}

/// One form of the metrics.
struct Form {
    media: &'static str,
    options: &'static str,
    ms: Vec<f64>,
    bytes: usize,
}

impl Form {
    fn new(media: &'static str, options: &'static str) -> Self {
        Self { media, options, ms: Vec::new(), bytes: 0 }
    }

    /// Milliseconds that one answer took.
    fn scrape(&mut self, socket: &Path) -> Result<f64> {
        let Self { media, options, .. } = self;
        let mut answer = Vec::with_capacity(16 << 20);
        let begin = Instant::now();
        let mut stream = UnixStream::connect(socket)?;
        let accept = format!("Accept: {media}{options}");
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: localhost\r\n{accept}\r\n\r\n")?;
        stream.read_to_end(&mut answer)?;
        let ms = begin.elapsed().as_secs_f64() * 1e3;
        let head = answer.windows(4).position(|four| four == b"\r\n\r\n");
        let head = head.context("no HTTP answer")?;
        let text = String::from_utf8_lossy(&answer[..head]).to_lowercase();
        let right = text.contains(&format!("content-type: {media}"));
        if text.split_whitespace().nth(1) != Some("200") || !right {
            bail!("not the answer that was asked for: {text}");
        }
        for vm in ["busy-0001", "busy-1000"] {
            if !answer.windows(vm.len()).any(|window| window == vm.as_bytes()) {
                bail!("{vm} is not in the answer");
            }
        }
        self.bytes = answer.len() - head - 4;
        Ok(ms)
    }
}

/// Buckets that hold something, per VM.
fn filled(agent: &Agent) -> Result<f64> {
    let all: Value = serde_json::from_str(&agent.get("/v1/histograms")?)?;
    let series = all["histograms"].as_array().context("no histograms")?;
    // Waits, and block I/O by two operations and two phases.
    if series.len() < 5 * VMS {
        bail!("formtune has {} histograms of {VMS} VMs", series.len());
    }
    let buckets = series.iter().filter_map(|series| Some(series["counts"].as_array()?.len()));
    Ok(buckets.sum::<usize>() as f64 / series.len() as f64)
}

fn late(agent: &Agent) -> Result<f64> {
    let metrics = agent.get("/metrics")?;
    let line =
        metrics.lines().find_map(|line| line.strip_prefix("formtune_agent_ticks_late_total "));
    Ok(line.context("no count of late ticks")?.parse()?)
}
