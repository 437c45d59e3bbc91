//! What is read: the probe's counters, the VMs there are, their CPU time. Reads, never
//! writes (but for the probe's own maps).
//!
//! A thread watches for VMs ([`discover`]); [`Sense::sample`] takes what it found, gives each
//! VM a slot of the probe's map, reads the counters, and is the only one to touch either.

pub mod block;
pub mod btf;
pub mod cgroup;
mod config;
mod discover;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod health;
pub mod inventory;
pub mod kernel;
mod libvirt_names;
mod prefetch;
pub mod probes;
mod runq;
mod shortage;
mod slots;
mod table;
pub mod tcp;
mod usage;

pub use config::{CgroupPattern, CgroupPatternError, SenseConfig};
pub use files::{MemoryEvents, Pressure, RunqCheck, Stall, Stalls, VmFiles};
pub use health::{ProbeHealth, ProbeState};
pub use runq::RunqTotals;
pub use slots::trial;
pub use usage::QuotaPeriods;

use crate::hypervisor::{Domain, Hypervisor};
use crate::vm::{Owner, Vm};
use block::{Block, BlockTotals};
use cgroup::{CgroupError, Hierarchies};
use discover::{Discovery, Found};
use formtune_common::runq::{HOST, IDLE, slot_of};
use formtune_core::sample::{HeldInterval, HostSample, RunqInterval};
use formtune_core::units::{Nanos, VmId};
use inventory::{Change, Group, Tree};
use probes::{CostMeter, Kernel};
use runq::HeldBy;
use shortage::Shortage;
use slots::Slots;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tcp::{Tcp, TcpCounts, TcpHealth};
use usage::{HostCpu, UsageReader};

/// Why nothing can be sensed at all. A probe that cannot be loaded is not among these: see
/// [`ProbeHealth`].
#[derive(Debug, thiserror::Error)]
pub enum SenseError {
    /// No hierarchy with the `cpu` controller.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Not enough rights.
    #[error(
        "missing {0}: loading the run-queue probe needs CAP_BPF and CAP_PERFMON (or \
         CAP_SYS_ADMIN); run as root, or grant them with AmbientCapabilities= or setcap"
    )]
    Capability(String),
    /// No thread for discovery.
    #[error("failed to start the discovery thread: {0}")]
    Thread(#[source] std::io::Error),
}

/// One reading of the node.
#[derive(Debug)]
pub struct Reading {
    /// The node as a whole.
    pub host: HostSample,
    /// Every VM known now.
    pub vms: BTreeMap<VmId, VmReading>,
    /// VMs that were not in the reading before.
    pub appeared: Vec<VmId>,
    /// VMs that were, and are no longer. One that was started again under its name is in
    /// both.
    pub gone: Vec<VmId>,
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmReading {
    /// Waits since the reading before; `None` if it is not measured.
    pub runq: Option<RunqInterval>,
    /// Who held the CPUs during the long ones of them.
    pub held: Option<HeldInterval>,
    /// Cumulative CPU time, nanoseconds; renewed at most once per second.
    pub cpu_usage_ns: Option<u64>,
    /// Cumulative time throttled by its own quota, nanoseconds; renewed likewise.
    pub throttled_ns: Option<u64>,
    /// Periods of that quota, renewed likewise.
    pub quota_periods: Option<QuotaPeriods>,
    /// Block I/O since the reading before, from queued to done, over all devices and
    /// operations; `None` if it is not measured.
    pub block: Option<RunqInterval>,
}

/// What is known of one VM, since it was first seen.
#[derive(Debug)]
pub struct VmView<'a> {
    /// Which.
    pub vm: &'a Arc<Vm>,
    /// See [`Sense::runq`].
    pub runq: Option<&'a RunqTotals>,
    /// See [`Sense::files`].
    pub files: &'a VmFiles,
    /// See [`Sense::tcp`].
    pub tcp: TcpCounts,
    /// See [`Block::totals`].
    pub block: Option<BlockTotals<'a>>,
}

/// How long a cgroup of libvirt's waits to be claimed by a domain, before it is taken for
/// one of a libvirtd that is not connected.
const CLAIM: Nanos = Nanos::from_millis(500);

/// Discarded switches in one reading, and their share of all, from which on the counts
/// cannot be relied on.
const DISCARDED_MIN: u64 = 10;
const DISCARDED_SHARE: f64 = 0.01;

/// The senses, running.
pub struct Sense {
    hierarchies: Hierarchies,
    slots: Slots,
    discovery: Discovery,
    has_hypervisor: bool,
    domains: Vec<Domain>,
    /// By cgroup. As bytes: paths are compared by their parts, which takes twenty times as long.
    tracked: BTreeMap<OsString, Tracked>,
    paths: BTreeMap<VmId, PathBuf>,
    vms: BTreeMap<VmId, Arc<Vm>>,
    /// Something is new, or still waits for its name.
    to_identify: bool,
    host_cpu: HostCpu,
    cost: CostMeter,
    sampling_shift: u8,
    health: ProbeHealth,
    files: files::Files,
    tcp: Tcp,
    block: Block,
    shortage: Shortage,
}

struct Tracked {
    group: Group,
    slot: slots::Slot,
    /// Its number at the block sensor.
    block: u32,
    totals: RunqTotals,
    usage: UsageReader,
    found_at: Nanos,
    /// `None` until it is clear whose it is.
    vm: Option<Arc<Vm>>,
    files: files::VmReader,
}

impl Sense {
    /// Finds the hierarchies, loads the probe, finds the VMs there are.
    ///
    /// # Errors
    /// [`SenseError`]. If the probe cannot be loaded all else works, every reading is marked
    /// blind, and [`Sense::health`] says why.
    pub fn open(config: &SenseConfig, hypervisor: Option<Hypervisor>) -> Result<Self, SenseError> {
        let missing = missing_capabilities();
        if !missing.is_empty() {
            return Err(SenseError::Capability(missing.join(" and ")));
        }
        let hierarchies = Hierarchies::find(&config.cgroup_root)?;
        raise_limits();
        let kernel = Kernel::open();
        let (slots, runq) = Slots::open(kernel.as_ref(), hierarchies.version, config.max_vms);
        let mut tcp = Tcp::open(kernel.as_ref(), &hierarchies, config);
        let block = Block::open(kernel.as_ref(), &hierarchies, config.max_vms);
        drop(kernel);
        let mut programs = slots.programs();
        programs.extend(tcp.programs());
        programs.extend(block.programs());
        let has_hypervisor = hypervisor.is_some();
        let tree = Tree::new(&hierarchies.cpu, &config.patterns);
        let discovery = Discovery::start(tree, hypervisor).map_err(SenseError::Thread)?;
        let health = ProbeHealth {
            runq,
            hierarchies: hierarchies.clone(),
            slots: slots.total(),
            slots_used: 0,
            not_measured: 0,
            cgroups: 0,
            cgroups_not_measured: 0,
            cgroups_spilled: 0,
            map_bytes: slots.map_bytes(),
            counted: 0,
            discarded: 0,
            domains_without_cgroup: 0,
            cost: None,
            sampling_shift: 0,
            unsampled: 0,
        };
        Ok(Self {
            hierarchies,
            slots,
            discovery,
            has_hypervisor,
            domains: Vec::new(),
            tracked: BTreeMap::new(),
            paths: BTreeMap::new(),
            vms: BTreeMap::new(),
            to_identify: false,
            host_cpu: HostCpu::open(),
            cost: CostMeter::new(programs),
            sampling_shift: 0,
            health,
            files: files::Files::open(),
            tcp,
            block,
            shortage: Shortage::of(config.max_vms),
        })
    }

    /// Applies what discovery found, then reads all counters. `now` is `CLOCK_MONOTONIC`.
    /// Never waits for libvirt.
    pub fn sample(&mut self, now: Nanos) -> Reading {
        let (mut appeared, mut gone) = (Vec::new(), Vec::new());
        for slot in self.slots.recycle(now) {
            self.tracked.values_mut().for_each(|tracked| tracked.slot.forget_holder(slot));
        }
        for found in self.discovery.take().collect::<Vec<_>>() {
            self.to_identify = true;
            match found {
                Found::Domains(domains) => self.domains = domains,
                Found::Change(Change::Appeared(group, ids)) => self.track(group, &ids, now),
                Found::Change(Change::Regrouped(group, ids)) => {
                    if let Some(tracked) = self.tracked.get_mut(group.path.as_os_str()) {
                        self.tcp.track(&group.path, &ids, now);
                        self.slots.regroup(&mut tracked.slot, &ids);
                        tracked.block = self.block.track(&group.path, &ids, now);
                        tracked.group = group;
                    }
                }
                Found::Change(Change::Gone(path)) => gone.extend(self.untrack(&path, now)),
            }
        }
        if std::mem::take(&mut self.to_identify) {
            self.identify(now, &mut appeared, &mut gone);
        }
        self.block.read(now);
        let (vms, blind) = self.read(now);
        self.files.read(&self.hierarchies, &mut self.tracked, now);
        self.tcp.look(now);
        self.slots.flush_log();
        self.update_health();
        self.shortage.look(&self.health, &self.block);
        let (cpus, cpu_busy_ns) = self.host_cpu.read();
        let cost = self.cost.tick(now);
        self.health.cost = cost.or(self.health.cost);
        let host = HostSample {
            cpus,
            cpu_busy_ns,
            blind,
            probe_cost: cost.map(|cost| rounded(cost.cpus)),
            sampling_shift: self.sampling_shift,
        };
        Reading { host, vms, appeared, gone }
    }

    /// From now on the probes look at one event in 2^shift, which counts as 2^shift.
    pub fn sample_one_in(&mut self, shift: u8) {
        // One line per probe that can. Segments that the host's TCP sends again are too few.
        self.slots.set_sampling_shift(shift.into());
        self.block.set_sampling_shift(shift.into());
        self.tcp.set_sampling_shift(shift.into());
        self.sampling_shift = shift;
        self.health.sampling_shift = shift;
    }

    /// Every VM known at the last reading.
    pub fn vms(&self) -> &BTreeMap<VmId, Arc<Vm>> {
        &self.vms
    }

    /// Whose cgroup this is.
    pub fn vm_of(&self, cgroup: &Path) -> Option<&VmId> {
        Some(&self.tracked.get(cgroup.as_os_str())?.vm.as_ref()?.id)
    }

    /// Everything that is known of every VM, in no order that means something.
    pub fn each(&self) -> impl Iterator<Item = VmView<'_>> {
        self.tracked.values().filter_map(|tracked| {
            Some(VmView {
                vm: tracked.vm.as_ref()?,
                runq: tracked.slot.is_measured().then_some(&tracked.totals),
                files: tracked.files.values(),
                tcp: self.tcp.counts(&tracked.group.path),
                block: self.block.totals_by_number(tracked.block),
            })
        })
    }

    /// A VM's waits since it was first seen; `None` if it is not measured.
    pub fn runq(&self, vm: &VmId) -> Option<&RunqTotals> {
        let tracked = self.tracked.get(self.paths.get(vm)?.as_os_str())?;
        tracked.slot.is_measured().then_some(&tracked.totals)
    }

    /// cgroups that are counted for a VM; `None` if it is not measured.
    pub fn cgroups(&self, vm: &VmId) -> Option<u32> {
        let tracked = self.tracked.get(self.paths.get(vm)?.as_os_str())?;
        tracked.slot.is_measured().then(|| tracked.slot.counted())
    }

    /// What the kernel's files say of a VM, at most a few seconds old while it runs.
    pub fn files(&self, vm: &VmId) -> Option<&VmFiles> {
        Some(self.tracked.get(self.paths.get(vm)?.as_os_str())?.files.values())
    }

    /// The node's pressure, at most a second older than the last reading.
    pub fn pressure(&self) -> &Pressure {
        self.files.pressure()
    }

    /// A VM's TCP retransmissions since it was first seen; `None` if there is no such VM.
    pub fn tcp(&self, vm: &VmId) -> Option<TcpCounts> {
        Some(self.tcp.counts(self.paths.get(vm)?))
    }

    /// State of the probes behind [`Sense::tcp`].
    pub fn tcp_health(&self) -> TcpHealth {
        self.tcp.health()
    }

    /// Block I/O latency; VMs are known there by their cgroups.
    pub fn block(&self) -> &Block {
        &self.block
    }

    /// State of the probe.
    pub fn health(&self) -> &ProbeHealth {
        &self.health
    }

    fn track(&mut self, group: Group, ids: &BTreeSet<u64>, now: Nanos) {
        self.tcp.track(&group.path, ids, now);
        let mut slot = slots::Slot::default();
        self.slots.regroup(&mut slot, ids);
        let block = self.block.track(&group.path, ids, now);
        let tracked = Tracked {
            slot,
            block,
            totals: RunqTotals::default(),
            usage: UsageReader::new(self.hierarchies.version),
            found_at: now,
            vm: None,
            group,
            files: files::VmReader::default(),
        };
        self.tracked.insert(tracked.group.path.clone().into(), tracked);
    }

    /// Forgets a VM; returns its name if it had one.
    fn untrack(&mut self, path: &Path, now: Nanos) -> Option<VmId> {
        let tracked = self.tracked.remove(path.as_os_str())?;
        self.tcp.untrack(path, now);
        self.slots.release(tracked.slot, now);
        self.block.untrack(path, now);
        let id = tracked.vm?.id.clone();
        self.paths.remove(&id);
        self.vms.remove(&id);
        Some(id)
    }

    /// Gives a name to what has none yet, and what libvirt knows to what it knows.
    fn identify(&mut self, now: Nanos, appeared: &mut Vec<VmId>, gone: &mut Vec<VmId>) {
        let version = self.hierarchies.version;
        for tracked in self.tracked.values_mut() {
            let (group, path) = (&tracked.group, &tracked.group.path);
            let domain = group.machine.as_ref().and_then(|machine| {
                self.domains.iter().find(|domain| machine.is(domain.id, &domain.name))
            });
            let old = tracked.vm.as_ref();
            // Once libvirt has named it, it keeps its name while libvirt is away.
            let keep = old.is_some_and(|vm| domain.is_none() || vm.uuid.is_some());
            let (name, uuid, owner, vcpus) = match (domain, old) {
                (Some(domain), _) => (
                    domain.name.clone(),
                    Some(domain.uuid.clone()),
                    Owner::Libvirt { domain: domain.name.clone() },
                    domain.vcpus,
                ),
                (None, Some(vm)) => {
                    let vcpus = if vm.uuid.is_some() { vm.vcpus } else { group.vcpus };
                    (vm.id.to_string(), vm.uuid.clone(), vm.owner.clone(), vcpus)
                }
                (None, None) => {
                    let claimable = group.machine.is_some() && self.has_hypervisor;
                    if claimable && now.since(tracked.found_at) < CLAIM {
                        self.to_identify = true;
                        continue;
                    }
                    (group.name.clone(), None, Owner::Cgroup, group.vcpus)
                }
            };
            let taken = |id: &VmId| self.paths.get(id).is_some_and(|other| other != path);
            let id = match old {
                Some(vm) if keep => vm.id.clone(),
                _ => [Some(name), group.machine.as_ref().map(|machine| machine.name.clone())]
                    .into_iter()
                    .flatten()
                    .map(VmId::from)
                    .find(|id| !taken(id))
                    .unwrap_or_else(|| {
                        let relative = path.strip_prefix(&self.hierarchies.cpu).unwrap_or(path);
                        VmId::from(relative.display().to_string())
                    }),
            };
            let vm = Vm {
                id: id.clone(),
                uuid,
                vcpus,
                owner,
                cgroup: path.clone(),
                cgroup_id: group.id,
                cgroup_version: version,
            };
            if old.is_some_and(|old| **old == vm) {
                continue;
            }
            let old_id = old.map(|old| old.id.clone());
            if old_id.as_ref() != Some(&id) {
                if let Some(old_id) = old_id {
                    self.paths.remove(&old_id);
                    self.vms.remove(&old_id);
                    gone.push(old_id);
                }
                self.paths.insert(id.clone(), path.clone());
                appeared.push(id.clone());
            }
            let vm = Arc::new(vm);
            tracked.vm = Some(vm.clone());
            self.vms.insert(id, vm);
        }
    }

    /// Reads all counters; the second is why they cannot be relied on, if so.
    fn read(&mut self, now: Nanos) -> (BTreeMap<VmId, VmReading>, Option<String>) {
        let mut vms = Vec::with_capacity(self.tracked.len());
        let mut held_by = Vec::new();
        let (mut counted, mut discarded) = (0, 0);
        let (mut measured, mut cgroups_not_measured) = (0, 0);
        for tracked in self.tracked.values() {
            self.slots.prefetch(&tracked.slot);
        }
        // One pass for everything: what a thousand VMs cost is to get at their memory.
        for tracked in self.tracked.values_mut() {
            self.slots.ensure(&mut tracked.slot);
            measured += u32::from(tracked.slot.is_measured());
            cgroups_not_measured += tracked.slot.not_counted();
            let before = (tracked.totals.count, tracked.totals.discarded);
            let mut held = HeldBy::default();
            let runq = self.slots.read(&mut tracked.slot, &mut tracked.totals, &mut held);
            let ran = tracked.totals.count - before.0;
            counted += ran;
            discarded += tracked.totals.discarded - before.1;
            let Some(vm) = &tracked.vm else { continue };
            let ran = ran > 0 || runq.is_none();
            if ran {
                tracked.files.ran();
            }
            let usage = tracked.usage.usage(&self.hierarchies, &tracked.group.path, now, ran);
            if held != HeldBy::default() {
                held_by.push((vm.id.clone(), held));
            }
            let reading = VmReading {
                held: (runq.is_some() && self.sampling_shift == 0).then(HeldInterval::default),
                runq,
                cpu_usage_ns: usage.cpu_ns,
                throttled_ns: usage.throttled_ns,
                quota_periods: usage.periods,
                block: self.block.interval(tracked.block),
            };
            vms.push((vm.id.clone(), reading));
        }
        // At once, which is faster than one by one.
        let mut vms = BTreeMap::from_iter(vms);
        self.name_holders(held_by, &mut vms);
        // Without the probe nothing is looked for.
        let loaded = self.slots.total() > 0;
        self.health.not_measured = if loaded { self.tracked.len() as u32 - measured } else { 0 };
        self.health.cgroups_not_measured = if loaded { cgroups_not_measured } else { 0 };
        self.slots.set_complete(cgroups_not_measured == 0);
        self.health.counted += counted;
        self.health.discarded += discarded;
        let share = discarded as f64 / (counted + discarded).max(1) as f64;
        let blind = self.health.blind().or_else(|| {
            (discarded >= DISCARDED_MIN && share > DISCARDED_SHARE).then(|| {
                format!("{discarded} of {} switches had no usable time stamp", counted + discarded)
            })
        });
        (vms, blind)
    }

    /// Says whose the slots are that the probe names.
    fn name_holders(&self, held_by: Vec<(VmId, HeldBy)>, vms: &mut BTreeMap<VmId, VmReading>) {
        if held_by.is_empty() {
            return;
        }
        let slots: BTreeMap<u32, &VmId> = self
            .tracked
            .values()
            .filter_map(|tracked| Some((tracked.slot.number()?, &tracked.vm.as_ref()?.id)))
            .collect();
        for (id, HeldBy { by, unknown_ns }) in held_by {
            let Some(VmReading { held: Some(held), .. }) = vms.get_mut(&id) else { continue };
            held.unknown_ns = unknown_ns;
            for (holder, ns) in by {
                match slot_of(holder).and_then(|slot| slots.get(&slot)) {
                    Some(vm) => *held.by_vm.entry((*vm).clone()).or_default() += ns,
                    None if holder == HOST => held.by_host_ns += ns,
                    None if holder == IDLE => held.idle_ns += ns,
                    None => held.unknown_ns += ns,
                }
            }
        }
    }

    fn update_health(&mut self) {
        self.health.slots_used = self.slots.used();
        self.health.unsampled = self.slots.unsampled();
        (self.health.cgroups, self.health.cgroups_spilled) = self.slots.cgroups();
        self.health.domains_without_cgroup = if self.domains.is_empty() {
            0
        } else {
            let owned = self.vms.values().filter(|vm| vm.uuid.is_some()).count();
            self.domains.len().saturating_sub(owned) as u32
        };
    }
}

/// To a millionth: what is recorded is read back as it was.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// Those of `CAP_BPF` and `CAP_PERFMON` that the process lacks, unless it has
/// `CAP_SYS_ADMIN`, which stands for both (capabilities(7)).
pub(crate) fn missing_capabilities() -> Vec<&'static str> {
    const SYS_ADMIN: u64 = 1 << 21;
    let effective = std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?.trim();
            u64::from_str_radix(hex, 16).ok()
        })
        .unwrap_or(0);
    if effective & SYS_ADMIN != 0 {
        return Vec::new();
    }
    [("CAP_PERFMON", 1 << 38), ("CAP_BPF", 1 << 39)]
        .into_iter()
        .filter(|(_, bit)| effective & bit == 0)
        .map(|(name, _)| name)
        .collect()
}

/// Two files per VM stay open; before Linux 5.11 maps count against the memlock limit. Where
/// a limit cannot be raised, what runs into it says so itself.
fn raise_limits() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
