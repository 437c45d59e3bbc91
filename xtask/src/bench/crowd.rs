//! A thousand VMs that do all that is measured of a VM: wake up, read from a disk and write to
//! it, and send TCP segments through a tap device of their own, some of them twice. In a network
//! namespace of the benchmark's own; an agent or reader that is to see the devices has to be
//! started while this is there.

use super::disk::LoopDevice;
use super::load::{Cgroups, Load};
use crate::demo::interrupt;
use crate::progress;
use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;

/// VMs.
pub const VMS: usize = 1_000;
/// Each is active at least once between two readings.
const PERIOD_US: &str = "200000";

/// The VMs, running.
pub struct Crowd {
    /// One process per VM.
    pub loads: Vec<Load>,
    #[expect(dead_code, reason = "detached after the processes that use it")]
    disk: LoopDevice,
    cgroups: Cgroups,
    #[expect(dead_code, reason = "left last")]
    namespace: Namespace,
}

impl Crowd {
    /// Starts all of them.
    ///
    /// # Errors
    /// When the load cannot be built or set up.
    pub fn start() -> Result<Self> {
        let program = super::build("busy-vm")?;
        let namespace = Namespace::enter()?;
        let disk = LoopDevice::new()?;
        let cgroups = Cgroups::new()?;
        let device = disk.path().to_str().context("a device's path is text")?;
        let mut step = progress::Step::start(format!("starting {VMS} busy VMs"));
        let mut loads = Vec::new();
        for number in 1..=VMS {
            let vm = cgroups.vm(number, &format!("busy-{number:04}"))?;
            let (tap, block) = (format!("ft-busy{number}"), number.to_string());
            let settings = [
                ("tap", tap.as_str()),
                ("device", device),
                ("block", &block),
                ("period_us", PERIOD_US),
            ];
            let mut load = vm.spawn(&program, &settings, None)?;
            load.wait_for_line()?;
            loads.push(load);
            interrupt::check()?;
            step.tick();
        }
        step.end("done");
        Ok(Self { loads, disk, cgroups, namespace })
    }

    /// For the `cgroups` key of formtune's configuration.
    pub fn pattern(&self) -> String {
        self.cgroups.pattern()
    }
}

/// The network namespace that was left; it is entered again when dropped.
struct Namespace(File);

impl Namespace {
    fn enter() -> Result<Self> {
        let left = File::open("/proc/thread-self/ns/net").context("no network namespaces")?;
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            bail!("no network namespace of its own: {error}");
        }
        Ok(Self(left))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.0, CloneFlags::CLONE_NEWNET) {
            eprintln!("failed to go back to the network namespace: {error}");
        }
    }
}
