//! `formtune run` with all of its sensors at work while VMs come and go: what each holds for a
//! VM (slot, rows, places, cgroups in the tables) goes with it.

use formtune_common::block::HOST;
use formtune_tests::agent::{Agent, Site};
use formtune_tests::block::LoopDevice;
use formtune_tests::footprint::{Footprint, no_stale_watch};
use formtune_tests::many::Folder;
use formtune_tests::maps::{self, Entry};
use formtune_tests::net;
use formtune_tests::vm_cgroup::Member;
use formtune_tests::wait::until;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);
const VMS: usize = 500;
/// VMs that are there at once.
const ROUND: usize = 50;
/// After these, buffers have grown to their size.
const WARM_UP: usize = 2 * ROUND;
/// Room for so few VMs that slots, rows and places that do not come back run out.
const MAX_VMS: u64 = 64;

#[test]
fn five_hundred_starts_and_stops_leave_every_sensor_as_it_was() {
    net::own_namespace().unwrap();
    let name = format!("ft-churn-sensors-{}", std::process::id());
    let folder = Folder::make(&name).unwrap();
    let device = LoopDevice::new();
    // Nobody answers there: who connects has to send again after a second.
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    net::drop_some(&deaf, u16::MAX).unwrap();
    let address = deaf.local_addr().unwrap();
    let config = format!(
        "max_vms = {MAX_VMS}\nlibvirt = \"off\"\nlisten = \"off\"\ntick = \"100ms\"\n\
         cgroups = [\"{name}/{{name}}\"]\n"
    );
    let site = Site::new(&config).unwrap();
    let agent = site.run(&[]).unwrap();
    let pid = agent.pid().to_string();
    let footprint = || Footprint::of(&pid, 0).unwrap();
    let mut before = footprint();
    for first in (0..VMS).step_by(ROUND) {
        if first == WARM_UP {
            before = footprint();
        }
        round(&agent, &folder, device.path(), address, first);
    }

    // Slots and rows rest for a second.
    let node = until(LIMIT, "end of what was held for VMs", || {
        let node = get(&agent, "/v1/node");
        let host = node["block"]["host"].as_array().unwrap();
        let rows: usize = host.iter().map(|device| device["ops"].as_array().unwrap().len()).sum();
        let held = [&node["probe"]["slots_used"], &node["tcp"]["taps"]].map(Value::as_u64);
        let used = node["block"]["rows_used"].as_u64().unwrap();
        (held == [Some(0); 2] && used == rows as u64).then_some(node)
    });
    for (of, what) in [
        ("probe", "unmeasured_vms"),
        ("probe", "unmeasured_cgroups"),
        ("block", "unmeasured_cgroups"),
        ("tcp", "unmeasured_vms"),
        ("tcp", "unmeasured_cgroups"),
        ("tcp", "unmeasured_taps"),
    ] {
        assert_eq!(node[of][what], 0, "{of}.{what}");
    }
    assert_eq!(node["block"]["counters"]["full"], 0);
    assert_eq!(of_vms(&agent), [vec![0; TABLES], vec![0; TABLES], vec![0]]);
    let after = footprint();
    println!("after {VMS} starts and stops: {after:?}, after {WARM_UP}: {before:?}");
    after.has_not_grown_since(&before);
    no_stale_watch(&pid, folder.cpu().parent().unwrap());
    let metrics = agent.get("/metrics").unwrap();
    let left: Vec<_> = metrics.lines().filter(|line| line.contains("vm-")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0), "{}", site.log());
}

/// Starts [`ROUND`] VMs, each with a process that waits for CPUs, reads and writes, holds a tap
/// device and sends a segment again; waits until all of it is counted for all; stops them.
fn round(agent: &Agent, folder: &Folder, device: &Path, address: SocketAddr, first: usize) {
    let vms: Vec<String> = (first..first + ROUND).map(|n| format!("vm-{n}")).collect();
    let (go, mut say) = nix::unistd::pipe().map(|(r, w)| (File::from(r), File::from(w))).unwrap();
    vms.iter().for_each(|vm| folder.add(vm).unwrap());
    let members: Vec<Member> = vms
        .iter()
        .enumerate()
        .map(|(at, vm)| {
            let tap = format!("ft-churn{at}");
            let body = || work(&go, &tap, device, address);
            let member = Member::start_in(&folder.vcpus(vm).join("vcpu0"), None, body);
            folder.take(vm, member.id()).unwrap();
            member
        })
        .collect();
    say.write_all(&[1; ROUND]).unwrap();
    let begun = Instant::now();
    let mut counted = measured(agent);
    while counted != [ROUND; 4] {
        assert!(begun.elapsed() < LIMIT, "run queue, block, host's TCP, tap devices: {counted:?}");
        std::thread::sleep(Duration::from_millis(50));
        counted = measured(agent);
    }
    // Run queue, block, host's TCP: a cgroup each at least; a device each.
    let [tables, spills, rows] = of_vms(agent);
    let known: Vec<usize> =
        tables.iter().zip(&spills).map(|(table, spill)| table + spill).collect();
    assert!(known.len() == TABLES && known.iter().all(|known| *known >= ROUND), "{known:?}");
    assert!(rows[0] >= 2 * ROUND, "{} rows for reads and writes of {ROUND} VMs", rows[0]);
    drop(members);
    vms.iter().for_each(|vm| folder.remove(vm));
    until(LIMIT, "end of the 50 VMs in /metrics", || {
        (!agent.get("/metrics").unwrap().contains("vm=\"vm-")).then_some(())
    });
}

/// What a VM's process does, until it is killed; system calls only.
fn work(mut go: &File, tap: &str, device: &Path, address: SocketAddr) {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    // Until it is where it belongs in every hierarchy.
    let _ = go.read(&mut [0]);
    let Ok(_tap) = net::tap(tap) else { return };
    let direct = OFlag::O_DIRECT.bits();
    let mut options = File::options();
    let Ok(disk) = options.read(true).write(true).custom_flags(direct).open(device) else {
        return;
    };
    let mut page = Page([7; 4096]);
    loop {
        if disk.read_exact_at(&mut page.0, 0).is_err() || disk.write_all_at(&page.0, 0).is_err() {
            return;
        }
        let _ = TcpStream::connect_timeout(&address, Duration::from_millis(1_200));
    }
}

/// VMs for which the sensors counted something: run queue, block I/O (reads and writes of one
/// device at least), the host's TCP, tap devices.
fn measured(agent: &Agent) -> [usize; 4] {
    let answer = get(agent, "/v1/vms");
    let vms = answer["vms"].as_array().unwrap();
    let count = |of: fn(&Value) -> bool| vms.iter().filter(|vm| of(vm)).count();
    [
        count(|vm| vm["runq"].is_object()),
        count(|vm| {
            let devices = vm["block"]["devices"].as_array();
            let ops = |device: &Value| device["ops"].as_array().map_or(0, Vec::len);
            devices.is_some_and(|devices| devices.iter().any(|device| ops(device) >= 2))
        }),
        count(|vm| vm["tcp"]["host"]["retransmitted"].as_u64() > Some(0)),
        count(|vm| vm["tcp"]["guest"]["taps"].as_array().is_some_and(|taps| taps.len() == 1)),
    ]
}

/// Probes that tell VMs apart by a table: run queue, block, host's TCP, tap devices.
const TABLES: usize = 4;

/// What the kernel's maps hold of VMs: cgroups and devices in each `TABLE` and each `SPILL`, and
/// keys that lead to a row of the block probe's, but for the host's.
fn of_vms(agent: &Agent) -> [Vec<usize>; 3] {
    let held = |name: &str, of_vm: fn(&Entry) -> bool| {
        let maps = maps::named(agent.pid(), name).unwrap();
        maps.iter().map(|map| map.iter().filter(|entry| of_vm(entry)).count()).collect()
    };
    // `formtune_common::block::Key` begins with whose it is.
    let whose = |(key, _): &Entry| key[..4] != HOST.to_ne_bytes();
    [held("TABLE", |_| true), held("SPILL", |_| true), held("ROW_OF", whose)]
}

fn get(agent: &Agent, path: &str) -> Value {
    serde_json::from_str(&agent.get(path).unwrap()).unwrap()
}
