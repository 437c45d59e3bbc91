//! `formtune run` beside a VM that its own quota stops: `explain` names the quota before anybody
//! who had the CPU meanwhile, and nobody is blamed for a CPU that was idle.

use formtune_tests::agent::Site;
use formtune_tests::vm_cgroup::{Member, VmCgroup};
use formtune_tests::wait::until;
use serde_json::Value;
use std::time::Duration;

/// Other work on this machine may leave the VM's CPU little time to be idle.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn explain_names_the_quota_first() {
    let name = "ft-quota";
    let group = VmCgroup::new(name);
    group.limit_cpu(20_000, 100_000);
    let site = Site::new(&format!(
        "libvirt = \"off\"\nlisten = \"off\"\ncgroups = [\"{}\"]\n",
        group.pattern()
    ))
    .unwrap();
    let agent = site.run(&[]).unwrap();
    let _spinner = Member::start(&group, "vcpu0", Some(0), || {
        loop {
            std::hint::spin_loop();
        }
    });
    let vm = until(LIMIT, "idle time in its waits", || {
        let vm: Value = serde_json::from_str(&agent.get(&format!("/v1/vms/{name}")).ok()?).unwrap();
        let top = vm["held_by"]["top"].as_array()?;
        let idle = top.iter().any(|held| held["holder"]["kind"] == "idle");
        (idle && vm["throttled_lately"].as_u64()? > 0).then_some(vm)
    });
    println!("{}, stopped for {} ns", vm["held_by"], vm["throttled_lately"]);

    let output = site.output(&["explain", name]).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}");
    let because = text.split_once("\nBecause").map(|(_, rest)| rest.trim_start());
    let because = because.unwrap_or_else(|| panic!("no cause in {text}"));
    assert!(because.starts_with("its own quota stopped it for "), "{text}");
    let words = because.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("was idle for "), "{text}");
    let metrics = agent.get("/metrics").unwrap();
    let held = format!("runqueue_held_seconds_total{{vm=\"{name}\",by_kind=\"idle\",by=\"\"}}");
    assert!(metrics.contains(&held), "no {held}");
}
