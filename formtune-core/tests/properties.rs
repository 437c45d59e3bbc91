//! What holds for every sample, however strange.

use formtune_common::histogram::{BUCKETS, bucket, upper_bound};
use formtune_core::plan::{Knob, Outcome, OutcomeResult, Plan, Reason};
use formtune_core::plant::{Rng, Scenario, run};
use formtune_core::policy::{Mode, Policy};
use formtune_core::sample::{HeldInterval, HostSample, RunqInterval, Sample, VmSample};
use formtune_core::trace::{Header, HostFacts};
use formtune_core::units::{ClassName, Nanos, VmId, Weight};
use formtune_core::{State, replay, step};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn policy() -> Policy {
    Scenario::random(0).policy
}

fn weight() -> impl Strategy<Value = Weight> {
    (1_u32..=10_000).prop_map(|weight| Weight::new(weight).unwrap())
}

fn class() -> impl Strategy<Value = ClassName> {
    prop_oneof![Just("service"), Just("standard"), Just("batch"), Just("nobody")]
        .prop_map(ClassName::from)
}

/// Anything the type can hold: buckets out of order, twice and out of range included.
fn any_interval() -> impl Strategy<Value = RunqInterval> {
    (vec((any::<u16>(), any::<u32>()), 0..40), any::<u64>())
        .prop_map(|(counts, wait_ns)| RunqInterval { counts, wait_ns })
}

fn any_vm() -> impl Strategy<Value = VmSample> {
    let counter = || option::of(any::<u64>());
    (class(), any::<u32>(), option::of(any_interval()), counter(), counter(), option::of(weight()))
        .prop_flat_map(|(class, vcpus, runq, cpu_usage_ns, throttled_ns, cpu_weight)| {
            (option::of(weight()), option::of(any_held())).prop_map(
                move |(cpu_weight_original, held)| VmSample {
                    class: class.clone(),
                    vcpus,
                    runq: runq.clone(),
                    held,
                    cpu_usage_ns,
                    throttled_ns,
                    cpu_weight,
                    cpu_weight_original,
                },
            )
        })
}

/// Holders that exist, that do not, and times that overflow when added.
fn any_held() -> impl Strategy<Value = HeldInterval> {
    let by_vm = proptest::collection::btree_map("[a-f]".prop_map(VmId::from), any::<u64>(), 0..4);
    (by_vm, any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
        |(by_vm, by_host_ns, idle_ns, unknown_ns)| HeldInterval {
            by_vm,
            by_host_ns,
            idle_ns,
            unknown_ns,
        },
    )
}

fn name() -> impl Strategy<Value = VmId> {
    "[a-d]".prop_map(VmId::from)
}

fn any_outcome() -> impl Strategy<Value = Outcome> {
    let result = prop_oneof![
        weight().prop_map(|value| OutcomeResult::Applied { value }),
        Just(OutcomeResult::Unchanged),
        weight().prop_map(|value| OutcomeResult::Clamped { value }),
        weight().prop_map(|found| OutcomeResult::Yielded { found }),
        Just(OutcomeResult::Refused { why: "gone".into() }),
    ];
    (0_u64..40, name(), weight(), result).prop_map(|(plan_seq, vm, asked, result)| Outcome {
        plan_seq,
        vm,
        knob: Knob::CpuWeight,
        asked,
        result,
    })
}

fn any_sample() -> impl Strategy<Value = Sample> {
    let host = (any::<u32>(), option::of(any::<u64>()), option::weighted(0.2, Just("lost".into())))
        .prop_map(|(cpus, cpu_busy_ns, blind)| HostSample {
            cpus,
            cpu_busy_ns,
            blind,
            ..HostSample::default()
        });
    // Times that go forth and back, and leap.
    let at = prop_oneof![0_u64..20_000_000_000, any::<u64>()].prop_map(|at| Nanos(at / 2));
    (any::<u64>(), at, host, btree_map(name(), any_vm(), 0..5), vec(any_outcome(), 0..3))
        .prop_map(|(seq, at, host, vms, outcomes)| Sample { seq, at, host, vms, outcomes })
}

/// A load with bad and good windows, counters that stand still or jump, and weights that obey
/// the plans: what the loop really meets, at random.
#[derive(Clone, Debug)]
struct Tick {
    after_ms: u64,
    waits: BTreeMap<VmId, (u32, u64)>,
    cpus_used: BTreeMap<VmId, u8>,
    busy: u8,
    refuse: bool,
}

fn ticks() -> impl Strategy<Value = Vec<Tick>> {
    let wait = prop_oneof![Just(50_000_u64), Just(900_000), Just(1_500_000), Just(30_000_000)];
    let tick = (
        prop_oneof![4 => Just(250_u64), 1 => 1_u64..3_000],
        btree_map(name(), (0_u32..200, wait), 4),
        btree_map(name(), 0_u8..4, 4),
        0_u8..3,
        proptest::bool::weighted(0.05),
    )
        .prop_map(|(after_ms, waits, cpus_used, busy, refuse)| Tick {
            after_ms,
            waits,
            cpus_used,
            busy,
            refuse,
        });
    // Each load lasts a while, or nothing would ever be confirmed.
    vec((tick, 1_usize..30), 1..12).prop_map(|loads| {
        loads.into_iter().flat_map(|(tick, n)| std::iter::repeat_n(tick, n)).collect()
    })
}

/// Lives through the ticks; weights follow the plans.
fn live(policy: &Policy, ticks: &[Tick]) -> Vec<(Sample, Plan)> {
    let mut state = State::default();
    let classes = ["service", "standard", "batch", "service"];
    let names = ["a", "b", "c", "d"];
    let mut weights = [100, 50, 400, 1_000].map(Weight::clamped);
    let mut used = [0_u64; 4];
    let (mut at, mut busy, mut outcomes, mut lived) = (Nanos(0), 0_u64, Vec::new(), Vec::new());
    for (seq, tick) in ticks.iter().enumerate() {
        let span = tick.after_ms * 1_000_000;
        at = Nanos(at.0 + span);
        busy += span * u64::from(tick.busy);
        let mut vms = BTreeMap::new();
        for (n, name) in names.iter().enumerate() {
            let id = VmId::from(*name);
            used[n] += span / 2 * u64::from(tick.cpus_used.get(&id).copied().unwrap_or(0));
            let runq = tick.waits.get(&id).map(|&(count, wait)| RunqInterval {
                counts: Vec::from_iter((count > 0).then_some((bucket(wait) as u16, count))),
                wait_ns: u64::from(count) * wait,
            });
            let vm = VmSample {
                class: classes[n].into(),
                held: None,
                vcpus: 2,
                runq,
                cpu_usage_ns: Some(used[n]),
                throttled_ns: Some(0),
                cpu_weight: Some(weights[n]),
                cpu_weight_original: Some([100, 50, 400, 1_000].map(Weight::clamped)[n]),
            };
            vms.insert(id, vm);
        }
        let host =
            HostSample { cpus: 2, cpu_busy_ns: Some(busy), blind: None, ..HostSample::default() };
        let outcomes_now = std::mem::take(&mut outcomes);
        let sample = Sample { seq: seq as u64, at, host, vms, outcomes: outcomes_now };
        let plan = step(&mut state, policy, &sample);
        for setpoint in plan.setpoints.iter().filter(|s| s.mode == Mode::Enforce) {
            let n = names.iter().position(|name| setpoint.vm.as_str() == *name).unwrap();
            let result = if tick.refuse {
                OutcomeResult::Refused { why: "busy".into() }
            } else {
                weights[n] = setpoint.to;
                OutcomeResult::Applied { value: setpoint.to }
            };
            outcomes.push(Outcome {
                plan_seq: plan.seq,
                vm: setpoint.vm.clone(),
                knob: setpoint.knob,
                asked: setpoint.to,
                result,
            });
        }
        lived.push((sample, plan));
    }
    lived
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_never_panics(samples in vec(any_sample(), 1..30), enforce: bool) {
        let mut policy = policy();
        policy.modes.cpu_weight = if enforce { Mode::Enforce } else { Mode::Shadow };
        let mut state = State::default();
        for sample in &samples {
            let plan = step(&mut state, &policy, sample);
            prop_assert_eq!(plan.decisions.len(), sample.vms.len());
            let text = serde_json::to_string(&plan).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Plan>(&text).unwrap(), &plan);
            for decision in &plan.decisions {
                prop_assert!(!decision.reason.to_string().is_empty());
            }
        }
    }

    #[test]
    fn a_strange_policy_never_panics(
        samples in vec(any_sample(), 1..20),
        floats in vec(prop_oneof![Just(f64::NAN), Just(-1.0), Just(1e300), -2.0..2.0], 12),
        counts in vec(any::<u8>(), 4),
        times in vec(0_u64..1_u64 << 60, 6),
    ) {
        let mut policy = policy();
        policy.modes.cpu_weight = Mode::Enforce;
        let cpu = &mut policy.cpu;
        (cpu.slack_act, cpu.slack_relax, cpu.slack_severe) = (floats[0], floats[1], floats[2]);
        (cpu.raise_ratio, cpu.lower_factor, cpu.relax_ratio) = (floats[3], floats[4], floats[5]);
        (cpu.min_change_ratio, cpu.verify_gain) = (floats[6], floats[7]);
        cpu.relax_below_busy = floats[8];
        (cpu.confirm, cpu.confirm_of) = (counts[0], counts[1]);
        (cpu.verify_windows, cpu.reversals) = (counts[2], counts[3]);
        (cpu.cooldown, cpu.bar, cpu.freeze) = (Nanos(times[0]), Nanos(times[1]), Nanos(times[2]));
        (cpu.reversal_window, cpu.blind_decay_after) = (Nanos(times[3]), Nanos(times[4]));
        for class in policy.classes.values_mut() {
            (class.floor_ratio, class.ceiling_ratio) = (floats[9], floats[10]);
            if let Some(slo) = &mut class.slo {
                (slo.quantile, slo.share) = (floats[11], floats[0]);
                (slo.window, slo.threshold) = (Nanos(times[5]), Nanos(times[0]));
                slo.min_samples = counts[0].into();
            }
        }
        let mut state = State::default();
        for sample in &samples {
            let plan = step(&mut state, &policy, sample);
            prop_assert_eq!(plan.decisions.len(), sample.vms.len());
        }
    }

    #[test]
    fn setpoints_are_bounded_spaced_and_worth_it(ticks in ticks()) {
        let policy = policy();
        let mut last: BTreeMap<VmId, Nanos> = BTreeMap::new();
        for (sample, plan) in live(&policy, &ticks) {
            for setpoint in &plan.setpoints {
                let vm = &sample.vms[&setpoint.vm];
                let class = &policy.classes[&vm.class];
                let original = vm.cpu_weight_original.unwrap();
                let bounds =
                    original.scaled(class.floor_ratio)..=original.scaled(class.ceiling_ratio);
                prop_assert!(bounds.contains(&setpoint.to) || setpoint.to == original);
                prop_assert_eq!(Some(setpoint.from), vm.cpu_weight);
                let change = f64::from(setpoint.to.get().abs_diff(setpoint.from.get()));
                let least = policy.cpu.min_change_ratio * f64::from(setpoint.from.get());
                // What did not help is taken back exactly, however little it was.
                let back = matches!(setpoint.reason, Reason::DidNotHelp { .. });
                prop_assert!(change >= least || setpoint.to == original || back, "{:?}", setpoint);
                if let Some(before) = last.insert(setpoint.vm.clone(), plan.at) {
                    prop_assert!(plan.at.since(before) >= policy.cpu.cooldown);
                }
                // Nobody pays for somebody of a lower priority.
                if let Reason::Polluter { victim, .. } = &setpoint.reason {
                    let victim = &policy.classes[&sample.vms[victim].class];
                    prop_assert!(class.priority <= victim.priority);
                }
            }
        }
    }

    #[test]
    fn observe_writes_nothing_and_shadow_only_announces(ticks in ticks()) {
        let mut policy = policy();
        policy.modes.cpu_weight = Mode::Observe;
        for (_, plan) in live(&policy, &ticks) {
            prop_assert!(plan.setpoints.is_empty());
            for decision in &plan.decisions {
                let said = matches!(decision.reason, Reason::Observing | Reason::StaleSample);
                prop_assert!(said, "{:?}", decision);
            }
        }
        policy.modes.cpu_weight = Mode::Shadow;
        let mut last: BTreeMap<VmId, Nanos> = BTreeMap::new();
        for (_, plan) in live(&policy, &ticks) {
            for decision in &plan.decisions {
                let held = !matches!(decision.reason, Reason::Frozen { .. });
                prop_assert!(held, "announcing is no oscillation: {:?}", decision);
            }
            for setpoint in &plan.setpoints {
                prop_assert_eq!(setpoint.mode, Mode::Shadow);
                if let Some(before) = last.insert(setpoint.vm.clone(), plan.at) {
                    prop_assert!(plan.at.since(before) >= policy.cpu.cooldown);
                }
            }
        }
    }

    #[test]
    fn the_same_trace_gives_the_same_bytes(ticks in ticks()) {
        let header = Header::new(HostFacts::default(), policy());
        let (samples, plans): (Vec<_>, Vec<_>) =
            live(&header.policy, &ticks).into_iter().unzip();
        let text = |plans: &[Plan]| serde_json::to_string(plans).unwrap();
        // Through text and back, as a recorded trace goes.
        let read: Vec<Sample> = samples
            .iter()
            .map(|s| serde_json::from_str(&serde_json::to_string(s).unwrap()).unwrap())
            .collect();
        let replayed: Vec<Plan> = replay(&header, &read).collect();
        prop_assert_eq!(text(&replayed), text(&plans));
    }

    #[test]
    fn constant_calm_ends_in_an_empty_plan(mut ticks in ticks()) {
        let calm = Tick {
            after_ms: 250,
            waits: ["a", "b", "c", "d"].map(|name| (name.into(), (100, 50_000))).into(),
            cpus_used: BTreeMap::new(),
            busy: 0,
            refuse: false,
        };
        // Past a freeze (600 s) and all the steps back.
        ticks.extend(std::iter::repeat_n(calm, 4 * 900));
        let lived = live(&policy(), &ticks);
        let (sample, plan) = lived.last().unwrap();
        prop_assert!(plan.setpoints.is_empty(), "{:?}", plan);
        for (id, vm) in &sample.vms {
            prop_assert_eq!(vm.cpu_weight, vm.cpu_weight_original, "{} is not back", id);
        }
    }

    #[test]
    fn quantile_agrees_with_a_sort(
        waits in vec(prop_oneof![0_u64..100, 0_u64..10_000_000, 0_u64..1 << 36], 1..400),
        q in 0.01_f64..0.999,
    ) {
        let mut policy = policy();
        let slo = policy.classes.get_mut(&"service".into()).unwrap().slo.as_mut().unwrap();
        (slo.quantile, slo.min_samples) = (q, 1);
        let mut counts = BTreeMap::new();
        for &wait in &waits {
            *counts.entry(bucket(wait) as u16).or_insert(0_u32) += 1;
        }
        let runq = RunqInterval { counts: counts.into_iter().collect(), wait_ns: 0 };
        let vm = VmSample {
            class: "service".into(),
            held: None,
            vcpus: 1,
            runq: Some(runq),
            cpu_usage_ns: None,
            throttled_ns: None,
            cpu_weight: None,
            cpu_weight_original: None,
        };
        let host = HostSample { cpus: 1, cpu_busy_ns: None, blind: None, ..HostSample::default() };
        let vms = [("a".into(), vm)].into();
        let sample = Sample { seq: 0, at: Nanos(1), host, vms, outcomes: Vec::new() };
        let plan = step(&mut State::default(), &policy, &sample);
        let mut sorted = waits.clone();
        sorted.sort_unstable();
        let rank = ((q * waits.len() as f64).ceil() as usize).clamp(1, waits.len());
        let exact = sorted[rank - 1];
        let evidence = &plan.decisions[0].evidence;
        prop_assert_eq!(evidence.measured, Some(Nanos(upper_bound(bucket(exact)))));
        prop_assert_eq!(evidence.samples, waits.len() as u64);
    }

    #[test]
    fn counters_going_backwards_are_no_reading(values in vec(any::<u64>(), 2..20)) {
        let mut state = State::default();
        let scenario = run(&Scenario::named("quota").unwrap(), Mode::Observe);
        let mut before = None;
        for (sample, &value) in scenario.samples.iter().zip(&values) {
            let mut sample = sample.clone();
            let web = sample.vms.get_mut(&"web".into()).unwrap();
            web.cpu_usage_ns = Some(value);
            let plan = step(&mut state, &policy(), &sample);
            let web = plan.decisions.iter().find(|d| d.vm.as_str() == "web").unwrap();
            if before.is_some_and(|before| value < before) {
                prop_assert_eq!(web.evidence.cpus_used, None);
            }
            prop_assert!(web.evidence.cpus_used.is_none_or(|used| used >= 0.0));
            before = Some(value);
        }
    }
}

#[test]
fn last_bucket_is_known() {
    // What the garbage tests rely on: the last bucket has an upper bound.
    assert!(upper_bound(BUCKETS as u32 - 1) > upper_bound(BUCKETS as u32 - 2));
    assert_ne!(Rng(1).bits(), Rng(2).bits());
}

/// A starting agent knows no usage for a second or two: it must not hold everybody guilty.
#[test]
fn nobody_is_lowered_before_usage_can_be_known() {
    let policy =
        Policy { modes: formtune_core::policy::Modes { cpu_weight: Mode::Enforce }, ..policy() };
    let waits = |ns: u64| RunqInterval { counts: vec![(bucket(ns) as u16, 500)], wait_ns: ns };
    let vm = |ns| VmSample {
        class: "service".into(),
        held: None,
        vcpus: 1,
        runq: Some(waits(ns)),
        cpu_usage_ns: None,
        throttled_ns: None,
        cpu_weight: Weight::new(100),
        cpu_weight_original: Weight::new(100),
    };
    let mut state = State::default();
    let mut reasons = Vec::new();
    for seq in 1..=60 {
        let sample = Sample {
            seq,
            at: Nanos::from_millis(250 * seq),
            host: HostSample {
                cpus: 2,
                cpu_busy_ns: Some(500_000_000 * seq),
                blind: None,
                ..HostSample::default()
            },
            vms: BTreeMap::from([("idle".into(), vm(1_000)), ("web".into(), vm(500_000_000))]),
            outcomes: Vec::new(),
        };
        let plan = step(&mut state, &policy, &sample);
        if seq <= 12 {
            assert_eq!(plan.setpoints, [], "{seq}");
            reasons.extend(plan.decisions.into_iter().map(|decision| decision.reason));
        } else if !plan.setpoints.is_empty() {
            assert!(reasons.contains(&Reason::UsageUnknown), "{reasons:?}");
            return;
        }
    }
    panic!("the guard never ended");
}
