//! What the agent knows at one moment, as plain owned data.
//!
//! Built by the daemon's loop on request, read by `/metrics`, `/v1/*` and, as JSON over
//! the Unix socket, by `formtune status` and `formtune explain`. It holds no policy and
//! decides nothing. Its JSON form is the interface of `/v1/*`: fields are only added.

use super::culprits::Blamed;
pub use super::latency::LatencyCounts;
use super::tcp::{NodeTcp, VmTcp};
use crate::sense::{MemoryEvents, Pressure, QuotaPeriods, RunqCheck};
use crate::vm::{CgroupVersion, Owner, Vm};
use formtune_core::plan::{Action, Decision, Evidence, OutcomeResult, Reason};
use formtune_core::policy::{Mode, Modes, Slo};
use formtune_core::units::{ClassName, Nanos, VmId, Weight};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// The agent at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// `CLOCK_MONOTONIC` when it was built.
    pub at: Nanos,
    /// The node and the agent itself.
    pub node: Node,
    /// Every VM measured now; a VM that is gone is not in it.
    pub vms: BTreeMap<VmId, VmState>,
    /// The last decisions, oldest first; see [`super::DecisionLog`].
    pub decisions: Vec<Arc<DecisionRecord>>,
    /// [`Snapshot::at`] as milliseconds since 1970 UTC.
    #[serde(default)]
    pub unix_ms: u64,
}

/// The node and the agent itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Host name, as `uname -n` says.
    pub name: String,
    /// Kernel release, as `uname -r` says.
    pub kernel: String,
    /// Online CPUs.
    pub cpus: u32,
    /// Share of the CPUs' time that was not idle, 0 to 1, over the last tick. `None` before
    /// the second sample.
    pub busy_ratio: Option<f64>,
    /// Layout of the cgroup hierarchy.
    pub cgroup: CgroupLayout,
    /// Whether VMs are found and actuated through libvirt.
    pub libvirt: LibvirtState,
    /// Running domains of libvirt's without a cgroup that was found: neither measured nor
    /// changed.
    pub domains_without_cgroup: u64,
    /// How far the agent may go, per knob, as configured.
    pub modes: Modes,
    /// Why `enforce` is held back although configured, e.g. a damaged journal.
    pub enforce_blocked: Option<String>,
    /// The probe.
    pub probe: ProbeState,
    /// The agent's process.
    pub agent: AgentState,
    /// Since the agent started.
    pub counters: Counters,
    /// Block I/O; `None` in answers of agents that do not measure it.
    #[serde(default)]
    pub block: Option<super::block::BlockNode>,
    /// The node's pressure.
    #[serde(default)]
    pub pressure: Pressure,
    /// What is measured of TCP.
    #[serde(default)]
    pub tcp: NodeTcp,
    /// The interval log; `None` where none is asked for.
    #[serde(default)]
    pub hdr_log: Option<HdrLogState>,
}

/// Whether the interval log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HdrLogState {
    /// The last interval could not be written.
    pub failing: bool,
    /// Intervals that could not be written; their counts come with the next that can.
    pub failures: u64,
}

/// Where cgroups are, and which interface carries the `cpu` controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupLayout {
    /// Interface of the hierarchy with the `cpu` controller.
    pub version: CgroupVersion,
    /// Where that hierarchy is mounted.
    pub cpu_root: PathBuf,
}

/// Whether VMs are found and actuated through libvirt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum LibvirtState {
    /// Not configured, or built without it: cgroups only.
    NotUsed,
    /// Connected.
    Connected {
        /// Connection URI.
        uri: String,
    },
    /// Configured, and not to be reached now; cgroups only until it comes back.
    Unreachable {
        /// Connection URI.
        uri: String,
        /// One line.
        why: String,
    },
}

/// The probe's health.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProbeState {
    /// How run-queue latency is measured, e.g. `tp_btf`; `None` while not loaded.
    pub method: Option<String>,
    /// Why the counts cannot be relied on now; `None` while all is well.
    pub blind: Option<String>,
    /// Waits thrown away since the start because they could not be true or did not fit.
    pub discarded: u64,
    /// VMs that found no room in the probe's table.
    pub unmeasured_vms: u64,
    /// cgroups of VMs that found none.
    #[serde(default)]
    pub unmeasured_cgroups: u64,
    /// VMs that there is room for.
    #[serde(default)]
    pub slots: u64,
    /// Of these, how many are taken.
    #[serde(default)]
    pub slots_used: u64,
    /// CPUs that the programs took when that was last measured; `None` before, and where the
    /// kernel keeps no statistics.
    pub cost_cpus: Option<f64>,
    /// Runs of the programs per second, at that time.
    pub runs_per_s: Option<f64>,
    /// Events that none of the programs saw until then, as the same CPU was running it; `None` also
    /// where the kernel does not say.
    #[serde(default)]
    pub missed: Option<u64>,
    /// CPUs they may take; see `probe_budget`.
    pub budget_cpus: f64,
    /// They look at one event in 2^this, which counts as 2^this.
    pub sampling_shift: u8,
    /// Context switches that the run-queue probe did not look at for that reason, on the whole node;
    /// `None` while it is not loaded.
    #[serde(default)]
    pub unsampled: Option<u64>,
}

/// The agent's process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentState {
    /// Version of the binary.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Configuration file, `None` when running on defaults.
    pub config: Option<PathBuf>,
    /// `CLOCK_MONOTONIC` when it started.
    pub started_at: Nanos,
    /// Configured time between samples.
    pub tick: Nanos,
    /// Samples taken.
    pub ticks: u64,
    /// Ticks that were skipped because an earlier one took too long.
    pub ticks_late: u64,
    /// `CLOCK_MONOTONIC` of the last sample; `None` before the first.
    pub last_tick_at: Option<Nanos>,
    /// Time the last tick took from reading to acting.
    pub last_tick_took: Option<Nanos>,
    /// CPU time and memory of the process itself; see [`OwnCost::read`].
    pub cost: OwnCost,
}

/// CPU time and memory of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnCost {
    /// User and system time since its start, nanoseconds.
    pub cpu_ns: u64,
    /// Resident memory, bytes.
    pub resident_bytes: u64,
}

impl OwnCost {
    /// Reads `getrusage(2)` and `/proc/self/statm`; zero where the kernel does not say.
    pub fn read() -> Self {
        use nix::sys::resource::{UsageWho, getrusage};
        use nix::sys::time::TimeValLike;
        let cpu_ns = getrusage(UsageWho::RUSAGE_SELF)
            .map(|usage| usage.user_time() + usage.system_time())
            .map_or(0, |time| time.num_microseconds().max(0) as u64 * 1_000);
        let pages = std::fs::read_to_string("/proc/self/statm")
            .ok()
            .and_then(|statm| statm.split_whitespace().nth(1)?.parse::<u64>().ok())
            .unwrap_or(0);
        let page_bytes = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .map_or(4096, |bytes| bytes as u64);
        Self { cpu_ns, resident_bytes: pages * page_bytes }
    }
}

/// Counts since the agent started. Kept by [`super::DecisionLog`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Decisions, including those to do nothing, by action and by the mode they were made in.
    pub decisions: Vec<DecisionCount>,
    /// Setpoints carried out, by what became of them: `applied`, `unchanged`, `clamped`,
    /// `yielded`, `refused`.
    pub outcomes: BTreeMap<String, u64>,
}

/// See [`Counters::decisions`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionCount {
    /// What was decided.
    pub action: Action,
    /// Mode of the knob at that time.
    pub mode: Mode,
    /// How often.
    pub count: u64,
}

/// One VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    /// Name, unique on the node.
    pub id: VmId,
    /// libvirt's UUID.
    pub uuid: Option<String>,
    /// Virtual CPUs; 0 where not known.
    pub vcpus: u32,
    /// Class of the policy.
    pub class: ClassName,
    /// `libvirt` or `cgroup`: who is asked to change a knob.
    pub owner: OwnerKind,
    /// Its cgroup, absolute.
    pub cgroup: PathBuf,
    /// Interface of that cgroup.
    pub cgroup_version: CgroupVersion,
    /// `CLOCK_MONOTONIC` when the agent first saw it.
    pub seen_at: Nanos,
    /// The promise of its class.
    pub slo: Option<Slo>,
    /// How far the promise was kept since the VM was first seen.
    pub attainment: Option<Attainment>,
    /// The weight as last read, v2 scale.
    pub cpu_weight: Option<Weight>,
    /// The weight as first found.
    pub cpu_weight_original: Option<Weight>,
    /// The weight its class or its original entitles it to.
    pub cpu_weight_entitlement: Option<Weight>,
    /// Least and greatest weight the loop may set.
    pub cpu_weight_bounds: Option<(Weight, Weight)>,
    /// The last decision about it, including one to do nothing; `None` in mode `observe`
    /// and before the first one.
    pub decision: Option<Decision>,
    /// `decision.reason` in words, for readers without the core crate.
    pub why: Option<String>,
    /// The last decision to do something; see [`super::DecisionLog::fill`].
    pub last_action: Option<Arc<DecisionRecord>>,
    /// Percentiles of the last seconds; see [`super::Recent`].
    pub recent: Option<RecentRunq>,
    /// Counts since the VM was first seen; `None` while it is not measured.
    pub runq: Option<LatencyCounts>,
    /// CPU time used since the VM started, nanoseconds.
    pub cpu_usage_ns: Option<u64>,
    /// Time the VM was throttled by its own quota, nanoseconds.
    pub throttled_ns: Option<u64>,
    /// Of it, that of the last 10 s, as the kernel books it (on each CPU by itself).
    #[serde(default)]
    pub throttled_lately: Option<Nanos>,
    /// Who held the CPUs during its long waits of the last seconds; `None` where nobody knows.
    pub held_by: Option<Blamed>,
    /// The same since the VM was first seen.
    pub held_by_total: Option<Blamed>,
    /// Periods of that quota.
    pub quota_periods: Option<QuotaPeriods>,
    /// Time its tasks stalled for want of a resource.
    #[serde(default)]
    pub pressure: Pressure,
    /// How often its memory limits were met.
    #[serde(default)]
    pub memory_events: MemoryEvents,
    /// The probe's waits against the kernel's own sum.
    pub runq_check: Option<RunqCheck>,
    /// TCP retransmissions since the VM was first seen.
    #[serde(default)]
    pub tcp: Option<VmTcp>,
    /// Block I/O since the VM was first seen; `None` while it is not measured.
    #[serde(default)]
    pub block: Option<super::block::BlockState>,
}

impl VmState {
    /// What is known from the inventory alone; everything measured or decided is `None`.
    pub fn new(vm: &Vm, class: ClassName, seen_at: Nanos) -> Self {
        Self {
            id: vm.id.clone(),
            uuid: vm.uuid.clone(),
            vcpus: vm.vcpus,
            class,
            owner: match vm.owner {
                Owner::Libvirt { .. } => OwnerKind::Libvirt,
                Owner::Cgroup => OwnerKind::Cgroup,
            },
            cgroup: vm.cgroup.clone(),
            cgroup_version: vm.cgroup_version,
            seen_at,
            slo: None,
            attainment: None,
            cpu_weight: None,
            cpu_weight_original: None,
            cpu_weight_entitlement: None,
            cpu_weight_bounds: None,
            decision: None,
            why: None,
            last_action: None,
            recent: None,
            runq: None,
            cpu_usage_ns: None,
            throttled_ns: None,
            throttled_lately: None,
            held_by: None,
            held_by_total: None,
            quota_periods: None,
            pressure: Pressure::default(),
            memory_events: MemoryEvents::default(),
            runq_check: None,
            tcp: None,
            block: None,
        }
    }

    /// Sets the decision and its words.
    pub fn decided(&mut self, decision: &Decision) {
        self.why = Some(decision.reason.to_string());
        self.decision = Some(decision.clone());
    }

    /// What the last window said, where a decision was made.
    pub fn evidence(&self) -> Option<&Evidence> {
        self.decision.as_ref().map(|decision| &decision.evidence)
    }
}

/// Who is asked to change a VM's knobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OwnerKind {
    /// libvirt's API.
    Libvirt,
    /// The cgroup's files.
    Cgroup,
}

/// How far an SLO was kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attainment {
    /// Windows with enough samples to tell.
    pub windows: u64,
    /// Of these, windows that met the threshold.
    pub met: u64,
}

impl Attainment {
    /// Share of windows met; `None` without any.
    pub fn ratio(self) -> Option<f64> {
        (self.windows > 0).then(|| self.met as f64 / self.windows as f64)
    }
}

/// Percentiles of the waits that ended in the last seconds, each the upper bound of its
/// bucket (at most 4.43 % above the true value).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecentRunq {
    /// Time looked back on.
    pub span: Nanos,
    /// Waits.
    pub samples: u64,
    /// Their sum.
    pub wait: Nanos,
    /// Median; `None` without samples.
    pub p50: Option<Nanos>,
    /// 99th percentile.
    pub p99: Option<Nanos>,
    /// 99.9th percentile.
    pub p999: Option<Nanos>,
    /// Longest.
    pub max: Option<Nanos>,
}

/// One entry of the decision log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DecisionRecord {
    /// Counts up by one per entry since the agent started.
    pub seq: u64,
    /// Plan it belongs to.
    pub plan_seq: u64,
    /// `CLOCK_MONOTONIC` of the sample that led to it.
    pub at: Nanos,
    /// The same, as milliseconds since 1970 UTC.
    pub unix_ms: u64,
    /// About whom.
    pub vm: VmId,
    /// What was decided.
    pub action: Action,
    /// Mode of the knob: in `shadow` nothing was written.
    pub mode: Mode,
    /// The write it asked for.
    pub change: Option<Change>,
    /// The VM for whose sake.
    pub victim: Option<VmId>,
    /// What the last window of `vm` said.
    pub evidence: Evidence,
    /// Why, for machines.
    pub reason: Reason,
    /// Why, in one sentence.
    pub sentence: String,
    /// What became of it; `None` where nothing was to be written, or not yet.
    pub outcome: Option<OutcomeResult>,
}

/// From which weight to which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Found.
    pub from: Weight,
    /// Asked for.
    pub to: Weight,
}

/// A reason in words.
pub fn sentence(reason: &Reason) -> String {
    reason.to_string()
}

/// The name of an action, as in JSON and in metric labels.
pub const fn action_name(action: Action) -> &'static str {
    match action {
        Action::Hold => "hold",
        Action::Raise => "raise",
        Action::Lower => "lower",
        Action::Relax => "relax",
        Action::Revert => "revert",
    }
}

/// The name of a mode, as in JSON and in metric labels.
pub const fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Observe => "observe",
        Mode::Shadow => "shadow",
        Mode::Enforce => "enforce",
    }
}

/// The name of a result, as in JSON and in metric labels.
pub const fn result_name(result: &OutcomeResult) -> &'static str {
    match result {
        OutcomeResult::Applied { .. } => "applied",
        OutcomeResult::Unchanged => "unchanged",
        OutcomeResult::Clamped { .. } => "clamped",
        OutcomeResult::Yielded { .. } => "yielded",
        OutcomeResult::Refused { .. } => "refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cost_is_read() {
        let cost = OwnCost::read();
        assert!(cost.resident_bytes > 100_000, "{cost:?}");
    }
}
