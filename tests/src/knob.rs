//! A real cgroup with a `cpu` knob, made for one test and removed after it.

use anyhow::{Context, Result};
use formtune_agent::act::weight_of;
use formtune_agent::sense::cgroup::Hierarchies;
use formtune_agent::vm::{CgroupVersion, Owner, Vm};
use formtune_core::plan::{Knob, Reason, Setpoint};
use formtune_core::policy::Mode;
use formtune_core::units::{VmId, Weight};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A cgroup of one's own in the hierarchy that carries the `cpu` controller.
#[derive(Debug)]
pub struct KnobCgroup {
    path: PathBuf,
    version: CgroupVersion,
    /// See [`pin`].
    pin: Option<PathBuf>,
}

impl KnobCgroup {
    /// Makes `name`, which must be unique on the machine, below the hierarchy's root.
    pub fn make(name: &str) -> Result<Self> {
        let hierarchies = Hierarchies::find(Path::new("/sys/fs/cgroup"))?;
        let (root, version) = (hierarchies.cpu, hierarchies.version);
        let path = root.join(name);
        let parent = path.parent().unwrap_or(&root);
        let pin = match version {
            CgroupVersion::V2 if parent == root => Some(pin(&root, name)?),
            CgroupVersion::V2 => switch_on_below(parent).map(|()| None)?,
            CgroupVersion::V1 => None,
        };
        fs::create_dir(&path).with_context(|| format!("failed to make {}", path.display()))?;
        Ok(Self { path, version, pin })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The interface file.
    pub fn file(&self) -> PathBuf {
        self.path.join(file_name(self.version))
    }

    /// Raw value.
    pub fn raw(&self) -> u64 {
        fs::read_to_string(self.file()).unwrap().trim().parse().unwrap()
    }

    /// Writes a raw value, as somebody else would.
    pub fn set_raw(&self, raw: u64) {
        fs::write(self.file(), raw.to_string()).unwrap();
    }

    /// On core's scale.
    pub fn weight(&self) -> Weight {
        weight_of(self.version, self.raw())
    }

    /// Removes it and makes it again: the same path, another cgroup.
    pub fn remake(&self) {
        fs::remove_dir(&self.path).unwrap();
        // The file system may give the same inode number again otherwise.
        let other = self.path.with_extension("other");
        fs::create_dir(&other).unwrap();
        fs::create_dir(&self.path).unwrap();
        fs::remove_dir(&other).unwrap();
    }

    /// The VM record that the agent would have of it.
    pub fn vm(&self) -> Vm {
        Vm {
            id: VmId::from(self.path.file_name().unwrap().to_string_lossy().into_owned()),
            uuid: None,
            vcpus: 1,
            owner: Owner::Cgroup,
            cgroup: self.path.clone(),
            cgroup_id: fs::metadata(&self.path).unwrap().ino(),
            cgroup_version: self.version,
        }
    }
}

impl Drop for KnobCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
        let _ = self.pin.as_ref().map(fs::remove_dir);
    }
}

/// Name of the interface file.
pub fn file_name(version: CgroupVersion) -> &'static str {
    match version {
        CgroupVersion::V1 => "cpu.shares",
        CgroupVersion::V2 => "cpu.weight",
    }
}

/// Keeps the `cpu` controller switched on below the root of a v2 hierarchy, by a cgroup that
/// passes it on in turn. systemd switches it off whenever it starts a unit and none of its own
/// needs it, and the kernel refuses that while somebody passes it on.
fn pin(root: &Path, name: &str) -> Result<PathBuf> {
    switch_on_below(root)?;
    let pin = root.join(format!("{name}.pin"));
    fs::create_dir(&pin).with_context(|| format!("failed to make {}", pin.display()))?;
    switch_on_below(&pin)?;
    Ok(pin)
}

fn switch_on_below(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.subtree_control"), "+cpu")
        .with_context(|| format!("failed to enable the cpu controller in {}", cgroup.display()))
}

/// A setpoint to be written.
pub fn setpoint(vm: &Vm, from: Weight, to: u32) -> Setpoint {
    Setpoint {
        vm: vm.id.clone(),
        knob: Knob::CpuWeight,
        from,
        to: Weight::new(to).expect("1 to 10000"),
        mode: Mode::Enforce,
        victim: None,
        reason: Reason::NoSlo,
    }
}
