//! SIGKILL at every system call that touches the journal, and SIGKILL or a broken connection
//! at every message to libvirt, while it is asked to write: after the next start the domain's
//! weight is at its original, also where libvirt does late what a dead agent asked for.
//! Needs root, strace, libvirt and QEMU.
#![cfg(feature = "libvirt")]

use formtune_agent::act::{Act, RestoreResult};
use formtune_agent::hypervisor::Hypervisor;
use formtune_agent::vm::{CgroupVersion, Owner, Vm};
use formtune_core::plan::OutcomeResult;
use formtune_core::units::VmId;
use formtune_tests::injected::{libvirt_writes, met, order_of_writes, traced};
use formtune_tests::knob::setpoint;
use formtune_tests::libvirtd::Libvirtd;
use formtune_tests::relay::{Fate, Relay};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

const AGENT: &str = env!("CARGO_BIN_EXE_crash_agent");
/// No whole weight.
const ORIGINAL: u64 = 1000;

/// A libvirtd with one spinning domain, a connection to it, and a state folder.
struct Node {
    hypervisor: Hypervisor,
    state: tempfile::TempDir,
    domain: String,
    cgroup: PathBuf,
    libvirtd: Libvirtd,
    dir: tempfile::TempDir,
}

impl Node {
    fn new(name: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("ft-").tempdir().unwrap();
        let libvirtd = Libvirtd::start(dir.path()).unwrap();
        let domain = format!("ft-crash-{name}-{}", std::process::id());
        libvirtd.start_spinning(&domain).unwrap();
        let cgroup = libvirtd.cpu_cgroup(&domain).unwrap();
        let hypervisor = Hypervisor::connect(&libvirtd.uri()).unwrap();
        hypervisor.set_cpu_shares(&domain, ORIGINAL).unwrap();
        let state = tempfile::tempdir().unwrap();
        Self { hypervisor, state, domain, cgroup, libvirtd, dir }
    }

    fn state(&self) -> PathBuf {
        self.state.path().join("state")
    }

    fn shares(&self) -> u64 {
        fs::read_to_string(self.cgroup.join("cpu.shares")).unwrap().trim().parse().unwrap()
    }

    /// A relay to libvirtd, for one agent.
    fn relay(
        &self,
        name: &str,
        decide: impl FnMut(Option<(String, u64)>) -> Fate + Send + 'static,
    ) -> Relay {
        Relay::start(&self.libvirtd.socket(), self.dir.path().join(name), decide).unwrap()
    }

    fn agent(&self, what: &str, uri: &str) -> Command {
        let mut agent = Command::new(AGENT);
        agent.arg(what).arg(self.state()).arg("--libvirt");
        agent.arg(uri).arg(&self.domain).arg(&self.cgroup);
        agent.stdin(Stdio::null());
        agent
    }

    /// The journal and the lock.
    fn paths(&self) -> Vec<PathBuf> {
        let state = self.state();
        ["journal", "journal.new", "lock"].map(|name| state.join(name)).into()
    }

    /// Begins with nothing for `once`, and for the others with what an agent leaves that was
    /// killed at work.
    fn prepare(&self, what: &str) {
        let _ = fs::remove_dir_all(self.state());
        if what == "once" {
            return;
        }
        let uri = self.libvirtd.uri();
        let mut killed = self.agent("loop", &uri).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(killed.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "open\n");
        while self.shares() == ORIGINAL {
            std::thread::sleep(Duration::from_micros(200));
        }
        killed.kill().unwrap();
        killed.wait().unwrap();
    }

    #[track_caller]
    fn is_original(&self, when: &str) {
        assert_eq!(self.shares(), ORIGINAL, "{when}: the weight is left changed");
        let said = self.libvirtd.virsh_ok(&["schedinfo", &self.domain]).unwrap();
        let said = said.lines().find(|line| line.trim_start().starts_with("cpu_shares")).unwrap();
        assert!(said.ends_with(&format!(" {ORIGINAL}")), "{when}: libvirt says {said}");
    }

    /// The next start: the weight must be back, nothing damaged, and enforcing possible.
    fn next_start_restores(&self, after: &str) {
        let (act, report) = Act::open(&self.state(), Some(self.hypervisor.clone()))
            .unwrap_or_else(|error| panic!("{after}: the next start failed: {error}"));
        assert!(report.restored.is_complete(), "{after}: {report:?}");
        assert_eq!(report.damaged, None, "{after}");
        assert!(act.enforce_allowed(), "{after}");
        self.is_original(after);
    }
}

/// Says how a sweep went.
fn report(what: &str, points: u32, begin: Instant) -> u32 {
    let seconds = begin.elapsed().as_secs_f64();
    eprintln!("{what}: {points} points in {seconds:.1} s, none bad");
    points
}

/// One fault at the n-th call on the journal, n = 1, 2, 3 … until a run passes without it.
/// Returns how many points there were.
fn at_calls(node: &Node, what: &str, call: &str, fault: &str) -> u32 {
    let begin = Instant::now();
    let log = node.state.path().join("strace.log");
    for n in 1.. {
        let point = format!("{what}: {fault} at {call} {n}");
        // What a killed agent had asked libvirt for may be done late: not this late.
        node.is_original(&format!("some time before {point}"));
        node.prepare(what);
        let before = fs::read_to_string(node.state().join("journal")).unwrap_or_default();
        let inject = format!("{call}:{fault}:when={n}");
        let agent = node.agent(what, &node.libvirtd.uri());
        let log = traced(&agent, &log, &node.paths(), call, Some(&inject));
        order_of_writes(&log, &before).unwrap_or_else(|wrong| panic!("{point}: {wrong}"));
        node.next_start_restores(&point);
        if !met(&log) {
            return report(&format!("{what}: {fault} at {call}"), n - 1, begin);
        }
    }
    unreachable!("some run passes without the fault")
}

/// One fault at the n-th message to libvirt, n = 1, 2, 3 … until there is none.
fn at_messages(node: &Node, what: &str, name: &str, fault: fn() -> Fate) -> u32 {
    let begin = Instant::now();
    for n in 1.. {
        let point = format!("{what}: {name} at message {n}");
        node.is_original(&format!("some time before {point}"));
        node.prepare(what);
        let seen = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&seen);
        let journal = node.state().join("journal");
        let relay = node.relay("relay", move |set| {
            // Where it is written is checked beside the order, in the runs under strace.
            if let Some((domain, value)) = set {
                let text = fs::read_to_string(&journal).unwrap_or_default();
                let entry = [format!("\"to\":{value},"), format!("\"original\":{value},")];
                let known = text.lines().any(|line| {
                    line.contains(&domain) && entry.iter().any(|field| line.contains(field))
                });
                if !known {
                    eprintln!("{domain} is set to {value} without an entry: {text}");
                    std::process::abort();
                }
            }
            if count.fetch_add(1, Ordering::SeqCst) + 1 == n { fault() } else { Fate::Pass }
        });
        let output = node.agent(what, &relay.uri()).output().unwrap();
        drop(relay);
        node.next_start_restores(&format!("{point} ({output:?})"));
        if seen.load(Ordering::SeqCst) < n {
            return report(&format!("{what}: {name} at messages"), n - 1, begin);
        }
    }
    unreachable!("some run has fewer messages")
}

#[test]
fn no_fault_while_libvirt_writes_leaves_its_weight_changed() {
    let node = Node::new("sweep");
    // A clean run, and that what it asks of libvirt is seen.
    let log = node.state.path().join("strace.log");
    let log = traced(&node.agent("once", &node.libvirtd.uri()), &log, &[], "write", None);
    order_of_writes(&log, "").unwrap();
    assert!(libvirt_writes(&log) >= 4, "{log}");
    let unsynced: Vec<&str> = log.lines().filter(|line| !line.contains("sync(")).collect();
    assert!(order_of_writes(&unsynced.join("\n"), "").unwrap_err().contains("libvirt is to set"));

    let mut points = 0;
    for (call, fault) in [
        ("write", "signal=SIGKILL"),
        ("write", "error=ENOSPC"),
        ("fdatasync", "signal=SIGKILL"),
        ("fdatasync", "error=EIO"),
        ("fsync", "signal=SIGKILL"),
        ("rename", "signal=SIGKILL"),
    ] {
        points += at_calls(&node, "once", call, fault);
    }
    for what in ["recover", "restore"] {
        points += at_calls(&node, what, "write", "signal=SIGKILL");
    }
    points += at_messages(&node, "once", "SIGKILL before", || Fate::Kill);
    points += at_messages(&node, "once", "EPIPE", || Fate::Cut);
    for what in ["once", "recover", "restore"] {
        points += at_messages(&node, what, "SIGKILL after", || Fate::PassAndKill);
        points += at_messages(&node, what, "no answer, EPIPE", || Fate::PassAndCut);
    }
    std::thread::sleep(Duration::from_secs(1));
    node.is_original("a second after the last run");
    assert!(points > 100, "only {points} points");
}

/// libvirt does what a dead agent asked for after what the next one asks.
#[test]
fn a_dead_agents_message_that_libvirt_gets_to_late_is_undone() {
    let node = Node::new("late");
    let mut late = 0;
    for round in 1..=10 {
        let _ = fs::remove_dir_all(node.state());
        let (release, released) = mpsc::channel();
        let mut released = Some(released);
        let first = node.relay("first", move |set| match set {
            Some(_) => Fate::KillAndHold(released.take().unwrap()),
            None => Fate::Pass,
        });
        let output = node.agent("loop", &first.uri()).output().unwrap();
        assert_eq!(output.status.code(), None, "{output:?}");
        assert_eq!(node.shares(), ORIGINAL, "the message was not kept back");
        // The next agent's message passes, and a moment later the dead one's.
        let mut release = Some(release);
        let second = node.relay("second", move |set| {
            if set.is_some()
                && let Some(release) = release.take()
            {
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(10));
                    release.send(()).unwrap();
                });
            }
            Fate::Pass
        });
        let hypervisor = Hypervisor::connect(&second.uri()).unwrap();
        let (act, report) = Act::open(&node.state(), Some(hypervisor)).unwrap();
        assert!(report.restored.is_complete() && act.enforce_allowed(), "{report:?}");
        let result = &report.restored.knobs[0].result;
        late += u32::from(matches!(result, RestoreResult::Restored { .. }));
        std::thread::sleep(Duration::from_millis(100));
        node.is_original(&format!("round {round}: {report:?}"));
    }
    assert!(late > 0, "libvirt never got to it late");
}

/// The same of an agent that lives: its connection breaks in the middle of a call.
#[test]
fn a_message_of_a_broken_connection_that_libvirt_gets_to_late_is_undone() {
    let node = Node::new("broken");
    let (release, released) = mpsc::channel();
    let mut released = Some(released);
    let relay = node.relay("relay", move |set| match (set, released.take()) {
        (Some(_), Some(released)) => Fate::CutAndHold(released),
        (_, still) => {
            released = still;
            Fate::Pass
        }
    });
    let hypervisor = Hypervisor::connect(&relay.uri()).unwrap();
    // Nobody answers again either.
    drop(relay);
    let (mut act, _) = Act::open(&node.state(), Some(hypervisor)).unwrap();
    let vm = Vm {
        id: VmId::from(node.domain.clone()),
        uuid: None,
        vcpus: 1,
        owner: Owner::Libvirt { domain: node.domain.clone() },
        cgroup: node.cgroup.clone(),
        cgroup_id: fs::metadata(&node.cgroup).unwrap().ino(),
        cgroup_version: CgroupVersion::V1,
    };
    let from = act.read_weight(&vm).unwrap();
    let outcome = act.execute(&vm, &setpoint(&vm, from, 200), 1);
    assert!(matches!(outcome.result, OutcomeResult::Refused { .. }), "{outcome:?}");
    // The original is there, but that is not the end of it.
    let report = act.restore_all();
    assert!(!report.is_complete(), "{report:?}");
    drop(act);
    node.is_original("before libvirt gets to it");
    release.send(()).unwrap();
    let begin = Instant::now();
    while node.shares() == ORIGINAL {
        assert!(begin.elapsed() < Duration::from_secs(30), "the message was lost");
        std::thread::sleep(Duration::from_millis(5));
    }
    node.next_start_restores("libvirt got to it late");
}
