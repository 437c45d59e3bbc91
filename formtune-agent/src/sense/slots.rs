//! Slots: which VM the probe counts into which rows.

use super::btf::BtfError;
use super::health::ProbeState;
use super::kernel;
use super::probes::{self, Kernel, ProbeError, RunqProbe, Sizes};
use super::runq::{HeldBy, RunqReader, RunqTotals, Scratch, SlotRows};
use super::table::Table;
use crate::vm::CgroupVersion;
use formtune_common::runq::{Control, HOST, Row, UNMEASURED, vm};
use formtune_core::sample::RunqInterval;
use formtune_core::units::Nanos;
use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;

/// Most kernel memory that rows may take, bytes: 399 VMs on 128 CPUs.
const ROWS_MAX_BYTES: u64 = 128 << 20;
/// cgroups to make room for per VM: scope, `libvirt`, `emulator`, vCPUs, I/O threads.
const CGROUPS_PER_VM: u32 = 16;
/// A freed slot rests this long: a switch under way when its cgroups were taken out of the
/// table may still count (microseconds), and must not count for another VM; and a wait that
/// began while the VM held the CPU may still be charged to it.
const REST: Nanos = Nanos::from_secs(1);
/// Waits at least this long are somebody's fault. Well above what any wake-up takes, well
/// below what anybody is promised; at 10,000 such waits per second and CPU, blaming somebody
/// for each takes some tenths of a per cent of the CPU.
pub const BLAME: Nanos = Nanos::from_micros(100);

/// All slots, and the probe, if it could be loaded.
pub struct Slots {
    probe: Option<RunqProbe>,
    sizes: Sizes,
    table: Table,
    /// The one that has been free for longest first: what a CPU remembers of who had it names
    /// slots.
    free: VecDeque<u32>,
    resting: VecDeque<(Nanos, u32, SlotRows)>,
    scratch: Scratch,
    control: Control,
}

/// What a VM holds.
#[derive(Default)]
pub struct Slot {
    reader: Option<(u32, RunqReader)>,
    /// Wanted.
    ids: BTreeSet<u64>,
    /// Known to the probe.
    counted: BTreeSet<u64>,
}

impl Slot {
    /// Its number, if it has rows.
    pub fn number(&self) -> Option<u32> {
        self.reader.as_ref().map(|(number, _)| *number)
    }

    /// Forgets who a holder was: its slot is about to be somebody else's.
    pub fn forget_holder(&mut self, slot: u32) {
        if let Some((_, reader)) = &mut self.reader {
            reader.forget_holder(slot);
        }
    }

    /// Whether it has rows.
    pub fn is_measured(&self) -> bool {
        self.reader.is_some()
    }

    /// cgroups that the probe counts for it.
    pub fn counted(&self) -> u32 {
        self.counted.len() as u32
    }

    /// cgroups that the probe has no room for.
    pub fn not_counted(&self) -> u32 {
        (self.ids.len() - self.counted.len()) as u32
    }
}

impl Slots {
    /// Loads the probe for up to `max_vms` VMs. Without it, everything else still works.
    pub fn open(
        kernel: Result<&Kernel, &ProbeError>,
        version: CgroupVersion,
        max_vms: u32,
    ) -> (Self, ProbeState) {
        let sizes = sizes(max_vms, possible_cpus());
        let (probe, state) = match load(kernel, version, sizes) {
            Ok(probe) => (Some(probe), ProbeState::Loaded),
            Err(state) => (None, state),
        };
        let slots = Self {
            free: if probe.is_some() { (0..sizes.slots).collect() } else { VecDeque::new() },
            probe,
            sizes,
            table: Table::new(sizes.table),
            resting: VecDeque::new(),
            scratch: Scratch::default(),
            control: control(),
        };
        (slots, state)
    }

    /// VMs that can be measured at once.
    pub fn total(&self) -> u32 {
        if self.probe.is_some() { self.sizes.slots } else { 0 }
    }

    /// Slots that VMs hold.
    pub fn used(&self) -> u32 {
        self.total() - (self.free.len() + self.resting.len()) as u32
    }

    /// Kernel memory of the maps.
    pub fn map_bytes(&self) -> u64 {
        if self.probe.is_some() { self.sizes.bytes() } else { 0 }
    }

    /// cgroups the probe looks for, and those of them in the hash map.
    pub fn cgroups(&self) -> (u32, u32) {
        (self.table.len(), self.table.spilled())
    }

    /// Sets the cgroups of a VM.
    pub fn regroup(&mut self, slot: &mut Slot, ids: &BTreeSet<u64>) {
        let number = slot.number().unwrap_or(UNMEASURED);
        for id in slot.counted.difference(ids).copied().collect::<Vec<_>>() {
            slot.counted.remove(&id);
            self.forget(id, number);
        }
        slot.ids.clone_from(ids);
    }

    /// Gives a VM a slot if there is one, and tells the probe of its cgroups; what does not
    /// fit is tried again with the next reading. Those of a VM without a slot are known as such.
    pub fn ensure(&mut self, slot: &mut Slot) {
        let settled = slot.is_measured() || self.free.is_empty();
        if settled && slot.counted.len() == slot.ids.len() {
            return;
        }
        if slot.reader.is_none() {
            self.give(slot);
        }
        let Some(probe) = &mut self.probe else { return };
        let number = slot.number().unwrap_or(UNMEASURED);
        for &id in &slot.ids {
            if !slot.counted.contains(&id) {
                match self.table.insert(&mut probe.cgroups, id, number) {
                    Ok(()) => slot.counted.insert(id),
                    Err(error) => {
                        tracing::debug!("cgroup {id} is not counted: {error}");
                        break;
                    }
                };
            }
        }
    }

    /// Gives a VM that has none a slot, if there is one.
    fn give(&mut self, slot: &mut Slot) {
        let (Some(probe), Some(&number)) = (&self.probe, self.free.front()) else { return };
        match probe.map_slot(number) {
            Ok(rows) => slot.reader = Some((number, RunqReader::new(rows))),
            Err(error) => {
                tracing::warn!("failed to map slot {number} of map ROWS: {error}");
                return;
            }
        }
        self.free.pop_front();
        // Known to be no slot's until now.
        for id in std::mem::take(&mut slot.counted) {
            self.forget(id, UNMEASURED);
        }
    }

    /// Asks for the rows that [`Self::read`] is about to read.
    pub fn prefetch(&self, slot: &Slot) {
        if let (Some(probe), Some((number, reader))) = (&self.probe, &slot.reader) {
            reader.prefetch(|cpu| probe.seen(*number, cpu));
        }
    }

    /// Waits since the last reading; `None` without a slot. Who held the CPUs during the long
    /// ones is added to `held`.
    pub fn read(
        &mut self,
        slot: &mut Slot,
        totals: &mut RunqTotals,
        held: &mut HeldBy,
    ) -> Option<RunqInterval> {
        let (number, reader) = slot.reader.as_mut()?;
        let probe = self.probe.as_ref()?;
        let seen = |cpu| probe.seen(*number, cpu);
        Some(reader.read(seen, totals, held, &mut self.scratch))
    }

    /// Takes a VM's cgroups out of the table; its slot rests.
    pub fn release(&mut self, slot: Slot, now: Nanos) {
        let number = slot.number().unwrap_or(UNMEASURED);
        for id in slot.counted {
            self.forget(id, number);
        }
        if let Some((number, reader)) = slot.reader {
            self.resting.push_back((now, number, reader.into_rows()));
        }
    }

    /// Zeroes the slots that have rested, for others to use, and returns their numbers.
    pub fn recycle(&mut self, now: Nanos) -> Vec<u32> {
        let mut freed = Vec::new();
        while let Some((_, number, mut rows)) =
            self.resting.pop_front_if(|(since, ..)| now.since(*since) >= REST)
        {
            rows.zero();
            self.free.push_back(number);
            freed.push(number);
        }
        freed
    }

    /// The probe's programs, to be asked what they cost.
    pub fn programs(&self) -> Vec<OwnedFd> {
        self.probe.as_ref().map_or_else(Vec::new, RunqProbe::programs)
    }

    /// From now on the probe looks at one switch in 2^shift.
    pub fn set_sampling_shift(&mut self, shift: u32) {
        self.control(Control { sampling_shift: shift, ..self.control });
    }

    /// Switches that the probe did not look at, as it was told to.
    pub fn unsampled(&self) -> u64 {
        self.probe.as_ref().map_or(0, RunqProbe::unsampled)
    }

    /// Whether every cgroup of every VM is known to the probe: else one that is not need not be
    /// the host's.
    pub fn set_complete(&mut self, complete: bool) {
        let outside = if complete { HOST } else { vm(UNMEASURED) };
        self.control(Control { outside, ..self.control });
    }

    fn control(&mut self, control: Control) {
        if control == self.control {
            return;
        }
        if let Some(probe) = &mut self.probe {
            match probe.control(control) {
                Ok(()) => self.control = control,
                Err(error) => tracing::warn!("the run-queue probe goes on as before: {error}"),
            }
        }
    }

    /// Passes on what the probes logged (debug builds only).
    pub fn flush_log(&mut self) {
        if let Some(probe) = &mut self.probe {
            probe.flush_log();
        }
    }

    fn forget(&mut self, id: u64, slot: u32) {
        if let Some(probe) = &mut self.probe
            && let Err(error) = self.table.remove(&mut probe.cgroups, id, slot)
        {
            tracing::warn!("cgroup {id} may be counted on: {error}");
        }
    }
}

fn sizes(max_vms: u32, cpus: u32) -> Sizes {
    let per_slot = u64::from(cpus) * size_of::<Row>() as u64;
    let most = u32::try_from(ROWS_MAX_BYTES / per_slot).unwrap_or(u32::MAX).max(1);
    let slots = max_vms.clamp(1, most);
    let cgroups = slots.saturating_mul(CGROUPS_PER_VM);
    Sizes {
        slots,
        cpus,
        table: cgroups.next_power_of_two().clamp(1 << 12, 1 << 16),
        spill: cgroups.max(1 << 12),
    }
}

/// The greatest CPU number that can ever come, and one.
pub(super) fn possible_cpus() -> u32 {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    greatest(&list).map_or(1024, |cpu| cpu + 1)
}

/// The greatest number of a CPU list such as `0-3,8`.
fn greatest(list: &str) -> Option<u32> {
    list.trim().split([',', '-']).filter_map(|number| number.parse().ok()).max()
}

/// Loads and attaches the probe with the least of maps and detaches it again, so that
/// `doctor` need not guess.
pub fn trial(version: CgroupVersion) -> ProbeState {
    let sizes = Sizes { slots: 1, cpus: possible_cpus(), table: 64, spill: 64 };
    let kernel = Kernel::open();
    match load(kernel.as_ref(), version, sizes) {
        Ok(_) => ProbeState::Loaded,
        Err(state) => state,
    }
}

fn load(
    kernel: Result<&Kernel, &ProbeError>,
    version: CgroupVersion,
    sizes: Sizes,
) -> Result<RunqProbe, ProbeState> {
    let kernel = kernel.map_err(unavailable)?;
    RunqProbe::load(kernel, version, sizes, control()).map_err(|error| unavailable(&error))
}

fn control() -> Control {
    Control { sampling_shift: 0, outside: HOST, blame_ns: BLAME.0 }
}

fn unavailable(error: &ProbeError) -> ProbeState {
    let remedy = match error {
        ProbeError::Btf(BtfError::Read { .. }) => {
            "run a kernel with CONFIG_DEBUG_INFO_BTF=y (5.10 or later; every Debian kernel since 11)"
        }
        ProbeError::Btf(BtfError::Malformed(_)) => {
            "run another kernel (5.10 or later; every Debian kernel since 11 will do)"
        }
        ProbeError::Btf(BtfError::Missing(_)) => {
            "run a kernel 5.10 or later with CONFIG_SCHED_INFO, CONFIG_FAIR_GROUP_SCHED and cgroups"
        }
        ProbeError::Load(_)
        | ProbeError::Program(_)
        | ProbeError::Object(_)
        | ProbeError::Mmap(..) => {
            "run a kernel 5.10 or later, not locked down (/sys/kernel/security/lockdown)"
        }
    };
    // What an old kernel says of what it does not know helps nobody by itself.
    let too_old = kernel::release().ok().and_then(|release| kernel::too_old(&release));
    ProbeState::Unavailable {
        program: probes::SCHED_SWITCH,
        why: too_old.map_or_else(|| error.to_string(), |too_old| format!("{too_old}: {error}")),
        remedy: format!("{remedy}; without it nothing is decided on CPU weights"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_stay_below_the_ceiling() {
        let small = sizes(1024, 2);
        assert_eq!((small.slots, small.table), (1024, 16_384));
        let large = sizes(4096, 512);
        assert!(large.slots < 128 && large.bytes() < ROWS_MAX_BYTES + (1 << 21));
        assert_eq!(sizes(0, 1).slots, 1);
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(greatest("0-1\n"), Some(1));
        assert_eq!(greatest("0,2-7,12"), Some(12));
        assert_eq!(greatest(""), None);
    }
}
