//! VMs that come and go on the running kernel: found in time, and nothing left behind.

use formtune_agent::sense::Sense;
use formtune_agent::vm::Owner;
use formtune_core::units::VmId;
use formtune_tests::footprint::{Footprint, no_stale_watch};
use formtune_tests::sensing::{Sensing, in_time};
use formtune_tests::vm_cgroup::{Member, VmCgroup, make_tree, remove_tree, remove_with_all_below};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A folder for VMs in the `cpu` hierarchy; removed with all below when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let hierarchies = formtune_agent::sense::cgroup::Hierarchies::find(root).unwrap();
        let path = hierarchies.cpu.join(format!("formtune-test-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
    fn pattern(&self) -> String {
        format!("{}/{{name}}", self.0.file_name().unwrap().to_str().unwrap())
    }
    fn start(&self, vm: &str) {
        make_tree(&self.0.join(vm)).unwrap();
    }
    fn stop(&self, vm: &str) {
        remove_tree(&self.0.join(vm)).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        remove_with_all_below(&self.0);
    }
}

#[test]
fn a_vm_that_starts_is_measured_and_one_that_stops_is_gone() {
    let folder = Folder::new("start");
    let mut sensing = Sensing::open(&[folder.pattern()], 64, None);
    let id = VmId::from(format!("a-{}", std::process::id()));
    let name = id.as_str();
    assert!(!sensing.sample().vms.contains_key(&id));
    let gone = |sense: &Sense| !sense.vms().contains_key(&id);
    // Events, not scans, which come every 30 s.
    in_time("VM starts", |attempt| {
        if attempt > 0 {
            folder.stop(name);
            sensing.until("a gone", gone);
        }
        folder.start(name);
        sensing.until("a found", |sense| sense.cgroups(&id) == Some(4))
    });
    let vm = sensing.sense.vms()[&id].clone();
    assert_eq!((vm.owner.clone(), vm.vcpus), (Owner::Cgroup, 1));
    assert_eq!(vm.cgroup, folder.0.join(name));

    // A vCPU that is plugged in later, and one that is pulled.
    let vcpu1 = folder.0.join(name).join("libvirt/vcpu1");
    in_time("vCPU is plugged in", |attempt| {
        if attempt > 0 {
            std::fs::remove_dir(&vcpu1).unwrap();
            sensing.until("vcpu1 gone", |sense| sense.cgroups(&id) == Some(4));
        }
        std::fs::create_dir(&vcpu1).unwrap();
        sensing.until("vcpu1 found", |sense| sense.cgroups(&id) == Some(5))
    });
    assert_eq!(sensing.sense.vms()[&id].vcpus, 2);
    std::fs::remove_dir(&vcpu1).unwrap();
    sensing.until("vcpu1 gone", |sense| sense.cgroups(&id) == Some(4));

    in_time("VM stops", |attempt| {
        if attempt > 0 {
            folder.start(name);
            sensing.until("a found", |sense| sense.cgroups(&id) == Some(4));
        }
        folder.stop(name);
        sensing.until("a gone", gone)
    });
    sensing.nothing_left_over();
    assert!(sensing.sense.runq(&id).is_none());
}

/// A VM that is started again under its name is another one, and what its predecessor
/// waited is not its own, though it may get the same slot.
#[test]
fn a_vm_started_again_begins_at_zero() {
    let name = format!("ft-again-{}", std::process::id());
    let group = VmCgroup::new(&name);
    let mut sensing = Sensing::open(&[group.pattern()], 1, None);
    let spin = || loop {
        std::thread::sleep(Duration::from_micros(100));
    };
    let member = Member::start(&group, "vcpu0", None, spin);
    let id = group.id();
    sensing.until("waits", |sense| sense.runq(&id).is_some_and(|runq| runq.count > 100));
    let first = sensing.sense.vms()[&id].cgroup_id;
    drop(member);
    drop(group);
    let _group = VmCgroup::new(&name);
    sensing.until("the second", |sense| {
        sense.vms().get(&id).is_some_and(|vm| vm.cgroup_id != first) && sense.runq(&id).is_some()
    });
    std::thread::sleep(Duration::from_millis(50));
    sensing.sample();
    assert_eq!(sensing.sense.runq(&id).map(|runq| runq.count), Some(0));
}

#[test]
fn a_thousand_starts_and_stops_leave_nothing() {
    let folder = Folder::new("churn");
    let mut sensing = Sensing::open(&[folder.pattern()], 128, None);
    let round = |sensing: &mut Sensing, first: usize| {
        let ids: Vec<VmId> =
            (first..first + 50).map(|n| VmId::from(format!("churn-{n}"))).collect();
        ids.iter().for_each(|id| folder.start(&id.0));
        sensing.until("50 found", |s| ids.iter().all(|id| s.cgroups(id) == Some(4)));
        ids.iter().for_each(|id| folder.stop(&id.0));
        sensing.until("none left", |s| !ids.iter().any(|id| s.vms().contains_key(id)));
        sensing.nothing_left_over();
    };
    // Buffers grow to their size with the first hundred.
    round(&mut sensing, 0);
    round(&mut sensing, 50);
    let before = Footprint::of("self", sensing.sense.vms().len()).unwrap();
    for first in (100..1_100).step_by(50) {
        round(&mut sensing, first);
    }
    let after = Footprint::of("self", sensing.sense.vms().len()).unwrap();
    println!("after 1,000 starts and stops: {after:?}, before: {before:?}");
    after.has_not_grown_since(&before);
    no_stale_watch("self", &sensing.sense.health().hierarchies.cpu);
}

#[test]
fn what_has_no_place_in_the_table_spills_and_comes_back() {
    // With few slots the table has its least length, 4,096; one VM of 5,004 groups fills it.
    let folder = Folder::new("spill");
    let mut sensing = Sensing::open(&[folder.pattern()], 8, None);
    let leaves = 5_000;
    let id = VmId::from(format!("spill-{}", std::process::id()));
    let below = folder.0.join(id.as_str()).join("libvirt");
    folder.start(&id.0);
    for n in 0..leaves {
        std::fs::create_dir(below.join(format!("iothread{n}"))).unwrap();
    }
    let all = leaves + 4;
    sensing.until("all known", |sense| sense.cgroups(&id) == Some(all));
    let health = sensing.sense.health();
    println!("{} cgroups, {} spilled", health.cgroups, health.cgroups_spilled);
    assert!(health.cgroups_spilled >= all - 4_096 && health.cgroups_not_measured == 0);
    for n in 0..leaves {
        std::fs::remove_dir(below.join(format!("iothread{n}"))).unwrap();
    }
    sensing.until("all gone", |sense| sense.cgroups(&id) == Some(4));
    sensing.nothing_left_over();
    folder.stop(&id.0);
    sensing.until("none left", |sense| !sense.vms().contains_key(&id));
    sensing.nothing_left_over();
}
