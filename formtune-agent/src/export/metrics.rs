//! `/metrics`: what there is to know as Prometheus metric families, in base units.
//!
//! Families are described here, once; [`text`](text()) and [`protobuf`](protobuf()) encode
//! them. Every value is taken from a snapshot, so a VM that is gone is gone from the next
//! scrape, and a value that is not known is absent rather than zero.

mod accept;
mod block;
mod exposition;
mod kernel_files;
pub mod protobuf;
mod tcp;
mod text;

use super::latency::LatencyCounts;
use super::series::Latency;
use super::snapshot::{LibvirtState, Node, Snapshot, VmState, action_name, mode_name};
pub use accept::Format;
use exposition::{Exposition, Family, Kind, Value};
use formtune_core::plan::Action;
use formtune_core::units::Weight;
use protobuf::Protobuf;
use std::fmt;
use text::Text;

/// VMs whose series are exported: as many as `max_vms` can be. The first ones by name; how
/// many are left out is a metric.
pub const VMS: usize = 10_000;
/// Every action, so that each has a series from the start.
const ACTIONS: [Action; 5] =
    [Action::Hold, Action::Raise, Action::Lower, Action::Relax, Action::Revert];
/// Every result of a setpoint, for the same reason.
const RESULTS: [&str; 5] = ["applied", "unchanged", "clamped", "yielded", "refused"];

/// Bytes of a piece of the exposition, about. It stays in the processor's cache until it is sent.
const PIECE: usize = 256 << 10;

/// Takes pieces of the exposition; an error ends it.
pub type Sink<'a> = dyn FnMut(Vec<u8>) -> fmt::Result + 'a;

/// Writes the exposition, piece by piece as it is encoded.
///
/// # Errors
/// Those of `to`.
pub fn write(snapshot: &Snapshot, format: Format, to: &mut Sink<'_>) -> fmt::Result {
    match format {
        Format::Text => encode(snapshot, VMS, &mut Text::new(to)),
        Format::Protobuf => encode(snapshot, VMS, &mut Protobuf::new(to)),
    }
}

/// The whole exposition in memory.
pub fn whole(snapshot: &Snapshot, format: Format) -> Vec<u8> {
    let mut all = Vec::new();
    let written = write(snapshot, format, &mut |piece| {
        all.extend(piece);
        Ok(())
    });
    written.expect("writing to memory does not fail");
    all
}

/// The same, as text.
pub fn text(snapshot: &Snapshot) -> String {
    String::from_utf8(whole(snapshot, Format::Text)).expect("text is text")
}

/// The same, as length-delimited messages.
pub fn protobuf(snapshot: &Snapshot) -> Vec<u8> {
    whole(snapshot, Format::Protobuf)
}

fn encode(snapshot: &Snapshot, most: usize, to: &mut dyn Exposition) -> fmt::Result {
    Families(to).all(snapshot, most)?;
    to.finish()
}

/// Describes metric families to an encoder.
struct Families<'a>(&'a mut dyn Exposition);

type Labels<'a, const N: usize> = [(&'static str, &'a str); N];

impl Families<'_> {
    fn all(&mut self, snapshot: &Snapshot, most: usize) -> fmt::Result {
        let Snapshot { at, node, vms, .. } = snapshot;
        self.agent(node, at.since(node.agent.started_at).as_secs_f64())?;
        self.node(node)?;
        self.one("formtune_vms", "VMs measured now", Some(vms.len() as f64))?;
        let shown: Vec<_> = vms.values().take(most).collect();
        let left_out = vms.len() - shown.len();
        self.counter(
            "formtune_hdr_log_failures_total",
            "Intervals of the interval log that could not be written; absent without a log",
            [([], node.hdr_log.map(|log| log.failures as f64))],
        )?;
        let help = "VMs whose series are left out, as there are too many";
        self.one("formtune_vms_left_out", help, Some(left_out as f64))?;
        self.vms(&shown)?;
        self.kernel_files(node, &shown)?;
        self.block(node, &shown)?;
        self.tcp(node, &shown)?;
        self.decisions(node)
    }

    fn agent(&mut self, node: &Node, uptime: f64) -> fmt::Result {
        let agent = &node.agent;
        let version = [("version", agent.version.as_str())];
        self.gauge("formtune_build_info", "Version of the agent", [(version, Some(1.0))])?;
        self.one("formtune_agent_uptime_seconds", "Time since the agent started", Some(uptime))?;
        self.counter(
            "formtune_agent_cpu_seconds_total",
            "User and system CPU time of the agent's process",
            [([], Some(agent.cost.cpu_ns as f64 / 1e9))],
        )?;
        self.one(
            "formtune_agent_resident_memory_bytes",
            "Resident memory of the agent's process",
            Some(agent.cost.resident_bytes as f64),
        )?;
        self.one(
            "formtune_agent_tick_interval_seconds",
            "Configured time between two samples",
            Some(agent.tick.as_secs_f64()),
        )?;
        self.one(
            "formtune_agent_tick_duration_seconds",
            "Time the last tick took from reading to acting",
            agent.last_tick_took.map(|took| took.as_secs_f64()),
        )?;
        let ticks = [([], Some(agent.ticks as f64))];
        self.counter("formtune_agent_ticks_total", "Samples taken", ticks)?;
        let late = [([], Some(agent.ticks_late as f64))];
        let help = "Ticks skipped because an earlier one took too long";
        self.counter("formtune_agent_ticks_late_total", help, late)
    }

    fn node(&mut self, node: &Node) -> fmt::Result {
        self.gauge(
            "formtune_node_info",
            "Kernel of the node and how run-queue latency is measured on it",
            [(
                [
                    ("kernel", node.kernel.as_str()),
                    ("method", node.probe.method.as_deref().unwrap_or("none")),
                ],
                Some(1.0),
            )],
        )?;
        self.one("formtune_node_cpus", "Online CPUs", Some(f64::from(node.cpus)))?;
        let help = "Share of the CPUs' time in use, 0 to 1";
        self.one("formtune_node_cpu_busy_ratio", help, node.busy_ratio)?;
        let mode = [("knob", "cpu_weight"), ("mode", mode_name(node.modes.cpu_weight))];
        self.gauge("formtune_mode_info", "Configured mode of a knob", [(mode, Some(1.0))])?;
        self.one(
            "formtune_enforce_blocked",
            "1 while writing is held back although configured",
            Some(f64::from(u8::from(node.enforce_blocked.is_some()))),
        )?;
        self.one(
            "formtune_probe_up",
            "1 while the probe counts everything, 0 while blind",
            Some(f64::from(u8::from(node.probe.method.is_some() && node.probe.blind.is_none()))),
        )?;
        let help = "Waits thrown away because they could not be true or did not fit";
        let discarded = [([], Some(node.probe.discarded as f64))];
        self.counter("formtune_probe_discarded_total", help, discarded)?;
        self.one(
            "formtune_probe_unmeasured_vms",
            "VMs that found no room in the probe's table",
            Some(node.probe.unmeasured_vms as f64),
        )?;
        self.one(
            "formtune_probe_unmeasured_cgroups",
            "cgroups of VMs that found no room in the probe's table",
            Some(node.probe.unmeasured_cgroups as f64),
        )?;
        let help = "VMs that the run-queue probe has room for";
        self.one("formtune_probe_slots", help, Some(node.probe.slots as f64))?;
        let help = "Of these, how many are taken";
        self.one("formtune_probe_slots_used", help, Some(node.probe.slots_used as f64))?;
        self.one(
            "formtune_probe_cost_cpus",
            "CPUs that the probes' programs took when that was last measured",
            node.probe.cost_cpus,
        )?;
        self.one(
            "formtune_probe_budget_cpus",
            "CPUs that the probes' programs may take",
            Some(node.probe.budget_cpus),
        )?;
        self.one(
            "formtune_probe_sampling_ratio",
            "Share of events that the probes look at; each counts as its reciprocal",
            Some(f64::exp2(-f64::from(node.probe.sampling_shift))),
        )?;
        self.counter(
            "formtune_probe_missed_total",
            "Events that a program did not see as the same CPU was running it; as of when the \
             programs' cost was last measured",
            [([], node.probe.missed.map(|missed| missed as f64))],
        )?;
        let unsampled = [
            ("runq", node.probe.unsampled),
            ("block", node.block.as_ref().map(|block| block.counters.unsampled)),
            ("tap", node.tcp.unsampled),
        ];
        self.counter(
            "formtune_probe_unsampled_total",
            "What a probe did not look at, to stay within the budget: context switches, block \
             requests, TCP segments of guests; those that it did look at count for them too",
            unsampled.map(|(probe, count)| ([("probe", probe)], count.map(|count| count as f64))),
        )?;
        self.one(
            "formtune_libvirt_up",
            "1 while libvirt answers, 0 while it does not; absent where it is not used",
            match node.libvirt {
                LibvirtState::NotUsed => None,
                LibvirtState::Connected { .. } => Some(1.0),
                LibvirtState::Unreachable { .. } => Some(0.0),
            },
        )?;
        self.one(
            "formtune_libvirt_domains_without_cgroup",
            "Running domains of libvirt's without a cgroup that was found: they are not seen",
            match node.libvirt {
                LibvirtState::NotUsed => None,
                _ => Some(node.domains_without_cgroup as f64),
            },
        )
    }

    fn vms(&mut self, vms: &[&VmState]) -> fmt::Result {
        self.gauge(
            "formtune_vm_info",
            "What the agent knows of a VM",
            vms.iter().map(|vm| {
                let owner = match vm.owner {
                    super::snapshot::OwnerKind::Libvirt => "libvirt",
                    super::snapshot::OwnerKind::Cgroup => "cgroup",
                };
                let uuid = vm.uuid.as_deref().unwrap_or("");
                let labels = [
                    ("vm", vm.id.as_str()),
                    ("uuid", uuid),
                    ("class", &vm.class.0),
                    ("owner", owner),
                ];
                (labels, Some(1.0))
            }),
        )?;
        for latency in Latency::ALL {
            self.latency(latency, vms)?;
        }
        let seconds = |ns: u64| ns as f64 / 1e9;
        self.counter(
            "formtune_vm_runqueue_wait_seconds_total",
            "Time all threads of the VM waited for a CPU, since it was first seen",
            vms.iter().map(|vm| (by_vm(vm), vm.runq.as_ref().map(|runq| seconds(runq.sum_ns)))),
        )?;
        self.counter(
            "formtune_vm_runqueue_held_seconds_total",
            "Time of the VM's long waits by who held the CPU: the three who held it longest",
            vms.iter().flat_map(|vm| {
                vm.held_by_total.iter().flat_map(|blamed| &blamed.top).map(|held| {
                    let (kind, by) = held.holder.labels();
                    let labels = [("vm", vm.id.as_str()), ("by_kind", kind), ("by", by)];
                    (labels, Some(held.time.as_secs_f64()))
                })
            }),
        )?;
        self.counter(
            "formtune_vm_cpu_usage_seconds_total",
            "CPU time of the VM",
            vms.iter().map(|vm| (by_vm(vm), vm.cpu_usage_ns.map(seconds))),
        )?;
        self.counter(
            "formtune_vm_cpu_throttled_seconds_total",
            "Time the VM was stopped by its own CPU quota",
            vms.iter().map(|vm| (by_vm(vm), vm.throttled_ns.map(seconds))),
        )?;
        self.weights(vms)?;
        self.slos(vms)
    }

    fn weights(&mut self, vms: &[&VmState]) -> fmt::Result {
        let number = |weight: Option<Weight>| weight.map(|weight| f64::from(weight.get()));
        self.gauge(
            "formtune_vm_cpu_weight",
            "CPU weight as last read, on the scale of cgroup v2 (1 to 10000)",
            vms.iter().map(|vm| (by_vm(vm), number(vm.cpu_weight))),
        )?;
        self.gauge(
            "formtune_vm_cpu_weight_original",
            "CPU weight as formtune first found it",
            vms.iter().map(|vm| (by_vm(vm), number(vm.cpu_weight_original))),
        )?;
        self.gauge(
            "formtune_vm_cpu_weight_entitlement",
            "CPU weight that the VM's class entitles it to",
            vms.iter().map(|vm| (by_vm(vm), number(vm.cpu_weight_entitlement))),
        )
    }

    fn slos(&mut self, vms: &[&VmState]) -> fmt::Result {
        self.gauge(
            "formtune_vm_slo_threshold_seconds",
            "Threshold of the SLO of the VM's class",
            vms.iter()
                .map(|vm| (by_vm(vm), vm.slo.as_ref().map(|slo| slo.threshold.as_secs_f64()))),
        )?;
        self.gauge(
            "formtune_vm_slo_indicator_seconds",
            "What the last window measured of the SLO's indicator; absent with too few samples",
            vms.iter().map(|vm| {
                let measured = vm.evidence().and_then(|evidence| evidence.measured);
                (by_vm(vm), measured.map(|measured| measured.as_secs_f64()))
            }),
        )?;
        let slack = |vm: &VmState| vm.evidence().and_then(|evidence| evidence.slack);
        self.gauge(
            "formtune_vm_slo_slack_ratio",
            "(threshold - indicator) / threshold of the last window; absent with too few samples",
            vms.iter().map(|vm| (by_vm(vm), slack(vm))),
        )?;
        self.gauge(
            "formtune_vm_slo_met",
            "1 if the last window met the SLO, else 0; absent with too few samples",
            vms.iter()
                .map(|vm| (by_vm(vm), slack(vm).map(|slack| f64::from(u8::from(slack >= 0.0))))),
        )?;
        self.counter(
            "formtune_vm_slo_windows_total",
            "Windows with enough samples to tell whether the SLO was met",
            vms.iter().map(|vm| (by_vm(vm), vm.attainment.map(|kept| kept.windows as f64))),
        )?;
        self.counter(
            "formtune_vm_slo_windows_met_total",
            "Windows that met the SLO",
            vms.iter().map(|vm| (by_vm(vm), vm.attainment.map(|kept| kept.met as f64))),
        )
    }

    fn decisions(&mut self, node: &Node) -> fmt::Result {
        let mode = node.modes.cpu_weight;
        let made = &node.counters.decisions;
        let none_yet = ACTIONS
            .into_iter()
            .filter(|action| {
                !made.iter().any(|entry| (entry.action, entry.mode) == (*action, mode))
            })
            .map(|action| (action, mode, 0));
        let all = made.iter().map(|entry| (entry.action, entry.mode, entry.count)).chain(none_yet);
        self.counter(
            "formtune_decisions_total",
            "Decisions, one per VM and tick, including those to do nothing",
            all.map(|(action, mode, count)| {
                let labels = [("action", action_name(action)), ("mode", mode_name(mode))];
                (labels, Some(count as f64))
            }),
        )?;
        self.counter(
            "formtune_actions_total",
            "Writes asked for in mode enforce, by what became of them",
            RESULTS.iter().map(|result| {
                let count = node.counters.outcomes.get(*result).copied().unwrap_or(0);
                ([("result", *result)], Some(count as f64))
            }),
        )
    }

    /// A gauge without labels.
    fn one(&mut self, name: &str, help: &str, value: Option<f64>) -> fmt::Result {
        self.gauge(name, help, [([], value)])
    }

    fn gauge<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l, N>, Option<f64>)>,
    ) -> fmt::Result {
        self.family(name, help, Kind::Gauge, samples)
    }

    /// `name` ends in `_total`: unlike OpenMetrics, these formats declare a counter by the
    /// name of its samples.
    fn counter<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l, N>, Option<f64>)>,
    ) -> fmt::Result {
        self.family(name, help, Kind::Counter, samples)
    }

    fn family<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        kind: Kind,
        samples: impl IntoIterator<Item = (Labels<'l, N>, Option<f64>)>,
    ) -> fmt::Result {
        let known =
            |(labels, value): (_, Option<f64>)| Some((labels, value.filter(|v| v.is_finite())?));
        let mut samples = samples.into_iter().filter_map(known).peekable();
        // A family without samples is left out: its head alone would promise nothing.
        if samples.peek().is_none() {
            return Ok(());
        }
        let family = Family { name, help, kind };
        self.0.begin(&family)?;
        for (labels, value) in samples {
            self.0.sample(&family, &labels, Value::Number(value))?;
        }
        self.0.end()
    }

    fn latency(&mut self, latency: Latency, vms: &[&VmState]) -> fmt::Result {
        let (name, help) = latency.family();
        self.histograms(name, help, |each| vms.iter().for_each(|vm| latency.of(vm, &mut *each)))
    }

    /// A family of histograms; `all` hands over each with its labels. Without any, the family
    /// is left out.
    fn histograms(
        &mut self,
        name: &str,
        help: &str,
        all: impl FnOnce(&mut dyn FnMut(&[(&'static str, &str)], &LatencyCounts)),
    ) -> fmt::Result {
        let family = Family { name, help, kind: Kind::Histogram };
        let (mut begun, mut result) = (false, Ok(()));
        all(&mut |labels, counts| {
            result = result.and_then(|()| match std::mem::replace(&mut begun, true) {
                true => Ok(()),
                false => self.0.begin(&family),
            });
            result = result.and_then(|()| self.0.sample(&family, labels, Value::Latency(counts)));
        });
        result?;
        if begun { self.0.end() } else { Ok(()) }
    }
}

fn by_vm(vm: &VmState) -> Labels<'_, 1> {
    [("vm", vm.id.as_str())]
}
