//! A metric family as a value, and what an encoder of families must do.

use super::super::latency::LatencyCounts;
use std::fmt;

/// Names and values of labels.
pub type Labels<'a> = [(&'static str, &'a str)];

/// What a family is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Counts of a latency.
    Histogram,
}

/// The head of a family.
#[derive(Clone, Copy, Debug)]
pub struct Family<'a> {
    /// Full name, e.g. `formtune_vms`.
    pub name: &'a str,
    /// One sentence without a full stop.
    pub help: &'a str,
    /// What it is of.
    pub kind: Kind,
}

/// One sample of a family.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// Of a gauge or counter; finite.
    Number(f64),
    /// Of a histogram.
    Latency(&'a LatencyCounts),
}

/// Encodes families, one after the other: a `begin`, samples, an `end`.
pub trait Exposition {
    /// A family begins; there will be samples.
    fn begin(&mut self, family: &Family<'_>) -> fmt::Result;
    /// A sample of it, with labels that no other one has.
    fn sample(&mut self, family: &Family<'_>, labels: &Labels<'_>, value: Value<'_>)
    -> fmt::Result;
    /// It is complete.
    fn end(&mut self) -> fmt::Result;
    /// There are no more.
    fn finish(&mut self) -> fmt::Result;
}
