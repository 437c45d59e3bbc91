//! Block I/O of known size inside a test machine: reads and writes of one process with direct
//! I/O on a virtual disk, in a cgroup of choice.

use anyhow::{Context, Result, bail, ensure};
use formtune_agent::sense::Sense;
use formtune_agent::sense::block::{OpTotals, SPAN};
use formtune_common::block::{FLUSH, READ, WRITE};
use formtune_core::units::Nanos;
use nix::fcntl::OFlag;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The disk that xtask gives the machine; QEMU lets it do so many operations per second.
const DISK: &str = "vda";
const BLOCK: usize = 4096;
const READS: u64 = 400;
const WRITES: u64 = 100;
/// The first word of the command line of a process that makes such a load.
pub const LOAD: &str = "block-load";

/// What [`load`] did.
struct Done {
    elapsed_ns: u64,
}

/// The process that makes the load: `block-load READS WRITES PROCS`; each write is followed by
/// `fdatasync`. Prints how long it took, in nanoseconds.
///
/// # Errors
/// Those of the disk.
pub fn main(arguments: &[String]) -> Result<()> {
    let [reads, writes, procs] = arguments else { bail!("{LOAD} READS WRITES PROCS") };
    fs::write(procs, "0").with_context(|| format!("failed to write {procs}"))?;
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_DIRECT.bits())
        .open(format!("/dev/{DISK}"))?;
    let start = Instant::now();
    transfer(&disk, reads.parse()?, writes.parse()?)?;
    println!("{}", start.elapsed().as_nanos());
    Ok(())
}

#[repr(align(4096))]
struct Page([u8; BLOCK]);

fn transfer(disk: &File, reads: u64, writes: u64) -> Result<()> {
    let mut page = Page([7; BLOCK]);
    // Not one after the other, so that nothing is read ahead of time.
    let at = |i: u64| i * 37 % 1_000 * BLOCK as u64;
    for i in 0..reads {
        disk.read_exact_at(&mut page.0, at(i))?;
    }
    for i in 0..writes {
        disk.write_all_at(&page.0, at(i))?;
        disk.sync_data()?;
    }
    Ok(())
}

/// Runs the load as a process of a cgroup.
fn load(procs: &Path, reads: u64, writes: u64) -> Result<Done> {
    let out = Command::new("/proc/self/exe")
        .args([LOAD, &reads.to_string(), &writes.to_string()])
        .arg(procs)
        .output()?;
    ensure!(out.status.success(), "load: {}", String::from_utf8_lossy(&out.stderr));
    Ok(Done { elapsed_ns: String::from_utf8(out.stdout)?.trim().parse()? })
}

/// A VM's requests on the disk, or the host's.
fn totals(sense: &Sense, vm: Option<&Path>, op: u32) -> Result<OpTotals> {
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
) -> Result<String> {
    let settings = [("iostats", "1"), ("iostats", "0"), ("wbt_lat_usec", "0")];
    let set = |(setting, value): (&str, &str)| -> Result<()> {
        let path = format!("/sys/block/{DISK}/queue/{setting}");
        fs::write(&path, value).with_context(|| format!("failed to write {path}"))
    };
    set(settings[0])?;
    sense.sample(now()?);
    let health = sense.block().health();
    ensure!(!health.notes, "times are noted although the kernel keeps them: {health:?}");

    let done = load(procs, READS, WRITES)?;
    sense.sample(now()?);
    let [read, written, flushed] = [READ, WRITE, FLUSH].map(|op| totals(sense, Some(vm), op));
    let (read, written, flushed) = (read?, written?, flushed?);
    let counts = [read.requests, written.requests, flushed.requests];
    let health = sense.block().health();
    ensure!(counts == [READS, WRITES, WRITES], "counted {counts:?}, {health:?}");
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
    ensure!(read.device.sum_ns <= read.total.sum_ns, "more in the device than in all");
    let occupied = sense.block().occupants(now()?);
    let occupied = occupied.get(&device_of(sense, vm)?).context("nobody was in the device")?;
    let in_device = read.device.sum_ns + written.device.sum_ns + flushed.device.sum_ns;
    ensure!(occupied.first().is_some_and(|(_, ns)| *ns == in_device), "{SPAN}: {occupied:?}");

    let before = totals(sense, None, READ)?.requests;
    load(outside, READS, 0)?;
    sense.sample(now()?);
    let host = totals(sense, None, READ)?.requests - before;
    ensure!(host == READS, "{host} reads of the host's");
    ensure!(totals(sense, Some(vm), READ)?.requests == READS, "charged to the VM");

    set(settings[1])?;
    set(settings[2])?;
    load(procs, 1, 0)?;
    sense.sample(now()?);
    let health = sense.block().health();
    ensure!(health.notes, "no times, and they are not noted: {health:?}");
    let before = totals(sense, Some(vm), READ)?;
    let done = load(procs, READS, 0)?;
    sense.sample(now()?);
    let after = totals(sense, Some(vm), READ)?;
    let (total, device) =
        (after.total.count() - before.total.count(), after.device.count() - before.device.count());
    ensure!((total, device) == (READS, READS), "{total} and {device} times of {READS}");
    let noted = after.total.sum_ns - before.total.sum_ns;
    ensure!(noted <= done.elapsed_ns && noted > done.elapsed_ns / 4, "{noted} ns");
    set(settings[0])?;
    let health = sense.block().health();
    ensure!(health.counters.full + health.counters.discarded == 0, "{health:?}");
    let each = Duration::from_nanos(read.total.sum_ns / READS);
    Ok(format!(
        "{READS} reads ({each:.1?} each), {WRITES} writes, {WRITES} flushes; {host} of the host's; \
         {READS} by the map"
    ))
}

fn device_of(sense: &Sense, vm: &Path) -> Result<u32> {
    let all = sense.block().totals(vm).context("not measured")?;
    let mut devices = all.keys().map(|(device, _)| *device);
    devices.find(|device| sense.block().device(*device) == DISK).context("no disk")
}
