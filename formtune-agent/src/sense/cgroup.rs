//! Where the cgroup hierarchies are, and which one carries the `cpu` controller.
//!
//! That hierarchy is the one in which VMs compete for CPU: the probe keys by its cgroup
//! ids, `Vm::cgroup` lies in it and `act` writes there. It is v2 on a unified host, and
//! the v1 hierarchy of `cpu` on v1 and hybrid hosts.

use crate::vm::CgroupVersion;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The mounted hierarchies that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchies {
    /// Mount point of the hierarchy with the `cpu` controller.
    pub cpu: PathBuf,
    /// Its interface.
    pub version: CgroupVersion,
    /// Mount point of the v1 hierarchy with `cpuacct`.
    pub cpuacct: Option<PathBuf>,
    /// Mount point of the v2 hierarchy, also where `cpu` is on v1.
    pub unified: Option<PathBuf>,
    /// Mount point of the v1 hierarchy with `memory`.
    pub memory: Option<PathBuf>,
    /// Mount point of the hierarchy to whose cgroups block I/O is charged: that of v1 `blkio`,
    /// else v2 where it has `io`.
    pub block: Option<PathBuf>,
}

/// Why no hierarchy could be chosen.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file of procfs or cgroupfs.
    #[error("failed to read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No mounted hierarchy has it.
    #[error(
        "no cgroup hierarchy with the cpu controller is mounted; mount cgroup2, or check \
         cgroup_disable= on the kernel's command line"
    )]
    NoCpuController,
}

impl Hierarchies {
    /// From `/proc/self/mountinfo`; mounts at or below `root` (usually `/sys/fs/cgroup`) are
    /// preferred to those elsewhere.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn find(root: &Path) -> Result<Self, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let mountinfo = std::fs::read_to_string(path)
            .map_err(|source| CgroupError::Read { path: path.into(), source })?;
        Self::from_mountinfo(&mountinfo, root, |unified| {
            std::fs::read_to_string(unified.join("cgroup.controllers"))
        })
    }

    pub(super) fn from_mountinfo(
        mountinfo: &str,
        root: &Path,
        controllers: impl Fn(&Path) -> io::Result<String>,
    ) -> Result<Self, CgroupError> {
        let mut mounts: Vec<Mount> =
            mountinfo.lines().filter_map(Mount::parse).filter(|m| m.kind != Kind::Other).collect();
        // Whole hierarchies before bind mounts of a part, inside `root` before elsewhere.
        mounts.sort_by_key(|m| (m.part, !m.point.starts_with(root)));
        let v1 = |controller: &str| {
            mounts
                .iter()
                .find(|m| m.kind == Kind::V1 && m.options.iter().any(|o| o == controller))
                .map(|m| m.point.clone())
        };
        let unified = mounts.iter().find(|m| m.kind == Kind::V2).map(|m| m.point.clone());
        let (cpuacct, memory) = (v1("cpuacct"), v1("memory"));
        let has_io = |unified: &PathBuf| {
            controllers(unified).is_ok_and(|listed| listed.split_whitespace().any(|c| c == "io"))
        };
        let block = v1("blkio").or_else(|| unified.clone().filter(has_io));
        if let Some(cpu) = v1("cpu") {
            return Ok(Self { cpu, version: CgroupVersion::V1, cpuacct, unified, memory, block });
        }
        let cpu = unified.clone().ok_or(CgroupError::NoCpuController)?;
        let path = cpu.join("cgroup.controllers");
        let listed = controllers(&cpu).map_err(|source| CgroupError::Read { path, source })?;
        if !listed.split_whitespace().any(|c| c == "cpu") {
            return Err(CgroupError::NoCpuController);
        }
        Ok(Self { cpu, version: CgroupVersion::V2, cpuacct, unified, memory, block })
    }
}

/// The kernel's id of a cgroup: the inode number of its directory (`cgroup_ino()` is
/// `kernfs_ino()`, and on 64-bit machines that is the whole `kn->id`;
/// include/linux/kernfs.h).
///
/// # Errors
/// Those of `stat`.
pub fn id(path: &Path) -> io::Result<u64> {
    Ok(std::fs::symlink_metadata(path)?.ino())
}

#[derive(PartialEq, Eq)]
enum Kind {
    V1,
    V2,
    Other,
}

/// One line of mountinfo, proc(5): id, parent, device, root, mount point, options, optional
/// fields, `-`, type, source, super options.
struct Mount {
    kind: Kind,
    point: PathBuf,
    /// Only part of the hierarchy is mounted here.
    part: bool,
    options: Vec<String>,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (mount, source) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        let mut source = source.split(' ');
        let kind = match source.next()? {
            "cgroup" => Kind::V1,
            "cgroup2" => Kind::V2,
            _ => Kind::Other,
        };
        let options = source.nth(1)?.split(',').map(Into::into).collect();
        Some(Self { kind, point: unescape_octal(point).into(), part: root != "/", options })
    }
}

/// `\040` and its like, as the kernel writes blanks in mountinfo.
fn unescape_octal(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) =
            (first, tail)
        {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "/sys/fs/cgroup";

    fn find(mountinfo: &str, controllers: &str) -> Result<Hierarchies, CgroupError> {
        Hierarchies::from_mountinfo(mountinfo, Path::new(ROOT), |_| Ok(controllers.into()))
    }

    #[test]
    fn unified_host() {
        let found = find(
            "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate",
            "cpuset cpu io memory",
        )
        .unwrap();
        assert_eq!(found.cpu, Path::new(ROOT));
        assert_eq!(found.version, CgroupVersion::V2);
        assert_eq!(found.cpuacct, None);
        assert_eq!(found.block.as_deref(), Some(Path::new(ROOT)));
    }

    #[test]
    fn hybrid_host_with_joined_controllers() {
        let found = find(
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
             32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
             35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
            "hugetlb",
        )
        .unwrap();
        assert_eq!(found.cpu, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found.version, CgroupVersion::V1);
        assert_eq!(found.cpuacct.as_deref(), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(found.memory.as_deref(), Some(Path::new("/sys/fs/cgroup/memory")));
        assert_eq!(found.block, None);
    }

    #[test]
    fn block_io_is_charged_where_its_controller_is() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let found = find(mounts, "hugetlb io").unwrap();
        assert_eq!(found.block.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        let with_v1 =
            format!("{mounts}\n33 31 0:30 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio");
        let found = find(&with_v1, "hugetlb").unwrap();
        assert_eq!(found.block.as_deref(), Some(Path::new("/sys/fs/cgroup/blkio")));
    }

    #[test]
    fn mounts_elsewhere_and_bind_mounts() {
        let found = find(
            "50 1 0:29 /docker/x /var/lib/x/cpu rw - cgroup cgroup rw,cpu\n\
             51 1 0:29 / /my\\040cgroups/cpu rw - cgroup none rw,cpu",
            "",
        )
        .unwrap();
        assert_eq!(found.cpu, Path::new("/my cgroups/cpu"));
    }

    #[test]
    fn no_cpu_controller_is_said() {
        for (mountinfo, controllers) in [
            ("22 1 0:20 / /proc rw - proc proc rw", ""),
            ("29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw", "memory pids"),
            ("29 23 0:26 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset", ""),
        ] {
            assert!(matches!(find(mountinfo, controllers), Err(CgroupError::NoCpuController)));
        }
    }
}
