//! `formtune run` on a kernel that lacks what one probe needs, played by types in which a member
//! has another name: that probe says so, and the rest runs.

use formtune_tests::agent::{Agent, Site, mounted};
use formtune_tests::block::{BlockVm, LoopDevice, fio};
use formtune_tests::contention::Contention;
use formtune_tests::vm_cgroup::Member;
use formtune_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// What only the run-queue probe looks for, and only the block I/O probe.
const OF_RUNQ: &str = "last_queued";
const OF_BLOCK: &str = "io_start_time_ns";

/// This kernel's types, in which nothing is called `member`.
fn types_without(site: &Site, member: &str) -> PathBuf {
    let mut types = std::fs::read(BTF).unwrap();
    // Each name lies there once, between two zeroes.
    let name = [b"\0", member.as_bytes(), b"\0"].concat();
    let at = types.windows(name.len()).position(|found| found == name);
    types[at.unwrap_or_else(|| panic!("no {member} in this kernel's types")) + 1] = b'?';
    let file = site.path().join("vmlinux");
    std::fs::write(&file, types).unwrap();
    file
}

fn command(site: &Site, without: &str, args: &[&str]) -> Command {
    mounted(&types_without(site, without), BTF, &site.command(args))
}

fn json(agent: &Agent, path: &str) -> Value {
    serde_json::from_str(&agent.get(path).unwrap()).unwrap()
}

/// A VM that works and sleeps, and reads from a device.
struct Busy {
    device: LoopDevice,
    site: Site,
    /// Ends before its cgroup is removed.
    _worker: Member,
    vm: BlockVm,
}

impl Busy {
    fn start(name: &str) -> Self {
        let vm = BlockVm::new(name);
        let site = Site::new(&format!(
            "libvirt = \"off\"\nlisten = \"off\"\ncgroups = [\"{}\"]\n",
            vm.group.pattern()
        ));
        let worker = Member::start(&vm.group, "vcpu0", None, || {
            loop {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self { vm, device: LoopDevice::new(), site: site.unwrap(), _worker: worker }
    }

    fn read(&self) {
        fio(&self.device, Some(self.vm.procs()), &["--bs=4k", "--rw=randread", "--number_ios=50"]);
    }

    fn state(&self, agent: &Agent) -> Value {
        json(agent, &format!("/v1/vms/{}", self.vm.group.id()))
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}

#[test]
fn without_the_run_queue_probe_block_io_and_tcp_are_measured() {
    let busy = Busy::start("ft-no-runq");
    let agent = busy.site.start(command(&busy.site, OF_RUNQ, &["run"])).unwrap();
    let node = json(&agent, "/v1/node");
    assert_eq!(node["modes"]["cpu_weight"], "observe", "{node}");
    // Nobody had asked for writes.
    assert_eq!(node["enforce_blocked"], Value::Null);
    assert_eq!(node["probe"]["method"], Value::Null);
    assert!(node["block"]["method"].is_string() && node["tcp"]["guest_method"].is_string());
    let blind = until(LIMIT, "a reading", || {
        json(&agent, "/v1/node")["probe"]["blind"].as_str().map(str::to_owned)
    });
    has(&blind, &["sched_switch", OF_RUNQ]);
    let state = until(LIMIT, "block I/O of the VM", || {
        busy.read();
        let state = busy.state(&agent);
        (state["block"]["recent"]["samples"].as_u64()? >= 50).then_some(state)
    });
    assert_eq!(state["runq"], Value::Null, "{state}");
    assert_eq!(state["decision"]["reason"]["why"], "observing", "{state}");
    let metrics = agent.get("/metrics").unwrap();
    has(
        &metrics,
        &[
            "\nformtune_probe_up 0.0\n",
            "\nformtune_block_up 1.0\n",
            "mode=\"observe\"",
            "formtune_probe_unsampled_total{probe=\"block\"} 0.0\n",
            "\nformtune_probe_unmeasured_vms 0.0\n",
        ],
    );
    assert!(!metrics.contains("unsampled_total{probe=\"runq\"}"), "it is not known");
    let explained = text(&busy.site.output(&["explain", &busy.vm.group.id().0]).unwrap());
    has(&explained, &["Nothing is decided for anybody", OF_RUNQ, "formtune doctor"]);
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));

    let log = busy.site.log();
    let said: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
    assert_eq!(said.len(), 1, "{log}");
    has(
        said[0],
        &["sched_switch is not loaded", OF_RUNQ, "CONFIG_SCHED_INFO", "nothing is decided"],
    );
    let doctor = command(&busy.site, OF_RUNQ, &["doctor"]).output().unwrap();
    assert_eq!(doctor.status.code(), Some(1));
    has(
        &text(&doctor),
        &["sched_switch cannot be loaded", "block_rq_complete (block I/O latency) loads"],
    );
}

/// What a dead agent left is put back, and nothing is written after that.
#[test]
fn without_the_run_queue_probe_knobs_are_put_back_and_left_alone() {
    let contention = Contention::start(&format!("ft-partial-{}", std::process::id())).unwrap();
    let originals = contention.raw();
    let site = Site::new(&contention.eager()).unwrap();
    let agent = site.run(&["--mode", "enforce"]).unwrap();
    contention.wait_for_change(&originals, LIMIT);
    agent.end(Signal::SIGKILL).unwrap();
    assert_ne!(contention.raw(), originals, "nothing was there to bring back");

    let agent = site.start(command(&site, OF_RUNQ, &["run", "--mode", "enforce"])).unwrap();
    assert_eq!(contention.raw(), originals, "{}", site.log());
    let node = json(&agent, "/v1/node");
    has(node["enforce_blocked"].as_str().unwrap(), &["sched_switch", OF_RUNQ]);
    assert_eq!(agent.status("/readyz").unwrap().0, 503);
    has(&agent.get("/metrics").unwrap(), &["\nformtune_enforce_blocked 1.0\n"]);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(contention.raw(), originals, "{}", site.log());
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));
}

#[test]
fn without_the_block_probe_waits_are_measured() {
    let busy = Busy::start("ft-no-block");
    let agent = busy.site.start(command(&busy.site, OF_BLOCK, &["run"])).unwrap();
    busy.read();
    let state = until(LIMIT, "waits of the VM", || {
        let state = busy.state(&agent);
        (state["recent"]["samples"].as_u64()? > 100).then_some(state)
    });
    assert_eq!(state["block"], Value::Null, "{state}");
    let node = json(&agent, "/v1/node");
    assert_eq!(node["modes"]["cpu_weight"], "shadow", "{node}");
    assert_eq!((&node["probe"]["blind"], &node["block"]["method"]), (&Value::Null, &Value::Null));
    has(node["block"]["unsupported"].as_str().unwrap(), &["block_rq_complete", OF_BLOCK]);
    let metrics = agent.get("/metrics").unwrap();
    has(&metrics, &["\nformtune_probe_up 1.0\n", "\nformtune_block_up 0.0\n"]);
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));
}
