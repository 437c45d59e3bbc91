//! A recorded run replays to the same plans, byte for byte, and to those that were made.

use formtune_core::Plan;
use formtune_tests::agent::Site;
use formtune_tests::contention::Contention;
use nix::sys::signal::Signal;
use std::time::Duration;

#[test]
fn a_recorded_run_replays_to_the_plans_it_made() {
    let name = format!("ft-daemon-record-{}", std::process::id());
    let contention = Contention::start(&name).unwrap();
    let originals = contention.raw();
    let site = Site::new(&contention.eager()).unwrap();
    let trace = site.path().join("trace").display().to_string();
    let agent = site.run(&["--mode", "enforce", "--json", "--record", &trace]).unwrap();
    contention.wait_for_change(&originals, Duration::from_secs(60));
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));

    let replay = || site.output(&["replay", "--json", &trace]).unwrap();
    let (first, second) = (replay(), replay());
    assert_eq!(first.status.code(), Some(0), "{first:?}");
    assert_eq!(first.stdout, second.stdout);
    let plans: Vec<Plan> = String::from_utf8(first.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    // What the log says was decided then is in the plans made from the trace.
    let mut compared = 0;
    for line in site.log().lines() {
        let entry: serde_json::Value = serde_json::from_str(line).unwrap();
        let (Some(seq), Some(to)) = (entry["plan"].as_u64(), entry["to"].as_u64()) else {
            continue;
        };
        let plan = plans.iter().find(|plan| plan.seq == seq).expect("the plan is replayed");
        let vm = entry["vm"].as_str().unwrap();
        let setpoint = plan.setpoints.iter().find(|setpoint| setpoint.vm.as_str() == vm).unwrap();
        assert_eq!(u64::from(setpoint.to.get()), to, "{line}");
        compared += 1;
    }
    assert!(compared > 0, "{}", site.log());
    let text = site.output(&["replay", &trace]).unwrap();
    assert!(String::from_utf8_lossy(&text.stdout).contains(" plans, "), "{text:?}");
}

#[test]
fn a_damaged_trace_is_one_line() {
    let site = Site::new("").unwrap();
    std::fs::write(site.path().join("trace"), "no trace\n").unwrap();
    let output =
        site.output(&["replay", &site.path().join("trace").display().to_string()]).unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("is not a trace of formtune"), "{text}");
}
