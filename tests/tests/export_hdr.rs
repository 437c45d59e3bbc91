//! Interval logs of a real agent: what is read back is what was counted, also across a disk
//! that was full for a while.

use base64::Engine as _;
use formtune_agent::export::series::Histograms;
use formtune_tests::agent::{Agent, Site};
use formtune_tests::vm_cgroup::{Member, VmCgroup};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A thread that wakes up 500 times a second, in `vcpu0`.
fn periodic(vm: &VmCgroup) -> Member {
    Member::start(vm, "vcpu0", None, || {
        loop {
            std::thread::sleep(Duration::from_millis(2));
        }
    })
}

fn count(agent: &Agent, vm: &VmCgroup) -> u64 {
    let answer = agent.get(&format!("/v1/histograms?vm={}", vm.id().0)).unwrap();
    let all: Histograms = serde_json::from_str(&answer).unwrap();
    all.histograms.first().map_or(0, |series| series.counts.count())
}

/// The count once it no longer changes.
fn last_count(agent: &Agent, vm: &VmCgroup) -> u64 {
    let mut last = count(agent, vm);
    until("the agent's last reading", || {
        std::thread::sleep(Duration::from_secs(1));
        let before = std::mem::replace(&mut last, count(agent, vm));
        last == before
    });
    last
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(90), "not within 90 s: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Intervals of a VM in a log, and the times in them; every line must be whole.
fn read(log: &Path, vm: &VmCgroup) -> (u32, u64) {
    let text = fs::read(log).unwrap();
    let (mut intervals, mut times, mut before) = (0, 0, Duration::ZERO);
    for entry in IntervalLogIterator::new(&text) {
        let LogEntry::Interval(interval) = entry.unwrap() else { continue };
        let bytes = base64::engine::general_purpose::STANDARD.decode(interval.encoded_histogram());
        let histogram: Histogram<u64> =
            Deserializer::new().deserialize(&mut bytes.unwrap().as_slice()).unwrap();
        if *interval.tag().unwrap() != *format!("{}:runqueue_latency", vm.id().0) {
            continue;
        }
        assert!(interval.start_timestamp() >= before, "intervals are in order");
        before = interval.start_timestamp();
        assert!(interval.duration() > Duration::ZERO && !histogram.is_empty());
        (intervals, times) = (intervals + 1, times + histogram.len());
    }
    (intervals, times)
}

#[test]
fn a_full_disk_is_said_once_and_loses_nothing() {
    // A small disk that this thread and the agent alone see.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let vm = VmCgroup::new(&format!("hdr-disk-{}", std::process::id()));
    let site = Site::new("").unwrap();
    let disk = site.path().join("disk");
    fs::create_dir(&disk).unwrap();
    mount(Some("disk"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=128k")).unwrap();
    let log = disk.join("latency.hlog");
    site.configure(&format!(
        "libvirt = \"off\"\nlisten = \"off\"\ncgroups = [\"{}\"]\nmode.cpu_weight = \"observe\"\n\
         hdr_log = {{ file = \"{}\", interval = \"1s\" }}",
        vm.pattern(),
        log.display(),
    ))
    .unwrap();
    let agent = site.run(&[]).unwrap();
    until("the VM", || agent.get("/v1/histograms").unwrap().contains(vm.id().as_str()));
    let member = periodic(&vm);
    until("two intervals", || read(&log, &vm).0 >= 2);

    let failures = || -> u64 {
        let text = agent.get("/metrics").unwrap();
        let name = "formtune_hdr_log_failures_total ";
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.parse::<f64>().unwrap() as u64
    };
    assert_eq!(failures(), 0);
    let mut filler = fs::File::create(disk.join("filler")).unwrap();
    while filler.write_all(&[0; 4096]).is_ok() {}
    until("three failures", || failures() >= 3);
    let full = read(&log, &vm);
    let said = site.log().matches("failed to write the interval log").count();
    assert_eq!(said, 1, "{}", site.log());
    let at_rest = count(&agent, &vm);
    until("the agent measures on", || count(&agent, &vm) > at_rest);

    filler.set_len(0).unwrap();
    fs::remove_file(disk.join("filler")).unwrap();
    until("the log goes on", || read(&log, &vm).0 > full.0);
    member.stop();
    let counted = last_count(&agent, &vm);
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));
    assert_eq!(site.log().matches("is written again").count(), 1, "{}", site.log());
    let (intervals, times) = read(&log, &vm);
    assert_eq!(times, counted, "in {intervals} intervals");
    println!("{counted} waits counted and in the log, {intervals} intervals");
}

#[test]
fn export_ends_in_order_when_interrupted() {
    let vm = VmCgroup::new(&format!("hdr-cli-{}", std::process::id()));
    let site = Site::new(&format!(
        "libvirt = \"off\"\nlisten = \"off\"\ncgroups = [\"{}\"]",
        vm.pattern()
    ))
    .unwrap();
    let agent = site.run(&[]).unwrap();
    until("the VM", || agent.get("/v1/histograms").unwrap().contains(vm.id().as_str()));
    let log = site.path().join("l.hlog");
    let path = log.display().to_string();
    let mut export = site.command(&["export", "hdr", "--interval", "1s", "--output", &path]);
    let export = export.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("the log's head", || fs::metadata(&log).is_ok_and(|log| log.len() > 0));
    let member = periodic(&vm);
    until("two intervals", || read(&log, &vm).0 >= 2);
    member.stop();
    let counted = last_count(&agent, &vm);
    kill(Pid::from_raw(export.id() as i32), Signal::SIGINT).unwrap();
    let output = export.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!((output.stdout.len(), output.stderr.len()), (0, 0), "{output:?}");
    assert_eq!(read(&log, &vm).1, counted);
    drop(agent);
    let output = site.output(&["export", "hdr"]).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("not running"), "{output:?}");
}
