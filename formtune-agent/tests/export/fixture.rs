//! A node with four VMs, as a snapshot, and a server that shows it.

use formtune_agent::export::culprits::{Blamed, Held, Holder};
use formtune_agent::export::snapshot::*;
use formtune_agent::export::tcp::{GuestTcp, HostTcp, NodeTcp, TcpWay, VmTcp};
use formtune_agent::export::{DecisionLog, Listen, Server, ServerHandle, SnapshotRequest, source};
use formtune_agent::sense::{MemoryEvents, Pressure, QuotaPeriods, RunqCheck, Stall, Stalls};
use formtune_agent::vm::{CgroupVersion, Owner, Vm};
use formtune_common::histogram;
use formtune_core::plan::*;
use formtune_core::policy::{Indicator, Mode, Modes, Slo};
use formtune_core::reason::{Breach, Culprit, Quantile, Usage};
use formtune_core::units::{ClassName, Nanos, VmId, Weight};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// `CLOCK_MONOTONIC` of the snapshot.
pub const AT: Nanos = Nanos::from_secs(5_000);

pub fn weight(weight: u32) -> Weight {
    Weight::new(weight).unwrap()
}

pub fn snapshot() -> Snapshot {
    let log = decision_log();
    let mut vms = BTreeMap::new();
    for mut vm in [web(), hog(), idle(), odd()] {
        log.fill(&mut vm);
        vms.insert(vm.id.clone(), vm);
    }
    Snapshot { at: AT, node: node(&log), vms, decisions: log.records(), unix_ms: 1_790_000_000_000 }
}

fn node(log: &DecisionLog) -> Node {
    Node {
        name: "node-a".into(),
        kernel: "6.12.48-amd64".into(),
        cpus: 2,
        busy_ratio: Some(0.873),
        cgroup: CgroupLayout { version: CgroupVersion::V2, cpu_root: "/sys/fs/cgroup".into() },
        libvirt: LibvirtState::Connected { uri: "qemu:///system".into() },
        domains_without_cgroup: 1,
        modes: Modes { cpu_weight: Mode::Enforce },
        enforce_blocked: None,
        probe: ProbeState { method: Some("tp_btf".into()), discarded: 7, ..ProbeState::default() },
        agent: AgentState {
            version: "0.1.0".into(),
            pid: 4242,
            config: Some("/etc/formtune/formtune.toml".into()),
            started_at: Nanos::from_secs(1_400),
            tick: Nanos::from_millis(250),
            ticks: 14_400,
            ticks_late: 1,
            last_tick_at: Some(Nanos(AT.0 - 100_000_000)),
            last_tick_took: Some(Nanos::from_micros(350)),
            cost: OwnCost { cpu_ns: 7_200_000_000, resident_bytes: 22 << 20 },
        },
        counters: log.counters(),
        pressure: Pressure {
            cpu: Some(Stalls { some: Some(stall(30_250_000, 0.125)), full: None }),
            ..Pressure::default()
        },
        hdr_log: Some(HdrLogState { failing: false, failures: 3 }),
        tcp: NodeTcp {
            host_method: Some("tp_btf".into()),
            guest_method: Some("tcx".into()),
            no_vm: HostTcp { retransmitted: 3, syn_acks: 1 },
            taps: 1,
            ..NodeTcp::default()
        },
        block: Some(crate::block::node()),
    }
}

fn vm(name: &str, class: &str) -> VmState {
    let record = Vm {
        id: VmId::from(name),
        uuid: Some(format!(
            "00000000-0000-4000-8000-{:012}",
            name.bytes().fold(7u64, |h, b| (h * 31 + u64::from(b)) % 1_000_000_007)
        )),
        vcpus: 2,
        owner: Owner::Libvirt { domain: name.into() },
        cgroup: PathBuf::from("/sys/fs/cgroup/machine.slice").join(name),
        cgroup_id: 77,
        cgroup_version: CgroupVersion::V2,
    };
    let mut state = VmState::new(&record, ClassName::from(class), Nanos::from_secs(2_000));
    state.cpu_weight = Some(Weight::DEFAULT);
    state.cpu_weight_original = Some(Weight::DEFAULT);
    state.cpu_weight_entitlement = Some(Weight::DEFAULT);
    state.cpu_weight_bounds = Some((weight(25), weight(400)));
    state
}

fn stall(total_us: u64, avg10_ratio: f64) -> Stall {
    Stall { total_us, avg10_ratio }
}

fn dense(waits: &[(u64, u64)]) -> LatencyCounts {
    let mut buckets = vec![0; histogram::BUCKETS];
    let mut wait_ns = 0;
    for &(ns, count) in waits {
        buckets[histogram::bucket(ns) as usize] += count;
        wait_ns += ns * count;
    }
    LatencyCounts::from_dense(&buckets, wait_ns)
}

fn slo() -> Slo {
    Slo {
        indicator: Indicator::RunqLatency,
        quantile: 0.99,
        threshold: Nanos::from_millis(2),
        window: Nanos::from_secs(1),
        share: 0.6,
        min_samples: 100,
    }
}

/// The victim.
fn web() -> VmState {
    let mut vm = vm("web-1", "web");
    vm.cpu_weight = Some(weight(150));
    vm.slo = Some(slo());
    vm.attainment = Some(Attainment { windows: 1_200, met: 1_080 });
    vm.recent = Some(RecentRunq {
        span: Nanos::from_secs(10),
        samples: 48_120,
        wait: Nanos::from_secs(4),
        p50: Some(Nanos::from_micros(12)),
        p99: Some(Nanos::from_micros(4_200)),
        p999: Some(Nanos::from_micros(8_100)),
        max: Some(Nanos::from_micros(11_500)),
    });
    vm.runq = Some(dense(&[(900, 5_000), (12_000, 90_000), (4_200_000, 900), (20_000_000_000, 1)]));
    let held = |holder, ms| Held { holder, time: Nanos::from_millis(ms) };
    let top = vec![
        held(Holder::Vm("hog-1".into()), 2_900),
        held(Holder::Itself, 700),
        held(Holder::Host, 300),
    ];
    let blamed = Blamed { total: Nanos::from_secs(4), top };
    (vm.held_by, vm.held_by_total) = (Some(blamed.clone()), Some(blamed));
    vm.cpu_usage_ns = Some(61_500_000_000);
    vm.throttled_ns = Some(0);
    vm.tcp = Some(tcp());
    vm.block = Some(crate::block::state());
    vm.decided(&victim_decision());
    vm
}

fn tcp() -> VmTcp {
    let way = |segments, retransmitted| TcpWay {
        segments,
        bytes: segments * 1_000,
        retransmitted,
        ..TcpWay::default()
    };
    VmTcp {
        host: Some(HostTcp { retransmitted: 12, syn_acks: 2 }),
        guest: Some(GuestTcp {
            sent: way(48_000, 96),
            received: way(2_000, 1),
            taps: vec!["vnet0".into()],
        }),
    }
}

/// Its neighbour.
fn hog() -> VmState {
    let mut vm = vm("hog-1", "batch");
    vm.cpu_weight = Some(weight(80));
    vm.recent = Some(RecentRunq {
        span: Nanos::from_secs(10),
        samples: 900,
        wait: Nanos::from_secs(9),
        p50: Some(Nanos::from_millis(3)),
        p99: Some(Nanos::from_millis(12)),
        p999: Some(Nanos::from_millis(14)),
        max: Some(Nanos::from_millis(14)),
    });
    vm.runq = Some(dense(&[(3_000_000, 9_000), (12_000_000, 100)]));
    vm.throttled_ns = Some(12_000_000_000);
    vm.quota_periods = Some(QuotaPeriods { all: 3_600, throttled: 120 });
    let full = Some(stall(2_000_000, 0.0));
    vm.pressure.memory = Some(Stalls { some: Some(stall(7_500_000, 0.23)), full });
    vm.memory_events = MemoryEvents { max: Some(41), oom_kill: Some(1), ..Default::default() };
    vm.runq_check = Some(RunqCheck {
        at: AT,
        span: Nanos::from_secs(10),
        threads: 6,
        counted_ns: 980_000_000,
        kernel_ns: 1_000_000_000,
        divergence_ratio: -0.02,
    });
    vm.decided(&quiet("hog-1", Reason::LoweredFor { victim: VmId::from("web-1") }));
    vm
}

/// One that sleeps.
fn idle() -> VmState {
    let mut vm = vm("idle-with-a-rather-long-name-0001", "general-purpose");
    vm.slo = Some(slo());
    vm.recent = Some(RecentRunq {
        span: Nanos::from_secs(10),
        samples: 0,
        wait: Nanos(0),
        p50: None,
        p99: None,
        p999: None,
        max: None,
    });
    vm.runq = Some(dense(&[]));
    vm.decided(&quiet("idle-with-a-rather-long-name-0001", too_few()));
    vm
}

/// One that is not measured yet and whose name needs escapes everywhere.
fn odd() -> VmState {
    let mut vm = vm("a\"b\\c/d é", "web");
    vm.owner = OwnerKind::Cgroup;
    vm.uuid = None;
    vm.cpu_weight = None;
    vm.cpu_weight_original = None;
    vm
}

fn victim_decision() -> Decision {
    Decision {
        vm: VmId::from("web-1"),
        evidence: Evidence {
            samples: 4_812,
            measured: Some(Nanos::from_micros(4_200)),
            target: Some(Nanos::from_millis(2)),
            slack: Some(-1.1),
            bad_windows: 3,
            cpus_used: Some(0.41),
            cpu_weight: Some(weight(150)),
        },
        action: Action::Raise,
        reason: Reason::Victim {
            breach: breach(),
            to: Some(weight(150)),
            lowering: vec![Culprit { vm: VmId::from("hog-1"), usage: Some(usage()), caused: None }],
        },
    }
}

fn breach() -> Breach {
    Breach {
        quantile: Quantile(9_900),
        measured: Nanos::from_micros(4_200),
        target: Nanos::from_millis(2),
        bad: 3,
        of: 5,
    }
}

fn polluter() -> Reason {
    Reason::Polluter {
        victim: VmId::from("web-1"),
        breach: breach(),
        usage: Some(usage()),
        caused: None,
    }
}

fn too_few() -> Reason {
    Reason::TooFewSamples { have: 0, need: 100 }
}

fn usage() -> Usage {
    Usage { uses: 1.52, entitled: 1.0 }
}

fn quiet(vm: &str, reason: Reason) -> Decision {
    Decision { vm: VmId::from(vm), evidence: Evidence::default(), action: Action::Hold, reason }
}

pub fn decision_log() -> DecisionLog {
    let mut log = DecisionLog::default();
    let setpoint = |vm: &str, to| Setpoint {
        vm: VmId::from(vm),
        knob: Knob::CpuWeight,
        from: Weight::DEFAULT,
        to: weight(to),
        mode: Mode::Enforce,
        victim: Some(VmId::from("web-1")),
        reason: Reason::NoSlo,
    };
    let plan = Plan {
        seq: 14_380,
        at: Nanos(AT.0 - 5_000_000_000),
        sampling_shift: None,
        setpoints: vec![setpoint("web-1", 150), setpoint("hog-1", 80)],
        decisions: vec![
            victim_decision(),
            Decision { action: Action::Lower, ..quiet("hog-1", polluter()) },
            quiet("idle-with-a-rather-long-name-0001", too_few()),
        ],
    };
    log.note(&plan, Mode::Enforce, UNIX_EPOCH + Duration::from_secs(1_790_000_000));
    for setpoint in &plan.setpoints {
        log.outcome(&Outcome {
            plan_seq: plan.seq,
            vm: setpoint.vm.clone(),
            knob: setpoint.knob,
            asked: setpoint.to,
            result: OutcomeResult::Applied { value: setpoint.to },
        });
    }
    log
}

/// A served snapshot; `set` changes it, and what nobody answers for is a stalled loop.
pub struct Served {
    pub socket: PathBuf,
    pub tcp: SocketAddr,
    pub snapshot: Arc<Mutex<Snapshot>>,
    _server: ServerHandle,
    _folder: TempDir,
}

impl Served {
    pub fn new() -> Self {
        let (served, mut requests) = Self::unanswered();
        let snapshot = served.snapshot.clone();
        std::thread::spawn(move || {
            while let Some(reply) = requests.blocking_recv() {
                let _ = reply.send(Arc::new(snapshot.lock().unwrap().clone()));
            }
        });
        served
    }

    /// Its loop does not answer.
    pub fn unanswered() -> (Self, mpsc::Receiver<SnapshotRequest>) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("formtune.sock");
        let to = Listen { socket: socket.clone(), tcp: Some("127.0.0.1:0".parse().unwrap()) };
        let server = Server::bind(&to).unwrap();
        let tcp = server.tcp_addr().unwrap();
        let (snapshots, requests) = source::channel(Nanos::from_millis(250));
        let server = server.spawn(snapshots).unwrap();
        let snapshot = Arc::new(Mutex::new(snapshot()));
        (Self { socket, tcp, snapshot, _server: server, _folder: folder }, requests)
    }
}
