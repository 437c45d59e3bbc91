//! Block requests that are no plain ones, inside a test machine: those that find the disk's
//! ring full and are tried again, and drivers' own commands.
//!
//! Its rings, one per CPU, are short and have a place for each piece of memory of a request (`RING`
//! in xtask/src/test/kernels.rs), so that of reads into scattered pages one fits in at a time.

use crate::vm_block::{DISK, Page, at_once, totals};
use anyhow::{Context, Result, bail, ensure};
use formtune_agent::sense::Sense;
use formtune_agent::sense::block::OpTotals;
use formtune_common::block::READ;
use formtune_core::units::Nanos;
use nix::fcntl::OFlag;
use nix::sys::uio::preadv;
use std::fs::{self, File, OpenOptions};
use std::io::IoSliceMut;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;

/// The first word of the command line of a process that makes a crowd of reads.
pub const CROWD: &str = "block-crowd";
/// The same, of one that has the driver send commands of its own.
pub const COMMANDS: &str = "block-commands";

/// At once.
const READERS: u64 = 16;
/// Each of them, one after the other.
const READS_EACH: u64 = 8;
const READS: u64 = READERS * READS_EACH;
/// Pieces of memory of a read, a page each; its head takes two more places of 32.
const PIECES: usize = 24;
/// From the beginning of one to that of the next.
const STRIDE: u64 = 128 << 10;
const SENT: u64 = 10;

/// Either process: the word, and its `cgroup.procs`.
///
/// # Errors
/// Those of the disk.
pub fn main(arguments: &[String]) -> Result<()> {
    let [word, procs] = arguments else { bail!("{CROWD} or {COMMANDS}, PROCS") };
    fs::write(procs, "0").with_context(|| format!("failed to write {procs}"))?;
    if word == CROWD { crowd() } else { commands() }
}

fn crowd() -> Result<()> {
    let direct = OFlag::O_DIRECT.bits();
    let disk = OpenOptions::new().read(true).custom_flags(direct).open(format!("/dev/{DISK}"))?;
    let (disk, ready) = (&disk, &Barrier::new(READERS as usize));
    // The machine's CPUs are busy with others.
    at_once()?;
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|at| {
                scope.spawn(move || {
                    ready.wait();
                    read_scattered(disk, at * READS_EACH)
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("no panic"))
    })
}

/// Reads with gaps between them, so that nothing is merged, into every other page.
fn read_scattered(disk: &File, first: u64) -> Result<()> {
    let mut pages = vec![Page::default(); 2 * PIECES];
    let bytes = PIECES * size_of::<Page>();
    for at in first..first + READS_EACH {
        let mut pieces: Vec<_> =
            pages.iter_mut().step_by(2).map(|page| IoSliceMut::new(&mut page.0)).collect();
        let read = preadv(disk, &mut pieces, (at * STRIDE) as i64)?;
        ensure!(read == bytes, "{read} of {bytes} bytes");
    }
    Ok(())
}

/// The driver asks the disk for this each time (`virtblk_get_id()`, drivers/block/virtio_blk.c).
fn commands() -> Result<()> {
    for _ in 0..SENT {
        fs::read(format!("/sys/block/{DISK}/serial"))?;
    }
    Ok(())
}

fn run(word: &str, procs: &Path) -> Result<()> {
    let out = Command::new("/proc/self/exe").arg(word).arg(procs).output()?;
    ensure!(out.status.success(), "{word}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// Requests that are tried again count once, with their times; returns how often that was.
///
/// # Errors
/// When it is not so.
pub fn tried_again(
    sense: &mut Sense,
    vm: &Path,
    procs: &Path,
    mut now: impl FnMut() -> Result<Nanos>,
) -> Result<u64> {
    let before = totals(sense, Some(vm), READ)?;
    let requeued = sense.block().health().counters.requeued;
    run(CROWD, procs)?;
    sense.sample(now()?);
    let after = totals(sense, Some(vm), READ)?;
    let requeued = sense.block().health().counters.requeued - requeued;
    let counts = |of: &OpTotals| [of.requests, of.total.count(), of.device.count()];
    let counted: Vec<u64> =
        counts(&after).into_iter().zip(counts(&before)).map(|(now, then)| now - then).collect();
    let counters = sense.block().health().counters;
    ensure!(
        counted == [READS; 3],
        "{READS} reads, {requeued} tried again, are {counted:?}; {counters:?}"
    );
    ensure!(requeued > 0, "the ring was never full");
    Ok(requeued)
}

/// Drivers' own commands are counted as such, and nowhere else; returns how many.
///
/// # Errors
/// When it is not so.
pub fn drivers_own(
    sense: &mut Sense,
    vm: &Path,
    procs: &Path,
    mut now: impl FnMut() -> Result<Nanos>,
) -> Result<u64> {
    // Every row, whatever the operation.
    let rows = |sense: &Sense| -> Result<u64> {
        let block = sense.block();
        let all = [block.totals(vm), block.totals_of_host()].into_iter().flatten().flatten();
        let of_disk = all.filter(|((device, _), _)| block.device(*device) == DISK);
        Ok(of_disk.map(|(_, totals)| totals.requests).sum())
    };
    let before = (rows(sense)?, sense.block().health().counters.passthrough);
    run(COMMANDS, procs)?;
    sense.sample(now()?);
    let after = (rows(sense)?, sense.block().health().counters.passthrough);
    let counted = (after.0 - before.0, after.1 - before.1);
    ensure!(counted == (0, SENT), "{SENT} commands are {counted:?} requests and commands");
    Ok(SENT)
}
