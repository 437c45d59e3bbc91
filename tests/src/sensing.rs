//! The senses of the agent, sampled at its tick by a test.

use formtune_agent::hypervisor::Hypervisor;
use formtune_agent::sense::{ProbeState, Reading, Sense, SenseConfig};
use formtune_core::units::Nanos;
use std::time::{Duration, Instant};

/// The agent's default.
const TICK: Duration = Duration::from_millis(250);

/// Samples in the second within which a VM that starts is to be measured.
pub const IN_TIME: u32 = 4;

/// Running senses.
pub struct Sensing {
    /// These.
    pub sense: Sense,
    start: Instant,
}

impl Sensing {
    /// For VMs where `patterns` say, and for those of libvirt.
    ///
    /// # Panics
    /// Unless the probe is loaded.
    pub fn open(patterns: &[String], max_vms: u32, hypervisor: Option<Hypervisor>) -> Self {
        let patterns = patterns.iter().map(|p| p.parse().unwrap()).collect();
        let config = SenseConfig { patterns, max_vms, ..SenseConfig::default() };
        let sense = Sense::open(&config, hypervisor).unwrap();
        assert_eq!(sense.health().runq, ProbeState::Loaded);
        Self { sense, start: Instant::now() }
    }

    /// One sample.
    pub fn sample(&mut self) -> Reading {
        self.sense.sample(Nanos(self.start.elapsed().as_nanos() as u64 + 1))
    }

    /// Samples, at the agent's tick, until `done`; returns how many samples that took.
    ///
    /// # Panics
    /// When it is not in 50 s.
    #[track_caller]
    pub fn until(&mut self, what: &str, done: impl Fn(&Sense) -> bool) -> u32 {
        for samples in 1..200 {
            self.sample();
            if done(&self.sense) {
                return samples;
            }
            std::thread::sleep(TICK);
        }
        panic!("not in 50 s: {what}; {:?}", self.sense.health());
    }

    /// Every entry of the maps and every slot belongs to a VM that is known (other tests and
    /// people may run VMs on this machine, too).
    ///
    /// # Panics
    /// When one does not, for longer than a VM that is just starting goes without a name.
    #[track_caller]
    pub fn nothing_left_over(&mut self) {
        let known = |sense: &Sense| {
            let cgroups = sense.vms().keys().filter_map(|vm| sense.cgroups(vm)).sum();
            let slots = sense.vms().keys().filter(|vm| sense.runq(vm).is_some()).count() as u32;
            (cgroups, slots)
        };
        let mut held = (0, 0);
        for _ in 0..2 * IN_TIME {
            held = (self.sense.health().cgroups, self.sense.health().slots_used);
            if held == known(&self.sense) {
                return;
            }
            std::thread::sleep(TICK);
            self.sample();
        }
        panic!("{held:?} cgroups and slots are held, {:?} are known", known(&self.sense));
    }
}

/// Has `attempt` (numbered from 0) make something happen and count the samples until it is
/// seen. Of three attempts one must take at most [`IN_TIME`].
///
/// The promise is kept with room to spare where the machine has a CPU left for libvirtd and
/// for the thread that looks for VMs. Other work there (a compiler, other tests) may take all
/// of them for a second now and then, but not each time. An emulated machine promises no
/// time at all: with `FORMTUNE_EMULATED` in the environment the figure is only printed.
///
/// # Panics
/// When all three took longer.
#[track_caller]
pub fn in_time(what: &str, mut attempt: impl FnMut(u32) -> u32) {
    let emulated = std::env::var_os("FORMTUNE_EMULATED").is_some();
    for number in 0..3 {
        let samples = attempt(number);
        println!("{what}: seen after {samples} samples, one each {TICK:?}");
        if samples <= IN_TIME || emulated {
            return;
        }
    }
    panic!("{what}: not seen within {IN_TIME} samples");
}
