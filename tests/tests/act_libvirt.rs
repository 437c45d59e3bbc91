//! The libvirt connection against a real libvirtd with a real QEMU domain.
#![cfg(feature = "libvirt")]

use formtune_agent::act::{Act, RestoreResult, raw_of, restore, weight_of};
use formtune_agent::hypervisor::{CALL_LIMIT, DomainEvent, Hypervisor, HypervisorError};
use formtune_agent::sense::cgroup::Hierarchies;
use formtune_agent::vm::{CgroupVersion, Owner, Vm};
use formtune_core::plan::OutcomeResult;
use formtune_core::units::{VmId, Weight};
use formtune_tests::knob::{file_name, setpoint};
use formtune_tests::libvirtd::Libvirtd;
use formtune_tests::wait;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One test after another: the daemons share what they learn of QEMU.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signal(daemon: &Libvirtd, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(daemon.pid().unwrap().try_into().unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// Unique among everything that runs on the machine.
fn unique(name: &str) -> String {
    format!("ft-act-{name}-{}", std::process::id())
}

fn next(events: &Receiver<DomainEvent>) -> DomainEvent {
    events.recv_timeout(Duration::from_secs(30)).expect("an event within 30 s")
}

fn until<T>(what: &str, check: impl FnMut() -> Option<T>) -> T {
    wait::until(Duration::from_secs(30), what, check)
}

fn version() -> CgroupVersion {
    Hierarchies::find(Path::new("/sys/fs/cgroup")).unwrap().version
}

/// What libvirt calls `cpu_shares` for a weight: the kernel's raw value of either version.
fn shares(weight: u32) -> u64 {
    raw_of(version(), Weight::new(weight).unwrap())
}

#[test]
fn lists_hears_reads_and_sets_across_a_restart_of_libvirtd() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = Libvirtd::start(dir.path()).unwrap();
    let libvirt = Hypervisor::connect(&daemon.uri()).unwrap();
    let events = libvirt.subscribe();
    assert_eq!(libvirt.domains().unwrap(), []);

    let name = unique("a");
    daemon.start_spinning(&name).unwrap();
    // That the connection stands may be heard first: it is told to whoever listens by then.
    let started = until("the start of the domain", || match next(&events) {
        DomainEvent::Started { name, .. } => Some(name),
        _ => None,
    });
    assert_eq!(started, name);
    let listed = libvirt.domains().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].vcpus), (name.as_str(), 1));
    assert_eq!(listed[0].uuid.len(), 36);

    let knob = daemon.cpu_cgroup(&name).unwrap().join(file_name(version()));
    let read = || std::fs::read_to_string(&knob).unwrap().trim().parse::<u64>().unwrap();
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
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let daemon = Libvirtd::start(dir.path()).unwrap();
    let libvirt = Hypervisor::connect(&daemon.uri()).unwrap();
    signal(&daemon, nix::sys::signal::Signal::SIGSTOP);

    let begin = Instant::now();
    let error = libvirt.domains().unwrap_err();
    assert!(begin.elapsed() >= CALL_LIMIT);
    assert!(matches!(error, HypervisorError::NoAnswer { .. }), "{error}");
    // The thread is still in that call: the next one is refused, not queued behind it.
    let begin = Instant::now();
    assert!(matches!(libvirt.domains(), Err(HypervisorError::NoAnswer { .. })));
    assert!(begin.elapsed() < CALL_LIMIT);

    signal(&daemon, nix::sys::signal::Signal::SIGCONT);
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

/// A real domain whose knob is changed through libvirt.
struct Domain {
    name: String,
    knob: PathBuf,
    vm: Vm,
}

impl Domain {
    fn start(daemon: &Libvirtd, name: &str) -> Self {
        let name = unique(name);
        daemon.start_spinning(&name).unwrap();
        let cgroup = daemon.cpu_cgroup(&name).unwrap();
        let vm = Vm {
            id: VmId::from(name.clone()),
            uuid: None,
            vcpus: 1,
            owner: Owner::Libvirt { domain: name.clone() },
            cgroup_id: std::fs::metadata(&cgroup).unwrap().ino(),
            cgroup_version: version(),
            cgroup: cgroup.clone(),
        };
        Self { name, knob: cgroup.join(file_name(version())), vm }
    }

    fn raw(&self) -> u64 {
        std::fs::read_to_string(&self.knob).unwrap().trim().parse().unwrap()
    }

    fn set(&self, act: &mut Act, to: u32, plan_seq: u64) -> OutcomeResult {
        let from = weight_of(version(), self.raw());
        act.execute(&self.vm, &setpoint(&self.vm, from, to), plan_seq).result
    }
}

fn applied(value: u32) -> OutcomeResult {
    OutcomeResult::Applied { value: Weight::new(value).unwrap() }
}

#[test]
fn weights_go_through_libvirt_and_come_back_without_it() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut daemon = Libvirtd::start(dir.path()).unwrap();
    let domain = Domain::start(&daemon, "w");
    let libvirt = Hypervisor::connect(&daemon.uri()).unwrap();
    libvirt.set_cpu_shares(&domain.name, 1000).unwrap();
    let (mut act, _) = Act::open(state.path(), Some(libvirt.clone())).unwrap();
    assert_eq!(domain.set(&mut act, 200, 1), applied(200));
    assert_eq!(libvirt.cpu_shares(&domain.name).unwrap(), shares(200));

    // Killed agent, next start.
    drop(act);
    let (mut act, report) = Act::open(state.path(), Some(libvirt.clone())).unwrap();
    assert_eq!(report.restored.knobs[0].result, RestoreResult::Restored { from: shares(200) });
    assert_eq!(libvirt.cpu_shares(&domain.name).unwrap(), 1000);

    // Killed agent and killed libvirtd: the cgroup is written, as libvirt would have.
    assert_eq!(domain.set(&mut act, 300, 1), applied(300));
    daemon.kill().unwrap();
    until("libvirt's end noticed", || libvirt.domains().err());
    let refused = domain.set(&mut act, 400, 2);
    assert!(matches!(refused, OutcomeResult::Refused { .. }), "{refused:?}");
    assert_eq!(domain.raw(), shares(300));
    drop(act);
    let report = restore(state.path(), || None).unwrap();
    assert_eq!(report.restored.knobs[0].result, RestoreResult::Restored { from: shares(300) });
    assert_eq!(domain.raw(), 1000);
    daemon.restart().unwrap();
    assert_eq!(until("cpu_shares again", || libvirt.cpu_shares(&domain.name).ok()), 1000);

    // Somebody else's value, set with virsh.
    let (mut act, _) = Act::open(state.path(), Some(libvirt.clone())).unwrap();
    assert_eq!(domain.set(&mut act, 200, 1), applied(200));
    daemon.virsh_ok(&["schedinfo", &domain.name, "--live", "--set", "cpu_shares=777"]).unwrap();
    let found = weight_of(version(), 777);
    assert_eq!(domain.set(&mut act, 300, 2), OutcomeResult::Yielded { found });
    assert_eq!(act.restore_all().knobs, []);
    assert_eq!(domain.raw(), 777);

    // The domain ends between decision and write.
    daemon.destroy(&domain.name).unwrap();
    until("the cgroup's end", || (!domain.knob.exists()).then_some(()));
    let decided = setpoint(&domain.vm, found, 300);
    let outcome = act.execute(&domain.vm, &decided, 3).result;
    let OutcomeResult::Refused { why } = outcome else { panic!("{outcome:?}") };
    assert!(why.ends_with("is gone"), "{why}");
}

#[test]
fn a_write_that_a_hung_libvirt_makes_late_is_still_undone() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let state = tempfile::tempdir().unwrap();
    let daemon = Libvirtd::start(dir.path()).unwrap();
    let domain = Domain::start(&daemon, "late");
    let original = domain.raw();
    let libvirt = Hypervisor::connect(&daemon.uri()).unwrap();
    let (mut act, _) = Act::open(state.path(), Some(libvirt.clone())).unwrap();
    signal(&daemon, nix::sys::signal::Signal::SIGSTOP);
    let refused = domain.set(&mut act, 200, 1);
    assert!(matches!(refused, OutcomeResult::Refused { .. }), "{refused:?}");
    assert_eq!(domain.raw(), original);
    // Stopping now: the original is there, but that is not the end of it.
    let report = act.restore_all();
    assert!(!report.is_complete(), "{report:?}");
    drop(act);

    signal(&daemon, nix::sys::signal::Signal::SIGCONT);
    until("the late write", || (domain.raw() == shares(200)).then_some(()));
    let libvirt = until("libvirt again", || Hypervisor::connect(&daemon.uri()).ok());
    let (_, report) = Act::open(state.path(), Some(libvirt)).unwrap();
    assert_eq!(report.restored.knobs[0].result, RestoreResult::Restored { from: shares(200) });
    assert_eq!(domain.raw(), original);
}
