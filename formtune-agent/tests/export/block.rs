//! Block I/O as it is shown.

use crate::fixture;
use formtune_agent::export::Snapshot;
use formtune_agent::export::block::*;
use formtune_agent::export::metrics::text;
use formtune_agent::export::snapshot::{LatencyCounts, RecentRunq};
use formtune_common::histogram;
use formtune_core::units::{Nanos, VmId};
use std::sync::Arc;

fn counts(ns: u64, count: u64) -> LatencyCounts {
    let mut buckets = vec![0; histogram::BUCKETS];
    buckets[histogram::bucket(ns) as usize] = count;
    LatencyCounts::from_dense(&buckets, ns * count)
}

fn device(name: &str, ops: &[(Op, u64, u64)], occupants: &[(Who, f64)]) -> BlockDevice {
    let op = |&(op, ns, requests): &(Op, u64, u64)| BlockOp {
        op,
        requests,
        total: counts(ns, requests),
        in_device: if op == Op::Flush { counts(0, 0) } else { counts(ns / 2, requests) },
    };
    let occupant = |(who, share): &(Who, f64)| BlockOccupant {
        who: who.clone(),
        requests: share * 8.0,
        share: *share,
    };
    BlockDevice {
        device: name.into(),
        ops: ops.iter().map(op).collect(),
        occupants: occupants.iter().map(occupant).collect(),
    }
}

/// The sensor on the node of the fixture.
pub fn node() -> BlockNode {
    BlockNode {
        method: Some("stamps".into()),
        unsupported: None,
        host: vec![device("sda", &[(Op::Write, 1_000_000, 11)], &[])],
        unmeasured_vms: 0,
        unmeasured_cgroups: 0,
        rows: 4_352,
        rows_used: 3,
        span: Nanos::from_secs(10),
        counters: BlockCounters { no_cgroup: 3, full: 2, merged: 40, ..BlockCounters::default() },
    }
}

/// The victim, held up by its neighbour.
pub fn state() -> BlockState {
    let vm = |name: &str| Who::Vm(VmId::from(name));
    let occupants =
        [(vm("hog-1"), 0.81), (vm("web-1"), 0.15), (Who::Host, 0.03), (Who::Gone, 0.01)];
    let ops = [(Op::Read, 400_000, 900), (Op::Flush, 2_000_000, 7)];
    BlockState {
        recent: RecentRunq {
            span: Nanos::from_secs(10),
            samples: 907,
            wait: Nanos::from_millis(400),
            p50: Some(Nanos::from_micros(400)),
            p99: Some(Nanos::from_micros(2_100)),
            p999: Some(Nanos::from_micros(2_100)),
            max: Some(Nanos::from_micros(2_100)),
        },
        devices: vec![device("sda", &ops, &occupants), device("sdb", &[(Op::Write, 9, 1)], &[])],
    }
}

fn has(text: &str, line: &str) {
    assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
}

#[test]
fn histograms_are_by_device_operation_and_phase() {
    let text = text(&Arc::new(fixture::snapshot()));
    let name = "formtune_vm_block_latency_seconds";
    let labels = "vm=\"web-1\",device=\"sda\",op=\"read\"";
    has(&text, &format!("{name}_count{{{labels},phase=\"total\"}} 900"));
    has(&text, &format!("{name}_sum{{{labels},phase=\"total\"}} 0.36"));
    has(&text, &format!("{name}_sum{{{labels},phase=\"device\"}} 0.18"));
    assert!(text.contains("op=\"flush\",phase=\"total\""));
    assert!(!text.contains("op=\"flush\",phase=\"device\""), "nothing is known of it");
    has(
        &text,
        "formtune_host_block_latency_seconds_count{device=\"sda\",op=\"write\",phase=\"total\"} 11",
    );
    has(&text, "formtune_block_unattributed_total{reason=\"no_cgroup\"} 3.0");
    has(&text, "formtune_block_lost_total{reason=\"full\"} 2.0");
    assert!(!text.contains("reason=\"missed\""), "the kernel does not say");
}

#[test]
fn the_top_three_occupants_are_named() {
    let text = text(&Arc::new(fixture::snapshot()));
    let name = "formtune_vm_block_occupant_ratio{vm=\"web-1\",device=\"sda\"";
    has(&text, &format!("{name},kind=\"vm\",occupant=\"hog-1\"}} 0.81"));
    has(&text, &format!("{name},kind=\"host\",occupant=\"host\"}} 0.03"));
    assert_eq!(text.matches("formtune_vm_block_occupant_ratio{").count(), 3);
}

#[test]
fn answers_of_agents_without_the_sensor_are_read() {
    let mut json = serde_json::to_value(fixture::snapshot()).unwrap();
    json["node"].as_object_mut().unwrap().remove("block");
    json["vms"]["web-1"].as_object_mut().unwrap().remove("block");
    let snapshot: Snapshot = serde_json::from_value(json).unwrap();
    assert!(snapshot.node.block.is_none() && snapshot.vms[&VmId::from("web-1")].block.is_none());
    assert!(!text(&Arc::new(snapshot)).contains("_block_"));
}
