//! Times decision steps for `cargo xtask bench step`. Prints `vms ours_ms floor_ms` for
//! every round; `floor` is a plain walk over the same sample.

use formtune_common::histogram::bucket;
use formtune_core::plan::{Outcome, OutcomeResult};
use formtune_core::plant::{Rng, Scenario};
use formtune_core::sample::{HeldInterval, HostSample, RunqInterval, Sample, VmSample};
use formtune_core::units::{Nanos, VmId, Weight};
use formtune_core::{State, step};
use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 31;
/// Samples that differ, in turn, so that windows really move.
const DIFFERENT: usize = 8;

fn main() {
    for (vms, steps) in [(1_000, 16), (10_000, 8)] {
        for (ours, floor) in rounds(vms, steps) {
            println!("{vms} {ours:.6} {floor:.6}");
        }
    }
}

fn rounds(vms: usize, steps: usize) -> Vec<(f64, f64)> {
    let policy = Scenario::random(1).policy;
    let mut samples: Vec<Sample> = (0..DIFFERENT).map(|n| sample(vms, n as u64)).collect();
    let mut state = State::default();
    let (mut seq, mut outcomes, mut measured) = (0_u64, Vec::new(), Vec::new());
    // The first round fills the windows and is left out.
    for round in 0..=ROUNDS {
        let (mut ours, mut floor) = (0.0, 0.0);
        for _ in 0..steps {
            seq += 1;
            let sample = &mut samples[seq as usize % DIFFERENT];
            (sample.seq, sample.at) = (seq, Nanos(seq * policy.tick.0));
            sample.host.cpu_busy_ns = Some(seq * policy.tick.0 * 60);
            for (n, vm) in sample.vms.values_mut().enumerate() {
                vm.cpu_usage_ns = Some(seq * policy.tick.0 / 1_000 * (1 + n as u64 % 100));
            }
            sample.outcomes = std::mem::take(&mut outcomes);

            let start = Instant::now();
            black_box(walk(sample));
            floor += start.elapsed().as_secs_f64();
            let start = Instant::now();
            let plan = black_box(step(&mut state, &policy, sample));
            ours += start.elapsed().as_secs_f64();

            for setpoint in plan.setpoints {
                for sample in &mut samples {
                    let vm = sample.vms.get_mut(&setpoint.vm).expect("a VM of the sample");
                    vm.cpu_weight = Some(setpoint.to);
                }
                outcomes.push(Outcome {
                    plan_seq: plan.seq,
                    vm: setpoint.vm,
                    knob: setpoint.knob,
                    asked: setpoint.to,
                    result: OutcomeResult::Applied { value: setpoint.to },
                });
            }
        }
        if round > 0 {
            measured.push((ours * 1e3 / steps as f64, floor * 1e3 / steps as f64));
        }
    }
    measured
}

/// Reads every count and counter once.
fn walk(sample: &Sample) -> u64 {
    let of_vm = |vm: &VmSample| {
        let counts = vm.runq.iter().flat_map(|runq| &runq.counts);
        counts.map(|&(_, count)| u64::from(count)).sum::<u64>() + vm.cpu_usage_ns.unwrap_or(0)
    };
    sample.vms.values().map(of_vm).fold(0, u64::wrapping_add)
}

/// Every VM active with about 30 buckets; one in twenty breaks its promise.
fn sample(vms: usize, seed: u64) -> Sample {
    let mut rng = Rng(seed);
    let vm = |n: usize| {
        let scale = if n.is_multiple_of(20) { 8.0 } else { 1.0 };
        let mut counts = std::collections::BTreeMap::new();
        while counts.len() < 30 {
            let wait = 2_000.0 * scale * (rng.between(0.0, 5.0)).exp();
            *counts.entry(bucket(wait as u64) as u16).or_insert(0) += 1 + rng.below(4) as u32;
        }
        let holder = |of: usize| (VmId::from(format!("instance-{:08x}", of % vms)), 5_000_000);
        let held =
            HeldInterval { by_vm: [holder(n + 2), holder(n + 5)].into(), ..Default::default() };
        let vm = VmSample {
            class: ["service", "service", "batch"][n % 3].into(),
            vcpus: 2,
            runq: Some(RunqInterval { counts: counts.into_iter().collect(), wait_ns: 0 }),
            held: Some(if n.is_multiple_of(20) { held } else { HeldInterval::default() }),
            cpu_usage_ns: None,
            throttled_ns: Some(0),
            cpu_weight: Some(Weight::DEFAULT),
            cpu_weight_original: Some(Weight::DEFAULT),
        };
        (VmId::from(format!("instance-{n:08x}")), vm)
    };
    let vms = (0..vms).map(vm).collect();
    let host = HostSample { cpus: 64, cpu_busy_ns: None, blind: None, ..HostSample::default() };
    Sample { seq: 0, at: Nanos(0), host, vms, outcomes: Vec::new() }
}
