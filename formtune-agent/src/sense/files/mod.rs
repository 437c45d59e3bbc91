//! What the kernel's files say of a VM and of the node, besides CPU time: pressure, memory
//! events, and the run delay that the run-queue probe is checked with.
//!
//! Reading is a handful of system calls per VM, so a VM that runs is read at most once per
//! second, one that sleeps rarely, and never more than a few per tick: the price is bounded,
//! and on a very large node figures get older instead. Files of VMs that run stay open; those
//! of VMs that sleep are closed, as an open one holds a page of kernel memory.

mod memory_events;
mod pressure;
pub(super) mod run_delay;
pub(super) mod text;

pub use memory_events::MemoryEvents;
pub use pressure::{Pressure, Stall, Stalls};
pub use run_delay::RunqCheck;

use super::Tracked;
use super::cgroup::Hierarchies;
use formtune_core::units::Nanos;
use memory_events::MemoryFiles;
use pressure::PressureFiles;
use run_delay::RunDelay;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::ops::Bound::{Excluded, Included, Unbounded};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Least time between two readings of a VM that runs, and of the node.
const ACTIVE_EVERY: Nanos = Nanos::from_secs(1);
/// The same for one that sleeps, while its averages have not come down to zero.
const DECAYING_EVERY: Nanos = Nanos::from_secs(10);
/// The same for one that sleeps.
const IDLE_EVERY: Nanos = Nanos::from_secs(60);
/// VMs read per tick: at the price of some tens of microseconds each, 256 per second.
const PER_TICK: usize = 64;
/// Time between two readings of run delay, of whichever VM.
const CHECK_PACE: Nanos = Nanos::from_secs(1);

/// What was last read of a VM. Cumulative since its cgroup was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmFiles {
    /// Time that its tasks stalled for want of a resource.
    pub pressure: Pressure,
    /// How often its memory limits were met.
    pub memory_events: MemoryEvents,
    /// What the kernel itself says of its waits; `None` until it has waited long enough.
    pub runq_check: Option<RunqCheck>,
}

/// One VM's files.
#[derive(Default)]
pub struct VmReader {
    open: Option<Open>,
    last: (Pressure, MemoryEvents),
    values: VmFiles,
    read_at: Option<Nanos>,
    ran: bool,
    run_delay: RunDelay,
}

struct Open {
    pressure: PressureFiles,
    memory: MemoryFiles,
}

impl Open {
    /// A VM has a group in each hierarchy, at the same place. One that lies elsewhere, or is
    /// the root, is not the VM's alone.
    fn new(hierarchies: &Hierarchies, cgroup: &Path) -> Self {
        let relative = cgroup.strip_prefix(&hierarchies.cpu).ok();
        let relative = relative.filter(|relative| !relative.as_os_str().is_empty());
        let below = |root: &Option<PathBuf>| Some(root.as_ref()?.join(relative?));
        let unified = below(&hierarchies.unified);
        Self {
            pressure: PressureFiles::of_cgroup(unified.as_deref()),
            memory: MemoryFiles::open(below(&hierarchies.memory).as_deref(), unified.as_deref()),
        }
    }
}

impl VmReader {
    /// The VM had switches since the last tick, or it is not known whether it had.
    pub fn ran(&mut self) {
        self.ran = true;
    }

    /// As last read.
    pub fn values(&self) -> &VmFiles {
        &self.values
    }

    fn is_due(&self, now: Nanos) -> bool {
        let every = match (self.ran, self.last.0.is_zero()) {
            (true, _) => ACTIVE_EVERY,
            (false, false) => DECAYING_EVERY,
            (false, true) => IDLE_EVERY,
        };
        self.read_at.is_none_or(|at| now.since(at) >= every)
    }

    fn read(&mut self, hierarchies: &Hierarchies, cgroup: &Path, now: Nanos) {
        self.read_at = Some(now);
        let open = self.open.get_or_insert_with(|| Open::new(hierarchies, cgroup));
        let read = (open.pressure.read(), open.memory.read());
        self.values.pressure = read.0.after(&self.last.0);
        self.values.memory_events = read.1.after(&self.last.1);
        self.last = read;
        if !std::mem::take(&mut self.ran) {
            self.open = None;
        }
    }
}

/// Whose turn it is, and what is the node's.
pub struct Files {
    node: PressureFiles,
    last: Pressure,
    pressure: Pressure,
    node_read_at: Option<Nanos>,
    /// Path of the VM that was read last.
    read: OsString,
    /// Path of the VM whose run delay was read last.
    checked: OsString,
    checked_at: Option<Nanos>,
}

impl Files {
    /// Opens the node's files; those that are not there say `None`.
    pub fn open() -> Self {
        Self {
            node: PressureFiles::of_node(),
            last: Pressure::default(),
            pressure: Pressure::default(),
            node_read_at: None,
            read: OsString::new(),
            checked: OsString::new(),
            checked_at: None,
        }
    }

    /// The node's pressure, as last read.
    pub fn pressure(&self) -> &Pressure {
        &self.pressure
    }

    /// Reads what is due. The probe's counts have just been read.
    pub(super) fn read(
        &mut self,
        hierarchies: &Hierarchies,
        tracked: &mut BTreeMap<OsString, Tracked>,
        now: Nanos,
    ) {
        if self.node_read_at.is_none_or(|at| now.since(at) >= ACTIVE_EVERY) {
            self.node_read_at = Some(now);
            let read = self.node.read();
            self.pressure = read.after(&self.last);
            self.last = read;
        }
        let mut left = PER_TICK;
        round(tracked, &mut self.read, |path, vm| {
            if !vm.files.is_due(now) {
                return Turn::Pass;
            }
            vm.files.read(hierarchies, path, now);
            left -= 1;
            if left == 0 { Turn::Stop } else { Turn::Taken }
        });
        if self.checked_at.is_some_and(|at| now.since(at) < CHECK_PACE) {
            return;
        }
        round(tracked, &mut self.checked, |path, vm| {
            let counted = vm.totals.wait_ns;
            if !vm.slot.is_measured() || !vm.files.run_delay.is_due(counted, now) {
                return Turn::Pass;
            }
            self.checked_at = Some(now);
            let check = vm.files.run_delay.read(hierarchies.version, path, counted, now);
            if check.is_some() {
                vm.files.values.runq_check = check;
            }
            Turn::Stop
        });
    }
}

/// What a VM did with its turn.
enum Turn {
    Pass,
    Taken,
    Stop,
}

/// Goes round all VMs once, beginning after the one that had the last turn, so that all come
/// to theirs however few there are per tick.
fn round<V>(
    vms: &mut BTreeMap<OsString, V>,
    last: &mut OsString,
    mut turn: impl FnMut(&Path, &mut V) -> Turn,
) {
    let from = last.clone();
    let mut visit = |(path, vm): (&OsString, &mut V)| match turn(Path::new(path), vm) {
        Turn::Pass => ControlFlow::Continue(()),
        Turn::Taken => {
            last.clone_from(path);
            ControlFlow::Continue(())
        }
        Turn::Stop => {
            last.clone_from(path);
            ControlFlow::Break(())
        }
    };
    let rest = vms.range_mut::<OsStr, _>((Excluded(from.as_os_str()), Unbounded));
    if rest.into_iter().try_for_each(&mut visit).is_continue() {
        let _ =
            vms.range_mut::<OsStr, _>((Unbounded, Included(from.as_os_str()))).try_for_each(visit);
    }
}

/// A cumulative counter; one that is smaller than at the reading before is no reading.
pub(super) fn forward(before: Option<u64>, now: Option<u64>) -> Option<u64> {
    now.filter(|now| before.is_none_or(|before| before <= *now))
}

#[cfg(test)]
mod tests;
