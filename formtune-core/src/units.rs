//! Types that carry their unit and their bounds.

use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;
use serde::{Deserialize, Serialize};

/// A span of time, or a time since boot (`CLOCK_MONOTONIC`), in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nanos(pub u64);

impl Nanos {
    /// Whole milliseconds.
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms * 1_000_000)
    }
    /// Whole microseconds.
    pub const fn from_micros(us: u64) -> Self {
        Self(us * 1_000)
    }
    /// Whole seconds.
    pub const fn from_secs(s: u64) -> Self {
        Self(s * 1_000_000_000)
    }
    /// Seconds as a floating-point number, the base unit of exported metrics.
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }
    /// `self - earlier`, or zero where `earlier` is later.
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Nanos {
    /// A length of time as people write it: `870 ns`, `12.3 µs`, `4.50 ms`, `1.20 s`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0;
        match ns {
            0..1_000 => write!(f, "{ns} ns"),
            1_000..1_000_000 => write!(f, "{:.1} µs", ns as f64 / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.2} ms", ns as f64 / 1e6),
            _ => write!(f, "{:.2} s", ns as f64 / 1e9),
        }
    }
}

/// A cgroup v2 CPU weight, 1 to 10,000, the kernel's default being 100
/// (`Documentation/admin-guide/cgroup-v2.rst`, `cpu.weight`).
///
/// cgroup v1 `cpu.shares` are converted by systemd's rule, weight = shares × 100 / 1024,
/// which keeps ratios; the agent does that at the edge, so core knows one scale only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Weight(u32);

impl Weight {
    /// The least weight the kernel takes.
    pub const MIN: Self = Self(1);
    /// The greatest weight the kernel takes.
    pub const MAX: Self = Self(10_000);
    /// What a cgroup has unless somebody wrote it.
    pub const DEFAULT: Self = Self(100);

    /// `None` outside 1..=10,000.
    pub const fn new(weight: u32) -> Option<Self> {
        if weight >= Self::MIN.0 && weight <= Self::MAX.0 { Some(Self(weight)) } else { None }
    }
    /// The nearest weight the kernel takes.
    pub const fn clamped(weight: u64) -> Self {
        if weight < 1 {
            Self::MIN
        } else if weight > 10_000 {
            Self::MAX
        } else {
            Self(weight as u32)
        }
    }
    /// `self × factor`, rounded to nearest, within the kernel's bounds.
    pub fn scaled(self, factor: f64) -> Self {
        Self::clamped(libm::round(f64::from(self.0) * factor).max(0.0) as u64)
    }
    /// The number the kernel is given.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Weight {
    type Error = WeightOutOfRange;
    fn try_from(weight: u32) -> Result<Self, Self::Error> {
        Self::new(weight).ok_or(WeightOutOfRange(weight))
    }
}

impl From<Weight> for u32 {
    fn from(weight: Weight) -> u32 {
        weight.0
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A weight outside 1..=10,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightOutOfRange(pub u32);

impl fmt::Display for WeightOutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cpu weight {} is outside 1..=10000", self.0)
    }
}

impl core::error::Error for WeightOutOfRange {}

/// What a VM is called: the libvirt domain name, or the name a cgroup pattern yields.
/// Unique on a node; the value of the `vm` label. Shared, as every reading, decision and
/// snapshot names every VM.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmId(pub Arc<str>);

impl VmId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<&str> for VmId {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl From<String> for VmId {
    fn from(name: String) -> Self {
        Self(name.into())
    }
}

/// The name of a class of the policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClassName(pub String);

impl fmt::Display for ClassName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<&str> for ClassName {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}
