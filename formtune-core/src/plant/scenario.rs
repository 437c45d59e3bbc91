//! What happens on a simulated host, and when.

use super::{Host, Load, Rng, SimVm};
use crate::policy::{Class, CpuLoop, Indicator, Mode, Modes, Policy, Priority, Slo};
use crate::units::{Nanos, VmId, Weight};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Something that happens.
#[derive(Clone, Debug)]
pub enum Event {
    /// A VM starts.
    Start(VmId, SimVm),
    /// A VM stops.
    Stop(VmId),
    /// A VM does something else from now on.
    Load(VmId, Load),
    /// Somebody else writes a VM's knob.
    Foreign(VmId, Weight),
    /// The probe goes blind, or sees again.
    Blind(Option<String>),
}

/// An event and its time, counted from the start.
#[derive(Clone, Debug)]
pub struct Timed {
    /// When.
    pub at: Nanos,
    /// What.
    pub event: Event,
}

/// A host, what happens to it, and what the operator decided.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// As it is at the start.
    pub host: Host,
    /// In the order of time.
    pub events: Vec<Timed>,
    /// What the operator decided.
    pub policy: Policy,
    /// How long it is watched.
    pub length: Nanos,
    /// VMs whose wait is their neighbours' doing, and that weights can help.
    pub victims: Vec<VmId>,
    /// When the neighbours begin and end to be noisy.
    pub noisy: (Nanos, Nanos),
}

/// Does next to nothing.
const QUIET: Load = Load { demand: 0.02, wakeups: 40.0 };

/// Spins on all its vCPUs.
fn spin(vcpus: u32) -> Load {
    Load { demand: f64::from(vcpus), wakeups: 60.0 }
}

/// Serves requests: wakes often, uses little.
fn serve(demand: f64) -> Load {
    Load { demand, wakeups: 300.0 }
}

impl Scenario {
    /// The scenarios that have a name.
    pub const NAMED: &'static [&'static str] =
        &["contention", "quota", "blind", "foreign", "freeze"];

    /// One of [`NAMED`](Self::NAMED): two CPUs, a victim, two noisy neighbours.
    pub fn named(name: &str) -> Option<Self> {
        let mut host = Host::new(2, 7);
        host.vms.insert("web".into(), SimVm::new("service", 1, serve(0.15)));
        for noisy in ["noisy-1", "noisy-2"] {
            host.vms.insert(noisy.into(), SimVm::new("batch", 2, QUIET));
        }
        let mut scenario = Self {
            host,
            events: Vec::new(),
            policy: policy(),
            length: Nanos::from_secs(60),
            victims: ["web".into()].into(),
            noisy: (Nanos::from_secs(5), Nanos::from_secs(20)),
        };
        // Short traces: larger steps back.
        scenario.policy.cpu.relax_ratio = 0.3;
        scenario.policy.cpu.min_change_ratio = 0.3;
        scenario.policy.cpu.cooldown = Nanos::from_secs(2);
        let (from, to) = scenario.noisy;
        for noisy in ["noisy-1", "noisy-2"] {
            scenario.event(from, Event::Load(noisy.into(), spin(2)));
            scenario.event(to, Event::Load(noisy.into(), QUIET));
        }
        match name {
            "contention" => {
                scenario.length = Nanos::from_secs(40);
            }
            "quota" => {
                scenario.host.vms.get_mut(&"web".into())?.quota = Some(0.1);
                scenario.length = Nanos::from_secs(12);
            }
            "blind" => {
                let why = "4 % of the events were discarded";
                scenario.event(Nanos::from_secs(10), Event::Blind(Some(why.into())));
                scenario.event(Nanos::from_secs(34), Event::Blind(None));
                scenario.length = Nanos::from_secs(36);
            }
            "foreign" => {
                let weight = Weight::clamped(500);
                scenario.event(Nanos::from_secs(10), Event::Foreign("noisy-1".into(), weight));
                scenario.length = Nanos::from_secs(30);
            }
            "freeze" => {
                scenario.host.stubborn_p99 = Nanos::from_millis(20);
                scenario.host.knows_holders = false;
                let cpu = &mut scenario.policy.cpu;
                (cpu.cooldown, cpu.bar) = (Nanos::from_secs(1), Nanos::from_secs(2));
                scenario.length = Nanos::from_secs(24);
                scenario.noisy.1 = scenario.length;
            }
            _ => return None,
        }
        scenario.events.sort_by_key(|timed| timed.at);
        Some(scenario)
    }

    /// A host like one that a seed's worth of operators might run: 2 to 16 CPUs, services,
    /// batch VMs that get noisy for a while, VMs that come and go, now and then an actuator
    /// that refuses.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let cpus = 1 << (1 + rng.below(4));
        let mut host = Host::new(cpus, rng.bits());
        host.refuse = if rng.below(4) == 0 { 0.1 } else { 0.0 };
        host.knows_holders = !seed.is_multiple_of(4);
        let from = Nanos::from_millis(10_000 + rng.below(10_000));
        let to = Nanos(from.0 + Nanos::from_millis(25_000 + rng.below(20_000)).0);
        let mut scenario = Self {
            host,
            events: Vec::new(),
            policy: policy(),
            length: Nanos(to.0 + Nanos::from_secs(150).0),
            victims: Vec::new(),
            noisy: (from, to),
        };
        // Services use up to about a third of the node, each little against its share.
        for n in 0..=rng.below(u64::from(cpus)) {
            let id = VmId::from(format!("web-{n}"));
            let demand = rng.between(0.1, 0.3);
            scenario.host.vms.insert(id.clone(), SimVm::new("service", 2, serve(demand)));
            scenario.victims.push(id);
        }
        // Noise asks for 1.2 to 2.5 times the node.
        let mut asked = 0.0;
        let wanted = f64::from(cpus) * rng.between(1.2, 2.5);
        let mut n = 0;
        while asked < wanted {
            let id = VmId::from(format!("noisy-{n}"));
            let vcpus = 1 + rng.below(4) as u32;
            let class = if rng.below(3) == 0 { "standard" } else { "batch" };
            let mut vm = SimVm::new(class, vcpus, QUIET);
            vm.weight = Weight::clamped([50, 100, 200, 400][rng.below(4) as usize]);
            vm.original = vm.weight;
            scenario.host.vms.insert(id.clone(), vm);
            scenario.event(from, Event::Load(id.clone(), spin(vcpus)));
            scenario.event(to, Event::Load(id, QUIET));
            asked += f64::from(vcpus);
            n += 1;
        }
        for n in 0..rng.below(4) {
            let id = VmId::from(format!("passing-{n}"));
            let start = Nanos::from_millis(rng.below(to.0 / 1_000_000));
            let stop = Nanos(start.0 + Nanos::from_millis(5_000 + rng.below(40_000)).0);
            let vm = SimVm::new("standard", 1, serve(rng.between(0.05, 0.9)));
            scenario.event(start, Event::Start(id.clone(), vm));
            scenario.event(stop, Event::Stop(id));
        }
        scenario.events.sort_by_key(|timed| timed.at);
        scenario
    }

    fn event(&mut self, at: Nanos, event: Event) {
        self.events.push(Timed { at, event });
    }
}

/// Services are promised 1 ms, standard VMs nothing, batch VMs nothing and less.
fn policy() -> Policy {
    let slo = Slo {
        indicator: Indicator::RunqLatency,
        quantile: 0.99,
        threshold: Nanos::from_millis(1),
        window: Nanos::from_secs(1),
        share: 0.99,
        min_samples: 100,
    };
    let class = |priority, slo, floor_ratio, ceiling_ratio| Class {
        priority,
        slo,
        cpu_weight: None,
        floor_ratio,
        ceiling_ratio,
    };
    Policy {
        modes: Modes { cpu_weight: Mode::Enforce },
        tick: Nanos::from_millis(250),
        probe_budget: 0.05,
        cpu: CpuLoop::default(),
        classes: [
            ("service".into(), class(Priority::High, Some(slo), 1.0, 6.0)),
            ("standard".into(), class(Priority::Normal, None, 0.25, 4.0)),
            ("batch".into(), class(Priority::Low, None, 0.1, 1.0)),
        ]
        .into(),
        default_class: "standard".into(),
    }
}
