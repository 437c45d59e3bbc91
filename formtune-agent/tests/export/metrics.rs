//! The exposition, read back by a small parser of the format's own rules.

use crate::fixture;
use formtune_agent::export::metrics::{VMS, text};
use formtune_agent::export::snapshot::LibvirtState;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

type Series = (String, Vec<(String, String)>);

/// Samples in order; panics at what the format does not allow.
fn parse(text: &str) -> Vec<(Series, f64)> {
    let mut samples = Vec::new();
    let mut declared = BTreeMap::new();
    let mut helped = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(declared.insert(name.to_owned(), kind.to_owned()).is_none(), "{line}");
        } else {
            assert!(!line.starts_with('#') && !line.is_empty(), "{line:?}");
            let sample = sample(line);
            let name = &sample.0.0;
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix).filter(|b| declared.contains_key(*b)))
                .unwrap_or(name);
            let kind = declared.get(base).unwrap_or_else(|| panic!("{name} is not declared"));
            assert!(helped.contains(base));
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
            assert!(name.starts_with("formtune_"));
            samples.push(sample);
        }
    }
    samples
}

fn sample(line: &str) -> (Series, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let value = if value == "+Inf" { f64::INFINITY } else { value.parse().unwrap() };
    let Some((name, labels)) = series.split_once('{') else {
        return ((series.to_owned(), Vec::new()), value);
    };
    let mut rest = labels.strip_suffix('}').unwrap();
    let mut labels = Vec::new();
    while !rest.is_empty() {
        let (key, after) = rest.split_once("=\"").unwrap();
        let mut chars = after.char_indices();
        let mut label = String::new();
        loop {
            match chars.next().expect("a label ends in a quote") {
                (at, '"') => {
                    rest = after[at + 1..].trim_start_matches(',');
                    break;
                }
                (_, '\\') => label.push(match chars.next().unwrap().1 {
                    'n' => '\n',
                    c => c,
                }),
                (_, c) => label.push(c),
            }
        }
        labels.push((key.to_owned(), label));
    }
    ((name.to_owned(), labels), value)
}

fn label<'a>(series: &'a Series, key: &str) -> Option<&'a str> {
    series.1.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
}

fn value(samples: &[(Series, f64)], name: &str, vm: Option<&str>) -> Option<f64> {
    let mut found = samples.iter().filter(|(s, _)| s.0 == name && label(s, "vm") == vm);
    let value = found.next().map(|(_, value)| *value);
    assert!(found.next().is_none(), "{name} is ambiguous");
    value
}

#[test]
fn values_are_those_of_the_snapshot_in_base_units() {
    let samples = parse(&text(&fixture::snapshot()));
    let web = |name| value(&samples, name, Some("web-1"));
    assert_eq!(web("formtune_vm_cpu_weight"), Some(150.0));
    assert_eq!(web("formtune_vm_cpu_weight_original"), Some(100.0));
    assert_eq!(web("formtune_vm_slo_slack_ratio"), Some(-1.1));
    assert_eq!(web("formtune_vm_slo_met"), Some(0.0));
    assert_eq!(web("formtune_vm_slo_threshold_seconds"), Some(0.002));
    assert_eq!(web("formtune_vm_slo_indicator_seconds"), Some(0.0042));
    assert_eq!(web("formtune_vm_slo_windows_met_total"), Some(1_080.0));
    assert_eq!(web("formtune_vm_cpu_usage_seconds_total"), Some(61.5));
    assert_eq!(value(&samples, "formtune_vms", None), Some(4.0));
    assert_eq!(value(&samples, "formtune_agent_cpu_seconds_total", None), Some(7.2));
    assert_eq!(value(&samples, "formtune_agent_uptime_seconds", None), Some(3_600.0));
    assert_eq!(value(&samples, "formtune_probe_discarded_total", None), Some(7.0));
    assert_eq!(value(&samples, "formtune_probe_up", None), Some(1.0));
    let name = "formtune_libvirt_domains_without_cgroup";
    assert_eq!(value(&samples, name, None), Some(1.0));
    let mut without = fixture::snapshot();
    without.node.libvirt = LibvirtState::NotUsed;
    assert_eq!(value(&parse(&text(&Arc::new(without))), name, None), None);
}

#[test]
fn the_kernels_files_are_told_apart_by_resource_kind_and_event() {
    let samples = parse(&text(&fixture::snapshot()));
    let of = |name: &str| -> Vec<(Vec<&str>, f64)> {
        let named = samples.iter().filter(|(series, _)| series.0 == name);
        named
            .map(|(series, value)| (series.1.iter().map(|(_, v)| v.as_str()).collect(), *value))
            .collect()
    };
    assert_eq!(of("formtune_node_pressure_seconds_total"), [(vec!["cpu", "some"], 30.25)]);
    assert_eq!(
        of("formtune_vm_pressure_seconds_total"),
        [(vec!["hog-1", "memory", "some"], 7.5), (vec!["hog-1", "memory", "full"], 2.0)]
    );
    assert_eq!(
        of("formtune_vm_memory_events_total"),
        [(vec!["hog-1", "max"], 41.0), (vec!["hog-1", "oom_kill"], 1.0)]
    );
    assert_eq!(of("formtune_vm_cpu_periods_total"), [(vec!["hog-1"], 3_600.0)]);
    assert_eq!(of("formtune_vm_cpu_throttled_periods_total"), [(vec!["hog-1"], 120.0)]);
    assert_eq!(of("formtune_vm_runqueue_divergence_ratio"), [(vec!["hog-1"], -0.02)]);
}

#[test]
fn what_is_not_known_is_absent() {
    let samples = parse(&text(&fixture::snapshot()));
    let odd = "a\"b\\c/d é";
    assert_eq!(value(&samples, "formtune_vm_info", Some(odd)), Some(1.0));
    for name in [
        "formtune_vm_cpu_weight",
        "formtune_vm_runqueue_latency_seconds_count",
        "formtune_vm_runqueue_wait_seconds_total",
        "formtune_vm_slo_met",
    ] {
        assert_eq!(value(&samples, name, Some(odd)), None, "{name}");
    }
    assert_eq!(
        value(&samples, "formtune_vm_slo_met", Some("idle-with-a-rather-long-name-0001")),
        None
    );
}

#[test]
fn histograms_are_cumulative_ascending_and_consistent() {
    let samples = parse(&text(&fixture::snapshot()));
    let name = "formtune_vm_runqueue_latency_seconds";
    let mut seen = 0;
    for vm in ["web-1", "hog-1", "idle-with-a-rather-long-name-0001"] {
        let buckets: Vec<_> = samples
            .iter()
            .filter(|(s, _)| s.0 == format!("{name}_bucket") && label(s, "vm") == Some(vm))
            .map(|(s, count)| {
                let le = label(s, "le").unwrap();
                (if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap() }, *count)
            })
            .collect();
        assert!((20..=30).contains(&buckets.len()), "{}", buckets.len());
        assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{buckets:?}");
        let last = buckets.last().unwrap();
        assert_eq!(last.0, f64::INFINITY);
        assert_eq!(Some(last.1), value(&samples, &format!("{name}_count"), Some(vm)));
        assert_eq!(
            value(&samples, &format!("{name}_sum"), Some(vm)),
            value(&samples, "formtune_vm_runqueue_wait_seconds_total", Some(vm)),
        );
        seen += last.1 as u64;
        if vm == "web-1" {
            let below = |s: f64| buckets.iter().find(|(le, _)| *le >= s).unwrap().1;
            assert_eq!(below(0.000_001), 5_000.0);
            assert_eq!(below(0.000_012), 95_000.0);
            assert_eq!(below(0.0042), 95_900.0);
            assert_eq!(last.1, 95_901.0, "what is beyond every bound is in +Inf only");
        }
    }
    assert_eq!(seen, 95_901 + 9_100);
}

#[test]
fn every_action_and_result_has_a_series_from_the_start() {
    let mut snapshot = fixture::snapshot();
    snapshot.node.counters = Default::default();
    let samples = parse(&text(&Arc::new(snapshot)));
    for (name, key, count) in
        [("formtune_decisions_total", "action", 5), ("formtune_actions_total", "result", 5)]
    {
        let series: Vec<_> = samples.iter().filter(|(s, _)| s.0 == name).collect();
        assert_eq!(series.len(), count);
        assert!(series.iter().all(|(s, value)| *value == 0.0 && label(s, key).is_some()));
    }
    let samples = parse(&text(&fixture::snapshot()));
    let raised = samples.iter().find(|(s, _)| label(s, "action") == Some("raise")).unwrap();
    assert_eq!((label(&raised.0, "mode"), raised.1), (Some("enforce"), 1.0));
    let applied = samples.iter().find(|(s, _)| label(s, "result") == Some("applied")).unwrap();
    assert_eq!(applied.1, 2.0);
}

#[test]
fn a_vm_that_is_gone_is_gone() {
    let mut snapshot = fixture::snapshot();
    snapshot.vms.retain(|vm, _| vm.as_str() != "web-1");
    let text = text(&Arc::new(snapshot));
    parse(&text);
    assert!(!text.contains("web-1"), "no series of it is left");

    let mut empty = fixture::snapshot();
    empty.vms.clear();
    let samples = parse(&self::text(&Arc::new(empty)));
    assert!(samples.iter().all(|(s, _)| !s.0.starts_with("formtune_vm_")));
}

#[test]
fn vms_beyond_the_cap_are_counted_instead() {
    let mut snapshot = fixture::snapshot();
    let hog = snapshot.vms.values().next().unwrap().clone();
    for number in 0..VMS {
        let mut vm = hog.clone();
        vm.id = format!("many-{number:05}").as_str().into();
        snapshot.vms.insert(vm.id.clone(), vm);
    }
    let samples = parse(&text(&snapshot));
    assert_eq!(value(&samples, "formtune_vms", None), Some(VMS as f64 + 4.0));
    assert_eq!(value(&samples, "formtune_vms_left_out", None), Some(4.0));
    let shown = samples.iter().filter(|(s, _)| s.0 == "formtune_vm_info").count();
    assert_eq!(shown, VMS);
    let samples = parse(&text(&fixture::snapshot()));
    assert_eq!(value(&samples, "formtune_vms_left_out", None), Some(0.0));
}

#[test]
fn retransmissions_have_a_scope_and_a_direction() {
    let samples = parse(&text(&fixture::snapshot()));
    let find = |name: &str, scope: &str, direction: &str| {
        let wanted = [Some("web-1"), Some(scope), Some(direction)];
        let is =
            |series: &Series| ["vm", "scope", "direction"].map(|key| label(series, key)) == wanted;
        samples.iter().find(|(s, _)| s.0 == name && is(s)).map(|(_, value)| *value)
    };
    let retransmits = "formtune_vm_tcp_retransmits_total";
    assert_eq!(find(retransmits, "host", "sent"), Some(12.0));
    assert_eq!(find(retransmits, "guest", "sent"), Some(96.0));
    assert_eq!(find(retransmits, "guest", "received"), Some(1.0));
    let segments = "formtune_vm_tcp_segments_total";
    assert_eq!(find(segments, "guest", "sent"), Some(48_000.0));
    assert_eq!(find(segments, "host", "sent"), None, "not known");
    let of_web = samples.iter().filter(|(s, _)| s.0 == retransmits).count();
    assert_eq!(of_web, 3, "VMs that are not measured have no series");
}
