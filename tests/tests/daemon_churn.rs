//! `formtune run --mode enforce` while VMs come and go beside a real contention: whatever it
//! holds for a VM goes with it.

use formtune_agent::act::inspect;
use formtune_agent::sense::cgroup::Hierarchies;
use formtune_tests::agent::{Agent, Site};
use formtune_tests::contention::{Contention, eager};
use formtune_tests::footprint::{Footprint, no_stale_watch};
use formtune_tests::knob::file_name;
use formtune_tests::vm_cgroup::{Member, make_tree, remove_tree};
use formtune_tests::wait::{eventually, until};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
const VMS: usize = 1_000;
/// VMs that are there at once.
const ROUND: usize = 50;
/// After these, buffers have grown to their size.
const WARM_UP: usize = 2 * ROUND;
/// How long a round waits for the agent to turn a knob; it takes two to three windows.
const TURN: Duration = Duration::from_secs(3);

#[test]
fn a_thousand_starts_and_stops_leave_the_agent_as_it_was() {
    let name = format!("ft-daemon-churn-{}", std::process::id());
    let contention = Contention::start(&name).unwrap();
    let originals = contention.raw();
    let config = format!("max_vms = 128\n{}", eager(&name, "off", &["churn-*"]));
    let site = Site::new(&config).unwrap();
    let agent = site.run(&["--mode", "enforce"]).unwrap();
    contention.wait_for_change(&originals, LIMIT);

    let pid = agent.pid().to_string();
    let footprint = || Footprint::of(&pid, vms(&agent)).unwrap();
    let (mut before, mut turned) = (footprint(), 0);
    for first in (0..VMS).step_by(ROUND) {
        if first == WARM_UP {
            before = footprint();
        }
        turned += u32::from(round(&agent, contention.folder(), first));
    }
    let after = footprint();
    println!("after {VMS} starts and stops: {after:?}, after {WARM_UP}: {before:?}");
    after.has_not_grown_since(&before);
    no_stale_watch(&pid, &hierarchies().cpu);

    let journal = std::fs::read_to_string(site.state().join("journal")).unwrap();
    println!("in {turned} rounds a knob was turned; the journal has {} bytes", journal.len());
    assert!(turned > 0 && journal.contains("\"vm\":\"churn-"), "the knobs took no part");
    // It is rewritten at 256 KiB; one plan may come on top.
    assert!(journal.len() < 320 * 1024);
    let inspection = inspect(&site.state()).unwrap();
    assert_eq!(inspection.damage, None);
    let open: Vec<_> = inspection.open.iter().filter(|vm| vm.0.starts_with("churn-")).collect();
    assert!(open.is_empty(), "{open:?}");
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0), "{}", site.log());
    assert_eq!(contention.raw(), originals);
}

/// Starts [`ROUND`] VMs, two of them with a spinning task, waits until the agent shows them
/// and until it turns the knob of one that spins, and stops them. Whether it did turn one.
fn round(agent: &Agent, folder: &Path, first: usize) -> bool {
    let vms: Vec<PathBuf> =
        (first..first + ROUND).map(|n| folder.join(format!("churn-{n}"))).collect();
    vms.iter().for_each(|vm| make_tree(vm).unwrap());
    let busy = &vms[..2];
    let originals = raw(busy);
    let spin = || loop {
        std::hint::spin_loop();
    };
    let tasks: Vec<Member> =
        busy.iter().map(|vm| Member::start_in(&vm.join("libvirt/vcpu0"), None, spin)).collect();
    until(LIMIT, "50 VMs in /metrics", || (shown(agent) == ROUND).then_some(()));
    // Not each time: what did not help lately is not tried again at once.
    let turned = eventually(TURN, "turned knob", || Ok((raw(busy) != originals).then_some(())));
    drop(tasks);
    vms.iter().for_each(|vm| remove_tree(vm).unwrap());
    until(LIMIT, "end of the 50 VMs in /metrics", || (shown(agent) == 0).then_some(()));
    turned.is_ok()
}

/// All VMs that the agent knows.
fn vms(agent: &Agent) -> usize {
    let vms: serde_json::Value = serde_json::from_str(&agent.get("/v1/vms").unwrap()).unwrap();
    vms["vms"].as_array().unwrap().len()
}

/// The VMs of a round that `/metrics` names.
fn shown(agent: &Agent) -> usize {
    let metrics = agent.get("/metrics").unwrap();
    let names = metrics.split("vm=\"churn-").skip(1);
    names.filter_map(|rest| rest.split('"').next()).collect::<BTreeSet<_>>().len()
}

fn raw(vms: &[PathBuf]) -> Vec<String> {
    let file = file_name(hierarchies().version);
    vms.iter().map(|vm| std::fs::read_to_string(vm.join(file)).unwrap()).collect()
}

fn hierarchies() -> Hierarchies {
    Hierarchies::find(Path::new("/sys/fs/cgroup")).unwrap()
}
