//! Domains that a real libvirtd starts and stops, as the senses see them: in time, under
//! libvirt's name, while libvirtd is away too, and nothing left behind.
#![cfg(feature = "libvirt")]

use formtune_agent::hypervisor::Hypervisor;
use formtune_agent::sense::Sense;
use formtune_agent::vm::{Owner, Vm};
use formtune_core::units::VmId;
use formtune_tests::libvirtd::Libvirtd;
use formtune_tests::sensing::{IN_TIME, Sensing, in_time};
use formtune_tests::wait::until;
use std::time::Duration;

/// What the senses know of a VM, once it is measured and libvirt has said what it is.
fn measured<'a>(sense: &'a Sense, id: &VmId) -> Option<&'a Vm> {
    let vm = sense.vms().get(id)?;
    let owner = Owner::Libvirt { domain: id.to_string() };
    (sense.runq(id).is_some() && vm.owner == owner && vm.uuid.is_some()).then_some(vm)
}

#[test]
fn a_domain_is_measured_in_time_keeps_its_name_and_leaves_nothing() {
    let dir = tempfile::Builder::new().prefix("ft-").tempdir().unwrap();
    let mut libvirtd = Libvirtd::start(dir.path()).unwrap();
    let hypervisor = Hypervisor::connect(&libvirtd.uri()).unwrap();
    let mut sensing = Sensing::open(&[], 64, Some(hypervisor.clone()));
    // Its cgroup has no underscore, and with systemd the dashes are escaped.
    let id = VmId::from(format!("ft-web_3.old-{}", std::process::id()));
    let name = id.as_str();
    let known = sensing.sense.health().domains_without_cgroup;
    let gone = |sense: &Sense| !sense.vms().contains_key(&id);

    // From the return of `virsh create`.
    in_time("domain starts", |attempt| {
        if attempt > 0 {
            libvirtd.destroy(name).unwrap();
            sensing.until("domain gone", gone);
        }
        libvirtd.start_spinning(name).unwrap();
        sensing.until("domain measured", |sense| measured(sense, &id).is_some())
    });
    let vm = measured(&sensing.sense, &id).unwrap().clone();
    assert_eq!(vm.uuid, libvirtd.virsh_ok(&["domuuid", name]).ok());
    assert_eq!((&vm.cgroup, vm.vcpus), (&libvirtd.cpu_cgroup(name).unwrap(), 1));
    assert!(sensing.sense.cgroups(&id).is_some_and(|cgroups| cgroups >= 3), "no vcpu0, emulator");

    // While libvirtd is away, and when it is back, it is the VM that it was.
    let stays = |sensing: &mut Sensing| {
        let reading = sensing.sample();
        assert!(!reading.gone.contains(&id) && !reading.appeared.contains(&id), "{reading:?}");
        assert_eq!(measured(&sensing.sense, &id), Some(&vm));
        std::thread::sleep(Duration::from_millis(250));
    };
    libvirtd.kill().unwrap();
    until(Duration::from_secs(30), "loss of the connection", || {
        stays(&mut sensing);
        (!hypervisor.is_connected()).then_some(())
    });
    (0..IN_TIME).for_each(|_| stays(&mut sensing));
    libvirtd.restart().unwrap();
    until(Duration::from_secs(30), "connection again", || {
        stays(&mut sensing);
        hypervisor.is_connected().then_some(())
    });
    (0..2 * IN_TIME).for_each(|_| stays(&mut sensing));

    libvirtd.destroy(name).unwrap();
    sensing.until("domain gone", gone);
    assert!(sensing.sense.runq(&id).is_none() && sensing.sense.cgroups(&id).is_none());
    sensing.nothing_left_over();
    // libvirt's own list is a moment behind the cgroups.
    sensing.until("list without it", |sense| sense.health().domains_without_cgroup == known);
}
