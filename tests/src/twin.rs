//! The same cgroups in the v2 hierarchy, where `cpu` is on v1: libvirt makes a VM's path in
//! every hierarchy.

use crate::vm_cgroup::VmCgroup;
use formtune_agent::sense::cgroup::Hierarchies;
use formtune_agent::vm::CgroupVersion;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The twin of a VM's cgroup; nothing on a unified host. Removed when dropped.
pub struct Twin(Option<PathBuf>);

impl Twin {
    /// Makes it.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn of(group: &VmCgroup) -> Self {
        let hierarchies = Hierarchies::find(Path::new("/sys/fs/cgroup")).unwrap();
        if hierarchies.version == CgroupVersion::V2 {
            return Self(None);
        }
        let unified = hierarchies.unified.expect("a hybrid host has a v2 hierarchy");
        let path = unified.join(group.path().strip_prefix(&hierarchies.cpu).unwrap());
        fs::create_dir_all(path.join("emulator")).unwrap();
        Self(Some(path))
    }

    /// Moves a process there; on a unified host it is where it belongs.
    ///
    /// # Panics
    /// If it cannot be moved.
    pub fn take(&self, process: u32) {
        if let Some(path) = &self.0 {
            fs::write(path.join("emulator/cgroup.procs"), process.to_string()).unwrap();
        }
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        let Some(path) = &self.0 else { return };
        for path in [path.join("emulator"), path.clone(), path.parent().unwrap().to_owned()] {
            // A process that has just ended leaves its cgroup a moment later.
            for _ in 0..100 {
                if fs::remove_dir(&path).is_ok() || !path.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
