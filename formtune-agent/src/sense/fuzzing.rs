//! For the fuzz targets (`fuzz/`) only: the readers of what the kernel shows, with all that is
//! asked of what they found.

use super::btf::Btf;
use super::cgroup::Hierarchies;
use super::files::run_delay::run_delay;
use super::files::{MemoryEvents, Stalls};
use super::libvirt_names::machine;
use super::usage::{Usage, parse_stat};
use super::{CgroupPattern, usage};
use crate::vm::CgroupVersion;
use std::path::Path;

/// The kernel's types, and members that probes ask for.
pub fn btf(data: &[u8]) {
    let Ok(btf) = Btf::parse(data.to_vec()) else { return };
    for (structure, path) in [
        ("outer", "d.y"),
        ("outer", "c"),
        ("inner", "x"),
        ("task_struct", "sched_info.last_queued"),
        ("css_set", "dfl_cgrp"),
    ] {
        let _ = btf.offset(structure, path);
    }
    let _ = btf.cgroup_subsys_id("cpu_cgrp_id");
}

/// Every text of procfs and cgroupfs.
///
/// # Panics
/// When a reader does, or answers what cannot be.
pub fn kernel_files(text: &str) {
    let (mountinfo, controllers) = text.split_once('\0').unwrap_or((text, "cpu io memory"));
    let root = Path::new("/sys/fs/cgroup");
    if let Ok(found) = Hierarchies::from_mountinfo(mountinfo, root, |_| Ok(controllers.to_owned()))
    {
        assert!(found.version == CgroupVersion::V1 || found.unified == Some(found.cpu));
    }
    for version in [CgroupVersion::V1, CgroupVersion::V2] {
        let usage::Usage { cpu_ns, .. } = Usage::parse(text, version);
        assert!(cpu_ns.is_none_or(|ns| ns % 1_000 == 0));
    }
    let stalls = Stalls::parse(text);
    for stall in [stalls.some, stalls.full].into_iter().flatten() {
        assert!((0.0..=1.0).contains(&stall.avg10_ratio));
    }
    let _ = MemoryEvents::parse(text);
    let _ = MemoryEvents::parse_v1(text, text);
    let _ = run_delay(text);
    let _ = parse_stat(text);
}

/// Names of cgroups: libvirt's, and patterns of the configuration.
///
/// # Panics
/// When a reader does, or answers what cannot be.
pub fn names(text: &str) {
    let (name, pattern) = text.split_once('\0').unwrap_or((text, "*/vm-{name}*.scope"));
    if let Some(machine) = machine(name) {
        assert!(machine.name.starts_with("qemu-") && machine.name.ends_with(&machine.short_name));
        machine.is(machine.domain_id, name);
    }
    if let Ok(pattern) = pattern.parse::<CgroupPattern>() {
        assert_eq!(pattern.to_string().parse::<CgroupPattern>().as_ref(), Ok(&pattern));
        let cgroup = Path::new(name);
        if pattern.vm(cgroup).is_some() {
            assert!(pattern.may_hold(cgroup));
        }
    }
}
