//! `formtune run` whose probes cost more than they may: all of them look at fewer events, and
//! what they count stays true.

use formtune_tests::agent::{Agent, Site};
use formtune_tests::block::{BlockVm, LoopDevice, fio};
use formtune_tests::wait::until;
use serde_json::Value;
use std::time::Duration;

/// Small random reads, sixteen at a time.
const READS: &[&str] = &[
    "--bs=4k",
    "--rw=randread",
    "--ioengine=io_uring",
    "--iodepth=16",
    "--number_ios=30000",
    "--io_size=10g",
];
/// The cost is known every 5 s.
const LIMIT: Duration = Duration::from_secs(60);

fn json(agent: &Agent, path: &str) -> Value {
    serde_json::from_str(&agent.get(path).unwrap()).unwrap()
}

/// Reads that were counted for the VM.
fn counted(agent: &Agent, vm: &str, device: &str) -> u64 {
    let state = json(agent, &format!("/v1/vms/{vm}"));
    let devices = state["block"]["devices"].as_array().into_iter().flatten();
    let ops = devices.filter(|of| of["device"] == device).flat_map(|of| of["ops"].as_array());
    ops.flatten().filter(|op| op["op"] == "read").filter_map(|op| op["requests"].as_u64()).sum()
}

#[test]
fn above_the_budget_requests_are_sampled_and_counts_stay_true() {
    let name = "ft-budget";
    let vm = BlockVm::new(name);
    let device = LoopDevice::new();
    // The least that may be configured: a thousandth of a CPU.
    let config = format!(
        "probe_budget = 0.001\nlibvirt = \"off\"\nlisten = \"off\"\ncgroups = [\"{}\"]\n",
        vm.group.pattern()
    );
    let site = Site::new(&config).unwrap();
    let agent = site.run(&[]).unwrap();
    let probe = || json(&agent, "/v1/node")["probe"].clone();
    let shift = || probe()["sampling_shift"].as_u64().unwrap();
    assert_eq!(shift(), 0);
    until(LIMIT, "sampling", || {
        fio(&device, Some(vm.procs()), READS);
        (shift() > 0).then_some(())
    });

    // What was read until then is counted with the next ticks.
    std::thread::sleep(Duration::from_secs(1));
    let before = counted(&agent, name, device.name());
    let all = fio(&device, Some(vm.procs()), READS).read.total_ios;
    std::thread::sleep(Duration::from_secs(1));
    let ours = counted(&agent, name, device.name()) - before;
    let shift = shift();
    let unsampled = json(&agent, "/v1/node")["block"]["counters"]["unsampled"].as_u64();
    // Each counts 2^shift with a probability of 1 in so many.
    let error = (all as f64 * (f64::exp2(shift as f64) - 1.0)).sqrt();
    println!("{ours} ± {error:.0} of {all} reads at 1 in 2^{shift}; {unsampled:?} left out");
    assert!(6.0 * error < all as f64 * 0.5, "so few are looked at that nothing is told");
    // Some kernels of virtual machines run no program on top of certain tasks of theirs.
    let least = all as f64 * 0.9 - 6.0 * error;
    assert!((least..=all as f64 + 6.0 * error).contains(&(ours as f64)), "{ours} ± {error}");
    assert!(unsampled.is_some_and(|left_out| left_out > all / 4), "{unsampled:?}");
    let metrics = agent.get("/metrics").unwrap();
    let left_out = |probe: &str| {
        let name = format!("formtune_probe_unsampled_total{{probe=\"{probe}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
        line.unwrap_or_else(|| panic!("no {name}")).parse::<f64>().unwrap()
    };
    assert!(left_out("block") > all as f64 / 4.0, "{}", left_out("block"));
    // Each of these reads has a thread wait for it.
    assert!(left_out("runq") > 1_000.0, "{}", left_out("runq"));
    // There is no device.
    assert_eq!(left_out("tap"), 0.0);
    assert!(site.log().contains("the probes look at one event in"), "{}", site.log());
}
