//! What the loop remembers for those who look, and the snapshot it makes of it.

use super::Agent;
use crate::config::Config;
use crate::export::HdrLog;
use crate::export::recent::SPAN;
use crate::export::snapshot::{
    AgentState, Attainment, CgroupLayout, LatencyCounts, LibvirtState, Node, OwnCost, ProbeState,
    Snapshot, VmState,
};
use crate::hypervisor::Hypervisor;
use crate::sense::{QuotaPeriods, VmReading};
use formtune_core::plan::Decision;
use formtune_core::sample::HostSample;
use formtune_core::units::{ClassName, Nanos, Weight};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// What does not change, or only by counting.
#[derive(Debug)]
pub(super) struct Facts {
    pub name: String,
    pub kernel: String,
    pub cpus: u32,
    pub config_path: Option<PathBuf>,
    pub started_at: Nanos,
    pub libvirt: LibvirtState,
    hypervisor: Option<Hypervisor>,
    /// Why `enforce` is held back.
    pub barred: Option<String>,
    /// Ticks that came later than one tick after their time.
    pub late: u64,
    /// Time the last tick took.
    pub took: Option<Nanos>,
    busy_before: Option<(Nanos, u64)>,
    busy_ratio: Option<f64>,
}

impl Facts {
    pub fn gather(
        config: &Config,
        config_path: Option<PathBuf>,
        hypervisor: Option<&Hypervisor>,
        barred: Option<String>,
    ) -> Self {
        let uname = nix::sys::utsname::uname().ok();
        let of = |field: Option<&std::ffi::OsStr>| {
            field.map_or(String::new(), |text| text.to_string_lossy().into_owned())
        };
        let libvirt = match (&config.libvirt_uri, hypervisor) {
            (None, _) => LibvirtState::NotUsed,
            (Some(uri), Some(libvirt)) if libvirt.is_connected() => {
                LibvirtState::Connected { uri: uri.clone() }
            }
            (Some(uri), libvirt) => {
                let again = if libvirt.is_some() { "; trying again" } else { "" };
                let why = format!("not reached at start{again}");
                LibvirtState::Unreachable { uri: uri.clone(), why }
            }
        };
        Self {
            name: of(uname.as_ref().map(|uname| uname.nodename())),
            kernel: of(uname.as_ref().map(|uname| uname.release())),
            cpus: std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32),
            config_path,
            started_at: super::monotonic(),
            libvirt,
            hypervisor: hypervisor.cloned(),
            barred,
            late: 0,
            took: None,
            busy_before: None,
            busy_ratio: None,
        }
    }

    /// Notes whether libvirt went away or came (back) since the last tick.
    pub fn follow_libvirt(&mut self) {
        let Some(hypervisor) = &self.hypervisor else { return };
        let uri = || hypervisor.uri().to_owned();
        match (&self.libvirt, hypervisor.is_connected()) {
            (LibvirtState::Connected { .. }, false) => {
                let why = "it went away; trying to connect again".into();
                self.libvirt = LibvirtState::Unreachable { uri: uri(), why };
            }
            (LibvirtState::Unreachable { .. }, true) => {
                self.libvirt = LibvirtState::Connected { uri: uri() };
            }
            _ => {}
        }
    }

    /// Takes the node's busy time.
    pub fn busy(&mut self, at: Nanos, host: &HostSample) {
        self.cpus = host.cpus;
        let before = self.busy_before;
        self.busy_before = host.cpu_busy_ns.map(|busy| (at, busy));
        self.busy_ratio = host.cpu_busy_ns.zip(before).map(|(busy, (then, before))| {
            let capacity = at.since(then).0 as f64 * f64::from(host.cpus.max(1));
            (busy.saturating_sub(before) as f64 / capacity).min(1.0)
        });
    }
}

/// What is remembered of a VM besides what sense, act and core do.
#[derive(Debug)]
pub(super) struct Seen {
    pub class: ClassName,
    at: Nanos,
    attainment: Attainment,
    cpu_usage_ns: Option<u64>,
    throttled_ns: Option<u64>,
    /// When it was seen to have grown, and by how much, as far back as [`SPAN`].
    throttled: VecDeque<(Nanos, u64)>,
    quota_periods: Option<QuotaPeriods>,
}

impl Seen {
    pub fn new(at: Nanos, class: ClassName) -> Self {
        Self {
            class,
            at,
            attainment: Attainment::default(),
            cpu_usage_ns: None,
            throttled_ns: None,
            throttled: VecDeque::new(),
            quota_periods: None,
        }
    }

    pub fn usage(&mut self, at: Nanos, reading: &VmReading) {
        self.cpu_usage_ns = reading.cpu_usage_ns;
        let grown = reading.throttled_ns.zip(self.throttled_ns);
        let grown = grown.map_or(0, |(now, before)| now.saturating_sub(before));
        if grown > 0 {
            self.throttled.retain(|(then, _)| at.since(*then) < SPAN);
            self.throttled.push_back((at, grown));
        }
        self.throttled_ns = reading.throttled_ns;
        self.quota_periods = reading.quota_periods;
    }

    /// Time throttled in the last [`SPAN`]; `None` where it is not known.
    fn throttled_lately(&self, now: Nanos) -> Option<Nanos> {
        self.throttled_ns?;
        let lately = self.throttled.iter().filter(|(then, _)| now.since(*then) < SPAN);
        Some(Nanos(lately.map(|(_, ns)| ns).sum()))
    }

    pub fn decided(&mut self, decision: &Decision) {
        let evidence = &decision.evidence;
        if let (Some(measured), Some(target)) = (evidence.measured, evidence.target) {
            self.attainment.windows += 1;
            self.attainment.met += u64::from(measured <= target);
        }
    }
}

impl Agent {
    /// Everything there is to see, now.
    pub(super) fn snapshot(&self, now: Nanos) -> Snapshot {
        let occupants = self.block_occupants(now);
        let mut vms: std::collections::BTreeMap<_, _> = self
            .sense
            .each()
            .filter_map(|view| {
                let (vm, id) = (view.vm, &view.vm.id);
                let seen = self.vms.get(id)?;
                let mut state = VmState::new(vm, seen.class.clone(), seen.at);
                let class = self.config.policy.classes.get(&seen.class);
                let original = self.act.original(id).or_else(|| self.weights.original(id));
                state.slo = class.and_then(|class| class.slo.clone());
                state.attainment = state.slo.is_some().then_some(seen.attainment);
                state.cpu_weight = self.weights.last(id);
                state.cpu_weight_original = original;
                if let Some(class) = class
                    && let Some(entitlement) = class.cpu_weight.or(original)
                {
                    state.cpu_weight_entitlement = Some(entitlement);
                    let bounds: (Weight, Weight) = (
                        entitlement.scaled(class.floor_ratio).min(entitlement),
                        entitlement.scaled(class.ceiling_ratio).max(entitlement),
                    );
                    state.cpu_weight_bounds = Some(bounds);
                }
                state.recent = Some(self.recent.runq(id, now));
                state.runq = view.runq.map(|totals| {
                    let range = totals.range();
                    let counts = &totals.buckets()[range.clone()];
                    LatencyCounts::from_range(range.start, counts, totals.wait_ns)
                });
                state.cpu_usage_ns = seen.cpu_usage_ns;
                state.throttled_ns = seen.throttled_ns;
                state.throttled_lately = seen.throttled_lately(now);
                let known = state.runq.is_some();
                state.held_by = known.then(|| self.culprits.recent(id, now));
                state.held_by_total = known.then(|| self.culprits.total(id));
                state.quota_periods = seen.quota_periods;
                state.pressure = view.files.pressure;
                state.memory_events = view.files.memory_events;
                state.runq_check = view.files.runq_check;
                state.tcp = Some(view.tcp.into());
                state.block =
                    view.block.map(|totals| self.block_state(id, now, totals, &occupants));
                Some((id.clone(), state))
            })
            .collect();
        for decision in self.plan.iter().flat_map(|plan| &plan.decisions) {
            if let Some(state) = vms.get_mut(&decision.vm) {
                state.decided(decision);
            }
        }
        for state in vms.values_mut() {
            self.decisions.fill(state);
        }
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Snapshot {
            at: now,
            node: self.node(),
            vms,
            decisions: self.decisions.records(),
            unix_ms: since_1970.as_millis() as u64,
        }
    }

    fn node(&self) -> Node {
        let health = self.sense.health();
        let facts = &self.facts;
        Node {
            name: facts.name.clone(),
            kernel: facts.kernel.clone(),
            cpus: facts.cpus,
            busy_ratio: facts.busy_ratio,
            cgroup: CgroupLayout {
                version: health.hierarchies.version,
                cpu_root: health.hierarchies.cpu.clone(),
            },
            libvirt: facts.libvirt.clone(),
            domains_without_cgroup: u64::from(health.domains_without_cgroup),
            modes: self.config.policy.modes,
            enforce_blocked: facts.barred.clone(),
            probe: ProbeState {
                method: health.blind().is_none().then(|| "tp_btf".into()),
                blind: self.host.as_ref().and_then(|host| host.blind.clone()),
                discarded: health.discarded,
                unmeasured_vms: u64::from(health.not_measured),
                unmeasured_cgroups: u64::from(health.cgroups_not_measured),
                slots: u64::from(health.slots),
                slots_used: u64::from(health.slots_used),
                cost_cpus: health.cost.map(|cost| cost.cpus),
                runs_per_s: health.cost.map(|cost| cost.runs_per_s),
                missed: health.cost.and_then(|cost| cost.missed),
                budget_cpus: self.config.policy.probe_budget,
                sampling_shift: health.sampling_shift,
                unsampled: health.blind().is_none().then_some(health.unsampled),
            },
            agent: AgentState {
                version: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id(),
                config: facts.config_path.clone(),
                started_at: facts.started_at,
                tick: self.config.policy.tick,
                ticks: self.seq,
                ticks_late: facts.late,
                last_tick_at: (self.seq > 0).then_some(self.last_at),
                last_tick_took: facts.took,
                cost: OwnCost::read(),
            },
            counters: self.decisions.counters(),
            pressure: *self.sense.pressure(),
            hdr_log: self.hdr_log.as_ref().map(HdrLog::state),
            tcp: self.sense.tcp_health().into(),
            block: Some(self.block_node()),
        }
    }
}
