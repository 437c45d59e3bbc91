//! Debian's kernels for virtual machines, several series, fetched once into the cache.

use super::vmlinux;
use crate::setup::apt::Apt;
use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the series are; every one of them is on the machine's own Debian mirror.
const SUITES: &[&str] = &["bullseye", "bookworm", "trixie", "trixie-backports"];

/// The kernels that formtune is tested on, oldest first.
pub const TESTED: &[Series] =
    &[Series::Release("5.10"), Series::Release("6.1"), Series::Release("6.12"), Series::Newest];

/// Which kernel is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// The newest package of a stable series, e.g. `6.1`.
    Release(&'static str),
    /// The newest one to be had.
    Newest,
}

impl Series {
    /// For messages and folder names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Release(name) => name,
            Self::Newest => "newest",
        }
    }

    fn holds(self, version: &[u32]) -> bool {
        match self {
            Self::Newest => true,
            Self::Release(name) => version.starts_with(&numbers(name)),
        }
    }
}

/// One of [`TESTED`] by its name, for the command line.
///
/// # Errors
/// When there is none.
pub fn series(name: &str) -> Result<Series, String> {
    TESTED.iter().copied().find(|series| series.name() == name).ok_or_else(|| {
        let names: Vec<&str> = TESTED.iter().map(|series| series.name()).collect();
        format!("none of {}", names.join(", "))
    })
}

/// An unpacked kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` prints it.
    pub release: String,
    /// The ELF file, for `qemu -kernel`.
    pub vmlinux: PathBuf,
    /// `lib/modules/RELEASE`, with `modules.dep` and `modules.builtin`.
    pub modules: PathBuf,
}

/// The newest kernel to be had; fetched on first use.
///
/// # Errors
/// As [`get`].
pub fn newest() -> Result<Kernel> {
    get(Series::Newest)
}

/// The kernel of a series; fetched on first use, and kept until the cache is removed.
///
/// # Errors
/// When the mirror has none, or a package cannot be fetched or unpacked.
pub fn get(series: Series) -> Result<Kernel> {
    let folder = sh::cache().join("kernels").join(series.name());
    if let Some(kernel) = open(&folder) {
        return Ok(kernel);
    }
    // Another command may be fetching it right now.
    let _lock = sh::lock_cache("kernels")?;
    if let Some(kernel) = open(&folder) {
        return Ok(kernel);
    }
    fetch(series, &folder).with_context(|| format!("failed to get the {} kernel", series.name()))
}

/// The kernel in a folder of the cache, if it is complete.
fn open(folder: &Path) -> Option<Kernel> {
    let release = fs::read_to_string(folder.join("release")).ok()?;
    let vmlinux = folder.join("vmlinux");
    let modules = folder.join("lib/modules").join(&release);
    let files = [&vmlinux, &modules.join("modules.dep"), &modules.join("modules.builtin")];
    files.iter().all(|file| file.is_file()).then_some(Kernel { release, vmlinux, modules })
}

fn fetch(series: Series, folder: &Path) -> Result<Kernel> {
    let apt = Apt::open("kernels", SUITES)?;
    let mut candidates: BTreeMap<Vec<u32>, String> = BTreeMap::new();
    // The first question makes apt read all lists.
    let names = progress::during("looking for kernels in the package lists", |_| {
        apt.names("linux-image-")
    })?;
    for package in names {
        if let Some(version) = version(&package)
            && series.holds(&version)
        {
            candidates.insert(version, package);
        }
    }
    // A package can be listed and yet be gone from the mirror: the next older one will do.
    let mut failure = None;
    for package in candidates.into_values().rev().take(3) {
        match fetch_package(&apt, &package, folder) {
            Ok(kernel) => return Ok(kernel),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure.unwrap_or_else(|| anyhow::anyhow!("the mirror has none")))
}

fn fetch_package(apt: &Apt, image: &str, folder: &Path) -> Result<Kernel> {
    let release = image.trim_start_matches("linux-image-").to_owned();
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    // From 7.1 on the image's package is empty and leans on one each for kernel, modules and lists.
    let mut packages = vec![image.to_owned()];
    packages.extend(apt.depends(image)?.into_iter().filter(|name| name.ends_with(&release)));
    let debs = apt.download(&packages, &folder.join("deb"))?;
    progress::during(&format!("unpacking kernel {release}"), |tick| {
        unpack(&release, &debs, folder, tick)
    })?;
    fs::write(folder.join("release"), &release)?;
    open(folder).with_context(|| format!("the packages {} are not complete", packages.join(", ")))
}

/// From package files to what [`open`] looks for, but for the file that says that it is all there.
fn unpack(release: &str, debs: &[PathBuf], folder: &Path, tick: &mut dyn FnMut()) -> Result<()> {
    for deb in debs {
        sh::run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(folder))?;
        tick();
    }
    fs::remove_dir_all(folder.join("deb"))?;
    let lib = folder.join("lib");
    if !lib.exists() {
        std::os::unix::fs::symlink("usr/lib", &lib)?;
    }
    let modules = lib.join("modules").join(release);
    let image = [folder.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")];
    let Some(image) = image.iter().find(|file| file.is_file()) else {
        bail!("no vmlinuz in its packages");
    };
    vmlinux::extract(image, &folder.join("vmlinux"))?;
    fs::remove_file(image)?;
    tick();
    // depmod warns of the missing modules.builtin.modinfo and the like, which nobody needs here.
    sh::run(
        Command::new(sh::find_program("depmod").context("depmod (package kmod) is missing")?)
            .arg("-b")
            .arg(folder)
            .arg(release)
            .stderr(Stdio::null()),
    )
}

/// The version of `linux-image-VERSION-cloud-amd64`; `None` for all other packages.
fn version(package: &str) -> Option<Vec<u32>> {
    let version = package.strip_prefix("linux-image-")?.strip_suffix("-cloud-amd64")?;
    let version = numbers(version);
    (!version.is_empty()).then_some(version)
}

fn numbers(text: &str) -> Vec<u32> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::{Series, version};

    #[test]
    fn series_are_told_apart_by_number() {
        let old = version("linux-image-6.1.0-50-cloud-amd64").unwrap();
        let new = version("linux-image-6.12.107+deb13-cloud-amd64").unwrap();
        assert!(Series::Release("6.1").holds(&old) && !Series::Release("6.1").holds(&new));
        assert!(Series::Newest.holds(&old) && old < new);
        let newer = version("linux-image-6.12.94+deb13-cloud-amd64").unwrap();
        assert!(newer < new, "94 is less than 107");
    }

    #[test]
    fn only_cloud_images_count() {
        for package in [
            "linux-image-cloud-amd64",
            "linux-image-6.12.107+deb13-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64-dbg",
            "linux-image-6.12.107+deb13-cloud-amd64-unsigned",
        ] {
            assert_eq!(version(package), None, "{package}");
        }
    }
}
