//! A VM that does all that is measured of one, for the benchmarks: wakes up periodically, reads
//! from a disk or writes to it, and sends a TCP segment through a tap device that it makes, one
//! in ten of them twice.
//!
//! Settings are the environment's: `tap` (name), `device` (path), `block` (its place there, in
//! blocks of 4 KiB), `period_us`. Prints `ready` once it runs, and runs until it is killed.

use anyhow::{Context, Result};
use formtune_tests::frames::Wire;
use formtune_tests::net;
use nix::libc;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

/// Payload of a segment, bytes.
const LEN: u16 = 64;

/// Direct I/O demands it.
#[repr(align(4096))]
struct Block([u8; 4096]);

fn main() -> Result<()> {
    let setting = |name| std::env::var(name).with_context(|| format!("{name} is not set"));
    let mut tap = File::from(net::tap(&setting("tap")?).context("no tap device")?);
    let device = setting("device")?;
    let disk = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&device);
    let disk = disk.with_context(|| format!("failed to open {device}"))?;
    let at = setting("block")?.parse::<u64>()? * 4096;
    let period = Duration::from_micros(setting("period_us")?.parse()?);
    let mut block = Block([1; 4096]);
    let mut segment = Wire::data(1, 0, LEN);
    println!("ready");
    for turn in 0_u64.. {
        std::thread::sleep(period);
        if turn.is_multiple_of(2) {
            disk.read_exact_at(&mut block.0, at)?;
        } else {
            disk.write_all_at(&block.0, at)?;
        }
        let mut frame = segment.v4();
        // To somebody else, so that the host is done with it soon.
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        tap.write_all(&frame)?;
        if turn.is_multiple_of(10) {
            tap.write_all(&frame)?;
        }
        segment.seq = segment.seq.wrapping_add(LEN.into());
    }
    Ok(())
}
