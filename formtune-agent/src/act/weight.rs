//! `cpu.weight` and `cpu.shares` in the cgroup file system, and the scale between them.

use super::ActError;
use crate::vm::{CgroupVersion, Vm};
use formtune_core::units::{VmId, Weight};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

/// `MIN_SHARES` and `MAX_SHARES` of `kernel/sched/sched.h`.
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;
/// `CGROUP_WEIGHT_MIN` and `CGROUP_WEIGHT_MAX` of `include/linux/cgroup.h`.
const WEIGHTS: std::ops::RangeInclusive<u64> = 1..=10_000;

/// What a raw value of the knob is on core's scale: weight = shares × 100 / 1024, rounded,
/// which is systemd's rule and keeps ratios.
pub fn weight_of(version: CgroupVersion, raw: u64) -> Weight {
    match version {
        CgroupVersion::V1 => Weight::clamped((raw.min(*SHARES.end()) * 100 + 512) / 1024),
        CgroupVersion::V2 => Weight::clamped(raw),
    }
}

/// The raw value to write for a weight, within the kernel's bounds. Read back, it is the
/// same weight again.
pub fn raw_of(version: CgroupVersion, weight: Weight) -> u64 {
    let weight = u64::from(weight.get());
    match version {
        CgroupVersion::V1 => ((weight * 1024 + 50) / 100).clamp(*SHARES.start(), *SHARES.end()),
        CgroupVersion::V2 => weight,
    }
}

/// The knob of one cgroup: where it is, and how to know that it is still the same one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// For messages.
    pub vm: VmId,
    /// Absolute.
    pub cgroup: PathBuf,
    /// Inode of that directory.
    pub cgroup_id: u64,
    /// Which file it has.
    #[serde(with = "version_number")]
    pub cgroup_version: CgroupVersion,
}

impl Place {
    pub(super) fn of(vm: &Vm) -> Self {
        Self {
            vm: vm.id.clone(),
            cgroup: vm.cgroup.clone(),
            cgroup_id: vm.cgroup_id,
            cgroup_version: vm.cgroup_version,
        }
    }

    /// Name of the interface file.
    pub(super) fn file(&self) -> &'static str {
        match self.cgroup_version {
            CgroupVersion::V1 => "cpu.shares",
            CgroupVersion::V2 => "cpu.weight",
        }
    }

    /// In a systemd scope a raw write lasts until the next `daemon-reload` only.
    pub(super) fn in_scope(&self) -> bool {
        self.cgroup.iter().any(|part| part.to_string_lossy().ends_with(".scope"))
    }

    /// The raw value as it stands.
    ///
    /// # Errors
    /// [`ActError::Gone`] where the cgroup was removed, or removed and made again;
    /// [`ActError::Read`]; [`ActError::Idle`].
    pub(super) fn read(&self) -> Result<u64, ActError> {
        let failed =
            |source| self.trouble(source, |vm, file, source| ActError::Read { vm, file, source });
        let mut text = String::new();
        // The files hold one number; a limit keeps whatever else it may be out of memory.
        self.open(OFlag::O_RDONLY)?.take(64).read_to_string(&mut text).map_err(failed)?;
        let raw = text.trim().parse().map_err(|_| {
            failed(io::Error::new(io::ErrorKind::InvalidData, format!("not a number: {text:?}")))
        })?;
        let bounds = match self.cgroup_version {
            CgroupVersion::V1 => SHARES,
            CgroupVersion::V2 => WEIGHTS,
        };
        // Under cpu.idle the kernel reports a weight of 0, and refuses to change it.
        if bounds.contains(&raw) { Ok(raw) } else { Err(self.idle()) }
    }

    /// Writes a raw value; does not read it back.
    ///
    /// # Errors
    /// [`ActError::Gone`], [`ActError::Write`].
    pub(super) fn write(&self, raw: u64) -> Result<(), ActError> {
        let mut file = self.open(OFlag::O_WRONLY)?;
        // One write: the kernel takes each as a value of its own.
        file.write_all(raw.to_string().as_bytes()).map_err(|source| {
            self.trouble(source, |vm, file, source| ActError::Write { vm, file, source })
        })
    }

    /// Whether the directory is there and is still the one that was meant.
    pub(super) fn exists(&self) -> bool {
        self.directory().is_ok()
    }

    /// Opens the interface file through the directory that was checked, so that a cgroup
    /// made under the same name in between is not taken for it.
    fn open(&self, how: OFlag) -> Result<File, ActError> {
        let directory = self.directory()?;
        openat(&directory, self.file(), how | OFlag::O_CLOEXEC, Mode::empty())
            .map(File::from)
            .map_err(|e| match e {
                Errno::ENOENT if !self.exists() => self.gone(),
                e => ActError::Read { vm: self.vm.clone(), file: self.path(), source: e.into() },
            })
    }

    fn directory(&self) -> Result<File, ActError> {
        let flags = (OFlag::O_PATH | OFlag::O_DIRECTORY).bits();
        let directory =
            OpenOptions::new().read(true).custom_flags(flags).open(&self.cgroup).map_err(
                |source| {
                    self.trouble(source, |vm, file, source| ActError::Read { vm, file, source })
                },
            )?;
        let found = directory.metadata().map_err(|source| {
            self.trouble(source, |vm, file, source| ActError::Read { vm, file, source })
        })?;
        if found.ino() == self.cgroup_id { Ok(directory) } else { Err(self.gone()) }
    }

    fn path(&self) -> PathBuf {
        self.cgroup.join(self.file())
    }

    fn gone(&self) -> ActError {
        ActError::Gone { vm: self.vm.clone(), cgroup: self.cgroup.clone() }
    }

    fn idle(&self) -> ActError {
        ActError::Idle { vm: self.vm.clone(), file: self.path() }
    }

    /// A removed cgroup answers ENOENT at its path and ENODEV at its open files.
    fn trouble(
        &self,
        source: io::Error,
        otherwise: impl FnOnce(VmId, PathBuf, io::Error) -> ActError,
    ) -> ActError {
        match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ENODEV) => self.gone(),
            _ => otherwise(self.vm.clone(), self.path(), source),
        }
    }
}

/// `1` and `2` in the journal.
mod version_number {
    use crate::vm::CgroupVersion;
    use serde::de::{Deserialize, Deserializer, Error, Unexpected};

    pub fn serialize<S: serde::Serializer>(v: &CgroupVersion, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u8(match v {
            CgroupVersion::V1 => 1,
            CgroupVersion::V2 => 2,
        })
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<CgroupVersion, D::Error> {
        match u8::deserialize(d)? {
            1 => Ok(CgroupVersion::V1),
            2 => Ok(CgroupVersion::V2),
            n => Err(D::Error::invalid_value(Unexpected::Unsigned(n.into()), &"1 or 2")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shares_and_weights_keep_their_ratio() {
        let of = |shares| weight_of(CgroupVersion::V1, shares).get();
        assert_eq!(
            [of(2), of(512), of(1000), of(1024), of(2048), of(10240)],
            [1, 50, 98, 100, 200, 1000]
        );
        assert_eq!(of(262_144), 10_000);
        let raw = |weight| raw_of(CgroupVersion::V1, Weight::new(weight).unwrap());
        assert_eq!([raw(1), raw(50), raw(100), raw(10_000)], [10, 512, 1024, 102_400]);
    }

    proptest! {
        #[test]
        fn every_weight_survives_both_scales(weight in 1u32..=10_000) {
            let weight = Weight::new(weight).unwrap();
            for version in [CgroupVersion::V1, CgroupVersion::V2] {
                prop_assert_eq!(weight_of(version, raw_of(version, weight)), weight);
            }
        }

        #[test]
        fn any_raw_value_has_a_weight(raw: u64) {
            weight_of(CgroupVersion::V1, raw);
            weight_of(CgroupVersion::V2, raw);
        }
    }
}
