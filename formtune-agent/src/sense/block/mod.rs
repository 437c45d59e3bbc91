//! Block I/O latency per VM, device and operation: whose cgroups the probe looks for, and what
//! it counted.

mod devices;
mod groups;
mod occupancy;
mod rows;
mod totals;

pub use occupancy::SPAN;
pub use totals::{BlockTotals, LatencyTotals, OpTotals};

use super::cgroup::Hierarchies;
use super::health::ProbeState;
use super::probes::{BLOCK_RQ_COMPLETE, BlockProbe, BlockSizes, Kernel, ProbeError};
use super::table::Table;
use devices::Devices;
use formtune_common::block::{Control, Counters, HOST, Key, Row};
use formtune_core::sample::RunqInterval;
use formtune_core::units::Nanos;
use occupancy::Occupancy;
use rows::{Rows, Scratch};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Most kernel memory that rows may take, bytes.
const ROWS_MAX_BYTES: u64 = 32 << 20;
/// Rows to make room for: per VM, for reads, writes and flushes of one device and a little;
/// and for the host, on all devices.
const ROWS_PER_VM: u32 = 4;
const ROWS_OF_HOST: u32 = 256;
/// cgroups to make room for per VM.
const CGROUPS_PER_VM: u32 = 16;
/// The rows of a VM that is gone are kept this long: a request that found the VM just before
/// its cgroups left the table may still look for its row (microseconds).
const REST: Nanos = Nanos::from_secs(1);
/// Where cgroups are not those that discovery follows they are looked for again after this, and
/// after twice as long each time.
const LOOK_FRESH: Nanos = Nanos::from_secs(1);
/// Of so many readings of a row one looks everywhere.
const THOROUGH: u32 = 64;
/// How long "at first" is.
const FRESH: Nanos = Nanos::from_secs(10);
/// The same later, if there are none yet.
const LOOK_NONE: Nanos = Nanos::from_secs(5);
/// The same if there are; devices that are gone are looked for as often.
const LOOK: Nanos = Nanos::from_secs(30);

/// The sensor, whether or not its probe could be loaded.
pub struct Block {
    hierarchies: Hierarchies,
    probe: Option<BlockProbe>,
    state: ProbeState,
    sizes: BlockSizes,
    table: Table,
    /// By cgroup; as bytes, which are fast to compare.
    vms: BTreeMap<OsString, BlockVm>,
    /// By number.
    paths: BTreeMap<u32, PathBuf>,
    /// Numbers of VMs of which a cgroup is counted.
    measured: BTreeSet<u32>,
    /// No VM's cgroups have to be looked for before.
    look_due: Nanos,
    /// Number of the next VM. None is given twice, so no request is charged to the wrong one.
    next: u32,
    resting: VecDeque<(Nanos, u32)>,
    rows: Rows,
    scratch: Scratch,
    /// Rows that are taken, by key.
    taken: BTreeMap<Key, (u32, OpTotals)>,
    /// Rows that are not, in the order in which the probe will take them.
    free: VecDeque<u32>,
    /// Of [`Counters::taken`], those that are in `taken` or were.
    known: u64,
    counters: Counters,
    control: Control,
    /// Of the last reading, by number, ascending.
    intervals: Vec<(u32, RunqInterval)>,
    readings: u32,
    occupancy: Occupancy,
    devices: Devices,
    /// Devices that were gone when they were last looked for.
    gone: BTreeSet<u32>,
    looked_at: Nanos,
}

/// What is kept of a VM.
struct BlockVm {
    number: u32,
    /// Its cgroups as discovery found them.
    known: BTreeSet<u64>,
    /// Those its block I/O is charged to; `None` if there are none.
    ids: Option<BTreeSet<u64>>,
    /// Those the probe knows.
    counted: BTreeSet<u64>,
    found_at: Nanos,
    looked_at: Option<Nanos>,
}

/// Whose requests occupy a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupant<'a> {
    /// No VM's.
    Host,
    /// Those of the VM with this cgroup.
    Vm(&'a Path),
    /// Those of a VM that is gone.
    Gone,
}

/// State of the sensor.
#[derive(Clone, Debug)]
pub struct BlockHealth {
    /// The probe.
    pub probe: ProbeState,
    /// Whether times are noted in a map, as some device's requests carry none.
    pub notes: bool,
    /// What could not be counted, or not in full, since start.
    pub counters: Counters,
    /// Requests that were not seen, as they were done while the same CPU looked at another;
    /// `None` where the kernel does not say (before 5.12).
    pub missed: Option<u64>,
    /// VMs whose block I/O is charged to no cgroup of theirs.
    pub not_attributed: u32,
    /// cgroups of VMs that the probe has no room for.
    pub cgroups_not_counted: u32,
    /// Rows there are.
    pub rows: u32,
    /// Rows taken.
    pub rows_taken: u32,
    /// Kernel memory of the maps, bytes.
    pub map_bytes: u64,
}

impl Block {
    /// Loads the probe for up to `max_vms` VMs. Without it, everything else still works.
    pub fn open(
        kernel: Result<&Kernel, &ProbeError>,
        hierarchies: &Hierarchies,
        max_vms: u32,
    ) -> Self {
        let sizes = sizes(max_vms);
        let (probe, state) = match load(kernel, hierarchies, sizes) {
            Ok(probe) => (Some(probe), ProbeState::Loaded),
            Err(state) => (None, state),
        };
        Self {
            hierarchies: hierarchies.clone(),
            free: if probe.is_some() { (0..sizes.rows).collect() } else { VecDeque::new() },
            probe,
            state,
            sizes,
            table: Table::new(sizes.table),
            vms: BTreeMap::new(),
            paths: BTreeMap::new(),
            measured: BTreeSet::new(),
            look_due: Nanos(0),
            next: HOST + 1,
            resting: VecDeque::new(),
            rows: Rows::new(sizes.rows),
            scratch: Scratch::default(),
            taken: BTreeMap::new(),
            known: 0,
            counters: Counters::default(),
            control: Control::default(),
            intervals: Vec::new(),
            readings: 0,
            occupancy: Occupancy::default(),
            devices: Devices::new(),
            gone: BTreeSet::new(),
            looked_at: Nanos(0),
        }
    }

    /// The probe's programs, to be asked what they cost.
    pub fn programs(&self) -> Vec<OwnedFd> {
        self.probe.as_ref().map_or_else(Vec::new, BlockProbe::programs)
    }

    /// From now on the probe looks at one request in 2^shift, which counts as so many.
    pub fn set_sampling_shift(&mut self, shift: u32) {
        self.control(Control { sampling_shift: shift, ..self.control });
    }

    fn control(&mut self, control: Control) {
        if control == self.control {
            return;
        }
        if let Some(probe) = &mut self.probe {
            match probe.control(control) {
                Ok(()) => self.control = control,
                Err(error) => tracing::warn!("the block I/O probe goes on as before: {error}"),
            }
        }
    }

    /// A VM that appeared, or whose cgroups are others now. Its number, for
    /// [`Self::interval`].
    pub fn track(&mut self, path: &Path, ids: &BTreeSet<u64>, now: Nanos) -> u32 {
        self.look_due = now;
        if let Some(vm) = self.vms.get_mut(path.as_os_str()) {
            vm.known.clone_from(ids);
            vm.looked_at = None;
            return vm.number;
        }
        let vm = BlockVm {
            number: self.next,
            known: ids.clone(),
            ids: None,
            counted: BTreeSet::new(),
            found_at: now,
            looked_at: None,
        };
        self.paths.insert(self.next, path.into());
        self.vms.insert(path.into(), vm);
        self.next += 1;
        self.next - 1
    }

    /// Takes a VM's cgroups out of the table; its rows rest.
    pub fn untrack(&mut self, path: &Path, now: Nanos) {
        let Some(vm) = self.vms.remove(path.as_os_str()) else { return };
        self.paths.remove(&vm.number);
        self.measured.remove(&vm.number);
        for id in vm.counted {
            self.forget(id, vm.number);
        }
        self.resting.push_back((now, vm.number));
    }

    /// Looks for cgroups that may have come, then reads all counters.
    pub fn read(&mut self, now: Nanos) {
        if self.probe.is_none() {
            return;
        }
        self.look(now);
        let incomplete = u32::from(self.cgroups_not_counted() > 0);
        self.control(Control { incomplete, ..self.control });
        self.count();
        self.intervals.clear();
        self.drain(now);
        while let Some((_, number)) =
            self.resting.pop_front_if(|(since, _)| now.since(*since) >= REST)
        {
            self.release(|key| key.who == number);
        }
        if now.since(self.looked_at) >= LOOK {
            self.looked_at = now;
            self.occupancy.prune(now);
            self.look_for_devices();
        }
    }

    /// Takes the times from queued to done since the last reading, over all devices and
    /// operations, of the VM with this number; `None` if it is not measured. Asked for every
    /// VM at every reading, hence by number: paths are slow to compare.
    pub fn interval(&mut self, vm: u32) -> Option<RunqInterval> {
        if !self.measured.contains(&vm) {
            return None;
        }
        let at = self.intervals.binary_search_by_key(&vm, |(who, _)| *who);
        Some(at.map(|at| std::mem::take(&mut self.intervals[at].1)).unwrap_or_default())
    }

    /// A VM's requests since it was first seen; `None` if it is not measured.
    pub fn totals(&self, vm: &Path) -> Option<BlockTotals<'_>> {
        self.totals_by_number(self.vms.get(vm.as_os_str())?.number)
    }

    /// The same for the VM with this number.
    pub fn totals_by_number(&self, vm: u32) -> Option<BlockTotals<'_>> {
        self.measured.contains(&vm).then(|| self.totals_of(vm))
    }

    /// Requests that are no VM's, since start; `None` without the probe.
    pub fn totals_of_host(&self) -> Option<BlockTotals<'_>> {
        self.probe.is_some().then(|| self.totals_of(HOST))
    }

    fn totals_of(&self, who: u32) -> BlockTotals<'_> {
        let from = Key { who, device: 0, op: 0 };
        let to = Key { who, device: u32::MAX, op: u32::MAX };
        self.taken
            .range(from..=to)
            .map(|(key, (_, totals))| ((key.device, key.op), totals))
            .collect()
    }

    /// Who had requests in each device in the last [`SPAN`], and for how long in all,
    /// nanoseconds; most first.
    pub fn occupants(&self, now: Nanos) -> BTreeMap<u32, Vec<(Occupant<'_>, u64)>> {
        let who = |who| match (who, self.paths.get(&who)) {
            (HOST, _) => Occupant::Host,
            (_, Some(path)) => Occupant::Vm(path),
            (_, None) => Occupant::Gone,
        };
        let named = |all: Vec<(u32, u64)>| all.into_iter().map(|(n, ns)| (who(n), ns)).collect();
        let all = self.occupancy.all(now).into_iter();
        all.map(|(device, all)| (device, named(all))).collect()
    }

    /// Requests under way whose times are noted in a map; slow, for tests.
    pub fn noted(&self) -> usize {
        self.probe.as_ref().map_or(0, BlockProbe::noted)
    }

    /// Name of a device, e.g. `sda`.
    pub fn device(&self, device: u32) -> String {
        self.devices.name(device)
    }

    /// State of the sensor.
    pub fn health(&self) -> BlockHealth {
        BlockHealth {
            probe: self.state.clone(),
            notes: self.probe.as_ref().is_some_and(BlockProbe::notes),
            counters: self.counters,
            missed: self.probe.as_ref().and_then(BlockProbe::missed),
            not_attributed: self.vms.values().filter(|vm| vm.ids.is_none()).count() as u32,
            cgroups_not_counted: self.cgroups_not_counted(),
            rows: if self.probe.is_some() { self.sizes.rows } else { 0 },
            rows_taken: self.taken.len() as u32,
            map_bytes: if self.probe.is_some() { self.sizes.bytes() } else { 0 },
        }
    }

    /// cgroups of VMs that the probe has no room for.
    pub fn cgroups_not_counted(&self) -> u32 {
        let not_counted =
            |vm: &BlockVm| vm.ids.as_ref().map_or(0, BTreeSet::len) - vm.counted.len();
        self.vms.values().map(not_counted).sum::<usize>() as u32
    }

    /// Requests that are in no row as all were taken, and how many rows there are.
    pub fn without_row(&self) -> (u64, u32) {
        (self.counters.full, self.sizes.rows)
    }

    /// Tells the probe of cgroups that have come and of those that are gone.
    fn look(&mut self, now: Nanos) {
        let Some(probe) = &mut self.probe else { return };
        if now < self.look_due {
            return;
        }
        self.look_due = Nanos(now.0 + LOOK.0);
        for (path, vm) in &mut self.vms {
            let interval = match vm.ids {
                // Later each time: after 1, 2, 4 … seconds.
                _ if now.since(vm.found_at) < FRESH => {
                    Nanos(LOOK_FRESH.0.max(vm.looked_at.map_or(0, |at| at.since(vm.found_at).0)))
                }
                None => LOOK_NONE,
                Some(_) => LOOK,
            };
            let due = vm.looked_at.is_none_or(|at| now.since(at) >= interval);
            let complete = vm.ids.as_ref().is_none_or(|ids| ids.len() == vm.counted.len());
            if !due && complete {
                let at = Nanos(vm.looked_at.unwrap_or(now).0 + interval.0);
                self.look_due = self.look_due.min(at);
                continue;
            }
            if due {
                vm.ids = groups::of(&self.hierarchies, Path::new(path), &vm.known);
                vm.looked_at = Some(now);
            }
            let none = BTreeSet::new();
            let ids = vm.ids.as_ref().unwrap_or(&none);
            for id in vm.counted.difference(ids).copied().collect::<Vec<_>>() {
                vm.counted.remove(&id);
                if let Err(error) = self.table.remove(&mut probe.cgroups, id, vm.number) {
                    tracing::warn!("block cgroup {id} may be counted on: {error}");
                }
            }
            for id in ids.difference(&vm.counted).copied().collect::<Vec<_>>() {
                match self.table.insert(&mut probe.cgroups, id, vm.number) {
                    Ok(()) => vm.counted.insert(id),
                    Err(error) => {
                        tracing::debug!("block cgroup {id} is not counted: {error}");
                        break;
                    }
                };
            }
            // Then it is seen when exactly; what does not fit is tried again with every reading.
            let wait = if ids.len() == vm.counted.len() { LOOK_FRESH } else { Nanos(0) };
            self.look_due = self.look_due.min(Nanos(now.0 + wait.0));
            if vm.counted.is_empty() {
                self.measured.remove(&vm.number);
            } else {
                self.measured.insert(vm.number);
            }
        }
    }

    fn forget(&mut self, id: u64, vm: u32) {
        if let Some(probe) = &mut self.probe
            && let Err(error) = self.table.remove(&mut probe.cgroups, id, vm)
        {
            tracing::warn!("block cgroup {id} may be counted on: {error}");
        }
    }

    /// Reads what is not in the rows, and follows from it.
    fn count(&mut self) {
        let Some(probe) = &mut self.probe else { return };
        let before = self.counters;
        match probe.counters() {
            Ok(counters) => self.counters = counters,
            Err(error) => tracing::warn!("{error}"),
        }
        let now = &self.counters;
        if now.no_queued + now.no_issued > before.no_queued + before.no_issued {
            match probe.note() {
                Ok(()) => {}
                Err(error) => tracing::warn!("block I/O without time stamps: {error}"),
            }
        }
        if self.known == self.counters.taken {
            return;
        }
        // The probe takes rows in the order of `free`, but for those that two CPUs wanted.
        let mut at = 0;
        while self.known < self.counters.taken && at < self.free.len() {
            let number = self.free[at];
            if let Err(error) = self.rows.ensure(probe.rows(), number) {
                tracing::warn!("failed to map row {number} of map ROWS: {error}");
                return;
            }
            match self.rows.key(number) {
                Some(key) if key != Key::default() => {
                    self.devices.learn(key.device);
                    self.taken.insert(key, (number, OpTotals::default()));
                    self.free.remove(at);
                    self.known += 1;
                }
                _ => at += 1,
            }
        }
    }

    /// Takes out what the rows hold.
    fn drain(&mut self, now: Nanos) {
        for (number, _) in self.taken.values() {
            self.rows.prefetch(*number);
        }
        self.readings = self.readings.wrapping_add(1);
        for (key, (number, totals)) in &mut self.taken {
            // A few rows with each reading.
            let thorough = self.readings.wrapping_add(*number).is_multiple_of(THOROUGH);
            let drained = self.rows.drain(*number, thorough, &mut self.scratch);
            let Some(drained) = drained else { continue };
            totals.requests += u64::from(drained.count);
            totals.total.add(drained.total.0, drained.total.1);
            totals.device.add(drained.device.0, drained.device.1);
            self.occupancy.add(key.device, key.who, drained.device.0, now);
            // Keys are in the order of whose they are.
            match self.intervals.last_mut() {
                Some((who, interval)) if *who == key.who => {
                    interval.wait_ns += drained.total.0;
                    interval.counts.extend_from_slice(drained.total.1);
                    coalesce(&mut interval.counts);
                }
                _ => {
                    // Most hold no more, of all devices and operations.
                    let mut counts = Vec::with_capacity(16.max(drained.total.1.len()));
                    counts.extend_from_slice(drained.total.1);
                    let interval = RunqInterval { counts, wait_ns: drained.total.0 };
                    self.intervals.push((key.who, interval));
                }
            }
        }
    }

    /// Frees the rows of keys that no request leads to any more.
    fn release(&mut self, gone: impl Fn(&Key) -> bool) {
        let Some(probe) = &mut self.probe else { return };
        let keys: Vec<Key> = self.taken.keys().filter(|key| gone(key)).copied().collect();
        for key in keys {
            let Some((number, _)) = self.taken.remove(&key) else { continue };
            let freed = probe.forget(&key).and_then(|()| {
                self.rows.zero(number);
                probe.give_back(number)
            });
            match freed {
                Ok(()) => self.free.push_back(number),
                Err(error) => tracing::warn!("row {number} of map ROWS is lost: {error}"),
            }
        }
    }

    /// Frees the rows of devices that were gone twice in a row: their last requests are done.
    fn look_for_devices(&mut self) {
        let used: BTreeSet<u32> = self.taken.keys().map(|key| key.device).collect();
        let gone: BTreeSet<u32> =
            used.into_iter().filter(|&device| self.devices.is_gone(device)).collect();
        for &device in gone.intersection(&std::mem::take(&mut self.gone)) {
            self.release(|key| key.device == device);
            self.devices.forget(device);
        }
        self.gone = gone;
    }
}

/// Sorts by bucket and adds up what is of the same.
fn coalesce(counts: &mut Vec<(u16, u32)>) {
    counts.sort_unstable_by_key(|&(bucket, _)| bucket);
    counts.dedup_by(|&mut (bucket, count), kept| {
        let same = kept.0 == bucket;
        if same {
            kept.1 = kept.1.saturating_add(count);
        }
        same
    });
}

fn sizes(max_vms: u32) -> BlockSizes {
    let most = (ROWS_MAX_BYTES / size_of::<Row>() as u64) as u32;
    let cgroups = max_vms.max(1).saturating_mul(CGROUPS_PER_VM).clamp(1 << 12, 1 << 16);
    BlockSizes {
        rows: max_vms.saturating_mul(ROWS_PER_VM).saturating_add(ROWS_OF_HOST).min(most),
        table: cgroups.next_power_of_two(),
        spill: cgroups,
    }
}

/// Loads and attaches the probe with the least of maps and detaches it again, for `doctor`.
pub fn trial(hierarchies: &Hierarchies) -> ProbeState {
    let sizes = BlockSizes { rows: 1, table: 64, spill: 64 };
    match load(Kernel::open().as_ref(), hierarchies, sizes) {
        Ok(_) => ProbeState::Loaded,
        Err(state) => state,
    }
}

fn load(
    kernel: Result<&Kernel, &ProbeError>,
    hierarchies: &Hierarchies,
    sizes: BlockSizes,
) -> Result<BlockProbe, ProbeState> {
    let unavailable = |why: String, remedy: &str| ProbeState::Unavailable {
        program: BLOCK_RQ_COMPLETE,
        why,
        remedy: format!("{remedy}; without it block I/O is not measured, all else is"),
    };
    if hierarchies.block.is_none() {
        return Err(unavailable(
            "no cgroup hierarchy has the controller io (v2) or blkio (v1)".into(),
            "run a kernel with CONFIG_BLK_CGROUP and mount the hierarchy",
        ));
    }
    let refused = |error: &ProbeError| {
        let remedy = match error {
            ProbeError::Btf(_) => "run a kernel 5.10 or later with BTF and CONFIG_BLK_CGROUP",
            _ => "run a kernel 5.10 or later, not locked down (/sys/kernel/security/lockdown)",
        };
        unavailable(error.to_string(), remedy)
    };
    BlockProbe::load(kernel.map_err(refused)?, sizes).map_err(|error| refused(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_stay_below_the_ceiling() {
        assert_eq!(sizes(1024).rows, 4_352);
        assert!(sizes(1024).bytes() < 22 << 20);
        let large = sizes(u32::MAX);
        assert!(large.bytes() < ROWS_MAX_BYTES + (2 << 20), "{large:?}");
        assert_eq!(sizes(0).rows, ROWS_OF_HOST);
    }

    #[test]
    fn intervals_of_several_rows_are_one() {
        let mut counts = vec![(7, 1), (9, u32::MAX), (3, 2), (7, 5), (9, 1)];
        coalesce(&mut counts);
        assert_eq!(counts, [(3, 2), (7, 6), (9, u32::MAX)]);
    }
}
