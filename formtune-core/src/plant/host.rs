//! The physics: who gets how much CPU, and how long everybody waits.

use super::Rng;
use crate::plan::{Outcome, OutcomeResult, Plan};
use crate::policy::Mode;
use crate::sample::{HeldInterval, HostSample, RunqInterval, Sample, VmSample};
use crate::units::{Nanos, VmId, Weight};
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use formtune_common::histogram::bucket;

/// p99 of a wait on an idle node.
const IDLE_P99_NS: f64 = 60e3;
/// What p99 gains where twice the node's CPUs are asked for, at equal weights.
const CONTENDED_P99_NS: f64 = 4e6;
/// How p99 falls with the ratio of weights; see the module.
const WEIGHT_EXPONENT: f64 = -0.85;
/// Waits from here on are somebody's fault, as for the probe.
const LONG_NS: f64 = 100e3;
/// Noise of a tick's waits, either way.
const NOISE: f64 = 0.25;

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// CPUs wanted.
    pub demand: f64,
    /// Wake-ups, that is waits, per second.
    pub wakeups: f64,
}

/// A simulated VM.
#[derive(Clone, Debug)]
pub struct SimVm {
    /// Name of its class.
    pub class: crate::units::ClassName,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// What it does at present.
    pub load: Load,
    /// CPUs its own quota allows.
    pub quota: Option<f64>,
    /// The knob.
    pub weight: Weight,
    /// The knob at the start.
    pub original: Weight,
    usage_ns: u64,
    throttled_ns: u64,
}

impl SimVm {
    /// A VM with the kernel's default weight.
    pub fn new(class: &str, vcpus: u32, load: Load) -> Self {
        Self {
            class: class.into(),
            vcpus,
            load,
            quota: None,
            weight: Weight::DEFAULT,
            original: Weight::DEFAULT,
            usage_ns: 0,
            throttled_ns: 0,
        }
    }

    fn wants(&self) -> f64 {
        let demand = self.load.demand.min(f64::from(self.vcpus));
        self.quota.map_or(demand, |quota| demand.min(quota))
    }
}

/// A simulated node.
#[derive(Clone, Debug)]
pub struct Host {
    /// Online CPUs.
    pub cpus: u32,
    /// By name.
    pub vms: BTreeMap<VmId, SimVm>,
    /// p99 that everybody waits whatever the weights, e.g. for interrupts.
    pub stubborn_p99: Nanos,
    /// Why the probe sees nothing, if so.
    pub blind: Option<String>,
    /// Share of writes that the actuator refuses.
    pub refuse: f64,
    /// Whether the probe knows who held the CPU during long waits.
    pub knows_holders: bool,
    /// The clock.
    pub now: Nanos,
    rng: Rng,
    seq: u64,
    busy_ns: u64,
    outcomes: Vec<Outcome>,
}

impl Host {
    /// A node without VMs.
    pub fn new(cpus: u32, seed: u64) -> Self {
        Self {
            cpus,
            vms: BTreeMap::new(),
            stubborn_p99: Nanos(0),
            blind: None,
            refuse: 0.0,
            knows_holders: true,
            now: Nanos::from_secs(1_000),
            rng: Rng(seed),
            seq: 0,
            busy_ns: 0,
            outcomes: Vec::new(),
        }
    }

    /// Lives through one tick and reads the node at its end.
    pub fn tick(&mut self, tick: Nanos) -> Sample {
        // Real ticks come a little early or late.
        let jitter = self.rng.between(-0.01, 0.01);
        let span = Nanos((tick.0 as f64 * (1.0 + jitter)) as u64);
        self.now = Nanos(self.now.0 + span.0);
        let shares = self.shares();
        let pressure = self.pressure();
        let running: Vec<(VmId, f64)> =
            self.vms.keys().cloned().zip(shares.iter().map(|(gets, _)| *gets)).collect();
        let mut vms = BTreeMap::new();
        for (index, (id, vm)) in self.vms.iter_mut().enumerate() {
            let (gets, rivals) = shares[index];
            vm.usage_ns += (gets * span.0 as f64) as u64;
            let over_quota = vm.quota.is_some_and(|quota| vm.load.demand > quota);
            if over_quota {
                vm.throttled_ns += span.0 / 4;
            }
            let ratio = f64::from(vm.weight.get()) / rivals.max(1.0);
            let mut p99 =
                IDLE_P99_NS + CONTENDED_P99_NS * pressure * libm::pow(ratio, WEIGHT_EXPONENT);
            // Wanting more than one gets queues one's own vCPUs behind each other.
            p99 *= 1.0 + 2.0 * ((vm.wants() - gets) / gets.max(0.01)).clamp(0.0, 10.0);
            if over_quota {
                p99 += 20e6;
            }
            p99 += self.stubborn_p99.0 as f64;
            p99 *= self.rng.between(1.0 - NOISE, 1.0 + NOISE);
            let waits = vm.load.wakeups * span.as_secs_f64();
            let runq = waits_of(&mut self.rng, waits, p99);
            let long_ns = if p99 >= LONG_NS { runq.wait_ns } else { 0 };
            let stubborn = self.stubborn_p99.0 as f64 / p99;
            let held = self.knows_holders.then(|| held(&running, id, long_ns, stubborn));
            vms.insert(
                id.clone(),
                VmSample {
                    class: vm.class.clone(),
                    vcpus: vm.vcpus,
                    runq: Some(runq),
                    held,
                    cpu_usage_ns: Some(vm.usage_ns),
                    throttled_ns: Some(vm.throttled_ns),
                    cpu_weight: Some(vm.weight),
                    cpu_weight_original: Some(vm.original),
                },
            );
        }
        let used: f64 = shares.iter().map(|(gets, _)| gets).sum();
        self.busy_ns += (used * span.0 as f64) as u64;
        self.seq += 1;
        Sample {
            seq: self.seq,
            at: self.now,
            host: HostSample {
                cpus: self.cpus,
                cpu_busy_ns: Some(self.busy_ns),
                blind: self.blind.clone(),
                probe_cost: None,
                sampling_shift: 0,
            },
            vms,
            outcomes: core::mem::take(&mut self.outcomes),
        }
    }

    /// Does what a plan says, as the actuators would; outcomes enter the next sample.
    pub fn act(&mut self, plan: &Plan) {
        for setpoint in plan.setpoints.iter().filter(|s| s.mode == Mode::Enforce) {
            let Some(vm) = self.vms.get_mut(&setpoint.vm) else { continue };
            let result = if self.rng.unit() < self.refuse {
                OutcomeResult::Refused { why: "cgroup is busy".into() }
            } else if vm.weight != setpoint.from {
                OutcomeResult::Yielded { found: vm.weight }
            } else {
                vm.weight = setpoint.to;
                OutcomeResult::Applied { value: setpoint.to }
            };
            self.outcomes.push(Outcome {
                plan_seq: plan.seq,
                vm: setpoint.vm.clone(),
                knob: setpoint.knob,
                asked: setpoint.to,
                result,
            });
        }
    }

    /// CPUs each VM gets, and the mean weight of those it competes with, by their demand.
    fn shares(&self) -> Vec<(f64, f64)> {
        let vms: Vec<&SimVm> = self.vms.values().collect();
        let mut gets: Vec<Option<f64>> = alloc::vec![None; vms.len()];
        let mut room = f64::from(self.cpus);
        loop {
            let open = || vms.iter().zip(&gets).filter(|(_, gets)| gets.is_none());
            let weights: f64 = open().map(|(vm, _)| f64::from(vm.weight.get())).sum();
            let level = room / weights.max(1.0);
            let sated = |vm: &SimVm| vm.wants() <= level * f64::from(vm.weight.get());
            let Some(next) = (0..vms.len()).find(|&i| gets[i].is_none() && sated(vms[i])) else {
                for (vm, gets) in vms.iter().zip(&mut gets) {
                    gets.get_or_insert(level * f64::from(vm.weight.get()));
                }
                break;
            };
            gets[next] = Some(vms[next].wants());
            room -= vms[next].wants();
        }
        let all: f64 = vms.iter().map(|vm| vm.wants()).sum();
        let weighted: f64 = vms.iter().map(|vm| vm.wants() * f64::from(vm.weight.get())).sum();
        vms.iter()
            .zip(gets)
            .map(|(vm, gets)| {
                let others = all - vm.wants();
                let rivals = weighted - vm.wants() * f64::from(vm.weight.get());
                (gets.unwrap_or(0.0), if others > 0.0 { rivals / others } else { 1.0 })
            })
            .collect()
    }

    /// 0 while everybody finds a free CPU, 1 where twice the node is asked for.
    fn pressure(&self) -> f64 {
        let demand: f64 = self.vms.values().map(SimVm::wants).sum();
        ((demand / f64::from(self.cpus) - 0.9) / 1.1).clamp(0.0, 3.0)
    }
}

/// Long waits, by who had the CPU: the host a share `stubborn`, the rest whoever ran, each as
/// much as it ran.
fn held(running: &[(VmId, f64)], waiting: &VmId, long_ns: u64, stubborn: f64) -> HeldInterval {
    let by_host_ns = (long_ns as f64 * stubborn.clamp(0.0, 1.0)) as u64;
    let others = || running.iter().filter(|(id, gets)| id != waiting && *gets > 0.0);
    let all: f64 = others().map(|(_, gets)| gets).sum();
    let of_vms = (long_ns - by_host_ns) as f64;
    let by_vm: BTreeMap<VmId, u64> = others()
        .map(|(id, gets)| (id.clone(), (of_vms * gets / all) as u64))
        .filter(|(_, ns)| *ns > 0)
        .collect();
    HeldInterval { by_vm, by_host_ns, ..HeldInterval::default() }
}

/// About `n` exponential waits with the given p99.
fn waits_of(rng: &mut Rng, n: f64, p99: f64) -> RunqInterval {
    // p99 of an exponential is ln(100) times its mean.
    let mean = p99 / 4.605;
    let mut counts: BTreeMap<u16, u32> = BTreeMap::new();
    let mut wait_ns = 0;
    for _ in 0..(n + rng.unit()) as u32 {
        let wait = (-libm::log(1.0 - rng.unit()) * mean) as u64;
        *counts.entry(bucket(wait) as u16).or_insert(0) += 1;
        wait_ns += wait;
    }
    RunqInterval { counts: counts.into_iter().collect(), wait_ns }
}
