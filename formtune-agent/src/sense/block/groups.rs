//! To which cgroups a VM's block I/O is charged.
//!
//! Where the io controller is in the same hierarchy as cpu (v2), they are the VM's cgroups as
//! discovery found them. Elsewhere they are at the same path in the hierarchy of blkio, where
//! they may be made a moment later than those of cpu.

use crate::sense::cgroup::{self, Hierarchies};
use std::collections::BTreeSet;
use std::path::Path;

/// As deep as discovery looks.
const MAX_DEPTH: u8 = 6;

/// The cgroups of a VM, whose cgroup for CPU is `path` and has the ids `known` with all below
/// it. `None` if its block I/O is charged to none of its own: the hierarchy of the io
/// controller has no such cgroup, or the controller is not on for it.
pub fn of(hierarchies: &Hierarchies, path: &Path, known: &BTreeSet<u64>) -> Option<BTreeSet<u64>> {
    let root = hierarchies.block.as_ref()?;
    let group = root.join(path.strip_prefix(&hierarchies.cpu).ok()?);
    // The v2 controller's file; on v1 every cgroup of the hierarchy has the controller.
    if hierarchies.unified.as_ref() == Some(root) && !group.join("io.stat").exists() {
        return None;
    }
    if *root == hierarchies.cpu {
        return Some(known.clone());
    }
    let mut ids = BTreeSet::from([cgroup::id(&group).ok()?]);
    below(&group, &mut ids, 0);
    Some(ids)
}

fn below(group: &Path, ids: &mut BTreeSet<u64>, depth: u8) {
    // Gone meanwhile, and its groups with it.
    let Ok(entries) = std::fs::read_dir(group) else { return };
    for entry in entries.flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        ids.extend(cgroup::id(&path).ok());
        if depth < MAX_DEPTH {
            below(&path, ids, depth + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::CgroupVersion;
    use std::fs::{create_dir_all, write};

    fn hierarchies(root: &Path) -> Hierarchies {
        Hierarchies {
            cpu: root.join("cpu"),
            version: CgroupVersion::V1,
            cpuacct: None,
            unified: Some(root.join("unified")),
            memory: None,
            block: Some(root.join("blkio")),
        }
    }

    #[test]
    fn on_v1_they_are_at_the_same_path_and_may_come_later() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchies = hierarchies(dir.path());
        let path = hierarchies.cpu.join("machine/a");
        create_dir_all(path.join("vcpu0")).unwrap();
        let known = BTreeSet::from([1, 2]);
        assert_eq!(of(&hierarchies, &path, &known), None);
        let group = dir.path().join("blkio/machine/a");
        create_dir_all(group.join("x/y")).unwrap();
        let ids = of(&hierarchies, &path, &known).unwrap();
        assert_eq!(ids.len(), 3);
        assert!(ids.contains(&cgroup::id(&group.join("x/y")).unwrap()));
    }

    #[test]
    fn on_v2_the_controller_must_be_on() {
        let dir = tempfile::tempdir().unwrap();
        let unified = dir.path().join("unified");
        let path = unified.join("machine.slice/a.scope");
        create_dir_all(&path).unwrap();
        let hierarchies = Hierarchies {
            cpu: unified.clone(),
            version: CgroupVersion::V2,
            block: Some(unified),
            ..hierarchies(dir.path())
        };
        let known = BTreeSet::from([1, 2]);
        assert_eq!(of(&hierarchies, &path, &known), None);
        write(path.join("io.stat"), "").unwrap();
        assert_eq!(of(&hierarchies, &path, &known), Some(known.clone()));
        let none = Hierarchies { block: None, ..hierarchies };
        assert_eq!(of(&none, &path, &known), None);
    }
}
