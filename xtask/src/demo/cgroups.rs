//! The cgroup that holds the guests: a resource partition of libvirt's at the top of each
//! hierarchy, apart from the `machine` that guests of somebody else may be in. libvirt
//! expects such a partition to be there (<https://libvirt.org/cgroups.html>).

use anyhow::{Context, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";
/// Its folder; libvirt appends `.partition` to the name of the definition.
const FOLDER: &str = "formtune-demo.partition";
/// Ten times the default, in either version's unit.
const RAISED: &[(&str, &str)] = &[("cpu.shares", "10240"), ("cpu.weight", "1000")];
/// A guest that was just destroyed leaves its cgroup a moment later.
const PATIENCE: Duration = Duration::from_secs(2);

/// The partition; removed when dropped.
pub struct Partition {
    paths: Vec<PathBuf>,
    /// Controllers of version 2 that were off below the root before.
    switched_on: Vec<&'static str>,
}

impl Partition {
    /// What a definition calls it.
    pub const NAME: &str = "/formtune-demo";
    /// For the `cgroups` key of formtune's configuration.
    pub const PATTERN: &str = "formtune-demo.partition/qemu-*-{name}.libvirt-qemu";

    /// Makes it in every hierarchy; one that is left of a run that was killed will do.
    ///
    /// # Errors
    /// When a cgroup cannot be made or written.
    pub fn make() -> Result<Self> {
        let root = Path::new(ROOT);
        let mut hierarchies = Vec::new();
        let mut switched_on = Vec::new();
        if root.join("cgroup.controllers").exists() {
            hierarchies.push(root.to_owned());
            let control = root.join("cgroup.subtree_control");
            let before = fs::read_to_string(&control).unwrap_or_default();
            // As libvirt itself does for the groups that it makes.
            for controller in ["cpu", "cpuset", "io", "memory"] {
                // One that the kernel lacks cannot be had, and is not needed for the demo.
                if !before.split_whitespace().any(|on| on == controller)
                    && fs::write(&control, format!("+{controller}")).is_ok()
                {
                    switched_on.push(controller);
                }
            }
        } else {
            for entry in fs::read_dir(root).with_context(|| format!("failed to read {ROOT}"))? {
                let path = entry?.path();
                // `cpu -> cpu,cpuacct` is the same hierarchy under another name.
                if path.join("cgroup.procs").exists() && !path.is_symlink() {
                    hierarchies.push(path);
                }
            }
        }
        let mut new = Self { paths: Vec::new(), switched_on };
        for hierarchy in hierarchies {
            let path = hierarchy.join(FOLDER);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(error)
                        .with_context(|| format!("failed to make {}", path.display()));
                }
                _ => new.paths.push(path.clone()),
            }
            // A new cpuset of version 1 has no CPUs and no memory until it is given some.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let (from, to) = (hierarchy.join(file), path.join(file));
                if hierarchy != root && from.exists() {
                    fs::write(&to, fs::read_to_string(&from)?.trim())
                        .with_context(|| format!("failed to write {}", to.display()))?;
                }
            }
            raise(&path)?;
        }
        Ok(new)
    }

    /// It, in the hierarchy of the `cpu` controller.
    ///
    /// # Errors
    /// When no hierarchy has one.
    pub fn cpu(&self) -> Result<&Path> {
        let has_knob = |path: &&PathBuf| RAISED.iter().any(|(file, _)| path.join(file).exists());
        let path = self.paths.iter().find(has_knob);
        Ok(path.context("no hierarchy carries the cpu controller")?)
    }
}

/// Gives the parent of measured cgroups more weight than the host's other work has: a
/// compiler that happens to run on their CPU then disturbs the measurement less, in all
/// phases alike, and the scheduler moves it elsewhere. Weights below the parent, which are
/// what is measured, are left alone.
///
/// # Errors
/// When a knob that is there cannot be written.
pub fn raise(parent: &Path) -> Result<()> {
    for (file, value) in RAISED {
        let to = parent.join(file);
        if to.exists() {
            fs::write(&to, value).with_context(|| format!("failed to write {}", to.display()))?;
        }
    }
    Ok(())
}

impl Drop for Partition {
    fn drop(&mut self) {
        let end = Instant::now() + PATIENCE;
        for path in &self.paths {
            while let Err(error) = remove(path) {
                if Instant::now() >= end {
                    eprintln!("failed to remove {}: {error}", path.display());
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        for controller in &self.switched_on {
            // Where somebody else has come to need it, it stays on.
            let _ =
                fs::write(Path::new(ROOT).join("cgroup.subtree_control"), format!("-{controller}"));
        }
    }
}

fn remove(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
