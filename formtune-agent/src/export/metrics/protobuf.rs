//! The Prometheus protobuf format: length-delimited `io.prometheus.client.MetricFamily`.
//!
//! Histograms are both classic and native, as Prometheus' own clients write them; a server
//! takes the form that it is configured for. The messages are those of
//! <https://github.com/prometheus/client_model/blob/master/io/prometheus/client/metrics.proto>,
//! less what formtune has no use for (summaries, exemplars, time stamps, float counts).

use super::super::latency::{LE_BOUNDS, LatencyCounts, le_bound_seconds};
use super::exposition::{Exposition, Family, Kind, Labels, Value};
use super::{PIECE, Sink};
use formtune_common::histogram;
use prost::Message;
use prost::encoding::{encode_varint, message};
use std::fmt;

/// Breadth of the zero bucket of native histograms, seconds: that of Prometheus' own clients.
/// Times are whole nanoseconds, so it holds zeroes only; were it zero, a histogram that is
/// still empty would be taken for a classic one.
pub const ZERO_THRESHOLD: f64 = 1.0 / (1_u128 << 127) as f64 / 2.0;

/// Name and value of a label.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct LabelPair {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// Value of a gauge or of a counter: the messages are alike.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Number {
    /// Value.
    #[prost(double, tag = "1")]
    pub value: f64,
}

/// A classic bucket.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Bucket {
    /// Times up to the bound.
    #[prost(uint64, tag = "1")]
    pub cumulative_count: u64,
    /// Bound, inclusive, seconds.
    #[prost(double, tag = "2")]
    pub upper_bound: f64,
}

/// Consecutive native buckets.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct BucketSpan {
    /// Gap to the span before; the first: its index.
    #[prost(sint32, tag = "1")]
    pub offset: i32,
    /// Buckets.
    #[prost(uint32, tag = "2")]
    pub length: u32,
}

/// A histogram, classic and native.
#[derive(Clone, PartialEq, Message)]
pub struct Histogram {
    /// Times.
    #[prost(uint64, tag = "1")]
    pub sample_count: u64,
    /// Their sum, seconds.
    #[prost(double, tag = "2")]
    pub sample_sum: f64,
    /// Classic; that without a bound is left out, as it equals `sample_count`.
    #[prost(message, repeated, tag = "3")]
    pub bucket: Vec<Bucket>,
    /// Native from here on: powers of two are divided into 2^schema buckets.
    #[prost(sint32, tag = "5")]
    pub schema: i32,
    /// See [`ZERO_THRESHOLD`].
    #[prost(double, tag = "6")]
    pub zero_threshold: f64,
    /// Zeroes.
    #[prost(uint64, tag = "7")]
    pub zero_count: u64,
    /// Spans of buckets.
    #[prost(message, repeated, tag = "12")]
    pub positive_span: Vec<BucketSpan>,
    /// Count of each bucket less that of the one before.
    #[prost(sint64, repeated, packed = "false", tag = "13")]
    pub positive_delta: Vec<i64>,
}

/// One sample.
#[derive(Clone, PartialEq, Message)]
pub struct Metric {
    /// Labels.
    #[prost(message, repeated, tag = "1")]
    pub label: Vec<LabelPair>,
    /// Of a gauge.
    #[prost(message, optional, tag = "2")]
    pub gauge: Option<Number>,
    /// Of a counter.
    #[prost(message, optional, tag = "3")]
    pub counter: Option<Number>,
    /// Of a histogram.
    #[prost(message, optional, tag = "7")]
    pub histogram: Option<Histogram>,
}

/// A family with its samples.
#[derive(Clone, PartialEq, Message)]
pub struct MetricFamily {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Help.
    #[prost(string, tag = "2")]
    pub help: String,
    /// See [`MetricType`].
    #[prost(enumeration = "MetricType", optional, tag = "3")]
    pub r#type: Option<i32>,
    /// Samples.
    #[prost(message, repeated, tag = "4")]
    pub metric: Vec<Metric>,
}

/// Which field of [`Metric`] is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum MetricType {
    /// `counter`
    Counter = 0,
    /// `gauge`
    Gauge = 1,
    /// `histogram`
    Histogram = 4,
}

/// Number of the field `metric` of [`MetricFamily`].
const METRIC: u32 = 4;

/// Writes families as messages. A sample is encoded when it comes, so that there are never
/// more than one of them in memory besides the answer.
pub struct Protobuf<'s> {
    to: &'s mut Sink<'s>,
    /// Not handed over yet.
    out: Vec<u8>,
    /// The family at hand, without its length.
    family: Vec<u8>,
    metric: Metric,
    bounds: [f64; LE_BOUNDS],
}

impl<'s> Protobuf<'s> {
    /// Hands over what it wrote in pieces.
    pub fn new(to: &'s mut Sink<'s>) -> Self {
        Self {
            to,
            out: Vec::new(),
            family: Vec::new(),
            metric: Metric::default(),
            bounds: std::array::from_fn(le_bound_seconds),
        }
    }

    fn histogram(&self, counts: &LatencyCounts, into: &mut Histogram) {
        into.sample_count = counts.count();
        into.sample_sum = counts.sum_ns as f64 / 1e9;
        into.bucket.clear();
        let mut cumulative_count = 0;
        for (count, upper_bound) in counts.classic().into_iter().zip(self.bounds) {
            cumulative_count += count;
            into.bucket.push(Bucket { cumulative_count, upper_bound });
        }
        let native = counts.native();
        into.schema = histogram::SCHEMA;
        into.zero_threshold = ZERO_THRESHOLD;
        into.zero_count = native.zero;
        let span = |(offset, length)| BucketSpan { offset, length };
        into.positive_span = native.spans.into_iter().map(span).collect();
        into.positive_delta = native.deltas;
    }
}

impl Exposition for Protobuf<'_> {
    fn begin(&mut self, family: &Family<'_>) -> fmt::Result {
        let kind = match family.kind {
            Kind::Gauge => MetricType::Gauge,
            Kind::Counter => MetricType::Counter,
            Kind::Histogram => MetricType::Histogram,
        };
        let head = MetricFamily {
            name: family.name.to_owned(),
            help: family.help.to_owned(),
            r#type: Some(kind.into()),
            metric: Vec::new(),
        };
        self.family.clear();
        head.encode(&mut self.family).map_err(|_| fmt::Error)
    }

    fn sample(
        &mut self,
        family: &Family<'_>,
        labels: &Labels<'_>,
        value: Value<'_>,
    ) -> fmt::Result {
        // Taken out and put back: its strings and lists are used again.
        let mut metric = std::mem::take(&mut self.metric);
        metric.label.resize_with(labels.len(), LabelPair::default);
        for (pair, (name, value)) in metric.label.iter_mut().zip(labels) {
            (*name).clone_into(&mut pair.name);
            (*value).clone_into(&mut pair.value);
        }
        match (value, family.kind) {
            (Value::Number(value), Kind::Counter) => {
                (metric.gauge, metric.counter) = (None, Some(Number { value }));
                metric.histogram = None;
            }
            (Value::Number(value), _) => {
                (metric.gauge, metric.counter) = (Some(Number { value }), None);
                metric.histogram = None;
            }
            (Value::Latency(counts), _) => {
                (metric.gauge, metric.counter) = (None, None);
                self.histogram(counts, metric.histogram.get_or_insert_default());
            }
        }
        message::encode(METRIC, &metric, &mut self.family);
        self.metric = metric;
        Ok(())
    }

    fn end(&mut self) -> fmt::Result {
        encode_varint(self.family.len() as u64, &mut self.out);
        // Its length comes first, so a large one is a piece of its own.
        if self.family.len() >= PIECE {
            self.finish()?;
            return (self.to)(std::mem::take(&mut self.family));
        }
        self.out.extend_from_slice(&self.family);
        if self.out.len() >= PIECE { self.finish() } else { Ok(()) }
    }

    fn finish(&mut self) -> fmt::Result {
        (self.to)(std::mem::take(&mut self.out))
    }
}

/// Reads what [`Protobuf`] wrote.
///
/// # Errors
/// It is not a sequence of families.
pub fn decode(mut bytes: &[u8]) -> Result<Vec<MetricFamily>, prost::DecodeError> {
    let mut families = Vec::new();
    while !bytes.is_empty() {
        families.push(MetricFamily::decode_length_delimited(&mut bytes)?);
    }
    Ok(families)
}
