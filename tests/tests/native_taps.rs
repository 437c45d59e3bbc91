//! Tap devices as the running agent shows them: both directions, devices that go and come back,
//! more flows than there is room for.

use formtune_tests::agent::{Agent, Site};
use formtune_tests::frames::Wire;
use formtune_tests::net;
use formtune_tests::taps::TapGuest;
use formtune_tests::vm_cgroup::VmCgroup;
use formtune_tests::wait::until;
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);
const TAP: &str = "ft-tap0";

/// An agent for one VM, in a network namespace of the test's own, that looks at everything
/// whatever it costs.
fn start(vm: &VmCgroup) -> (Site, Agent) {
    let config = format!(
        "probe_budget = 64\nlibvirt = \"off\"\nlisten = \"off\"\ncgroups = [\"{}\"]",
        vm.pattern()
    );
    let site = Site::new(&config).unwrap();
    let agent = site.run(&[]).unwrap();
    (site, agent)
}

/// The VM's process with its device, once the agent looks at it; and the host's side.
fn attach(agent: &Agent, vm: &VmCgroup) -> (TapGuest, File) {
    let guest = TapGuest::start(vm, &[TAP]);
    until(LIMIT, "tap device that is looked at", || {
        (agent.metric("formtune_tcp_taps").unwrap() == Some(1.0)).then_some(())
    });
    (guest, net::sender(TAP).unwrap())
}

/// Counters of the VM's TCP by name and labels, those of the guest's.
fn counters(agent: &Agent, vm: &VmCgroup) -> BTreeMap<String, f64> {
    let text = agent.get("/metrics").unwrap();
    let of = format!("{{vm=\"{}\",scope=\"guest\",", vm.id().0);
    let lines = text.lines().filter(|line| line.starts_with("formtune_vm_tcp_"));
    lines
        .filter_map(|line| {
            let (name, rest) = line.split_once(&of)?;
            let (direction, value) = rest.split_once("} ")?;
            Some((format!("{name} {direction}"), value.parse().unwrap()))
        })
        .collect()
}

fn of(counters: &BTreeMap<String, f64>, name: &str, direction: &str) -> f64 {
    let name = format!("formtune_vm_tcp_{name}_total direction=\"{direction}\"");
    *counters.get(&name).unwrap_or_else(|| panic!("no {name} in {counters:?}"))
}

/// Each way has its own labels; and nothing that is exported goes back when the device is taken
/// away, under the process that holds it and with it, and made again.
#[test]
fn both_directions_are_exported_and_never_go_back() {
    const ROUNDS: u32 = 4;
    // To the host and to the guest, each with another number of all and of those sent again.
    const SENT: (u32, u32) = (30, 10);
    const RECEIVED: (u32, u32) = (50, 5);
    const LEN: u16 = 100;
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-taps-both");
    let (site, agent) = start(&vm);
    let mut last = BTreeMap::new();
    let grown = |last: &mut BTreeMap<String, f64>| {
        let now = counters(&agent, &vm);
        for (name, before) in last.iter() {
            let value = *now.get(name).unwrap_or_else(|| panic!("{name} is gone"));
            assert!(value >= *before, "{name}: {value} after {before}");
        }
        *last = now;
    };
    for round in 0..ROUNDS {
        let (mut guest, mut host) = attach(&agent, &vm);
        let frame = |n: u32| Wire::data(round as u16, n * u32::from(LEN), LEN).v4();
        for n in 0..SENT.0 {
            guest.send(&frame(n));
        }
        (0..SENT.1).for_each(|n| guest.send(&frame(n)));
        for n in (0..RECEIVED.0).chain(0..RECEIVED.1) {
            host.write_all(&frame(n)).unwrap();
        }
        let all = f64::from((round + 1) * (SENT.0 + SENT.1 + RECEIVED.0 + RECEIVED.1));
        until(LIMIT, "count of all segments", || {
            grown(&mut last);
            let [sent, received] = ["sent", "received"].map(|way| of(&last, "segments", way));
            (sent + received >= all).then_some(())
        });
        if round % 2 == 0 {
            let deleted = Command::new("ip").args(["link", "del", TAP]).status();
            assert!(deleted.unwrap().success());
        }
        guest.end();
        until(LIMIT, "end of the tap device", || {
            grown(&mut last);
            (agent.metric("formtune_tcp_taps").unwrap() == Some(0.0)).then_some(())
        });
        grown(&mut last);
    }
    for (direction, (new, again)) in [("sent", SENT), ("received", RECEIVED)] {
        let total = |n: u32| f64::from(n * ROUNDS);
        let expected = [
            ("segments", total(new + again)),
            ("payload_bytes", total((new + again) * u32::from(LEN))),
            ("retransmits", total(again)),
            ("reordered", 0.0),
            ("unread", 0.0),
            ("untracked", 0.0),
        ];
        for (name, value) in expected {
            assert_eq!(of(&last, name, direction), value, "{name}, {direction}");
        }
    }
    assert!(agent.end(Signal::SIGTERM).unwrap().success(), "{}", site.log());
}

/// With more flows at once than there is room for, some are followed and of the others only the
/// segments are counted; later there is room again.
#[test]
fn flows_without_room_are_counted_as_such() {
    // In IPv4 and in IPv6 alike: half as many again as there are places, each silent for a
    // moment only.
    const FLOWS: u16 = 50_000;
    const LEN: u16 = 10;
    net::own_namespace().unwrap();
    let vm = VmCgroup::new("ft-taps-full");
    let (site, agent) = start(&vm);
    let (mut guest, _host) = attach(&agent, &vm);
    let count = |all: f64| {
        until(LIMIT, "count of all segments", || {
            let counted = counters(&agent, &vm);
            (of(&counted, "segments", "sent") >= all).then_some(counted)
        })
    };
    for flow in 0..FLOWS {
        for frame in [Wire::data(flow, 0, LEN).v4(), Wire::data(flow, 0, LEN).v6(&[])] {
            // Each at once again.
            guest.send(&frame);
            guest.send(&frame);
        }
    }
    let flows = f64::from(FLOWS) * 2.0;
    let counted = count(flows * 2.0);
    let get = |name: &str| of(&counted, name, "sent");
    println!("{counted:?}");
    assert_eq!((get("segments"), get("payload_bytes")), (flows * 2.0, flows * 20.0));
    assert_eq!((get("reordered"), get("unread")), (0.0, 0.0));
    let (again, untracked) = (get("retransmits"), get("untracked"));
    assert!(untracked > 0.0, "all had room");
    // Of a flow that is followed one segment is sent again; of another both are untracked, or,
    // if there was room in between, the first.
    assert!(again > 0.0 && again + untracked >= flows, "{again} and {untracked} of {flows}");
    assert!(again * 2.0 + untracked <= flows * 2.0, "{again} and {untracked} of {flows}");
    assert!(counted.keys().all(|name| !name.contains("received") || counted[name] == 0.0));

    // Until all of them may make room.
    std::thread::sleep(Duration::from_millis(2_600));
    for flow in 0..100 {
        (0..2).for_each(|_| guest.send(&Wire::data(flow, 1_000, LEN).v4_tagged(&[7])));
    }
    let later = count(flows * 2.0 + 200.0);
    let get = |name: &str| of(&later, name, "sent");
    assert_eq!((get("retransmits"), get("untracked")), (again + 100.0, untracked));
    assert!(agent.end(Signal::SIGTERM).unwrap().success(), "{}", site.log());
}
