//! What a real Prometheus makes of a real agent's metrics.

use formtune_agent::export::metrics::protobuf::ZERO_THRESHOLD;
use formtune_agent::export::series::{Histograms, Latency};
use formtune_agent::export::snapshot::LatencyCounts;
use formtune_common::histogram;
use formtune_tests::agent::{Agent, Site};
use formtune_tests::block::{BlockVm, LoopDevice, fio};
use formtune_tests::frames::Wire;
use formtune_tests::net;
use formtune_tests::prometheus::{Prometheus, free_port};
use formtune_tests::taps::TapGuest;
use formtune_tests::vm_cgroup::{Member, VmCgroup};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const TAP: &str = "ft-prom0";

/// A VM that gives every sensor something to count.
struct Busy {
    guest: TapGuest,
    waits: Member,
    device: LoopDevice,
    vm: BlockVm,
}

impl Busy {
    /// With a thread that wakes up 500 times a second, and a tap device in this thread's network
    /// namespace.
    fn start(name: &str) -> Self {
        let vm = BlockVm::new(name);
        let waits = Member::start(&vm.group, "vcpu0", None, || {
            loop {
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let guest = TapGuest::start(&vm.group, &[TAP]);
        Self { guest, waits, device: LoopDevice::new(), vm }
    }

    fn id(&self) -> String {
        self.vm.group.id().to_string()
    }

    /// Reads, writes and flushes; segments both ways, some of them again. Once the agent looks
    /// at the device.
    fn work(&mut self, agent: &Agent) {
        until("tap device", || agent.metric("formtune_tcp_taps").unwrap() == Some(1.0));
        let args = ["--bs=4k", "--rw=randrw", "--fsync=8", "--number_ios=400", "--io_size=1g"];
        fio(&self.device, Some(self.vm.procs()), &args);
        // The host's.
        fio(&self.device, None, &args);
        let mut host = net::sender(TAP).unwrap();
        for n in 0..40 {
            let frame = Wire::data(1, n * 100, 100).v4();
            // To the guest half as often again.
            for _ in 0..1 + n % 2 {
                self.guest.send(&frame);
                host.write_all(&frame).unwrap();
            }
            (n % 4 == 0).then(|| host.write_all(&frame).unwrap());
        }
    }

    /// Series that work makes, each to be above zero.
    fn series(&self) -> Vec<String> {
        let (vm, device) = (self.id(), self.device.name());
        let block = |op: &str, phase: &str| {
            let labels = format!("device=\"{device}\",op=\"{op}\",phase=\"{phase}\"");
            [
                format!("formtune_vm_block_latency_seconds_count{{vm=\"{vm}\",{labels}}}"),
                format!("formtune_host_block_latency_seconds_count{{{labels}}}"),
            ]
        };
        let tcp = |name: &str, direction: &str| {
            format!("formtune_vm_tcp_{name}_total{{vm=\"{vm}\",scope=\"guest\",{direction}}}")
        };
        let block = [("read", "total"), ("read", "device"), ("write", "total"), ("flush", "total")]
            .map(|(op, phase)| block(op, phase));
        let tcp = ["segments", "payload_bytes", "retransmits"].map(|name| {
            ["direction=\"sent\"", "direction=\"received\""].map(|direction| tcp(name, direction))
        });
        let occupied =
            format!("formtune_vm_block_device_seconds_total{{vm=\"{vm}\",device=\"{device}\"}}");
        block.into_iter().flatten().chain(tcp.into_iter().flatten()).chain([occupied]).collect()
    }
}

/// All latencies of a VM, and how Prometheus knows them.
fn histograms(agent: &Agent, vm: &str) -> Vec<(String, LatencyCounts)> {
    let answer = agent.get(&format!("/v1/histograms?vm={vm}")).unwrap();
    let all: Histograms = serde_json::from_str(&answer).unwrap();
    all.histograms
        .into_iter()
        .map(|series| {
            let latency = Latency::ALL.iter().find(|latency| latency.name() == series.metric);
            let labels: Vec<_> =
                series.labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
            let name = latency.expect("a latency of the list").family().0;
            (format!("{name}{{{}}}", labels.join(",")), series.counts)
        })
        .collect()
}

/// What Prometheus has of a histogram is what the agent counted, to the last one.
fn compare(prometheus: &Prometheus, series: &str, ours: &LatencyCounts) {
    let sample = prometheus.query(series).unwrap();
    let expected: BTreeMap<u32, u64> =
        ours.counts().iter().map(|&(bucket, count)| (bucket.into(), count)).collect();
    assert_eq!(buckets(&sample[0]), expected, "{series}");
    let sum = prometheus.number(&format!("histogram_sum({series})")).unwrap();
    assert!((sum - ours.sum_ns as f64 / 1e9).abs() < 1e-9, "{sum} and {} ns", ours.sum_ns);
    for quantile in [0.1, 0.5, 0.9, 0.99] {
        let query = format!("histogram_quantile({quantile}, {series})");
        let theirs = prometheus.number(&query).unwrap();
        let rank = quantile * ours.count() as f64;
        let mut below = 0.0;
        let bucket = ours.counts().iter().find(|(_, count)| {
            below += *count as f64;
            below >= rank
        });
        let bucket = u32::from(bucket.unwrap().0);
        let bound = |bucket: u32| match histogram::native_index(bucket) {
            Some(index) => f64::exp2(f64::from(index) / 16.0),
            None => ZERO_THRESHOLD,
        };
        let lower = if bucket == 0 { 0.0 } else { bound(bucket - 1) };
        let within = (lower * (1.0 - 1e-9)..=bound(bucket) * (1.0 + 1e-9)).contains(&theirs);
        assert!(within, "{series}, quantile {quantile}: {theirs} is not in bucket {bucket}");
    }
    println!("{series}: {} times in {} buckets, the same", ours.count(), expected.len());
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "not within 60 s: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Kernel buckets of a sample that the API gave: `[rule, lower, upper, count]` per bucket.
fn buckets(sample: &Value) -> BTreeMap<u32, u64> {
    let number = |value: &Value| value.as_str().unwrap().parse::<f64>().unwrap();
    let buckets = sample["histogram"][1]["buckets"].as_array().into_iter().flatten();
    buckets
        .map(|bucket| {
            let upper = number(&bucket[2]);
            // The zero bucket is the only one around zero.
            let index = if number(&bucket[1]) < 0.0 {
                0
            } else {
                let index = (upper.log2() * 16.0).round() as i32 + histogram::NATIVE_OFFSET;
                u32::try_from(index).unwrap()
            };
            (index, number(&bucket[3]) as u64)
        })
        .collect()
}

#[test]
fn prometheus_ingests_native_histograms_with_the_agents_own_counts() {
    let pid = std::process::id();
    net::own_namespace().unwrap();
    let mut busy = Busy::start(&format!("prom-busy-{pid}"));
    let idle = VmCgroup::new(&format!("prom-idle-{pid}"));
    let (busy_id, idle_id) = (busy.id(), idle.id().0);
    let port = free_port().unwrap();
    let site = Site::new(&format!(
        "libvirt = \"off\"\nlisten = \"127.0.0.1:{port}\"\ncgroups = [\"{}\", \"{}\"]\n\
         mode.cpu_weight = \"observe\"",
        busy.vm.group.pattern(),
        idle.pattern(),
    ))
    .unwrap();
    let agent = site.run(&[]).unwrap();
    let prometheus = Prometheus::start(&site.path().join("prometheus"), port).unwrap();
    busy.work(&agent);
    let waits = |vm: &str| format!("{}{{vm=\"{vm}\"}}", Latency::RunQueue.family().0);
    let count = |series: &str| prometheus.number(&format!("histogram_count({series})"));
    until("1,000 waits in Prometheus", || {
        count(&waits(&busy_id)).is_ok_and(|count| count >= 1_000.0)
    });

    // From here on nothing is counted, so both sides can be compared to the last wait.
    busy.waits.stop();
    let mut ours = histograms(&agent, &busy_id);
    until("the agent's last reading", || {
        std::thread::sleep(Duration::from_secs(1));
        let before = std::mem::replace(&mut ours, histograms(&agent, &busy_id));
        ours == before
    });
    until("Prometheus' last scrape", || {
        ours.iter().all(|(series, ours)| count(series).unwrap() == ours.count() as f64)
    });
    // Reads and writes in both phases, flushes in one. The disk under the file has its own.
    let device = format!("device=\"{}\"", busy.device.name());
    let of_device = ours.iter().filter(|(series, _)| series.contains(&device)).count();
    assert_eq!(of_device, 5, "{ours:?}");
    assert_eq!(ours[0].0, waits(&busy_id));
    ours.iter().for_each(|(series, ours)| compare(&prometheus, series, ours));
    // The other form of the same, in text, and Prometheus' own.
    for series in busy.series() {
        let query = match series.split_once("_seconds_count") {
            Some((name, labels)) => format!("histogram_count({name}_seconds{labels})"),
            None => series.clone(),
        };
        until(&series, || {
            let ours = agent.metric(&series).unwrap().unwrap_or_else(|| panic!("no {series}"));
            ours > 0.0 && prometheus.number(&query).is_ok_and(|theirs| theirs == ours)
        });
    }

    // One without any wait is a native histogram as well.
    let none = histograms(&agent, &idle_id);
    assert_eq!(none, [(waits(&idle_id), LatencyCounts::default())]);
    assert_eq!(count(&waits(&idle_id)).unwrap(), 0.0);
    // Everything else came along.
    assert_eq!(prometheus.number("formtune_probe_up").unwrap(), 1.0);
    let vms = agent.get("/v1/vms").unwrap().matches("\"cgroup_version\"").count();
    assert_eq!(prometheus.number("count(formtune_vm_info)").unwrap(), vms as f64);

    // A VM that is gone is gone from the next scrape.
    drop(busy);
    let gone = waits(&busy_id);
    until("the end of the VM's series", || prometheus.query(&gone).unwrap().is_empty());
    assert_eq!(prometheus.query(&waits(&idle_id)).unwrap().len(), 1);
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));
}

#[test]
fn promtool_has_nothing_to_say() {
    net::own_namespace().unwrap();
    let mut busy = Busy::start(&format!("promtool-{}", std::process::id()));
    let site = Site::new(&format!(
        "libvirt = \"off\"\nlisten = \"off\"\ncgroups = [\"{}\"]",
        busy.vm.group.pattern()
    ))
    .unwrap();
    let agent = site.run(&[]).unwrap();
    busy.work(&agent);
    let waits = format!("{}_count{{vm=\"{}\"}}", Latency::RunQueue.family().0, busy.id());
    until("100 waits", || agent.metric(&waits).unwrap() >= Some(100.0));
    for series in busy.series() {
        until(&series, || agent.metric(&series).unwrap() > Some(0.0));
    }
    // What is not zero once stays so.
    let text = agent.get("/metrics").unwrap();
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool of the package prometheus");
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && said.trim().is_empty(), "{}: {said}", output.status);
    println!("promtool check metrics: {} lines, nothing to say", text.lines().count());
}
