//! SIGKILL, EIO and ENOSPC at every system call that touches the journal or a knob, and
//! SIGKILL at random moments under load: after the next start every knob is at its
//! original. Needs root and strace.

use formtune_agent::act::{Act, restore};
use formtune_tests::injected::{met, order_of_writes, traced};
use formtune_tests::knob::KnobCgroup;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const AGENT: &str = env!("CARGO_BIN_EXE_crash_agent");
/// Raw originals; 1000 shares are no whole weight.
const ORIGINALS: [u64; 2] = [1000, 1536];

/// A state folder and two knobs.
struct Node {
    state: tempfile::TempDir,
    knobs: Vec<KnobCgroup>,
}

impl Node {
    fn new(name: &str) -> Self {
        let knobs = ORIGINALS.iter().enumerate().map(|(n, original)| {
            let knob =
                KnobCgroup::make(&format!("ft-act-{name}{n}-{}", std::process::id())).unwrap();
            knob.set_raw(*original);
            knob
        });
        Self { state: tempfile::tempdir().unwrap(), knobs: knobs.collect() }
    }

    fn state(&self) -> PathBuf {
        self.state.path().join("state")
    }

    fn raw(&self) -> Vec<u64> {
        self.knobs.iter().map(KnobCgroup::raw).collect()
    }

    /// What the agent touches: these paths, and nothing else of it, are traced.
    fn paths(&self) -> Vec<PathBuf> {
        let state = self.state();
        let own = ["journal", "journal.new", "lock"].map(|name| state.join(name));
        let knobs = self.knobs.iter().flat_map(|knob| [knob.path().to_owned(), knob.file()]);
        own.into_iter().chain([state.clone()]).chain(knobs).collect()
    }

    fn agent(&self, what: &str) -> Command {
        let mut command = Command::new(AGENT);
        command.arg(what).arg(self.state());
        command.args(self.knobs.iter().map(KnobCgroup::path)).stdin(Stdio::null());
        command
    }

    /// Runs the agent under strace with `inject` (strace's syntax after `when=` included)
    /// and returns the log.
    fn traced(&self, what: &str, calls: &str, inject: Option<&str>) -> String {
        let log = self.state.path().join("strace.log");
        traced(&self.agent(what), &log, &self.paths(), calls, inject)
    }

    /// The next start: everything must be back, nothing damaged, and enforcing possible.
    fn next_start_restores(&self, after: &str) {
        let (act, report) = Act::open(&self.state(), None)
            .unwrap_or_else(|error| panic!("{after}: the next start failed: {error}"));
        assert!(report.restored.is_complete(), "{after}: {report:?}");
        assert_eq!(report.damaged, None, "{after}");
        assert!(act.enforce_allowed(), "{after}");
        assert_eq!(self.raw(), ORIGINALS, "{after}: a knob is left changed");
    }
}

/// Calls swept; each has a counter of its own.
const CALLS: [&str; 9] =
    ["openat", "read", "write", "fsync", "fdatasync", "rename", "unlink", "flock", "mkdir"];

fn faults(call: &str) -> &'static [&'static str] {
    match call {
        // Takes no space.
        "read" | "flock" | "unlink" => &["signal=SIGKILL", "error=EIO"],
        _ => &["signal=SIGKILL", "error=EIO", "error=ENOSPC"],
    }
}

/// Every fault at every call, n = 1, 2, 3 … until a run passes without it. Returns how many
/// points there were.
fn sweep(name: &str, what: &str, prepare: impl Fn(&Node)) -> u32 {
    let node = Node::new(name);
    let mut points = 0;
    let begin = Instant::now();
    let mut said = Instant::now();
    for call in CALLS {
        for fault in faults(call) {
            for n in 1.. {
                let _ = fs::remove_dir_all(node.state());
                prepare(&node);
                let before = fs::read_to_string(node.state().join("journal")).unwrap_or_default();
                let point = format!("{what}: {fault} at {call} {n}");
                let log = node.traced(what, call, Some(&format!("{call}:{fault}:when={n}")));
                order_of_writes(&log, &before).unwrap_or_else(|wrong| panic!("{point}: {wrong}"));
                node.next_start_restores(&point);
                if !met(&log) {
                    break;
                }
                points += 1;
                if said.elapsed() > Duration::from_secs(5) {
                    said = Instant::now();
                    eprintln!(
                        "{:4.0} s, {points} points, at {point}",
                        begin.elapsed().as_secs_f64()
                    );
                }
            }
        }
    }
    eprintln!("{what}: {points} points in {:.1} s, none bad", begin.elapsed().as_secs_f64());
    points
}

#[test]
fn no_fault_while_acting_leaves_a_knob_changed() {
    assert!(sweep("once", "once", |_| {}) > 100);
}

/// What an agent leaves that was killed at work.
fn leave_changed(node: &Node) {
    let mut killed = start(node, "loop");
    for_line(&mut killed);
    while node.raw() == ORIGINALS {
        std::thread::sleep(Duration::from_micros(200));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
}

#[test]
fn no_fault_while_recovering_leaves_a_knob_changed() {
    assert!(sweep("recover", "recover", leave_changed) > 20);
}

#[test]
fn no_fault_while_restoring_without_an_agent_leaves_a_knob_changed() {
    assert!(sweep("restore", "restore", leave_changed) > 20);
}

#[test]
fn a_clean_run_journals_before_it_writes() {
    let node = Node::new("clean");
    let log = node.traced("once", &CALLS.join(","), None);
    assert_eq!(node.raw(), ORIGINALS);
    let count = |what: &str| log.lines().filter(|line| line.contains(what)).count();
    assert!(count("cpu.shares>, \"") + count("cpu.weight>, \"") >= 8, "knobs were written: {log}");
    assert!(count("fdatasync(") >= 6, "{log}");
    order_of_writes(&log, "").unwrap();
    // The check itself can fail: the same log without its fsyncs is wrong.
    let unsynced = |line: &&str| !line.contains("sync(");
    let unsynced: Vec<&str> = log.lines().filter(unsynced).collect();
    assert!(order_of_writes(&unsynced.join("\n"), "").is_err());
}

#[test]
fn a_failed_fsync_is_final() {
    let node = Node::new("fsync");
    // The first fdatasync is that of the first intent: nothing may be written after it.
    let log = node.traced("once", "fdatasync,write", Some("fdatasync:error=EIO:when=1"));
    assert_eq!(log.lines().filter(|line| line.contains("fdatasync(")).count(), 1, "{log}");
    let written = |line: &&str| line.contains("write(") && line.contains("cpu.");
    assert_eq!(log.lines().filter(written).count(), 0, "{log}");
    assert_eq!(node.raw(), ORIGINALS);
    // With the second, the first knob is changed: it comes back all the same at the end.
    let log = node.traced("once", "fdatasync,write", Some("fdatasync:error=EIO:when=2"));
    assert_eq!(log.lines().filter(|line| line.contains("fdatasync(")).count(), 2, "{log}");
    assert_eq!(node.raw(), ORIGINALS);
}

fn start(node: &Node, what: &str) -> Child {
    let mut command = node.agent(what);
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until the agent says that it has opened the state folder.
fn for_line(agent: &mut Child) {
    let mut line = String::new();
    BufReader::new(agent.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "open\n");
}

/// SplitMix64: enough to choose moments, and the same on every machine.
struct Moments(u64);

impl Moments {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// Spins in a cgroup until dropped.
struct Hog(Child);

impl Hog {
    fn start(cgroup: &Path) -> Self {
        let spin = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        fs::write(cgroup.join("cgroup.procs"), spin.id().to_string()).unwrap();
        Self(spin)
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn sigkill_at_100_random_moments_under_load() {
    let seed = std::env::var("FORMTUNE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("FORMTUNE_SEED={seed}");
    let mut moments = Moments(seed);
    let node = Node::new("kill");
    let hogs: Vec<Hog> = node.knobs.iter().map(|knob| Hog::start(knob.path())).collect();
    let begin = Instant::now();
    let mut changed = 0;
    for kill in 1..=100 {
        let mut agent = start(&node, "loop");
        // Every third dies anywhere from its start on, recovery included, which most of
        // the time has something to do; the others at work.
        if kill % 3 != 0 {
            for_line(&mut agent);
        }
        std::thread::sleep(Duration::from_micros(moments.below(30_000)));
        agent.kill().unwrap();
        agent.wait().unwrap();
        changed += u32::from(node.raw() != ORIGINALS);
        // Mostly the next round's agent is the next start; now and then look closely.
        if kill % 2 == 0 {
            let after = format!("kill {kill} of FORMTUNE_SEED={seed}");
            if moments.below(2) == 0 {
                node.next_start_restores(&after);
            } else {
                let report = restore(&node.state(), || None).unwrap();
                assert!(report.restored.is_complete(), "{after}: {report:?}");
                assert_eq!(node.raw(), ORIGINALS, "{after}: a knob is left changed");
            }
        }
    }
    node.next_start_restores("the last kill");
    drop(hogs);
    eprintln!(
        "100 kills, {changed} with a knob changed, in {:.1} s; all restored",
        begin.elapsed().as_secs_f64()
    );
    assert!(changed > 20, "the kills came too early: only {changed} found a knob changed");
}
