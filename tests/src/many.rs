//! Many VM-shaped cgroups at once, in every hierarchy in which VMs are told apart.

use crate::vm_cgroup::{make_tree, remove_with_all_below};
use formtune_agent::sense::cgroup::Hierarchies;
use formtune_agent::vm::CgroupVersion;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A folder for VMs in the hierarchies of `cpu` and of block I/O and in the v2 hierarchy, which
/// may be one and the same; removed when dropped, with all VMs.
pub struct Folder {
    cpu: PathBuf,
    others: BTreeSet<PathBuf>,
}

impl Folder {
    /// `name` must be unique on the machine.
    ///
    /// # Errors
    /// Those of `mkdir`.
    pub fn make(name: &str) -> io::Result<Self> {
        let found = Hierarchies::find(Path::new("/sys/fs/cgroup")).map_err(io::Error::other)?;
        let cpu = found.cpu.join(name);
        let others = [found.block, found.unified].into_iter().flatten();
        let others = others.filter(|root| *root != found.cpu).map(|root| root.join(name)).collect();
        let folder = Self { cpu, others };
        for path in folder.all() {
            fs::create_dir_all(path)?;
        }
        if found.version == CgroupVersion::V2 {
            for group in [&found.cpu, &folder.cpu] {
                fs::write(group.join("cgroup.subtree_control"), "+cpu +io")?;
            }
        }
        Ok(folder)
    }

    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        self.others.iter().chain([&self.cpu])
    }

    /// Makes a VM; the folder with the `cpu` controller, by which it is found, comes last.
    ///
    /// # Errors
    /// Those of `mkdir`.
    pub fn add(&self, vm: &str) -> io::Result<()> {
        self.others.iter().try_for_each(|folder| fs::create_dir_all(folder.join(vm)))?;
        make_tree(&self.cpu.join(vm))
    }

    /// Removes a VM, whose processes have ended.
    pub fn remove(&self, vm: &str) {
        self.all().for_each(|folder| remove_with_all_below(&folder.join(vm)));
    }

    /// Where it is in the hierarchy with the `cpu` controller.
    pub fn cpu(&self) -> &Path {
        &self.cpu
    }

    /// A VM's cgroup below which its vCPUs are.
    pub fn vcpus(&self, vm: &str) -> PathBuf {
        self.cpu.join(vm).join("libvirt")
    }

    /// Moves a process into a VM in all hierarchies.
    ///
    /// # Errors
    /// If the kernel does not take it.
    pub fn take(&self, vm: &str, process: u32) -> io::Result<()> {
        let others = self.others.iter().map(|folder| folder.join(vm));
        others
            .chain([self.vcpus(vm).join("emulator")])
            .try_for_each(|group| fs::write(group.join("cgroup.procs"), process.to_string()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.all().for_each(|folder| remove_with_all_below(folder));
    }
}
