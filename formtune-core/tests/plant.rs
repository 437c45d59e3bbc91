//! The loop closed over a simulated host, hundreds of times: it settles, never oscillates,
//! never leaves its bounds, helps its victims, and puts everything back.

use formtune_core::plan::{Action, Plan, Reason};
use formtune_core::plant::{Event, Run, Scenario, run};
use formtune_core::policy::Mode;
use formtune_core::units::{Nanos, VmId, Weight};
use std::collections::BTreeMap;

/// Seeds of `Scenario::random`. Each is a host that lives for about three minutes.
const SEEDS: std::ops::Range<u64> = 0..200;

#[test]
fn random_hosts_settle_help_and_restore() {
    let mut reactions = Vec::new();
    let mut frozen_in = Vec::new();
    let mut undisturbed = 0;
    for seed in SEEDS {
        let scenario = Scenario::random(seed);
        let closed = run(&scenario, Mode::Enforce);
        let open = run(&scenario, Mode::Observe);
        in_bounds_and_spaced(seed, &scenario, &closed);
        undisturbed += u32::from(settles(seed, &scenario, &closed));
        let report = &closed.report;

        // A change for a victim and its way back are one change of direction, and of 198 of
        // the 200 hosts it is the only one. What would go on and on is frozen at the third.
        assert!(report.direction_changes <= 3, "seed {seed} oscillates: {report:?}");

        let reaction = report.reaction.unwrap_or(Nanos(u64::MAX));
        let broken = open.report.mean_p99 > Nanos::from_millis(2);
        if broken {
            assert!(reaction <= Nanos::from_secs(2), "seed {seed} is slow: {report:?}");
            reactions.push(reaction);
            assert!(
                report.mean_p99.0 * 10 <= open.report.mean_p99.0 * 8,
                "seed {seed} does not help: {} with, {} without",
                report.mean_p99,
                open.report.mean_p99,
            );
        }

        assert_eq!(report.left_changed, 0, "seed {seed} leaves knobs: {report:?}");
        frozen_in.extend((report.frozen > 0).then_some(seed));
    }
    reactions.sort_unstable();
    assert!(reactions.len() > 150, "only {} hosts had anything to help with", reactions.len());
    // Three windows of 250 ms tick after the onset; the rest is for who only starts to be bad.
    assert!(reactions[reactions.len() / 2] <= Nanos::from_secs(1), "{reactions:?}");
    // Freezing stops a knob that goes back and forth, so it is the sign of an oscillation that
    // was about to be. It happens on 2 of the 200 hosts: of two victims, the one that uses more
    // than it is entitled to is raised, then lowered for the other's sake, and suffers again.
    // One more may be chance.
    assert!(frozen_in.len() <= 3, "frozen in too many: {frozen_in:?}");
    assert!(undisturbed >= 50, "only {undisturbed} hosts were left alone for long enough");
}

/// Nothing goes back and forth, and where nothing happens any more, nothing is changed any
/// more. Looks at the last ten seconds of the noise; false where a VM came or went in these or
/// in the ten before them, so that there was something to answer.
fn settles(seed: u64, scenario: &Scenario, run: &Run) -> bool {
    let until = scenario.noisy.1;
    let from = Nanos(until.0 - Nanos::from_secs(10).0);
    let start = run.samples[0].at;
    let mut writes: BTreeMap<&VmId, Vec<bool>> = BTreeMap::new();
    for plan in &run.plans {
        if (from..until).contains(&plan.at.since(start)) {
            for setpoint in &plan.setpoints {
                writes.entry(&setpoint.vm).or_default().push(setpoint.to > setpoint.from);
            }
        }
    }
    // A step that does not help is taken back once, and then barred for longer than this.
    for (vm, ups) in &writes {
        let turns = ups.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(turns <= 1, "seed {seed}: {vm} goes back and forth: {ups:?}");
    }
    let answering = Nanos(from.0 - Nanos::from_secs(10).0)..until;
    let disturbed = scenario.events.iter().any(|timed| {
        matches!(timed.event, Event::Start(..) | Event::Stop(..)) && answering.contains(&timed.at)
    });
    // One write is left to whoever comes to be bad only now; two would be a trend.
    let most = writes.values().map(Vec::len).max().unwrap_or(0);
    assert!(disturbed || most <= 1, "seed {seed} does not settle: {writes:?}");
    !disturbed
}

/// No write outside the class's bounds, except back to the original; none inside a cooldown.
fn in_bounds_and_spaced(seed: u64, scenario: &Scenario, run: &Run) {
    let mut last: BTreeMap<&VmId, Nanos> = BTreeMap::new();
    for (sample, plan) in run.samples.iter().zip(&run.plans) {
        for setpoint in &plan.setpoints {
            let vm = &sample.vms[&setpoint.vm];
            let class = &scenario.policy.classes[&vm.class];
            let original = vm.cpu_weight_original.unwrap();
            let bounds = original.scaled(class.floor_ratio)..=original.scaled(class.ceiling_ratio);
            assert!(
                bounds.contains(&setpoint.to) || setpoint.to == original,
                "seed {seed}: {setpoint:?} leaves {bounds:?}"
            );
            if let Some(before) = last.insert(&setpoint.vm, plan.at) {
                let since = plan.at.since(before);
                assert!(since >= scenario.policy.cpu.cooldown, "seed {seed}: {setpoint:?}");
            }
        }
        last.retain(|id, _| sample.vms.contains_key(*id));
    }
}

fn named(name: &str) -> Run {
    run(&Scenario::named(name).unwrap(), Mode::Enforce)
}

fn reasons<'a>(run: &'a Run, vm: &'a str) -> impl Iterator<Item = &'a Reason> {
    let decisions = run.plans.iter().flat_map(|plan| &plan.decisions);
    decisions.filter(move |d| d.vm.as_str() == vm).map(|d| &d.reason)
}

fn setpoints(run: &Run) -> usize {
    run.plans.iter().map(|plan| plan.setpoints.len()).sum()
}

#[test]
fn contention_is_met_and_given_back() {
    let run = named("contention");
    let report = &run.report;
    assert!(report.reaction.unwrap() <= Nanos::from_secs(1), "{report:?}");
    assert!(report.recovery.unwrap() <= Nanos::from_secs(3), "{report:?}");
    assert_eq!((report.bad_windows.0, report.left_changed), (0, 0), "{report:?}");
    assert!(reasons(&run, "web").any(|r| matches!(r, Reason::Helped { .. })));
    let lowered = run.plans.iter().flat_map(|p| &p.decisions).find(|d| d.action == Action::Lower);
    let sentence = lowered.unwrap().reason.to_string();
    assert!(sentence.starts_with("web waits: run-queue p99 "), "{sentence}");
    assert!(sentence.contains("lowering this one (held the CPU for "), "{sentence}");
}

#[test]
fn a_quota_is_nobodys_fault() {
    let run = named("quota");
    assert_eq!(setpoints(&run), 0);
    assert!(reasons(&run, "web").any(|r| matches!(r, Reason::Throttled { .. })));
}

#[test]
fn blindness_holds_then_decays() {
    let run = named("blind");
    let blind: Vec<&Plan> = (run.samples.iter().zip(&run.plans))
        .filter_map(|(sample, plan)| sample.host.blind.is_some().then_some(plan))
        .collect();
    let since = blind[0].at;
    for plan in &blind {
        let held = plan.at.since(since) < Nanos::from_secs(10);
        assert!(!held || plan.setpoints.is_empty(), "acts while blind: {plan:?}");
        let back = |r: &Reason| matches!(r, Reason::BlindDecay { .. });
        assert!(plan.setpoints.iter().all(|s| back(&s.reason)), "{plan:?}");
    }
    let last = run.samples.iter().rfind(|s| s.host.blind.is_some()).unwrap();
    for (id, vm) in &last.vms {
        assert_eq!(vm.cpu_weight, vm.cpu_weight_original, "{id} is not back");
    }
}

#[test]
fn a_foreign_value_is_left_alone() {
    let run = named("foreign");
    let foreign = Weight::new(500);
    let last = &run.samples.last().unwrap().vms[&"noisy-1".into()];
    assert_eq!(last.cpu_weight, foreign);
    let from = run.samples.iter().position(|s| s.vms[&"noisy-1".into()].cpu_weight == foreign);
    let after = run.plans[from.unwrap()..].iter().flat_map(|plan| &plan.setpoints);
    assert_eq!(after.filter(|s| s.vm.as_str() == "noisy-1").count(), 0);
    assert_eq!(reasons(&run, "noisy-1").last(), Some(&Reason::Yielded { found: foreign.unwrap() }));
}

/// What is counted per sample is bounded: the value stays for more samples than a byte counts.
#[test]
fn a_foreign_value_may_stay_for_long() {
    let mut scenario = Scenario::named("foreign").unwrap();
    scenario.length = Nanos::from_secs(90);
    let run = run(&scenario, Mode::Enforce);
    let foreign = Weight::new(500).unwrap();
    let last = reasons(&run, "noisy-1").last();
    assert_eq!(last, Some(&Reason::Yielded { found: foreign }));
}

#[test]
fn going_back_and_forth_freezes_the_knob() {
    let run = named("freeze");
    assert!(reasons(&run, "noisy-1").any(|r| matches!(r, Reason::Frozen { reversals: 3, .. })));
    assert!(run.report.direction_changes <= 3, "{:?}", run.report);
}
