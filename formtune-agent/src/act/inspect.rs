//! A look at the journal that changes nothing: for `formtune doctor`.

use super::{BOOT_ID, journal, record};
use formtune_core::units::VmId;
use std::io;
use std::path::{Path, PathBuf};

/// What a state folder holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// VMs with a knob that is changed, as far as the journal knows.
    pub open: Vec<VmId>,
    /// Why the journal cannot be relied on.
    pub damage: Option<String>,
    /// A damaged journal that was set aside and not looked after yet.
    pub set_aside: Option<PathBuf>,
}

/// Reads the journal without its lock: a running agent may be about to change it.
///
/// # Errors
/// The folder or the journal cannot be read; `NotFound` where there is no folder.
pub fn inspect(state_dir: &Path) -> io::Result<Inspection> {
    let set_aside = journal::kept_aside(state_dir)?;
    let Some(bytes) = journal::read(state_dir)? else {
        return Ok(Inspection { set_aside, ..Inspection::default() });
    };
    let boot = std::fs::read_to_string(BOOT_ID)?;
    let replay = record::replay(&bytes, boot.trim());
    let open = replay.entries.into_keys().map(|(vm, _)| vm).collect();
    Ok(Inspection { open, damage: replay.damage, set_aside })
}
