//! A whole guest in one static binary. The kernel starts it as `/init` and hands it the
//! words of its command line as environment (`Documentation/admin-guide/kernel-parameters`:
//! unknown `key=value` words go to init). The benchmarks run it as a plain host process.
//!
//! `role` is one of
//! - `victim`: a periodic task of `work_us` every `period_us`, one report line per
//!   `report_ms`, with wake-up delays where `wake=1`;
//! - `neighbour`: `threads` threads (default: one per CPU) that spin, one line per
//!   `report_ms`;
//! - `idle`: nothing at all;
//! - `probe`: says hello and resets the machine; used to find out whether KVM works.

use anyhow::{Context, Result, bail};
use formtune_guest::{NeighbourReport, VictimReport, histogram_us};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};
use std::hint::black_box;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Steps of the generator per counted piece of work: some tens of microseconds.
const CHUNK: u32 = 10_000;

fn main() -> Result<()> {
    let is_init = std::process::id() == 1;
    match std::env::var("role").as_deref() {
        Ok("victim") => victim(),
        Ok("neighbour") => neighbour(),
        Ok("idle") => loop {
            nix::unistd::pause();
        },
        Ok("probe") => {
            println!("probe ok");
            if is_init {
                reboot(RebootMode::RB_AUTOBOOT).context("failed to reset the machine")?;
            }
            Ok(())
        }
        other => bail!("role is {other:?}; there are victim, neighbour, idle and probe"),
    }
}

fn victim() -> Result<()> {
    // The default slack of 50 µs would be part of every wake-up delay.
    nix::sys::prctl::set_timerslack(1).context("failed to set the timer slack")?;
    let period_us = setting("period_us", 5_000)?;
    let work_us = setting("work_us", 1_000)?;
    let report_us = setting("report_ms", 1_000)? * 1_000;
    if period_us == 0 || work_us == 0 || work_us >= period_us || report_us < period_us {
        bail!("need 0 < work_us < period_us <= report_ms * 1000");
    }
    let steps = steps_of(Duration::from_micros(work_us));
    let wake = (setting("wake", 0)? != 0).then(histogram_us);
    let mut report = VictimReport { at_us: now_us()?, response: histogram_us(), wake };
    let mut scheduled_us = now_us()? + period_us;
    let mut seed = 1;
    loop {
        sleep_until(scheduled_us)?;
        let started_us = now_us()?;
        seed = work(seed, steps);
        let done_us = now_us()?;
        if let Some(wake) = &mut report.wake {
            wake.record(started_us.saturating_sub(scheduled_us))?;
        }
        report.response.record(done_us.saturating_sub(scheduled_us))?;
        // A late task still owes every period: what piles up counts as its response time.
        scheduled_us += period_us;
        if done_us.saturating_sub(report.at_us) >= report_us {
            report.at_us = done_us;
            print_line(&report)?;
            report.response.reset();
            if let Some(wake) = &mut report.wake {
                wake.reset();
            }
        }
    }
}

fn neighbour() -> Result<()> {
    static ITERATIONS: AtomicU64 = AtomicU64::new(0);
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    let report_ms = setting("report_ms", 1_000)?;
    for thread in 0..setting("threads", cpus)? {
        std::thread::spawn(move || {
            let mut seed = thread + 1;
            loop {
                seed = work(seed, CHUNK);
                ITERATIONS.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    loop {
        std::thread::sleep(Duration::from_millis(report_ms));
        let iterations = ITERATIONS.load(Ordering::Relaxed);
        print_line(&NeighbourReport { at_us: now_us()?, iterations })?;
    }
}

/// One write per line: a console interleaves at line ends only.
fn print_line(report: &dyn std::fmt::Display) -> Result<()> {
    let line = format!("{report}\n");
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes()).context("failed to print a report")?;
    out.flush().context("failed to print a report")
}

/// Steps that take `length` on a CPU of one's own. The least of many short runs counts, so
/// that neighbours who disturb the measurement do not stretch the work.
fn steps_of(length: Duration) -> u32 {
    let least = (0..400)
        .map(|round| {
            let begin = Instant::now();
            black_box(work(round, CHUNK));
            begin.elapsed()
        })
        .min()
        .expect("there are rounds");
    let chunks = length.as_secs_f64() / least.as_secs_f64();
    (chunks * f64::from(CHUNK)).max(1.0) as u32
}

/// An xorshift generator: work that no compiler can leave out and no cache can help.
fn work(mut seed: u64, steps: u32) -> u64 {
    seed |= 1;
    for _ in 0..steps {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed = black_box(seed);
    }
    seed
}

fn now_us() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("failed to read the clock")?;
    Ok(now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1_000)
}

fn sleep_until(at_us: u64) -> Result<()> {
    let at = TimeSpec::from_duration(Duration::from_micros(at_us));
    let flags = ClockNanosleepFlags::TIMER_ABSTIME;
    loop {
        match clock_nanosleep(ClockId::CLOCK_MONOTONIC, flags, &at) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("failed to sleep"),
        }
    }
}

fn setting(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text:?} is no number")),
        Err(_) => Ok(default),
    }
}
