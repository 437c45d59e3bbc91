//! How often a VM's memory limits were met: `memory.events` on v2
//! (Documentation/admin-guide/cgroup-v2.rst), `memory.failcnt` and `memory.oom_control` on v1
//! (Documentation/admin-guide/cgroup-v1/memory.rst).

use super::forward;
use super::text::{key, read_at_start};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::Path;

/// Counts since the cgroup was made, on v2 of all cgroups below it as well. `None` where the
/// kernel does not count it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEvents {
    /// It was reclaimed from although below `memory.low`.
    pub low: Option<u64>,
    /// It was above `memory.high`, and its tasks were made to reclaim.
    pub high: Option<u64>,
    /// Its usage was about to pass `memory.max`, or `memory.limit_in_bytes` on v1.
    pub max: Option<u64>,
    /// Its limit was reached and nothing could be reclaimed.
    pub oom: Option<u64>,
    /// Processes of it that the OOM killer ended.
    pub oom_kill: Option<u64>,
}

impl MemoryEvents {
    /// From `memory.events`.
    pub fn parse(text: &str) -> Self {
        Self {
            low: key(text, "low"),
            high: key(text, "high"),
            max: key(text, "max"),
            oom: key(text, "oom"),
            oom_kill: key(text, "oom_kill"),
        }
    }

    /// From `memory.failcnt` and `memory.oom_control`.
    pub fn parse_v1(failcnt: &str, oom_control: &str) -> Self {
        Self {
            max: failcnt.trim().parse().ok(),
            oom_kill: key(oom_control, "oom_kill"),
            ..Self::default()
        }
    }

    /// Each event with its name, as in metric labels.
    pub fn by_event(&self) -> [(&'static str, Option<u64>); 5] {
        [
            ("low", self.low),
            ("high", self.high),
            ("max", self.max),
            ("oom", self.oom),
            ("oom_kill", self.oom_kill),
        ]
    }

    /// What of it is a reading, after an earlier one.
    pub(super) fn after(&self, before: &Self) -> Self {
        Self {
            low: forward(before.low, self.low),
            high: forward(before.high, self.high),
            max: forward(before.max, self.max),
            oom: forward(before.oom, self.oom),
            oom_kill: forward(before.oom_kill, self.oom_kill),
        }
    }
}

/// A VM's files, open.
pub(super) enum MemoryFiles {
    Unified(File),
    V1 {
        failcnt: Option<File>,
        oom_control: Option<File>,
    },
    /// The memory controller is off there.
    None,
}

impl MemoryFiles {
    /// `v1` and `unified` are where the VM's group would be; v1 goes first, as a controller is
    /// in one hierarchy only.
    pub fn open(v1: Option<&Path>, unified: Option<&Path>) -> Self {
        let file = |dir: Option<&Path>, name: &str| File::open(dir?.join(name)).ok();
        let failcnt = file(v1, "memory.failcnt");
        let oom_control = file(v1, "memory.oom_control");
        if failcnt.is_some() || oom_control.is_some() {
            return Self::V1 { failcnt, oom_control };
        }
        file(unified, "memory.events").map_or(Self::None, Self::Unified)
    }

    pub fn read(&self) -> MemoryEvents {
        let text = |file: &File| read_at_start(file, 4096).ok();
        match self {
            Self::Unified(events) => {
                text(events).map(|events| MemoryEvents::parse(&events)).unwrap_or_default()
            }
            Self::V1 { failcnt, oom_control } => {
                let text = |file: &Option<File>| file.as_ref().and_then(text).unwrap_or_default();
                MemoryEvents::parse_v1(&text(failcnt), &text(oom_control))
            }
            Self::None => MemoryEvents::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v2() {
        let text = "low 0\nhigh 12\nmax 3\noom 2\noom_kill 1\noom_group_kill 9\n";
        let events = MemoryEvents::parse(text);
        assert_eq!(
            events.by_event().map(|(_, count)| count),
            [Some(0), Some(12), Some(3), Some(2), Some(1)]
        );
        assert_eq!(MemoryEvents::parse(&text[..12]).max, None, "cut short");
    }

    #[test]
    fn v1() {
        let oom_control = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n";
        let events = MemoryEvents::parse_v1("45\n", oom_control);
        assert_eq!((events.max, events.oom_kill, events.high), (Some(45), Some(2), None));
        // Before Linux 4.13.
        let events = MemoryEvents::parse_v1("45\n", "oom_kill_disable 0\nunder_oom 0\n");
        assert_eq!(events.oom_kill, None);
    }

    #[test]
    fn garbage_is_no_reading_and_neither_is_a_count_that_goes_backwards() {
        for text in ["", "low", "low x", "lower 1", "low -1", "\0", "low1"] {
            assert_eq!(MemoryEvents::parse(text), MemoryEvents::default(), "{text:?}");
            assert_eq!(MemoryEvents::parse_v1(text, text), MemoryEvents::default(), "{text:?}");
        }
        let (before, now) =
            (MemoryEvents::parse("max 3\nhigh 5"), MemoryEvents::parse("max 2\nhigh 5"));
        assert_eq!(now.after(&before), MemoryEvents { high: Some(5), ..MemoryEvents::default() });
    }
}
