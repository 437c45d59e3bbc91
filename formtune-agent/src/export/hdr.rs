//! HdrHistogram interval logs (V2, compressed): what was counted between two moments, one
//! line per VM and metric, each under a tag of its own.
//!
//! Values are nanoseconds. A time is recorded at the upper bound of its bucket; three
//! significant digits tell all buckets apart, so that the counts come back exactly. Logs are
//! read by HdrHistogram's own tools in any language (<https://hdrhistogram.org>).

use super::series::{Histograms, Series};
use formtune_common::histogram;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{
    IntervalLogWriterBuilder, IntervalLogWriterError, Tag,
};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::{Duration, UNIX_EPOCH};

/// Significant digits: a bucket is more than 4 % wide, and 0.1 % is told apart.
const DIGITS: u8 = 3;
/// The smallest power of two above the last bucket's bound.
const HIGHEST: u64 = 1 << 38;

/// Turns successive states of the counts into intervals of a log.
pub struct Intervals {
    before: Option<Histograms>,
    room: Histogram<u64>,
    serializer: V2DeflateSerializer,
}

impl std::fmt::Debug for Intervals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = self.before.as_ref().map(|before| before.at);
        f.debug_struct("Intervals").field("at", &at).finish_non_exhaustive()
    }
}

impl Default for Intervals {
    fn default() -> Self {
        let room = Histogram::new_with_bounds(1, HIGHEST, DIGITS);
        Self {
            before: None,
            room: room.expect("the bounds are constants"),
            serializer: V2DeflateSerializer::new(),
        }
    }
}

impl Intervals {
    /// Whether there is a state yet that intervals can begin from.
    pub fn has_begun(&self) -> bool {
        self.before.is_some()
    }

    /// What was counted from the last state to `now`, as lines of a log; nothing without a
    /// last state. A VM that is new counts from when it was first seen, and so does one whose
    /// counts began anew; a VM without counts has no line.
    pub fn lines(&mut self, now: &Histograms) -> io::Result<Vec<u8>> {
        let mut lines = Vec::new();
        let Some(before) = &self.before else { return Ok(lines) };
        let old: BTreeMap<_, _> = before.histograms.iter().map(|old| (key(old), old)).collect();
        let length = Duration::from_nanos(now.at.since(before.at).0);
        let start = Duration::from_millis(now.unix_ms).saturating_sub(length);
        let mut log =
            IntervalLogWriterBuilder::new().begin_log_with(&mut lines, &mut self.serializer)?;
        for series in &now.histograms {
            let known = old.get(&key(series)).filter(|old| old.seen_at == series.seen_at);
            let counted = match known {
                Some(old) => series.counts.since(&old.counts),
                // It was there and had no room: what it counted before is not of now.
                None if before.left_out > 0 && series.seen_at <= before.at => continue,
                None => None,
            };
            let counted = counted.unwrap_or_else(|| series.counts.clone());
            if counted.counts().is_empty() {
                continue;
            }
            self.room.reset();
            for &(bucket, count) in counted.counts() {
                let value = histogram::upper_bound(bucket.into());
                self.room.record_n(value, count).map_err(io::Error::other)?;
            }
            let tag = tag(series);
            log.write_histogram(&self.room, start, length, Tag::new(&tag)).map_err(|error| {
                match error {
                    IntervalLogWriterError::IoError(error) => error,
                    IntervalLogWriterError::SerializeError(error) => io::Error::other(error),
                }
            })?;
        }
        Ok(lines)
    }

    /// The next interval begins here.
    pub fn begin(&mut self, now: Histograms) {
        self.before = Some(now);
    }
}

/// First lines of a log that begins with this state.
pub fn head(now: &Histograms) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    IntervalLogWriterBuilder::new()
        .add_comment("[Histogram log format version 1.3]")
        .add_comment("formtune: latency in nanoseconds, one tag per VM and metric")
        .with_start_time(UNIX_EPOCH + Duration::from_millis(now.unix_ms))
        .begin_log_with(&mut head, &mut V2DeflateSerializer::new())?;
    head.write_all(
        b"\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\"Interval_Compressed_Histogram\"\n",
    )?;
    Ok(head)
}

fn key(series: &Series) -> (&str, &BTreeMap<String, String>) {
    (&series.metric, &series.labels)
}

/// `VM:METRIC`, and further labels' values in the order of their names: `web-1:block_latency:
/// vda:device:read`. What a tag may not hold is percent-encoded.
fn tag(series: &Series) -> String {
    let mut tag = String::new();
    let vm = series.labels.get("vm").map_or("", String::as_str);
    let others = series.labels.iter().filter(|(name, _)| *name != "vm").map(|(_, value)| value);
    for (at, part) in [vm, &series.metric].into_iter().chain(others.map(String::as_str)).enumerate()
    {
        if at > 0 {
            tag.push(':');
        }
        for c in part.chars() {
            if matches!(c, ',' | ':' | '%') || c.is_whitespace() || c.is_control() {
                let mut bytes = [0; 4];
                for byte in c.encode_utf8(&mut bytes).bytes() {
                    let _ = write!(tag, "%{byte:02X}");
                }
            } else {
                tag.push(c);
            }
        }
    }
    tag
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::latency::LatencyCounts;
    use formtune_core::units::Nanos;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    fn series(vm: &str, seen_at: u64, counts: &[(u32, u64)]) -> Series {
        let mut dense = vec![0; histogram::BUCKETS];
        counts.iter().for_each(|&(bucket, count)| dense[bucket as usize] += count);
        Series {
            metric: "runqueue_latency".into(),
            labels: BTreeMap::from([("vm".into(), vm.into())]),
            seen_at: Nanos(seen_at),
            counts: LatencyCounts::from_dense(&dense, 0),
        }
    }

    fn state(ms: u64, histograms: Vec<Series>) -> Histograms {
        let (at, unix_ms) = (Nanos::from_millis(ms), 1_790_000_000_000 + ms);
        Histograms { at, unix_ms, histograms, left_out: 0 }
    }

    /// Tag, start and length in milliseconds, number of times.
    fn read(log: &[u8]) -> Vec<(String, u128, u128, u64)> {
        let entries = IntervalLogIterator::new(log).map(|entry| entry.unwrap());
        let intervals = entries.filter_map(|entry| match entry {
            LogEntry::Interval(interval) => Some(interval),
            _ => None,
        });
        intervals
            .map(|interval| {
                let bytes = base64(interval.encoded_histogram());
                let histogram: Histogram<u64> = hdrhistogram::serialization::Deserializer::new()
                    .deserialize(&mut bytes.as_slice())
                    .unwrap();
                let tag = interval.tag().unwrap().as_str().to_owned();
                let (start, length) = (interval.start_timestamp(), interval.duration());
                (tag, start.as_millis(), length.as_millis(), histogram.len())
            })
            .collect()
    }

    fn base64(text: &str) -> Vec<u8> {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.decode(text).unwrap()
    }

    #[test]
    fn intervals_hold_what_came_since_and_nothing_twice() {
        let mut intervals = Intervals::default();
        let first = state(1_000, vec![series("a", 5, &[(300, 10)]), series("b", 5, &[(0, 1)])]);
        assert!(intervals.lines(&first).unwrap().is_empty(), "nothing to begin from");
        let mut log = head(&first).unwrap();
        intervals.begin(first);
        let second = state(
            3_000,
            vec![
                series("a", 5, &[(300, 12), (400, 1)]),
                series("b", 5, &[(0, 1)]),
                series("new one", 1_500_000_000, &[(200, 7)]),
            ],
        );
        let lines = intervals.lines(&second).unwrap();
        assert_eq!(lines, intervals.lines(&second).unwrap(), "until it is begun anew");
        log.extend(lines);
        intervals.begin(second);
        // `a` was started again under its name.
        let third = state(4_000, vec![series("a", 3_500_000_000, &[(300, 13)])]);
        log.extend(intervals.lines(&third).unwrap());
        let start = 1_790_000_001_000;
        assert_eq!(
            read(&log),
            [
                ("a:runqueue_latency".into(), start, 2_000, 3),
                ("new%20one:runqueue_latency".into(), start, 2_000, 7),
                ("a:runqueue_latency".into(), start + 2_000, 1_000, 13),
            ]
        );
    }

    #[test]
    fn what_had_no_room_before_does_not_count_as_new() {
        let mut intervals = Intervals::default();
        let first = Histograms { left_out: 1, ..state(1_000, vec![series("a", 5, &[])]) };
        intervals.begin(first);
        let second = state(2_000, vec![series("b", 5, &[(9, 1_000_000)])]);
        assert!(intervals.lines(&second).unwrap().is_empty());
    }

    #[test]
    fn tags_hold_what_tags_may_hold() {
        let mut odd = series("a b,c:d\n%é", 0, &[]);
        odd.labels.extend([("op".into(), "read".into()), ("device".into(), "vda".into())]);
        let tag = tag(&odd);
        assert_eq!(tag, "a%20b%2Cc%3Ad%0A%25é:runqueue_latency:vda:read");
        assert!(Tag::new(&tag).is_some());
    }
}
