//! What a real Prometheus makes of a real agent's metrics.

use formtune_agent::export::metrics::protobuf::ZERO_THRESHOLD;
use formtune_agent::export::series::Histograms;
use formtune_agent::export::snapshot::LatencyCounts;
use formtune_common::histogram;
use formtune_tests::agent::{Agent, Site};
use formtune_tests::prometheus::{Prometheus, free_port};
use formtune_tests::vm_cgroup::{Member, VmCgroup};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const NAME: &str = "formtune_vm_runqueue_latency_seconds";

/// A thread that wakes up 500 times a second, in `vcpu0`.
fn periodic(vm: &VmCgroup) -> Member {
    Member::start(vm, "vcpu0", None, || {
        loop {
            std::thread::sleep(Duration::from_millis(2));
        }
    })
}

fn counts(agent: &Agent, vm: &str) -> LatencyCounts {
    let answer = agent.get(&format!("/v1/histograms?vm={vm}")).unwrap();
    let mut all: Histograms = serde_json::from_str(&answer).unwrap();
    all.histograms.pop().unwrap().counts
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
    let (busy, idle) =
        (VmCgroup::new(&format!("prom-busy-{pid}")), VmCgroup::new(&format!("prom-idle-{pid}")));
    let (busy_id, idle_id) = (busy.id().0, idle.id().0);
    let port = free_port().unwrap();
    let site = Site::new(&format!(
        "libvirt = \"off\"\nlisten = \"127.0.0.1:{port}\"\ncgroups = [\"{}\", \"{}\"]\n\
         mode.cpu_weight = \"observe\"",
        busy.pattern(),
        idle.pattern(),
    ))
    .unwrap();
    let agent = site.run(&[]).unwrap();
    let member = periodic(&busy);
    let prometheus = Prometheus::start(&site.path().join("prometheus"), port).unwrap();
    let of = |vm: &str| format!("{NAME}{{vm=\"{vm}\"}}");
    let count = |vm: &str| prometheus.number(&format!("histogram_count({})", of(vm)));
    until("1,000 waits in Prometheus", || count(&busy_id).is_ok_and(|count| count >= 1_000.0));

    // From here on nothing is counted, so both sides can be compared to the last wait.
    member.stop();
    let mut ours = counts(&agent, &busy_id);
    until("the agent's last reading", || {
        std::thread::sleep(Duration::from_secs(1));
        let before = std::mem::replace(&mut ours, counts(&agent, &busy_id));
        ours == before
    });
    until("Prometheus' last scrape", || count(&busy_id).unwrap() == ours.count() as f64);

    let sample = prometheus.query(&of(&busy_id)).unwrap();
    let expected: BTreeMap<u32, u64> =
        ours.counts().iter().map(|&(bucket, count)| (bucket.into(), count)).collect();
    assert_eq!(buckets(&sample[0]), expected);
    assert!(expected.len() >= 10, "too little to compare: {expected:?}");
    let sum = prometheus.number(&format!("histogram_sum({})", of(&busy_id))).unwrap();
    assert!((sum - ours.sum_ns as f64 / 1e9).abs() < 1e-9, "{sum} and {} ns", ours.sum_ns);
    for quantile in [0.1, 0.5, 0.9, 0.99] {
        let query = format!("histogram_quantile({quantile}, {})", of(&busy_id));
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
        assert!(within, "quantile {quantile}: {theirs} is not in bucket {bucket}");
        println!("quantile {quantile}: {:.3} µs in Prometheus, bucket {bucket}", theirs * 1e6);
    }

    // One without any wait is a native histogram as well.
    assert_eq!(counts(&agent, &idle_id), LatencyCounts::default());
    assert_eq!(count(&idle_id).unwrap(), 0.0);
    // Everything else came along.
    assert_eq!(prometheus.number("formtune_probe_up").unwrap(), 1.0);
    let vms = agent.get("/v1/vms").unwrap().matches("\"cgroup_version\"").count();
    assert_eq!(prometheus.number("count(formtune_vm_info)").unwrap(), vms as f64);
    println!("{} waits in {} buckets, the same in Prometheus", ours.count(), expected.len());

    // A VM that is gone is gone from the next scrape.
    drop(member);
    drop(busy);
    until("the end of the VM's series", || prometheus.query(&of(&busy_id)).unwrap().is_empty());
    assert_eq!(prometheus.query(&of(&idle_id)).unwrap().len(), 1);
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));
}

#[test]
fn promtool_has_nothing_to_say() {
    let vm = VmCgroup::new(&format!("promtool-{}", std::process::id()));
    let site = Site::new(&format!(
        "libvirt = \"off\"\nlisten = \"off\"\ncgroups = [\"{}\"]",
        vm.pattern()
    ))
    .unwrap();
    let agent = site.run(&[]).unwrap();
    let _member = periodic(&vm);
    let count = format!("{NAME}_count{{vm=\"{}\"}} ", vm.id().0);
    let mut text = String::new();
    until("100 waits", || {
        text = agent.get("/metrics").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&count));
        line.is_some_and(|count| count.parse::<u64>().unwrap() >= 100)
    });
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
