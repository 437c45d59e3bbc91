//! The libvirt connection against a real libvirtd with a real QEMU domain.
#![cfg(feature = "libvirt")]

use formtune_agent::hypervisor::{CALL_LIMIT, DomainEvent, Hypervisor, HypervisorError};
use formtune_tests::libvirtd::Libvirtd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// Shared by the tests of this file, which run one after another.
fn libvirt_cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("libvirt-cache")
}

/// Unique among everything that runs on the machine.
fn unique(name: &str) -> String {
    format!("ft-act-{name}-{}", std::process::id())
}

fn next(events: &Receiver<DomainEvent>) -> DomainEvent {
    events.recv_timeout(Duration::from_secs(30)).expect("an event within 30 s")
}

fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn lists_hears_reads_and_sets_across_a_restart_of_libvirtd() {
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = Libvirtd::start(dir.path(), &libvirt_cache()).unwrap();
    let libvirt = Hypervisor::connect(&daemon.uri()).unwrap();
    let events = libvirt.subscribe();
    assert_eq!(libvirt.domains().unwrap(), []);

    let name = unique("a");
    daemon.start_spinning(&name).unwrap();
    assert!(matches!(next(&events), DomainEvent::Started { name: started, .. } if started == name));
    let listed = libvirt.domains().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].vcpus), (name.as_str(), 1));
    assert_eq!(listed[0].uuid.len(), 36);

    let shares = daemon.cpu_cgroup(&name).unwrap().join("cpu.shares");
    let read = || std::fs::read_to_string(&shares).unwrap().trim().parse::<u64>().unwrap();
    assert_eq!(libvirt.cpu_shares(&name).unwrap(), read());
    libvirt.set_cpu_shares(&name, 2000).unwrap();
    assert_eq!((libvirt.cpu_shares(&name).unwrap(), read()), (2000, 2000));

    let absent = libvirt.set_cpu_shares("ft-act-none", 100).unwrap_err();
    assert_eq!(absent.to_string(), "libvirt knows no running domain ft-act-none");

    daemon.kill().unwrap();
    assert_eq!(next(&events), DomainEvent::Disconnected);
    assert!(matches!(libvirt.domains(), Err(HypervisorError::Disconnected { .. })));
    daemon.restart().unwrap();
    assert_eq!(next(&events), DomainEvent::Reconnected);
    // libvirtd takes up its running domains in the background.
    let again = until("the domain listed again", || {
        libvirt.domains().ok().filter(|domains| !domains.is_empty())
    });
    assert_eq!(again, listed);
    assert_eq!(until("cpu_shares again", || libvirt.cpu_shares(&name).ok()), 2000);

    daemon.destroy(&name).unwrap();
    let stopped = until("the end of the domain", || match next(&events) {
        DomainEvent::Stopped { name, .. } => Some(name),
        _ => None,
    });
    assert_eq!(stopped, name);
    assert_eq!(libvirt.domains().unwrap(), []);
}

#[test]
fn a_hung_libvirtd_costs_one_limit_and_then_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Libvirtd::start(dir.path(), &libvirt_cache()).unwrap();
    let libvirt = Hypervisor::connect(&daemon.uri()).unwrap();
    let pid = nix::unistd::Pid::from_raw(daemon.pid().unwrap().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();

    let begin = Instant::now();
    let error = libvirt.domains().unwrap_err();
    assert!(begin.elapsed() >= CALL_LIMIT);
    assert!(matches!(error, HypervisorError::NoAnswer { .. }), "{error}");
    // The thread is still in that call: the next one is refused, not queued behind it.
    let begin = Instant::now();
    assert!(matches!(libvirt.domains(), Err(HypervisorError::NoAnswer { .. })));
    assert!(begin.elapsed() < CALL_LIMIT);

    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    let listed = until("an answer again", || libvirt.domains().ok());
    assert_eq!(listed, []);
}

#[test]
fn no_libvirtd_is_one_clear_line() {
    let uri = "qemu+unix:///system?socket=/nonexistent/libvirt-sock";
    let error = Hypervisor::connect(uri).unwrap_err().to_string();
    assert!(error.starts_with(&format!("failed to connect to libvirt at {uri}: ")), "{error}");
    assert_eq!(error.lines().count(), 1);
}
