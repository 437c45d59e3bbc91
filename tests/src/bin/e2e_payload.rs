//! Runs inside a machine with systemd and libvirt (`cargo xtask test --only e2e`): two guests
//! spin on one CPU, the real agent shifts their weights, and each check asks libvirt and the
//! kernel for what came of it. Then native tests are run on this machine's pure cgroup v2.

use anyhow::{Context, Result, bail, ensure};
use formtune_agent::sense::cgroup::Hierarchies;
use formtune_agent::vm::CgroupVersion;
use formtune_tests::payload::{Agent, CONTENDED, Checks};
use formtune_tests::wait::eventually;
use nix::sys::signal::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Names with a dash, which systemd escapes in its scopes.
const VICTIM: &str = "web-1";
const NEIGHBOUR: &str = "batch-1";

const DISKS: &str = "/var/lib/libvirt/images";
const STATE: &str = "/var/lib/formtune-test";
const AGENT: &str = "/run/payload/formtune";
/// Test programs, which find the agent one folder above.
const TESTS: &str = "/run/payload/tests";
/// Where they may write: short, and not below `/run`, which their libvirtd hides.
const TEST_FILES: &str = "/var/tmp";
/// What this machine's libvirtd has learnt of QEMU.
const LIBVIRT_CACHE: &str = "/var/cache/libvirt";

fn settings(mode: &str) -> String {
    format!("[mode]\ncpu_weight = \"{mode}\"\n{CONTENDED}")
}

fn main() -> ExitCode {
    let mut checks = Checks::default();
    checks.run("guests spin", || {
        for name in [VICTIM, NEIGHBOUR] {
            start_guest(name)?;
        }
        Ok(format!("{} and {}", scope(VICTIM)?.display(), scope(NEIGHBOUR)?.display()))
    });
    checks.run("systemd layout discovered", discovered);
    checks.run("shadow writes nothing", shadow);
    let mut agent = None;
    checks.run("enforce sets weights through libvirt", || {
        let started = start("enforce")?;
        eventually(Duration::from_secs(60), "changed weight", || {
            if !changed()? {
                return Ok(None);
            }
            // Stopped, it cannot put back what systemd might take away in the next check.
            started.signal(Signal::SIGSTOP).map(Some)
        })
        .with_context(|| started.log_tail())?;
        let weights = format!("{:?}, the neighbour's {}", weights()?, property(NEIGHBOUR)?);
        agent = Some(started);
        Ok(weights)
    });
    checks.run("weights survive daemon-reload", || {
        let before = weights()?;
        ensure!(changed()?, "no weight is changed");
        run("systemctl", &["daemon-reload"])?;
        std::thread::sleep(Duration::from_secs(1));
        let after = weights()?;
        ensure!(before == after, "{before:?} before, {after:?} after");
        Ok(format!("{after:?}"))
    });
    checks.run("originals return after SIGKILL and restart", || {
        ensure!(changed()?, "no weight is changed");
        let mut killed = agent.take().context("formtune does not run")?;
        killed.signal(Signal::SIGKILL)?;
        killed.wait()?;
        let left = weights()?;
        ensure!(changed()?, "the weights were back before the restart");
        let _agent = start("shadow")?;
        originals()?;
        Ok(format!("{left:?} after SIGKILL, {:?} after the restart", weights()?))
    });
    checks.run("originals return on stop", || {
        let mut agent = start("enforce")?;
        eventually(Duration::from_secs(60), "changed weight", || Ok(changed()?.then_some(())))
            .with_context(|| agent.log_tail())?;
        let set = weights()?;
        agent.signal(Signal::SIGTERM)?;
        let status = agent.wait()?;
        ensure!(status.success(), "formtune ended with {status}; {}", agent.log_tail());
        originals()?;
        Ok(format!("{set:?} before, {:?} after", weights()?))
    });
    checks.run("guests end", || {
        for name in [VICTIM, NEIGHBOUR] {
            run("virsh", &["destroy", name])?;
        }
        Ok("their CPU is free".to_owned())
    });
    for test in tests() {
        checks.run(&test.file_name().unwrap_or_default().to_string_lossy(), || native(&test));
    }
    checks.exit_code()
}

fn start(mode: &str) -> Result<Agent> {
    Agent::start(Path::new(AGENT), Path::new(STATE), &settings(mode))
}

/// Both guests are known to the agent, by libvirt's names and with their scopes.
fn discovered() -> Result<String> {
    let agent = start("observe")?;
    let scopes = [scope(VICTIM)?, scope(NEIGHBOUR)?];
    eventually(Duration::from_secs(10), "pair of guests in /v1/vms", || {
        let vms = agent.get("/v1/vms")?;
        // JSON escapes the backslashes of the scopes' names.
        let known =
            |scope: &PathBuf| vms.contains(&scope.display().to_string().replace('\\', "\\\\"));
        Ok(scopes.iter().all(known).then_some(vms))
    })
    .with_context(|| format!("{}; /v1/vms: {:?}", agent.log_tail(), agent.get("/v1/vms")))?;
    Ok(format!("{} and {} with their scopes", VICTIM, NEIGHBOUR))
}

/// It decides and does not write.
fn shadow() -> Result<String> {
    let agent = start("shadow")?;
    let decided = eventually(Duration::from_secs(60), "decision to change a weight", || {
        let decisions = agent.get("/v1/decisions")?;
        Ok(["\"lower\"", "\"raise\""].iter().find(|action| decisions.contains(**action)).copied())
    })
    .with_context(|| agent.log_tail())?;
    ensure!(!changed()?, "weights are {:?}", weights()?);
    Ok(format!("decided {decided}, wrote nothing"))
}

/// The test programs, in order.
fn tests() -> Vec<PathBuf> {
    let mut tests: Vec<_> =
        fs::read_dir(TESTS).into_iter().flatten().flatten().map(|file| file.path()).collect();
    tests.sort();
    tests
}

/// Runs one on a machine that has no other hierarchy than v2.
fn native(test: &Path) -> Result<String> {
    let hierarchies = Hierarchies::find(Path::new("/sys/fs/cgroup"))?;
    ensure!(hierarchies.version == CgroupVersion::V2, "{hierarchies:?}");
    // The system's daemon goes on using its own.
    let cache = Path::new(TEST_FILES).join("libvirt-cache");
    if !cache.exists() {
        run("cp", &["--archive", LIBVIRT_CACHE, &cache.display().to_string()])?;
    }
    let start = Instant::now();
    let out = Command::new(test)
        .arg("--test-threads=1")
        .env("TMPDIR", TEST_FILES)
        .env("FORMTUNE_LIBVIRT_CACHE", &cache)
        .env("FORMTUNE_EMULATED", "1")
        .output()?;
    let text = [out.stdout, out.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    ensure!(out.status.success(), "{}: {}", out.status, text.trim());
    let passed = text
        .lines()
        .find_map(|line| line.strip_prefix("test result: ok. ")?.split(';').next())
        .with_context(|| format!("no result: {}", text.trim()))?;
    Ok(format!("{passed} in {:.0} s, cgroup v2", start.elapsed().as_secs_f64()))
}

/// A guest with one CPU that runs a boot sector: a jump to itself.
fn start_guest(name: &str) -> Result<()> {
    let disk = Path::new(DISKS).join(format!("{name}.img"));
    let mut sector = vec![0; 512];
    sector[..2].copy_from_slice(&[0xeb, 0xfe]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&disk, sector)?;
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>\
         <vcpu cpuset='0'>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>\
         <controller type='usb' model='none'/><memballoon model='none'/>\
         <disk type='file' device='disk'><driver name='qemu' type='raw'/>\
         <source file='{}'/><target dev='hda' bus='ide'/></disk></devices></domain>",
        disk.display()
    );
    let file = Path::new("/run").join(format!("{name}.xml"));
    fs::write(&file, xml)?;
    run("virsh", &["create", &file.display().to_string()])?;
    Ok(())
}

/// The guest's scope, the one cgroup of `machine.slice` that ends in its escaped name.
fn scope(name: &str) -> Result<PathBuf> {
    let end = format!("{}.scope", name.replace('-', "\\x2d"));
    for entry in fs::read_dir("/sys/fs/cgroup/machine.slice").context("no machine.slice")? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(&end) {
            return Ok(path);
        }
    }
    bail!("no scope of {name} in machine.slice")
}

/// Victim's and neighbour's weight; the kernel's and libvirt's answers must agree, which
/// takes a moment when the agent is at work.
fn weights() -> Result<[u32; 2]> {
    let mut seen = String::new();
    let agreed = eventually(Duration::from_secs(5), "agreement on the weights", || {
        let kernel = [kernel_weight(VICTIM)?, kernel_weight(NEIGHBOUR)?];
        let libvirt = [libvirt_shares(VICTIM)?, libvirt_shares(NEIGHBOUR)?];
        seen = format!("the kernel has {kernel:?}, libvirt says {libvirt:?}");
        Ok((kernel == libvirt).then_some(kernel))
    });
    agreed.with_context(|| seen)
}

fn kernel_weight(name: &str) -> Result<u32> {
    let file = scope(name)?.join("cpu.weight");
    fs::read_to_string(&file)?.trim().parse().with_context(|| format!("{}", file.display()))
}

fn libvirt_shares(name: &str) -> Result<u32> {
    let shown = run("virsh", &["schedinfo", name])?;
    shown
        .lines()
        .find_map(|line| line.strip_prefix("cpu_shares"))
        .and_then(|rest| rest.split(':').nth(1)?.trim().parse().ok())
        .with_context(|| format!("no cpu_shares of {name}: {shown}"))
}

fn changed() -> Result<bool> {
    Ok(kernel_weight(VICTIM)? != 100 || kernel_weight(NEIGHBOUR)? != 100)
}

fn originals() -> Result<()> {
    eventually(Duration::from_secs(10), "return of the originals", || {
        Ok((!changed()?).then_some(()))
    })
}

/// What systemd would write at its next reload.
fn property(name: &str) -> Result<String> {
    let scope = scope(name)?;
    let unit = scope.file_name().context("a scope has a name")?.to_string_lossy().into_owned();
    let shown = run("systemctl", &["show", "--property=CPUWeight", &unit])?;
    Ok(shown.trim().to_owned())
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let out = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("failed to start {program}"))?;
    if !out.status.success() {
        bail!(
            "{program} {} ended with {}: {}",
            arguments.join(" "),
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8(out.stdout)?)
}
