//! `formtune run` on a node with more VMs than it has room for: said once, shown, and nobody is
//! charged with what is another's.

use formtune_tests::agent::{Agent, Site};
use formtune_tests::block::LoopDevice;
use formtune_tests::many::Folder;
use formtune_tests::vm_cgroup::Member;
use formtune_tests::wait::until;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);
/// Each takes a row for its reads and one for its writes: more than the 260 there are for one VM
/// and the host.
const VMS: usize = 150;
/// Reads, and writes, of each VM.
const EACH: u64 = 3;

#[test]
fn more_vms_than_there_is_room_for_are_shown_and_charged_to_nobody() {
    let name = format!("ft-crowd-{}", std::process::id());
    let folder = Folder::make(&name).unwrap();
    let device = LoopDevice::new();
    let config = format!(
        "max_vms = 1\nlibvirt = \"off\"\nlisten = \"off\"\ntick = \"100ms\"\n\
         cgroups = [\"{name}/{{name}}\"]\n"
    );
    let site = Site::new(&config).unwrap();
    let agent = site.run(&[]).unwrap();
    let vms: Vec<String> = (0..VMS).map(|n| format!("vm-{n}")).collect();
    vms.iter().for_each(|vm| folder.add(vm).unwrap());
    let metric = |name: &str| metric(&agent, name);
    until(LIMIT, "all VMs but one without a slot", || {
        (metric("formtune_probe_unmeasured_vms") == (VMS - 1) as f64).then_some(())
    });
    assert_eq!((metric("formtune_probe_slots"), metric("formtune_probe_slots_used")), (1.0, 1.0));
    // The block cgroups of VMs that are new are looked for once per second.
    until(LIMIT, "block I/O of all VMs measured", || {
        (get(&agent, "/v1/vms")["vms"].as_array().unwrap().iter().all(|vm| vm["block"].is_object()))
            .then_some(())
    });

    for vm in &vms {
        let (go, say) = nix::unistd::pipe().unwrap();
        let member = Member::start_in(&folder.vcpus(vm).join("vcpu0"), None, || {
            // Until it is where it belongs in every hierarchy.
            let _ = nix::unistd::read(&go, &mut [0]);
            transfer(device.path());
        });
        folder.take(vm, member.id()).unwrap();
        nix::unistd::write(&say, &[1]).unwrap();
        member.join();
    }
    let lost = "formtune_block_lost_total{reason=\"full\"}";
    until(LIMIT, "requests without a row", || (metric(lost) > 0.0).then_some(()));
    std::thread::sleep(Duration::from_millis(500));
    let rows = (metric("formtune_block_rows"), metric("formtune_block_rows_used"));
    assert_eq!(rows, (260.0, 260.0));

    // Some kernels of virtual machines run no program on top of certain tasks of theirs.
    let answer = get(&agent, "/v1/vms");
    let counted: Vec<u64> = answer["vms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| requests(&vm["block"]["devices"], device.name()))
        .collect();
    let (all, sum) = (2 * EACH * VMS as u64, counted.iter().sum::<u64>());
    let full = metric(lost) as u64;
    println!("{sum} requests counted, {full} without a row, of {all}");
    assert!(counted.iter().all(|count| *count <= 2 * EACH), "charged to another: {counted:?}");
    assert!(counted.iter().filter(|count| **count == 0).count() > 5, "{counted:?}");
    assert!(sum + full > all * 9 / 10, "{sum} counted and {full} without a row, of {all}");
    let host = &get(&agent, "/v1/node")["block"]["host"];
    assert_eq!(requests(host, device.name()), 0, "charged to the host: {host}");

    let log = site.log();
    for said in ["slots of the run-queue probe are taken", "rows of the probe are taken"] {
        let lines = log.lines().filter(|line| line.contains(said)).count();
        assert_eq!(lines, 1, "{said}: {log}");
    }
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0), "{}", site.log());
}

/// Reads and writes of a device, in what the API says of devices.
fn requests(devices: &Value, name: &str) -> u64 {
    let devices = devices.as_array().into_iter().flatten().filter(|of| of["device"] == name);
    let ops = devices.flat_map(|device| device["ops"].as_array()).flatten();
    ops.filter_map(|op| op["requests"].as_u64()).sum()
}

/// What a VM's process does; system calls only.
fn transfer(device: &Path) {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let direct = OFlag::O_DIRECT.bits();
    let mut options = File::options();
    let Ok(disk) = options.read(true).write(true).custom_flags(direct).open(device) else {
        return;
    };
    let mut page = Page([7; 4096]);
    for at in 0..EACH {
        let _ = disk.read_exact_at(&mut page.0, at * 4096);
        let _ = disk.write_all_at(&page.0, at * 4096);
    }
}

fn get(agent: &Agent, path: &str) -> Value {
    serde_json::from_str(&agent.get(path).unwrap()).unwrap()
}

/// A value of `/metrics`; 0 for what is not there.
fn metric(agent: &Agent, name: &str) -> f64 {
    let metrics = agent.get("/metrics").unwrap();
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}
