//! Block I/O of known size and known latency inside a test machine: reads and writes of one
//! process with direct I/O on a virtual disk that QEMU slows down, in a cgroup of choice.
//!
//! How long a request takes is known twice over: from the disk's limit at least so long, and by
//! the process's own clock around each read at most so long. The difference to that clock is
//! what the system call, the interrupt and the way back to the process take, tenths of a
//! millisecond on an emulated CPU beside the 2.5 ms of the disk.

use crate::block::times;
use crate::vm_requests;
use anyhow::{Context, Result, bail, ensure};
use formtune_agent::sense::Sense;
use formtune_agent::sense::block::{LatencyTotals, OpTotals, SPAN};
use formtune_common::block::{FLUSH, READ, WRITE};
use formtune_common::histogram::{lower_bound, upper_bound};
use formtune_core::units::Nanos;
use nix::fcntl::OFlag;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The disk that xtask gives the machine.
pub(crate) const DISK: &str = "vda";
/// QEMU lets it do so many operations per second (`DISK` in xtask/src/test/kernels.rs)…
const PER_SECOND: u64 = 400;
/// …and a tenth of a second's worth at once after a pause (util/throttle.c).
const BURST: u64 = PER_SECOND / 10;
/// A request takes at most so much less than its read does by the process's clock: a share of
/// it, or this long, whichever is more.
const LESS: f64 = 0.4;
const LESS_NS: f64 = 1e6;
/// Reads at once, where they are to queue up.
const DEPTH: u64 = 4;
const BLOCK: usize = 4096;
const READS: u64 = 400;
const WRITES: u64 = 100;
/// The first word of the command line of a process that makes such a load.
pub const LOAD: &str = "block-load";

/// What [`load`] did.
struct Done {
    elapsed_ns: u64,
    /// What each read took by the process's clock, nanoseconds, sorted.
    reads: Vec<u64>,
}

/// The process that makes the load: `block-load READS WRITES DEPTH PROCS`, so many reads by
/// DEPTH threads, then the writes, each of them followed by `fdatasync`. Prints how long all
/// of it and each of the reads took, in nanoseconds.
///
/// # Errors
/// Those of the disk.
pub fn main(arguments: &[String]) -> Result<()> {
    let [reads, writes, depth, procs] = arguments else { bail!("{LOAD} READS WRITES DEPTH PROCS") };
    let (reads, depth): (u64, u64) = (reads.parse()?, depth.parse()?);
    at_once()?;
    fs::write(procs, "0").with_context(|| format!("failed to write {procs}"))?;
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_DIRECT.bits())
        .open(format!("/dev/{DISK}"))?;
    let start = Instant::now();
    let times = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..depth)
            .map(|at| {
                scope.spawn({
                    let disk = &disk;
                    move || read(disk, at, reads / depth)
                })
            })
            .collect();
        readers
            .into_iter()
            .map(|reader| reader.join().expect("no panic"))
            .collect::<Result<Vec<_>>>()
    })?;
    write(&disk, writes.parse()?)?;
    println!("{}", start.elapsed().as_nanos());
    times.iter().flatten().for_each(|time| println!("{time}"));
    Ok(())
}

/// Has this process run before all others: the machine's CPUs are busy, and what it waits for
/// one is not the disk's time.
pub(crate) fn at_once() -> Result<()> {
    let parameters = nix::libc::sched_param { sched_priority: 1 };
    // SAFETY: a policy of its own process and a valid structure.
    let set =
        unsafe { nix::libc::sched_setscheduler(0, nix::libc::SCHED_FIFO, &raw const parameters) };
    ensure!(set == 0, "no SCHED_FIFO: {}", std::io::Error::last_os_error());
    Ok(())
}

/// What direct I/O reads into.
#[derive(Clone)]
#[repr(align(4096))]
pub(crate) struct Page(pub [u8; BLOCK]);

impl Default for Page {
    fn default() -> Self {
        Self([0; BLOCK])
    }
}

/// Not one after the other, so that nothing is merged or read ahead of time.
fn place(i: u64) -> u64 {
    i * 37 % 1_000 * BLOCK as u64
}

/// Reads, one after the other; what each took.
fn read(disk: &File, thread: u64, reads: u64) -> Result<Vec<u64>> {
    let mut page = Page::default();
    let mut times = Vec::with_capacity(reads as usize);
    for i in 0..reads {
        let start = Instant::now();
        disk.read_exact_at(&mut page.0, place(thread * 250 + i))?;
        times.push(start.elapsed().as_nanos() as u64);
    }
    Ok(times)
}

fn write(disk: &File, writes: u64) -> Result<()> {
    let page = Page([7; BLOCK]);
    for i in 0..writes {
        disk.write_all_at(&page.0, place(i))?;
        disk.sync_data()?;
    }
    Ok(())
}

/// Runs the load as a process of a cgroup.
fn load(procs: &Path, reads: u64, writes: u64, depth: u64) -> Result<Done> {
    let out = Command::new("/proc/self/exe")
        .arg(LOAD)
        .args([reads, writes, depth].map(|number| number.to_string()))
        .arg(procs)
        .output()?;
    ensure!(out.status.success(), "load: {}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout)?;
    let mut numbers = text.lines().map(str::parse);
    let elapsed_ns = numbers.next().context("no output")??;
    let mut reads = numbers.collect::<Result<Vec<u64>, _>>()?;
    reads.sort_unstable();
    Ok(Done { elapsed_ns, reads })
}

/// How much less than `ns` so many requests may take.
fn less(ns: u64, requests: u64) -> f64 {
    (ns as f64 * LESS).max(requests as f64 * LESS_NS)
}

/// Reads that were counted from `before` to `after` took what is known of them, in sum and at
/// each quantile: no longer than by the process's own clock, up to the width of a bucket, and
/// not much shorter; all together as long as the disk's limit demands at least.
fn latency_is_known(before: &LatencyTotals, after: &LatencyTotals, done: &Done) -> Result<String> {
    let reads = done.reads.len() as u64;
    let limit_ns = (reads - BURST) * 1_000_000_000 / PER_SECOND;
    // A twentieth for the clocks of machine and host.
    let elapsed_ns = done.elapsed_ns;
    ensure!(elapsed_ns >= limit_ns / 20 * 19, "the disk is too fast: {elapsed_ns}, {limit_ns} ns");
    let counts: Vec<u64> =
        after.dense().iter().zip(before.dense()).map(|(after, before)| after - before).collect();
    let (ours, theirs) = (after.sum_ns - before.sum_ns, done.reads.iter().sum::<u64>());
    ensure!(
        ours <= theirs && ours as f64 >= theirs as f64 - less(theirs, reads),
        "reads took {ours} ns, {theirs} ns by the clock of their process"
    );
    let mut shown = Vec::new();
    // Below are those that the disk let through at once.
    for quantile in [0.25, 0.5, 0.9, 0.99] {
        let rank = (quantile * reads as f64) as u64;
        let mut sum = 0;
        let bucket = counts.iter().position(|count| {
            sum += count;
            sum > rank
        });
        let bucket = bucket.context("fewer times than reads")? as u32;
        let theirs = done.reads[rank as usize];
        let (from, to) = (lower_bound(bucket), upper_bound(bucket));
        ensure!(
            from <= theirs && to as f64 >= theirs as f64 - less(theirs, 1),
            "p{}: {from} to {to} ns, {theirs} ns by the clock of their process",
            quantile * 100.0
        );
        let shown_as = |ns| Duration::from_micros(ns / 1_000);
        shown.push(format!("p{} {:?} ({:?})", quantile * 100.0, shown_as(to), shown_as(theirs)));
    }
    Ok(shown.join(", "))
}

/// A VM's requests on the disk, or the host's.
pub(crate) fn totals(sense: &Sense, vm: Option<&Path>, op: u32) -> Result<OpTotals> {
    let block = sense.block();
    let all = match vm {
        Some(vm) => block.totals(vm),
        None => block.totals_of_host(),
    };
    let all = all.with_context(|| format!("{vm:?} is not measured"))?;
    let found =
        all.into_iter().find(|((device, of), _)| *of == op && block.device(*device) == DISK);
    Ok(found.map_or_else(OpTotals::default, |(_, totals)| totals.clone()))
}

/// What was seen.
pub struct Seen {
    /// All of it, in a sentence.
    pub detail: String,
    /// Whose the times are where the kernel keeps statistics of the disk, and where it does not.
    pub times: [&'static str; 2],
}

/// Counts of a VM are exactly what its process did, those of a process outside are the host's,
/// also where the kernel notes no times.
///
/// # Errors
/// When something is not so.
pub fn check(
    sense: &mut Sense,
    vm: &Path,
    procs: &Path,
    outside: &Path,
    mut now: impl FnMut() -> Result<Nanos>,
) -> Result<Seen> {
    let settings = [("iostats", "1"), ("iostats", "0"), ("wbt_lat_usec", "0")];
    let set = |(setting, value): (&str, &str)| -> Result<()> {
        let path = format!("/sys/block/{DISK}/queue/{setting}");
        fs::write(&path, value).with_context(|| format!("failed to write {path}"))
    };
    set(settings[0])?;
    sense.sample(now()?);
    let health = sense.block().health();
    ensure!(!health.notes, "times are noted although the kernel keeps them: {health:?}");
    let before = health.counters;

    let done = load(procs, READS, WRITES, 1)?;
    sense.sample(now()?);
    let [read, written, flushed] = [READ, WRITE, FLUSH].map(|op| totals(sense, Some(vm), op));
    let (read, written, flushed) = (read?, written?, flushed?);
    let counts = [read.requests, written.requests, flushed.requests];
    let health = sense.block().health();
    ensure!(counts == [READS, WRITES, WRITES], "counted {counts:?}, {health:?}");
    let with_statistics = times(&before, &health.counters);
    let timed = [&read, &written, &flushed].map(|op| op.total.count());
    ensure!(timed == counts, "of {counts:?} requests {timed:?} have times");
    ensure!(
        (read.device.count(), written.device.count()) == (READS, WRITES),
        "in the device: {} and {}",
        read.device.count(),
        written.device.count()
    );
    let total: u64 = [&read, &written, &flushed].iter().map(|op| op.total.sum_ns).sum();
    // One request after the other: they take as long as the load did, less its own time.
    ensure!(
        total <= done.elapsed_ns && total > done.elapsed_ns / 4,
        "requests took {total} ns of {} ns",
        done.elapsed_ns
    );
    let none = LatencyTotals::default();
    let alone = latency_is_known(&none, &read.total, &done).context("one at a time")?;
    latency_is_known(&none, &read.device, &done).context("in the device, one at a time")?;
    ensure!(read.device.sum_ns <= read.total.sum_ns, "more in the device than in all");
    let occupied = sense.block().occupants(now()?);
    let occupied = occupied.get(&device_of(sense, vm)?).context("nobody was in the device")?;
    let in_device = read.device.sum_ns + written.device.sum_ns + flushed.device.sum_ns;
    ensure!(occupied.first().is_some_and(|(_, ns)| *ns == in_device), "{SPAN}: {occupied:?}");

    let before = totals(sense, None, READ)?.requests;
    load(outside, READS, 0, 1)?;
    sense.sample(now()?);
    let host = totals(sense, None, READ)?.requests - before;
    ensure!(host == READS, "{host} reads of the host's");
    ensure!(totals(sense, Some(vm), READ)?.requests == READS, "charged to the VM");

    let done = load(procs, READS, 0, DEPTH)?;
    sense.sample(now()?);
    let after = totals(sense, Some(vm), READ)?;
    ensure!(after.requests == 2 * READS, "{} reads of {}", after.requests, 2 * READS);
    let queued = latency_is_known(&read.total, &after.total, &done)
        .with_context(|| format!("{DEPTH} at a time"))?;

    let again = vm_requests::tried_again(sense, vm, procs, &mut now)?;
    let own = vm_requests::drivers_own(sense, vm, procs, &mut now)?;

    set(settings[1])?;
    set(settings[2])?;
    let before = sense.block().health().counters;
    load(procs, 1, 0, 1)?;
    sense.sample(now()?);
    let health = sense.block().health();
    let without = times(&before, &health.counters);
    ensure!(health.notes, "no times, and they are not noted: {health:?}");
    let before = totals(sense, Some(vm), READ)?;
    let done = load(procs, READS, 0, 1)?;
    sense.sample(now()?);
    let after = totals(sense, Some(vm), READ)?;
    let (total, device) =
        (after.total.count() - before.total.count(), after.device.count() - before.device.count());
    ensure!((total, device) == (READS, READS), "{total} and {device} times of {READS}");
    latency_is_known(&before.total, &after.total, &done).context("by the map")?;
    let noted_again = vm_requests::tried_again(sense, vm, procs, &mut now).context("by the map")?;
    set(settings[0])?;
    let health = sense.block().health();
    ensure!(health.counters.full + health.counters.discarded == 0, "{health:?}");
    let detail = format!(
        "{READS} reads ({alone}; {DEPTH} at a time: {queued}), {WRITES} writes, {WRITES} flushes; {host} of the host's; \
         {READS} by the map; tried again {again} and, by the map, {noted_again} times; {own} \
         commands of the driver's"
    );
    Ok(Seen { detail, times: [with_statistics, without] })
}

fn device_of(sense: &Sense, vm: &Path) -> Result<u32> {
    let all = sense.block().totals(vm).context("not measured")?;
    let mut devices = all.keys().map(|(device, _)| *device);
    devices.find(|device| sense.block().device(*device) == DISK).context("no disk")
}
