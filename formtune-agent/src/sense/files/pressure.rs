//! Pressure: time in which tasks stalled for want of CPU, I/O or memory
//! (Documentation/accounting/psi.rst). `/proc/pressure` is the node's, `*.pressure` in the v2
//! hierarchy that of a cgroup and all below it.

use super::forward;
use super::text::read_at_start;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::Path;

/// Pressure per resource. `None` where the kernel does not show it: without `CONFIG_PSI`,
/// with `psi=0`, or where the VM has no group in the v2 hierarchy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pressure {
    /// Runnable and without a CPU.
    pub cpu: Option<Stalls>,
    /// Waiting for block I/O.
    pub io: Option<Stalls>,
    /// Waiting for memory: reclaim, refaults, swap.
    pub memory: Option<Stalls>,
}

/// Both lines of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stalls {
    /// At least one task stalled.
    pub some: Option<Stall>,
    /// All tasks that were not idle stalled at once. For CPU only from Linux 5.13, and always
    /// zero for the node.
    pub full: Option<Stall>,
}

/// One line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stall {
    /// Sum, microseconds.
    pub total_us: u64,
    /// Share of the last 10 s, 0 to 1, as the kernel averages it every 2 s.
    pub avg10_ratio: f64,
}

impl Stalls {
    /// From the text of a file; a line that cannot be read is `None`.
    pub fn parse(text: &str) -> Self {
        let line = |kind| text.lines().find_map(|line| Stall::parse(line, kind));
        Self { some: line("some"), full: line("full") }
    }

    fn is_empty(&self) -> bool {
        self.some.is_none() && self.full.is_none()
    }
}

impl Stall {
    /// `some avg10=1.53 avg60=0.87 avg300=0.20 total=12345678`; averages in per cent, the sum
    /// in microseconds.
    fn parse(line: &str, kind: &str) -> Option<Self> {
        let mut fields = line.split_whitespace();
        if fields.next()? != kind {
            return None;
        }
        let (mut avg10, mut total) = (None, None);
        for field in fields {
            match field.split_once('=')? {
                ("avg10", value) => avg10 = value.parse::<f64>().ok(),
                ("total", value) => total = value.parse().ok(),
                _ => {}
            }
        }
        let per_cent = avg10.filter(|value| (0.0..=100.0).contains(value))?;
        // Two digits after the point: rounded, so that 1.53 % is 0.0153.
        Some(Self { total_us: total?, avg10_ratio: (per_cent * 100.0).round() / 10_000.0 })
    }
}

impl Pressure {
    /// Each resource with its name, as in metric labels.
    pub fn by_resource(&self) -> [(&'static str, Option<Stalls>); 3] {
        [("cpu", self.cpu), ("io", self.io), ("memory", self.memory)]
    }

    /// Whether no average is above zero: nothing changes while nothing runs.
    pub(super) fn is_zero(&self) -> bool {
        let stalls = self.by_resource().into_iter().filter_map(|(_, stalls)| stalls);
        stalls
            .flat_map(|stalls| [stalls.some, stalls.full])
            .flatten()
            .all(|stall| stall.avg10_ratio == 0.0)
    }

    /// What of it is a reading, after an earlier one.
    pub(super) fn after(&self, before: &Self) -> Self {
        let line = |before: Option<Stall>, now: Option<Stall>| {
            now.filter(|now| {
                forward(before.map(|stall| stall.total_us), Some(now.total_us)).is_some()
            })
        };
        let both = |before: Option<Stalls>, now: Option<Stalls>| {
            let (before, now) = (before.unwrap_or_default(), now?);
            let stalls =
                Stalls { some: line(before.some, now.some), full: line(before.full, now.full) };
            (!stalls.is_empty()).then_some(stalls)
        };
        Self {
            cpu: both(before.cpu, self.cpu),
            io: both(before.io, self.io),
            memory: both(before.memory, self.memory),
        }
    }
}

/// The three files, open.
pub(super) struct PressureFiles([Option<File>; 3]);

impl PressureFiles {
    /// Those of the node.
    pub fn of_node() -> Self {
        Self(["cpu", "io", "memory"].map(|name| File::open(format!("/proc/pressure/{name}")).ok()))
    }

    /// Those of a cgroup in the v2 hierarchy.
    pub fn of_cgroup(cgroup: Option<&Path>) -> Self {
        Self(["cpu.pressure", "io.pressure", "memory.pressure"].map(|name| {
            let path = cgroup?.join(name);
            File::open(path).ok()
        }))
    }

    /// All that can be read: with `psi=0` older kernels show files that they refuse to read.
    pub fn read(&self) -> Pressure {
        let [cpu, io, memory] = self.0.each_ref().map(|file| {
            let text = read_at_start(file.as_ref()?, 4096).ok()?;
            Some(Stalls::parse(&text)).filter(|stalls| !stalls.is_empty())
        });
        Pressure { cpu, io, memory }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: &str = "some avg10=1.53 avg60=0.87 avg300=0.20 total=12345678\n";
    const FULL: &str = "full avg10=0.00 avg60=0.00 avg300=0.00 total=77\n";

    #[test]
    fn both_lines() {
        let stalls = Stalls::parse(&format!("{SOME}{FULL}"));
        assert_eq!(stalls.some, Some(Stall { total_us: 12_345_678, avg10_ratio: 0.0153 }));
        assert_eq!(stalls.full, Some(Stall { total_us: 77, avg10_ratio: 0.0 }));
    }

    #[test]
    fn before_5_13_cpu_has_no_full_line() {
        assert_eq!(Stalls::parse(SOME).full, None);
    }

    #[test]
    fn what_is_cut_short_or_garbage_is_no_reading() {
        for text in [
            "",
            "some",
            "some avg10=1.53 avg60=0.87 avg300=0.20",
            "some avg10=1.53 avg60=0.87 avg300=0.20 total=",
            "some avg10=nan total=1",
            "some avg10=-1.00 total=1",
            "some avg10=101.00 total=1",
            "some avg10=1.00 total=-1",
            "some avg10=1.00 total=18446744073709551616",
            "some avg10=1.00 avg60 total=1",
            "something avg10=1.00 total=1",
            "\u{fffd}\u{fffd}\0",
        ] {
            assert!(Stalls::parse(text).is_empty(), "{text:?}");
        }
        let half = &format!("{SOME}{FULL}")[..SOME.len() + 20];
        assert!(Stalls::parse(half).some.is_some() && Stalls::parse(half).full.is_none());
    }

    #[test]
    fn a_sum_that_goes_backwards_is_no_reading() {
        let at = |total_us| {
            let some = Some(Stall { total_us, avg10_ratio: 0.5 });
            Pressure { cpu: Some(Stalls { some, full: None }), ..Pressure::default() }
        };
        assert_eq!(at(7).after(&Pressure::default()), at(7));
        assert_eq!(at(7).after(&at(7)), at(7));
        assert_eq!(at(6).after(&at(7)), Pressure::default());
        assert!(!at(6).is_zero() && Pressure::default().is_zero());
    }
}
