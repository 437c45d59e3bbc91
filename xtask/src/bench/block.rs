//! What the block I/O probe costs per request, beside an empty program on the same tracepoint
//! (the floor) and Debian's `biolatency` (the peer).
//!
//! fio reads 4 KiB at random from a loop device on a file in memory, sixteen at a time, pinned
//! to one CPU. In each round every kind of probe is attached in turn, in an order that rotates.
//! `block.program` is the time that the kernel itself says a request's programs ran
//! (`BPF_ENABLE_STATS`), less what an empty program seems to run under that measurement, once
//! per program. `block.added` is what a request takes longer by the clock: it holds all of
//! the cost, also that of calling a program, and all of the machine's noise.

use super::disk::LoopDevice;
use super::load::Cgroups;
use super::runq::Held;
use crate::demo::interrupt;
use crate::figure::Figure;
use crate::{progress, sh};
use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

const ROUNDS: usize = 15;
/// Requests of one run, half a second or so.
const REQUESTS: u64 = 100_000;

/// What is attached.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Floor,
    InVm,
    Peer,
}

const KINDS: [Kind; 3] = [Kind::Floor, Kind::InVm, Kind::Peer];

/// Measures both figures.
///
/// # Errors
/// When a program is missing or a probe cannot be attached.
pub fn run() -> Result<Vec<Figure>> {
    interrupt::catch()?;
    let holder = super::build("hold-probe")?;
    let biolatency = sh::find_program("biolatency")
        .context("no biolatency; run `cargo xtask setup` or `apt-get install libbpf-tools`")?;
    let fio = sh::find_program("fio").context("no fio; run `cargo xtask setup`")?;
    let cgroups = Cgroups::new()?;
    let vm = cgroups.vm(1, "inside")?;
    let path = cgroups.cpu().join("qemu-1-inside.libvirt-qemu");
    let device = LoopDevice::new()?;
    let load = || requests(&fio, device.path(), &vm.procs_of_io());
    // The first run of everything fills caches and is not counted.
    load()?;

    let mut step = progress::Step::start(format!("bench block: {ROUNDS} rounds"));
    let mut added: [Vec<f64>; 3] = Default::default();
    let mut program: [Vec<f64>; 3] = Default::default();
    for round in 0..ROUNDS {
        let mut before = load()?;
        for turn in 0..KINDS.len() {
            let at = (round + turn) % KINDS.len();
            let known = programs()?;
            let held = match KINDS[at] {
                Kind::Floor => Held::start(Command::new(&holder).arg("floor-block"))?,
                Kind::InVm => Held::start(Command::new(&holder).arg("block").arg(&path))?,
                // Line-buffered, so that it says that it traces when it does.
                Kind::Peer => {
                    Held::start(Command::new("stdbuf").arg("-oL").arg(&biolatency).arg("3600"))?
                }
            };
            let with = load()?;
            program[at].push(program_time(&known, load)?);
            let said = held.stop(KINDS[at] == Kind::Peer)?;
            if KINDS[at] == Kind::InVm {
                check(&said)?;
            }
            let after = load()?;
            added[at].push(with - (before + after) / 2.0);
            before = after;
            interrupt::check()?;
            step.tick();
        }
    }
    step.end("done");
    // Of the peer, two programs run per request, one when it is issued and one when it is done.
    let less = |at: usize, programs: f64| -> Vec<f64> {
        program[at].iter().zip(&program[0]).map(|(ns, floor)| ns - floor * programs).collect()
    };
    let (ours, peer) = (less(1, 1.0), less(2, 2.0));
    let [floor, in_vm, biolatency] = &added;
    let target = Some("ratio_to_peer <= 0.4");
    Ok(vec![
        Figure::measured("block.program", "ns/request", &ours, Some(&peer), None, target),
        Figure::measured("block.added", "ns/request", in_vm, Some(biolatency), Some(floor), target),
    ])
}

/// Nanoseconds per request of the load.
fn requests(fio: &Path, device: &Path, procs: &Path) -> Result<f64> {
    let mut cpus = CpuSet::new();
    cpus.set(std::thread::available_parallelism()?.get() - 1)?;
    let procs = procs.to_owned();
    let mut command = Command::new(fio);
    command
        .args(["--name=bench", "--thread", "--rw=randread", "--bs=4k", "--direct=1"])
        .args(["--ioengine=io_uring", "--iodepth=16", "--output-format=json", "--io_size=100g"])
        .arg(format!("--number_ios={REQUESTS}"))
        .arg(format!("--filename={}", device.display()))
        .stdin(Stdio::null());
    // SAFETY: system calls only; the path was allocated before.
    unsafe {
        command.pre_exec(move || {
            sched_setaffinity(Pid::from_raw(0), &cpus)?;
            fs::write(&procs, "0")
        })
    };
    let out = command.output()?;
    ensure!(out.status.success(), "fio: {}", String::from_utf8_lossy(&out.stderr));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout)?;
    let per_second = report["jobs"][0]["read"]["iops"].as_f64().context("fio says no iops")?;
    Ok(1e9 / per_second)
}

/// That the load was charged where it was meant to be.
fn check(said: &str) -> Result<()> {
    let counted: Option<u64> =
        said.lines().find_map(|line| line.strip_prefix("counted ")?.parse().ok());
    match counted {
        // Two runs; some kernels run no programs on top of certain tasks.
        Some(counted) if counted >= REQUESTS * 18 / 10 => Ok(()),
        Some(counted) => bail!("the probe counted {counted} requests of {}", 2 * REQUESTS),
        None => bail!("the holder of the probe did not report"),
    }
}

const BPF_PROG_GET_NEXT_ID: i64 = 11;
const BPF_PROG_GET_FD_BY_ID: i64 = 13;
const BPF_OBJ_GET_INFO_BY_FD: i64 = 15;
const BPF_ENABLE_STATS: i64 = 32;
/// Where `struct bpf_prog_info` has the name, include/uapi/linux/bpf.h.
const INFO_NAME: std::ops::Range<usize> = 64..80;

/// bpf(2) with these bytes as its attributes; they may be changed.
fn bpf(command: i64, attributes: &mut [u8; 128]) -> Result<i64> {
    // SAFETY: the attributes are as long as is said; those used here hold numbers, or (of
    // `name`) the address and length of a buffer that outlives the call.
    let result = unsafe {
        nix::libc::syscall(nix::libc::SYS_bpf, command, attributes.as_mut_ptr(), attributes.len())
    };
    if result < 0 { Err(std::io::Error::last_os_error().into()) } else { Ok(result) }
}

/// Ids of all programs that are loaded.
fn programs() -> Result<BTreeSet<u32>> {
    let (mut all, mut id) = (BTreeSet::new(), 0_u32);
    loop {
        let mut attributes = [0; 128];
        attributes[..4].copy_from_slice(&id.to_ne_bytes());
        if bpf(BPF_PROG_GET_NEXT_ID, &mut attributes).is_err() {
            return Ok(all);
        }
        id = u32::from_ne_bytes(attributes[4..8].try_into()?);
        all.insert(id);
    }
}

fn open(command: i64, attributes: &mut [u8; 128]) -> Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A program's name, and how long and how often it ran while that was measured.
fn ran(id: u32) -> Result<(String, u64, u64)> {
    let mut attributes = [0; 128];
    attributes[..4].copy_from_slice(&id.to_ne_bytes());
    let program = open(BPF_PROG_GET_FD_BY_ID, &mut attributes)?;
    let mut info = [0_u8; 256];
    let mut attributes = [0; 128];
    attributes[..4].copy_from_slice(&program.as_raw_fd().to_ne_bytes());
    attributes[4..8].copy_from_slice(&(info.len() as u32).to_ne_bytes());
    attributes[8..16].copy_from_slice(&(info.as_mut_ptr() as u64).to_ne_bytes());
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    let name: Vec<u8> = info[INFO_NAME].iter().copied().take_while(|&byte| byte != 0).collect();
    let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    let field = |key: &str| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
    };
    Ok((
        String::from_utf8_lossy(&name).into_owned(),
        field("run_time_ns:").context("the kernel keeps no statistics of programs")?,
        field("run_cnt:").unwrap_or(0),
    ))
}

/// Nanoseconds per request that those programs on block requests ran which are not `known`.
fn program_time(known: &BTreeSet<u32>, load: impl Fn() -> Result<f64>) -> Result<f64> {
    // Measured as long as this is open.
    let _stats = open(BPF_ENABLE_STATS, &mut [0; 128])?;
    let new: Vec<u32> = programs()?.difference(known).copied().collect();
    let sum = || -> Result<(u64, u64)> {
        let mut sum = (0, 0);
        for &id in &new {
            // Another command's may have gone meanwhile.
            let Ok((name, ns, runs)) = ran(id) else { continue };
            if ["block_rq_", "floor_block"].iter().any(|prefix| name.starts_with(prefix)) {
                sum = (sum.0 + ns, sum.1 + runs);
            }
        }
        Ok(sum)
    };
    let before = sum()?;
    let start = Instant::now();
    load()?;
    let after = sum()?;
    let runs = after.1 - before.1;
    ensure!(
        runs >= REQUESTS * 9 / 10,
        "programs ran {runs} times in {:.1} s for {REQUESTS} requests",
        start.elapsed().as_secs_f64()
    );
    Ok((after.0 - before.0) as f64 / REQUESTS as f64)
}
