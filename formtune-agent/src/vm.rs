//! What the agent knows of a VM: the record that `sense` makes and `act` and `export` use.

use formtune_core::units::VmId;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A running VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Unique on the node; see [`VmId`].
    pub id: VmId,
    /// libvirt's UUID, where libvirt owns the VM.
    pub uuid: Option<String>,
    /// Virtual CPUs; 0 where not known.
    pub vcpus: u32,
    /// Who must be asked to change a knob.
    pub owner: Owner,
    /// The cgroup at which VMs compete with each other, absolute, in the hierarchy that
    /// carries the `cpu` controller: the scope, `machine/qemu-N-name.libvirt-qemu`, or what
    /// a pattern of the configuration names.
    pub cgroup: PathBuf,
    /// Inode of that directory, which is the kernel's cgroup id; changes when the directory
    /// is removed and made again.
    pub cgroup_id: u64,
    /// Which interface files that directory has.
    pub cgroup_version: CgroupVersion,
}

/// Who owns a VM's knobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// libvirt: written through its API, as systemd undoes raw writes to its scopes.
    Libvirt {
        /// The domain's name.
        domain: String,
    },
    /// Nobody known: the cgroup's own files are written.
    Cgroup,
}

/// The interface of the hierarchy that carries the `cpu` controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupVersion {
    /// `cpu.shares`, 2 to 262,144.
    V1,
    /// `cpu.weight`, 1 to 10,000.
    V2,
}
