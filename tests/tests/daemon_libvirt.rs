//! A libvirtd that comes up after the agent: until then the agent finds its domains by their
//! cgroups, from then on it asks libvirt and acts through it.
#![cfg(feature = "libvirt")]

use formtune_tests::agent::{Agent, Site};
use formtune_tests::contention::{Contention, eager};
use formtune_tests::libvirtd::Libvirtd;
use formtune_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_libvirtd_that_comes_after_the_agent_gets_its_domains() {
    let dir = tempfile::Builder::new().prefix("ft-").tempdir().unwrap();
    let mut libvirtd = Libvirtd::start(dir.path()).unwrap();
    let domain = format!("ft-daemon-late-{}", std::process::id());
    libvirtd.start_spinning(&domain).unwrap();
    let uuid = libvirtd.virsh_ok(&["domuuid", &domain]).unwrap();
    let original = shares(&libvirtd, &domain);
    libvirtd.kill().unwrap();

    let name = format!("ft-daemon-beside-{}", std::process::id());
    let site = Site::new(&eager(&name, &libvirtd.uri(), &[&domain])).unwrap();
    let agent = site.run(&["--mode", "enforce"]).unwrap();
    let found = until(LIMIT, "VM found by its cgroup", || vm(&agent, &domain));
    assert_eq!((&found["owner"], &found["uuid"]), (&Value::from("cgroup"), &Value::Null));
    assert_eq!(libvirt_state(&agent), "unreachable");
    // Long enough for a few attempts to connect.
    std::thread::sleep(Duration::from_secs(2));
    let log = site.log();
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    assert!(warnings[0].contains("finding VMs by their cgroups until it answers"), "{log}");

    libvirtd.restart().unwrap();
    let taken = until(LIMIT, "VM that is libvirt's", || {
        vm(&agent, &domain).filter(|vm| vm["owner"] == "libvirt")
    });
    assert_eq!(taken["uuid"], Value::from(uuid));
    assert_eq!(taken["cgroup"], found["cgroup"]);
    assert_eq!(libvirt_state(&agent), "connected");
    assert_eq!(shares(&libvirtd, &domain), original, "changed without a victim");

    let contention = Contention::start(&name).unwrap();
    let originals = contention.raw();
    let lowered = until(LIMIT, "change that libvirt knows of", || {
        (shares(&libvirtd, &domain) != original).then(|| defined_shares(&libvirtd, &domain))?
    });
    println!("cpu_shares of {domain}: {original}, then {lowered} through libvirt");
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0), "{}", site.log());
    assert_eq!(shares(&libvirtd, &domain), original);
    assert_eq!(contention.raw(), originals);
}

fn vm(agent: &Agent, id: &str) -> Option<Value> {
    // 404 until it is found.
    let body = agent.get(&format!("/v1/vms/{id}")).ok()?;
    Some(serde_json::from_str(&body).unwrap())
}

fn libvirt_state(agent: &Agent) -> Value {
    let node: Value = serde_json::from_str(&agent.get("/v1/node").unwrap()).unwrap();
    node["libvirt"]["state"].clone()
}

/// What `virsh schedinfo` says, which is what the cgroup holds.
fn shares(libvirtd: &Libvirtd, domain: &str) -> u64 {
    // A daemon that was just started takes up its domains in the background.
    until(LIMIT, "cpu_shares in `virsh schedinfo`", || {
        let shown = libvirtd.virsh_ok(&["schedinfo", domain, "--live"]).ok()?;
        let line = shown.lines().find(|line| line.starts_with("cpu_shares"))?;
        line.split(':').nth(1)?.trim().parse().ok()
    })
}

/// What libvirt itself notes of the running domain: only what was set through it.
fn defined_shares(libvirtd: &Libvirtd, domain: &str) -> Option<u64> {
    let xml = libvirtd.virsh_ok(&["dumpxml", domain]).unwrap();
    let (_, rest) = xml.split_once("<shares>")?;
    rest.split_once("</shares>")?.0.parse().ok()
}
