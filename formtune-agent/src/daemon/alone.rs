//! One agent per node turns knobs, whatever folders, sockets and ports the others were given.

use crate::sense::cgroup::Hierarchies;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::path::Path;

/// The right to turn the knobs below one cgroup hierarchy; given back when dropped or when
/// the process ends.
///
/// The lock is on the root directory of the hierarchy, opened for reading: it needs no file
/// of our own, every agent of the node finds the same one, and the kernel lets go of it
/// whatever way an agent ends.
#[derive(Debug)]
pub(super) struct Alone(#[expect(dead_code, reason = "held for its lock")] Flock<File>);

impl Alone {
    /// # Errors
    /// Another agent that enforces has it, or the hierarchy cannot be found or opened.
    pub fn on(cgroup_root: &Path) -> Result<Self> {
        let root = Hierarchies::find(cgroup_root)?.cpu;
        let file =
            File::open(&root).with_context(|| format!("failed to open {}", root.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "another formtune enforces on this node (it has locked {}); stop it first, or run \
                 this one with `--mode shadow`",
                root.display()
            ),
            Err((_, errno)) => bail!("failed to lock {}: {errno}", root.display()),
        }
    }
}
