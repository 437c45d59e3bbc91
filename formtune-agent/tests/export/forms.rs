//! Whatever form the counts leave in, they are the same counts.

use crate::fixture;
use formtune_agent::export::hdr::{Intervals, head};
use formtune_agent::export::metrics::{self, protobuf};
use formtune_agent::export::series::Histograms;
use formtune_agent::export::snapshot::{LatencyCounts, Snapshot};
use formtune_common::histogram::{self, BUCKETS};
use formtune_core::units::{Nanos, VmId};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
use proptest::prelude::*;
use std::collections::BTreeMap;

const NAME: &str = "formtune_vm_runqueue_latency_seconds";

/// The fixture with these counts for `web-1`.
fn with(dense: &[u64]) -> Snapshot {
    let mut snapshot = fixture::snapshot();
    let web = snapshot.vms.get_mut(&VmId::from("web-1")).unwrap();
    web.runq = Some(LatencyCounts::from_dense(dense, 1_234_567));
    snapshot
}

/// Bound in seconds and cumulative count of each line of the text form.
fn text_buckets(snapshot: &Snapshot) -> Vec<(f64, u64)> {
    let text = metrics::text(snapshot);
    let prefix = format!("{NAME}_bucket{{le=\"");
    let lines = text.lines().filter_map(|line| line.strip_prefix(&prefix));
    lines
        .filter(|line| line.contains("vm=\"web-1\""))
        .map(|line| {
            let (le, rest) = line.split_once('"').unwrap();
            let le = if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap() };
            (le, rest.rsplit_once(' ').unwrap().1.parse().unwrap())
        })
        .collect()
}

/// The histogram of `web-1` in the protobuf form.
fn protobuf_histogram(snapshot: &Snapshot) -> protobuf::Histogram {
    let families = protobuf::decode(&metrics::protobuf(snapshot)).unwrap();
    let family = families.into_iter().find(|family| family.name == NAME).unwrap();
    let ours = |metric: &protobuf::Metric| metric.label.iter().any(|pair| pair.value == "web-1");
    family.metric.into_iter().find(ours).unwrap().histogram.unwrap()
}

/// Kernel buckets of the native form.
fn native_dense(histogram: &protobuf::Histogram) -> Vec<u64> {
    assert_eq!(histogram.schema, 4);
    let mut dense = vec![0; BUCKETS];
    dense[0] = histogram.zero_count;
    let (mut index, mut count, mut deltas) = (0, 0, histogram.positive_delta.iter());
    for span in &histogram.positive_span {
        index += span.offset;
        for _ in 0..span.length {
            count += deltas.next().expect("a delta for each bucket");
            let bucket = usize::try_from(index + histogram::NATIVE_OFFSET).unwrap();
            dense[bucket] = u64::try_from(count).unwrap();
            index += 1;
        }
    }
    assert!(deltas.next().is_none());
    dense
}

/// Kernel buckets of the one interval that the log holds of `web-1`.
fn hdr_dense(log: &[u8]) -> Vec<u64> {
    let mut dense = vec![0; BUCKETS];
    for entry in IntervalLogIterator::new(log) {
        let LogEntry::Interval(interval) = entry.unwrap() else { continue };
        assert_eq!(&*interval.tag().unwrap(), "web-1:runqueue_latency");
        let bytes = base64(interval.encoded_histogram());
        let hdr: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
        for value in hdr.iter_recorded() {
            let low = hdr.lowest_equivalent(value.value_iterated_to());
            let high = hdr.highest_equivalent(value.value_iterated_to());
            let bucket = (0..BUCKETS as u32)
                .filter(|&bucket| has_times(bucket))
                .find(|&bucket| (low..=high).contains(&histogram::upper_bound(bucket)))
                .unwrap();
            dense[bucket as usize] += value.count_at_value();
        }
    }
    dense
}

fn base64(text: &str) -> Vec<u8> {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.decode(text).unwrap()
}

/// Some buckets below 32 ns hold no whole nanosecond; nothing is ever counted there.
fn has_times(bucket: u32) -> bool {
    histogram::lower_bound(bucket) <= histogram::upper_bound(bucket)
}

/// What is counted in kernel buckets up to a bound in seconds.
fn below(dense: &[u64], le: f64) -> u64 {
    let within =
        |bucket: u32| le.is_infinite() || histogram::upper_bound(bucket) as f64 / 1e9 <= le;
    (0..BUCKETS as u32).filter(|&bucket| within(bucket)).map(|bucket| dense[bucket as usize]).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_form_holds_the_same_counts(
        counts in proptest::collection::vec((0..BUCKETS as u32, 1u64..1 << 40), 0..120),
    ) {
        let mut dense = vec![0; BUCKETS];
        for (bucket, count) in counts.into_iter().filter(|(bucket, _)| has_times(*bucket)) {
            dense[bucket as usize] += count;
        }
        let total: u64 = dense.iter().sum();
        let snapshot = with(&dense);

        let text = text_buckets(&snapshot);
        prop_assert_eq!(text.len(), 25);
        for &(le, count) in &text {
            prop_assert_eq!(count, below(&dense, le), "le {}", le);
        }

        let histogram = protobuf_histogram(&snapshot);
        prop_assert_eq!(histogram.sample_count, total);
        prop_assert_eq!(histogram.sample_sum, 0.001_234_567);
        let classic: Vec<_> =
            histogram.bucket.iter().map(|b| (b.upper_bound, b.cumulative_count)).collect();
        prop_assert_eq!(&classic[..], &text[..24]);
        prop_assert_eq!(native_dense(&histogram), &dense[..]);

        let mut before = Histograms::of(&with(&[0; BUCKETS]), Some("web-1"));
        before.at = Nanos(before.at.0 - 1_000_000_000);
        let mut log = head(&before).unwrap();
        let mut intervals = Intervals::default();
        intervals.begin(before);
        log.extend(intervals.lines(&Histograms::of(&snapshot, Some("web-1"))).unwrap());
        prop_assert_eq!(hdr_dense(&log), dense);
    }
}

#[test]
fn both_encoders_say_the_same_of_every_family() {
    let snapshot = fixture::snapshot();
    let text = metrics::text(&snapshot);
    let mut from_text = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        from_text.insert(series.to_owned(), value.parse::<f64>().unwrap_or(f64::INFINITY));
    }
    let mut values = 0;
    for family in protobuf::decode(&metrics::protobuf(&snapshot)).unwrap() {
        let kind = protobuf::MetricType::try_from(family.r#type.unwrap()).unwrap();
        let word = format!("{kind:?}").to_lowercase();
        let head = format!("# HELP {0} {1}\n# TYPE {0} {word}\n", family.name, family.help);
        assert!(text.contains(&head), "{head}");
        assert!(!family.metric.is_empty());
        for metric in &family.metric {
            let escape = |v: &str| v.replace('\\', "\\\\").replace('"', "\\\"");
            let labels: Vec<_> = metric
                .label
                .iter()
                .map(|pair| format!("{}=\"{}\"", pair.name, escape(&pair.value)))
                .collect();
            let labels = labels.join(",");
            let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
            let same = |suffix: &str, value: f64| {
                let series = format!("{}{suffix}{labels}", family.name);
                assert_eq!(from_text.get(&series), Some(&value), "{series}");
            };
            match (&metric.gauge, &metric.counter, &metric.histogram) {
                (Some(gauge), None, None) => same("", gauge.value),
                (None, Some(counter), None) => same("", counter.value),
                (None, None, Some(histogram)) => {
                    same("_sum", histogram.sample_sum);
                    same("_count", histogram.sample_count as f64);
                    values += 26;
                }
                other => panic!("{}: {other:?}", family.name),
            }
            values += 1;
        }
    }
    assert_eq!(values, from_text.len(), "none is missing in either");
}

#[test]
fn an_idle_vm_has_a_native_histogram_too() {
    let histogram = protobuf_histogram(&with(&[0; BUCKETS]));
    assert_eq!((histogram.sample_count, histogram.positive_span.len()), (0, 0));
    // Servers tell native histograms by this.
    assert_eq!(histogram.zero_threshold, 2.938735877055719e-39);
}
