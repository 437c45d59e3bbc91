//! libvirt makes a `machine` cgroup for its guests and leaves it behind; where it was not
//! there before, it goes again.

use std::fs;
use std::path::{Path, PathBuf};

/// Removes, when dropped, the `machine` cgroups that were not there when noted, unless
/// somebody else uses them by then.
pub struct Leftovers {
    absent: Vec<PathBuf>,
}

impl Leftovers {
    /// Looks at every hierarchy.
    pub fn note() -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let mut candidates = vec![root.join("machine")];
        if let Ok(entries) = fs::read_dir(root) {
            candidates.extend(entries.flatten().map(|entry| entry.path().join("machine")));
        }
        candidates.retain(|path| path.parent().is_some_and(Path::is_dir) && !path.exists());
        Self { absent: candidates }
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        for path in &self.absent {
            // Fails where there is none, and where somebody's guests are in it: both are fine.
            let _ = fs::remove_dir(path);
        }
    }
}
