//! CPU time: of the host from `/proc/stat`, of a VM from its cgroup.

use super::cgroup::Hierarchies;
use super::files::forward;
use super::files::text::{key, read_at_start};
use crate::vm::CgroupVersion;
use formtune_core::units::Nanos;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// `/proc/stat`, kept open.
pub struct HostCpu {
    file: Option<File>,
    tick_ns: u64,
}

impl HostCpu {
    /// Opens it; without it every reading says `None`.
    pub fn open() -> Self {
        let hz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
        Self {
            file: File::open("/proc/stat").ok(),
            tick_ns: 1_000_000_000 / hz.and_then(|hz| u64::try_from(hz).ok()).unwrap_or(100).max(1),
        }
    }

    /// Online CPUs, and their busy time since boot in nanoseconds.
    pub fn read(&self) -> (u32, Option<u64>) {
        // The `cpu` lines come first; `intr`, which may be longer than any buffer, follows.
        let text = self.file.as_ref().and_then(|file| read_at_start(file, 1 << 18).ok());
        match text.as_deref().and_then(parse_stat) {
            Some((cpus, ticks)) => (cpus, ticks.checked_mul(self.tick_ns)),
            None => {
                let online = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
                (online.ok().flatten().and_then(|n| n.try_into().ok()).unwrap_or(1), None)
            }
        }
    }
}

/// CPUs and busy ticks. proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal;
/// guest time is contained in user and nice.
pub(super) fn parse_stat(text: &str) -> Option<(u32, u64)> {
    let mut lines = text.lines();
    let all: Vec<u64> = lines
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    // What adds up to more than there is room for is no reading.
    let mut busy = [0, 1, 2, 5, 6, 7].iter().filter_map(|&at| all.get(at));
    let busy = busy.try_fold(0u64, |sum, ticks| sum.checked_add(*ticks))?;
    let cpus = lines.take_while(|line| line.starts_with("cpu")).count();
    Some((cpus.try_into().ok()?, busy))
}

/// What a VM used, and how long its own quota held it back. Cumulative, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time of all its tasks.
    pub cpu_ns: Option<u64>,
    /// Time throttled, summed over CPUs as the kernel does.
    pub throttled_ns: Option<u64>,
    /// Periods of the quota.
    pub periods: Option<QuotaPeriods>,
}

/// Periods of a CPU quota, cumulative: `nr_periods` and `nr_throttled` of `cpu.stat`. Both
/// stand still while no quota is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaPeriods {
    /// Periods in which it had something to run.
    pub all: u64,
    /// Of these, periods in which the quota was used up.
    pub throttled: u64,
}

impl Usage {
    /// From `cpu.stat`; `usage_usec` is on v2 only.
    pub(super) fn parse(text: &str, version: CgroupVersion) -> Self {
        let microseconds = |name| key(text, name)?.checked_mul(1_000);
        let (all, throttled) = (key(text, "nr_periods"), key(text, "nr_throttled"));
        Self {
            cpu_ns: microseconds("usage_usec"),
            throttled_ns: match version {
                CgroupVersion::V2 => microseconds("throttled_usec"),
                CgroupVersion::V1 => key(text, "throttled_time"),
            },
            periods: all.zip(throttled).map(|(all, throttled)| QuotaPeriods { all, throttled }),
        }
    }

    /// What of it is a reading, after an earlier one.
    fn after(self, before: &Self) -> Self {
        let not_back = |before: Option<QuotaPeriods>, now: QuotaPeriods| {
            before.is_none_or(|b| b.all <= now.all && b.throttled <= now.throttled)
        };
        Self {
            cpu_ns: forward(before.cpu_ns, self.cpu_ns),
            throttled_ns: forward(before.throttled_ns, self.throttled_ns),
            periods: self.periods.filter(|now| not_back(before.periods, *now)),
        }
    }
}

/// Reads one VM's usage; files are opened with the first reading and kept open.
pub struct UsageReader {
    source: Option<Source>,
    /// `cpu.stat` of the hierarchy that carries the `cpu` controller.
    stat: Option<File>,
    version: CgroupVersion,
    raw: Usage,
    last: Usage,
    read_at: Option<Nanos>,
    /// It ran since.
    ran: bool,
}

/// Where CPU time comes from if `cpu.stat` does not hold it.
enum Source {
    /// v2 `cpu.stat` of a hybrid host: `usage_usec`.
    CpuStat(File),
    /// v1 `cpuacct.usage`: nanoseconds.
    Cpuacct(File),
    /// Where neither hierarchy has the VM as a group of its own.
    Threads(Threads),
}

/// Least time between two readings of one VM.
const INTERVAL: Nanos = Nanos::from_secs(1);

impl UsageReader {
    /// For a VM in a hierarchy of this version; opens nothing yet.
    pub fn new(version: CgroupVersion) -> Self {
        Self {
            source: None,
            stat: None,
            version,
            raw: Usage::default(),
            last: Usage::default(),
            read_at: None,
            ran: false,
        }
    }

    /// The last reading, renewed if the VM `ran` (had switches) since and a second has passed.
    /// A VM that never ran since it was found has been read once.
    pub fn usage(
        &mut self,
        hierarchies: &Hierarchies,
        cgroup: &Path,
        now: Nanos,
        ran: bool,
    ) -> Usage {
        self.ran |= ran;
        match self.read_at {
            Some(at) if !self.ran || now.since(at) < INTERVAL => return self.last,
            Some(_) => {}
            None => self.open(hierarchies, cgroup),
        }
        self.read_at = Some(now);
        self.ran = false;
        let raw = self.read();
        self.last = raw.after(&self.raw);
        self.raw = raw;
        self.last
    }

    fn open(&mut self, hierarchies: &Hierarchies, cgroup: &Path) {
        let relative = cgroup.strip_prefix(&hierarchies.cpu).unwrap_or(Path::new(""));
        let own = |root: &Option<PathBuf>, file: &str| {
            File::open(root.as_ref()?.join(relative).join(file)).ok()
        };
        self.stat = File::open(cgroup.join("cpu.stat")).ok();
        self.source = match self.version {
            CgroupVersion::V2 => None,
            CgroupVersion::V1 => Some(
                own(&hierarchies.cpuacct, "cpuacct.usage")
                    .map(Source::Cpuacct)
                    .or_else(|| own(&hierarchies.unified, "cpu.stat").map(Source::CpuStat))
                    .unwrap_or_else(|| Source::Threads(Threads::new(cgroup))),
            ),
        };
    }

    fn read(&mut self) -> Usage {
        let stat = |file: &File| read_at_start(file, 4096).ok();
        let mut usage = self
            .stat
            .as_ref()
            .and_then(stat)
            .map_or(Usage::default(), |text| Usage::parse(&text, self.version));
        match &mut self.source {
            None => {}
            Some(Source::CpuStat(file)) => {
                usage.cpu_ns =
                    stat(file).and_then(|text| Usage::parse(&text, CgroupVersion::V2).cpu_ns);
            }
            Some(Source::Cpuacct(file)) => {
                usage.cpu_ns = read_at_start(file, 64).ok().and_then(|t| t.trim().parse().ok());
            }
            Some(Source::Threads(threads)) => usage.cpu_ns = threads.read(),
        }
        usage
    }
}

/// Sum over the threads that are in a cgroup (v1) or below it, from `schedstat`: first field,
/// time on a CPU in nanoseconds (Documentation/scheduler/sched-stats.rst).
struct Threads {
    cgroup: PathBuf,
    /// Last reading per thread, so that a thread that ends does not take its time away.
    last: HashMap<String, u64>,
    total: u64,
}

impl Threads {
    fn new(cgroup: &Path) -> Self {
        Self { cgroup: cgroup.into(), last: HashMap::new(), total: 0 }
    }

    fn read(&mut self) -> Option<u64> {
        let mut tids = Vec::new();
        tids_below(&self.cgroup, &mut tids, 0).ok()?;
        let mut now = HashMap::with_capacity(tids.len());
        for tid in tids {
            // procfs has a directory for a thread's id too, though it lists processes only.
            let Ok(text) = std::fs::read_to_string(format!("/proc/{tid}/task/{tid}/schedstat"))
            else {
                continue;
            };
            let Some(ran) = text.split_whitespace().next().and_then(|v| v.parse().ok()) else {
                continue;
            };
            now.insert(tid, ran);
        }
        for (tid, &ran) in &now {
            // A smaller value is another thread with the same id.
            let before = self.last.get(tid).copied().filter(|&before| before <= ran).unwrap_or(0);
            self.total += ran - before;
        }
        self.last = now;
        Some(self.total)
    }
}

fn tids_below(cgroup: &Path, tids: &mut Vec<String>, depth: u8) -> io::Result<()> {
    tids.extend(std::fs::read_to_string(cgroup.join("tasks"))?.lines().map(Into::into));
    for entry in std::fs::read_dir(cgroup)?.flatten() {
        if depth < 8 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // Gone meanwhile, and its threads with it.
            let _ = tids_below(&entry.path(), tids, depth + 1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_leaves_out_idle_and_waiting_for_io() {
        let text = "cpu  100 20 3 4000 500 6 7 80 9 10\ncpu0 1 1\ncpu3 1 1\nintr 12 0\n";
        assert_eq!(parse_stat(text), Some((2, 100 + 20 + 3 + 6 + 7 + 80)));
        assert_eq!(parse_stat("intr 1"), None);
        // More than there is room for is no reading.
        assert_eq!(parse_stat(&format!("cpu  {} 1 0 0\n", u64::MAX)), None);
    }

    #[test]
    fn cpu_stat_of_both_interfaces() {
        let text = "usage_usec 12\nuser_usec 9\nsystem_usec 3\nnr_periods 8\nnr_throttled 3\n\
            throttled_usec 40\nnr_bursts 0\nburst_usec 0\n";
        let periods = Some(QuotaPeriods { all: 8, throttled: 3 });
        assert_eq!(
            Usage::parse(text, CgroupVersion::V2),
            Usage { cpu_ns: Some(12_000), throttled_ns: Some(40_000), periods }
        );
        let v1 = "nr_periods 8\nnr_throttled 3\nthrottled_time 77\nwait_sum 5\n";
        assert_eq!(
            Usage::parse(v1, CgroupVersion::V1),
            Usage { cpu_ns: None, throttled_ns: Some(77), periods }
        );
        // The controller is off: CPU time only.
        let usage = Usage::parse("usage_usec 12\n", CgroupVersion::V2);
        assert_eq!(usage, Usage { cpu_ns: Some(12_000), ..Usage::default() });
    }

    #[test]
    fn what_is_cut_short_or_garbage_is_no_reading() {
        let text = "usage_usec 12\nnr_periods 8\nnr_thrott";
        let usage = Usage::parse(text, CgroupVersion::V2);
        assert_eq!((usage.periods, usage.throttled_ns), (None, None));
        for text in [
            "",
            "usage_usec",
            "usage_usec x",
            "usage_usec -1",
            "usage 1",
            "\0\0",
            "usage_usec 18446744073709551615",
        ] {
            assert_eq!(Usage::parse(text, CgroupVersion::V2), Usage::default(), "{text:?}");
        }
    }

    #[test]
    fn counters_that_go_backwards_are_no_reading() {
        let of = |cpu, throttled, all| Usage {
            cpu_ns: Some(cpu),
            throttled_ns: Some(throttled),
            periods: Some(QuotaPeriods { all, throttled: 1 }),
        };
        assert_eq!(of(2, 3, 4).after(&Usage::default()), of(2, 3, 4));
        assert_eq!(of(2, 3, 4).after(&of(2, 3, 4)), of(2, 3, 4));
        assert_eq!(of(1, 2, 3).after(&of(2, 3, 4)), Usage::default());
    }

    #[test]
    fn hybrid_host_takes_the_group_that_the_vm_has() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("cpu/machine/a/cpu.stat", "nr_periods 9\nnr_throttled 2\nthrottled_time 77\n");
        write("unified/machine/a/cpu.stat", "usage_usec 5\n");
        let hierarchies = Hierarchies {
            cpu: root.join("cpu"),
            version: CgroupVersion::V1,
            cpuacct: Some(root.join("cpuacct")),
            unified: Some(root.join("unified")),
            memory: None,
            block: None,
        };
        let cgroup = root.join("cpu/machine/a");
        let read = |at| UsageReader::new(CgroupVersion::V1).usage(&hierarchies, &cgroup, at, true);
        let periods = Some(QuotaPeriods { all: 9, throttled: 2 });
        let expected = Usage { cpu_ns: Some(5_000), throttled_ns: Some(77), periods };
        assert_eq!(read(Nanos(1)), expected);
        write("cpuacct/machine/a/cpuacct.usage", "123456\n");
        assert_eq!(read(Nanos(1)), Usage { cpu_ns: Some(123_456), ..expected });
    }

    #[test]
    fn idle_vms_are_not_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let stat = dir.path().join("cpu.stat");
        std::fs::write(&stat, "usage_usec 1\nthrottled_usec 2\n").unwrap();
        let hierarchies = Hierarchies {
            cpu: "/nowhere".into(),
            version: CgroupVersion::V2,
            cpuacct: None,
            unified: None,
            memory: None,
            block: None,
        };
        let mut reader = UsageReader::new(CgroupVersion::V2);
        let mut at =
            |now, ran| reader.usage(&hierarchies, dir.path(), Nanos::from_millis(now), ran);
        let first = Usage { cpu_ns: Some(1_000), throttled_ns: Some(2_000), periods: None };
        assert_eq!(at(0, false), first);
        std::fs::write(&stat, "usage_usec 3\n").unwrap();
        assert_eq!(at(5_000, false), first, "idle");
        let second = Usage { cpu_ns: Some(3_000), ..Usage::default() };
        assert_eq!(at(5_001, true), second);
        std::fs::write(&stat, "usage_usec 4\n").unwrap();
        assert_eq!(at(5_999, true).cpu_ns, Some(3_000), "less than a second later");
        assert_eq!(at(6_001, false).cpu_ns, Some(4_000), "it ran after the last reading");
    }
}
