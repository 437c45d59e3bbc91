//! The Prometheus text format, 0.0.4: classic histograms only.
//!
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>

use super::super::latency::{LE_BOUNDS, LatencyCounts, le_bound_seconds};
use super::exposition::{Exposition, Family, Kind, Labels, Value};
use super::{PIECE, Sink};
use std::fmt::{self, Write};

/// Writes families as text.
pub struct Text<'s> {
    to: &'s mut Sink<'s>,
    /// Not handed over yet.
    out: String,
    /// The labels of the sample at hand.
    labels: String,
    bounds: [String; LE_BOUNDS],
    /// Of the family of histograms at hand, what comes before the labels in a line of each
    /// bucket: a thousand VMs have hundred thousand of these lines.
    buckets: Vec<String>,
}

impl<'s> Text<'s> {
    /// Hands over what it wrote in pieces.
    pub fn new(to: &'s mut Sink<'s>) -> Self {
        let bound = |i| dtoa::Buffer::new().format(le_bound_seconds(i)).to_owned();
        Self {
            to,
            out: String::with_capacity(PIECE + PIECE / 16),
            labels: String::new(),
            bounds: std::array::from_fn(bound),
            buckets: Vec::new(),
        }
    }

    /// A line that is not of a bucket.
    fn line(&mut self, family: &Family<'_>, suffix: &str, value: &str) {
        self.out.push_str(family.name);
        self.out.push_str(suffix);
        if !self.labels.is_empty() {
            self.out.push('{');
            self.out.push_str(&self.labels);
            self.out.push('}');
        }
        self.out.push(' ');
        self.out.push_str(value);
        self.out.push('\n');
    }

    fn latency(&mut self, family: &Family<'_>, counts: &LatencyCounts) {
        let classic = counts.classic();
        let mut number = itoa::Buffer::new();
        let sum = counts.sum_ns as f64 / 1e9;
        self.line(family, "_sum", dtoa::Buffer::new().format(sum));
        self.line(family, "_count", number.format(counts.count()));
        let mut below = 0;
        let labels = if self.labels.is_empty() { "" } else { "," };
        let rest = [labels, &self.labels, "} "];
        for (bucket, count) in self.buckets.iter().zip(classic) {
            below += count;
            self.out.push_str(bucket);
            rest.iter().for_each(|part| self.out.push_str(part));
            self.out.push_str(number.format(below));
            self.out.push('\n');
        }
    }
}

impl Exposition for Text<'_> {
    fn begin(&mut self, family: &Family<'_>) -> fmt::Result {
        let kind = match family.kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Histogram => "histogram",
        };
        let Family { name, help, .. } = family;
        debug_assert!(!help.contains(['\\', '\n']), "{help}");
        self.buckets.clear();
        if matches!(family.kind, Kind::Histogram) {
            let bounds = self.bounds.iter().map(String::as_str).chain(["+Inf"]);
            self.buckets.extend(bounds.map(|le| format!("{name}_bucket{{le=\"{le}\"")));
        }
        write!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}\n")
    }

    fn sample(
        &mut self,
        family: &Family<'_>,
        labels: &Labels<'_>,
        value: Value<'_>,
    ) -> fmt::Result {
        self.labels.clear();
        for (at, (name, value)) in labels.iter().enumerate() {
            if at > 0 {
                self.labels.push(',');
            }
            self.labels.push_str(name);
            self.labels.push_str("=\"");
            escape(&mut self.labels, value);
            self.labels.push('"');
        }
        match value {
            Value::Number(number) => {
                self.line(family, "", dtoa::Buffer::new().format(number));
            }
            Value::Latency(counts) => self.latency(family, counts),
        }
        if self.out.len() >= PIECE { self.finish() } else { Ok(()) }
    }

    fn end(&mut self) -> fmt::Result {
        Ok(())
    }

    fn finish(&mut self) -> fmt::Result {
        // A little more than a piece, as samples are handed over whole.
        let next = String::with_capacity(PIECE + PIECE / 16);
        (self.to)(std::mem::replace(&mut self.out, next).into_bytes())
    }
}

/// What the format wants escaped within a label's quotes.
fn escape(out: &mut String, value: &str) {
    let mut rest = value;
    while let Some(at) = rest.find(['\\', '"', '\n']) {
        out.push_str(&rest[..at]);
        out.push_str(match rest.as_bytes()[at] {
            b'\\' => "\\\\",
            b'"' => "\\\"",
            _ => "\\n",
        });
        rest = &rest[at + 1..];
    }
    out.push_str(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_of_the_format() {
        let mut out = Vec::new();
        let mut sink = |piece| {
            out.extend(piece);
            Ok(())
        };
        let mut text = Text::new(&mut sink);
        let family = Family { name: "a_total", help: "Things", kind: Kind::Counter };
        text.begin(&family).unwrap();
        text.sample(&family, &[], Value::Number(1.0)).unwrap();
        let odd = [("x", "a\\b\"c\nd é"), ("y", "")];
        text.sample(&family, &odd, Value::Number(1e-9)).unwrap();
        text.finish().unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "# HELP a_total Things\n# TYPE a_total counter\na_total 1.0\n\
             a_total{x=\"a\\\\b\\\"c\\nd é\",y=\"\"} 1e-9\n"
        );
    }
}
