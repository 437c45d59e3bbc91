//! Names of block devices by their numbers.

use formtune_common::block::major_minor;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Looked up once per device.
pub struct Devices {
    /// `/sys/dev/block`, whose entries `MAJOR:MINOR` lead to `…/block/NAME`.
    folder: PathBuf,
    names: BTreeMap<u32, String>,
}

impl Devices {
    /// Those of `/sys/dev/block`.
    pub fn new() -> Self {
        Self::below(Path::new("/sys/dev/block"))
    }

    fn below(folder: &Path) -> Self {
        Self { folder: folder.into(), names: BTreeMap::new() }
    }

    /// Looks a device up, if it was not before.
    pub fn learn(&mut self, device: u32) {
        if !self.names.contains_key(&device) {
            self.names.insert(device, self.look_up(device).unwrap_or_else(|| numbers(device)));
        }
    }

    /// `sda` or the like; `8:0` for one that was gone before it was looked up.
    pub fn name(&self, device: u32) -> String {
        self.names.get(&device).cloned().unwrap_or_else(|| numbers(device))
    }

    /// Whether a device is gone.
    pub fn is_gone(&self, device: u32) -> bool {
        !self.folder.join(numbers(device)).exists()
    }

    /// Forgets the name: the number may be given to another device.
    pub fn forget(&mut self, device: u32) {
        self.names.remove(&device);
    }

    fn look_up(&self, device: u32) -> Option<String> {
        let target = std::fs::read_link(self.folder.join(numbers(device))).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }
}

fn numbers(device: u32) -> String {
    let (major, minor) = major_minor(device);
    format!("{major}:{minor}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use formtune_common::block::device;

    #[test]
    fn names_are_kept_until_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let mut devices = Devices::below(folder.path());
        let (sda, gone) = (device(8, 0), device(259, 1_048_575));
        let link = folder.path().join("8:0");
        std::os::unix::fs::symlink("../../devices/pci0/block/sda", &link).unwrap();
        devices.learn(sda);
        devices.learn(gone);
        assert_eq!((devices.name(sda), devices.name(gone)), ("sda".into(), "259:1048575".into()));
        std::fs::remove_file(&link).unwrap();
        assert!(devices.is_gone(sda));
        assert_eq!(devices.name(sda), "sda");
        devices.forget(sda);
        assert_eq!(devices.name(sda), "8:0");
    }
}
