//! What the kernel must have for the probe.

use super::Check;
use crate::sense::btf::{self, Btf};
use crate::sense::cgroup::Hierarchies;
use crate::sense::kernel::{self, Version};
use crate::sense::probes::TapMethod;
use crate::sense::{ProbeState, tcp, trial};
use std::path::Path;

pub(super) fn release() -> Check {
    let release = match kernel::release() {
        Ok(release) => release,
        Err(error) => {
            let found = format!("failed to read {}: {error}", kernel::OSRELEASE);
            return Check::finding("kernel", found, "mount /proc");
        }
    };
    let found = format!("Linux {release} on {}", std::env::consts::ARCH);
    if kernel::too_old(&release).is_some() {
        let remedy = "run 5.10 or later; on older kernels programs may not load: formtune does what it \
                      can with the rest, and without sched_switch changes nothing";
        return Check::finding("kernel", found, remedy);
    }
    Check::ok("kernel", found)
}

pub(super) fn btf() -> Check {
    let path = Path::new(btf::VMLINUX);
    match Btf::read(path) {
        Ok(_) => {
            let bytes = std::fs::metadata(path).map_or(0, |meta| meta.len());
            Check::ok("btf", format!("{}, {:.1} MB", path.display(), bytes as f64 / 1e6))
        }
        Err(error) => Check::finding(
            "btf",
            error.to_string(),
            "run a kernel with CONFIG_DEBUG_INFO_BTF=y (every Debian kernel since 11); without it \
             no program can be loaded, so no waits are measured and nothing is changed",
        ),
    }
}

/// Each capability that something needs, with its bit of `CapEff`.
const CAPABILITIES: [(&str, u32, &str); 5] = [
    ("CAP_BPF", 39, "to load the probe"),
    ("CAP_PERFMON", 38, "to attach the probe and read the kernel's structures"),
    ("CAP_DAC_OVERRIDE", 1, "to write the weights of VMs that libvirt does not own"),
    ("CAP_SYS_RESOURCE", 24, "to lock the probe's maps in memory"),
    ("CAP_NET_ADMIN", 12, "to look at the VMs' tap devices"),
];
/// From here on maps are charged to the cgroup's memory instead of RLIMIT_MEMLOCK
/// (commits 97306be45fbe and following).
const NO_MEMLOCK: Version = Version(5, 11);
const SYS_ADMIN: u32 = 21;

/// The check, and whether the probe may be loaded.
pub(super) fn capabilities() -> (Check, bool) {
    let effective = std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(hex.trim(), 16).ok()
        })
        .unwrap_or(0);
    let version = kernel::release().ok().and_then(|release| Version::of(&release));
    let missing = missing(effective, version.is_none_or(|version| version < NO_MEMLOCK));
    let may_load = !missing.iter().any(|(name, _)| ["CAP_BPF", "CAP_PERFMON"].contains(name));
    if missing.is_empty() {
        return (Check::ok("rights", "all capabilities that formtune uses"), may_load);
    }
    let list: Vec<_> = missing.iter().map(|(name, what)| format!("{name} ({what})")).collect();
    let found = format!("missing {}", list.join(", "));
    let remedy = "run as root, or grant them (AmbientCapabilities= in the unit); `status` and \
                  `explain` need none";
    (Check::finding("rights", found, remedy), may_load)
}

fn missing(effective: u64, memlock: bool) -> Vec<(&'static str, &'static str)> {
    let has = |bit: u32| effective & (1 << bit) != 0;
    CAPABILITIES
        .into_iter()
        .filter(|(_, bit, _)| !has(*bit))
        .filter(|(name, ..)| !(has(SYS_ADMIN) && ["CAP_BPF", "CAP_PERFMON"].contains(name)))
        .filter(|(name, ..)| memlock || *name != "CAP_SYS_RESOURCE")
        .map(|(name, _, what)| (name, what))
        .collect()
}

pub(super) fn program(hierarchies: Option<&Hierarchies>, may_load: bool) -> Check {
    let name = "program";
    let what = "sched_switch (run-queue latency)";
    let Some(hierarchies) = hierarchies else {
        let remedy = "see cgroup; nothing can be told apart without it";
        return Check::finding(name, format!("{what} was not tried: no cgroups"), remedy);
    };
    if !may_load {
        let found = format!("{what} was not tried: it needs the rights named above");
        return Check::finding(name, found, "run `formtune doctor` as root");
    }
    match trial(hierarchies.version) {
        ProbeState::Loaded => Check::ok(name, format!("{what} loads and attaches")),
        ProbeState::Unavailable { program, why, remedy } => {
            Check::finding(name, format!("{program} cannot be loaded: {why}"), remedy)
        }
    }
}

/// What is seen of TCP: the host's sockets, and the guests' tap devices.
pub(super) fn tcp(hierarchies: Option<&Hierarchies>, may_load: bool) -> Vec<Check> {
    // Why not was said before.
    let (Some(hierarchies), true) = (hierarchies, may_load) else { return Vec::new() };
    let check = |name, state, good: String| match state {
        ProbeState::Loaded => Check::ok(name, good),
        ProbeState::Unavailable { program, why, remedy } => {
            Check::finding(name, format!("{program} cannot be loaded: {why}"), remedy)
        }
    };
    let sockets = "tcp_retransmit_skb (what the host's TCP sends again) loads and attaches";
    let (taps, method) = tcp::guest_trial();
    let on_taps = match method {
        TapMethod::Tcx => "by TCX",
        TapMethod::Clsact => "as a filter of clsact (no TCX before 6.6)",
    };
    let good = format!("tap programs (what guests' TCP sends again) load; attached {on_taps}");
    vec![check("sockets", tcp::host_trial(hierarchies), sockets.into()), check("taps", taps, good)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named_with_their_use() {
        let all: u64 = (1 << 41) - 1;
        assert!(missing(all, true).is_empty());
        let without_bpf = missing(all & !(1 << 39) & !(1 << SYS_ADMIN), true);
        assert_eq!(without_bpf, [("CAP_BPF", "to load the probe")]);
        assert!(missing(all & !(1 << 39), true).is_empty(), "CAP_SYS_ADMIN covers it");
        assert_eq!((missing(0, true).len(), missing(0, false).len()), (5, 4));
    }
}
