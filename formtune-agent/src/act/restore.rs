//! Bringing originals back: at start after a crash, at the end, and by `formtune restore`.

use super::journal::{self, Journal, Lock, NotLocked};
use super::late::{self, Writer};
use super::record::{Closed, Entry, Key, Record, Replay, Verdict, replay};
use super::{ActError, libvirt};
use crate::hypervisor::{Hypervisor, HypervisorError};
use formtune_core::plan::Knob;
use formtune_core::units::VmId;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What became of every knob that formtune had changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    /// One per knob.
    pub knobs: Vec<Restored>,
    /// Why the outcome could not be written to the journal. The knobs are not affected:
    /// the next start finds the originals in place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub journal: Option<String>,
}

impl RestoreReport {
    /// Whether nothing is left to be done by hand.
    pub fn is_complete(&self) -> bool {
        !self.knobs.iter().any(|knob| matches!(knob.result, RestoreResult::Failed { .. }))
    }
}

/// One knob that formtune had changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Restored {
    /// Whose knob.
    pub vm: VmId,
    /// Which knob.
    pub knob: Knob,
    /// The cgroup it is in.
    pub cgroup: PathBuf,
    /// The interface file, which also says the scale of the raw values.
    pub file: &'static str,
    /// Raw value as first found: `cpu.shares` on v1, `cpu.weight` on v2.
    pub original: u64,
    /// What happened.
    #[serde(flatten)]
    pub result: RestoreResult,
}

/// See [`Restored`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum RestoreResult {
    /// The original was written and read back.
    Restored {
        /// Raw value that was there.
        from: u64,
    },
    /// The original was there.
    AlreadyOriginal,
    /// Somebody else changed the knob since; it was left.
    Theirs {
        /// Raw value that is there.
        found: u64,
    },
    /// The VM is gone, and the knob with it.
    Gone,
    /// It could not be restored, or not for good.
    Failed {
        /// One line: what and where.
        why: String,
    },
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vm, file, original, .. } = self;
        match &self.result {
            RestoreResult::Restored { from } => {
                write!(f, "{vm}: {file} restored to {original} (was {from})")
            }
            RestoreResult::AlreadyOriginal => write!(f, "{vm}: {file} is {original} already"),
            RestoreResult::Theirs { found } => write!(
                f,
                "{vm}: {file} left at {found}: not formtune's value (original {original})"
            ),
            RestoreResult::Gone => write!(f, "{vm}: VM is gone, nothing to restore"),
            RestoreResult::Failed { why } => {
                write!(f, "{vm}: {file} NOT restored to {original}: {why}")
            }
        }
    }
}

/// What [`super::Act::open`] and [`restore`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RecoveryReport {
    /// Knobs that a dead agent had left changed.
    #[serde(flatten)]
    pub restored: RestoreReport,
    /// Knobs changed before the last boot: they ended with it.
    pub earlier_boot: u64,
    /// Why enforcement is refused, and what to do: the journal is, or was, damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
}

/// Restores one entry. `damaged`: see [`Entry::verdict`].
pub(super) fn restore_entry(
    entry: &Entry,
    writer: Writer,
    damaged: bool,
    hypervisor: Option<&Hypervisor>,
) -> Restored {
    let result = match try_restore(entry, writer, damaged, hypervisor) {
        Ok(result) => result,
        Err(ActError::Gone { .. }) => RestoreResult::Gone,
        Err(error) => RestoreResult::Failed { why: error.to_string() },
    };
    let (vm, knob) = entry.key();
    let (cgroup, file) = (entry.place.cgroup.clone(), entry.place.file());
    Restored { vm, knob, cgroup, file, original: entry.original, result }
}

fn try_restore(
    entry: &Entry,
    writer: Writer,
    damaged: bool,
    hypervisor: Option<&Hypervisor>,
) -> Result<RestoreResult, ActError> {
    let Entry { place, original, .. } = entry;
    let from = place.read()?;
    // What the file holds says nothing of what systemd would write next, nor of a write
    // that libvirt still has to make: an original that is back is set again through libvirt.
    let may_change = entry.may_differ_elsewhere();
    match entry.verdict(from, damaged) {
        Verdict::AlreadyOriginal if !may_change => return Ok(RestoreResult::AlreadyOriginal),
        Verdict::AlreadyOriginal | Verdict::Restore => {}
        Verdict::Theirs => return Ok(RestoreResult::Theirs { found: from }),
        Verdict::Unknown => {
            return Ok(RestoreResult::Failed {
                why: format!("the journal is damaged and {from} may be anybody's"),
            });
        }
    }
    let mut without_libvirt = None;
    let found = match &entry.domain {
        None => raw(entry)?,
        Some(domain) => match through_libvirt(entry, domain, hypervisor) {
            Ok(found) => found,
            Err(gone @ ActError::Gone { .. }) => return Err(gone),
            // Better back for now than throttled on. Without systemd libvirt would have
            // written the same file, so then it is back for good.
            Err(error) => {
                let found = raw(entry)?;
                let hung = matches!(
                    error,
                    ActError::Libvirt { source: HypervisorError::NoAnswer { .. }, .. }
                );
                // A connection that broke in the middle of a call says nothing of the call. With
                // an agent that died, libvirt is most likely dead as well.
                let broke_off = writer == Writer::Ourselves && !entry.is_settled();
                without_libvirt = (hung || broke_off || place.in_scope()).then_some(error);
                found
            }
        },
    };
    Ok(match without_libvirt {
        _ if found != *original => {
            RestoreResult::Failed { why: format!("it reads back as {found}") }
        }
        Some(error) => RestoreResult::Failed {
            why: format!(
                "written to the cgroup only, which may be undone ({error}); \
                 run `formtune restore` once libvirt answers"
            ),
        },
        None if from == *original => RestoreResult::AlreadyOriginal,
        None => RestoreResult::Restored { from },
    })
}

/// Once more if a late call of ours came in between.
fn through_libvirt(
    entry: &Entry,
    domain: &str,
    hypervisor: Option<&Hypervisor>,
) -> Result<u64, ActError> {
    let write = || libvirt::write(hypervisor, domain, &entry.place, entry.original);
    match write()? {
        found if found != entry.original && entry.is_ours(found) => write(),
        found => Ok(found),
    }
}

fn raw(entry: &Entry) -> Result<u64, ActError> {
    entry.place.write(entry.original)?;
    entry.place.read()
}

/// The journal's record of a restore that ended the entry.
pub(super) fn closing(entry: &Entry, result: &RestoreResult) -> Option<Record> {
    let why = match result {
        RestoreResult::Restored { .. } | RestoreResult::AlreadyOriginal => Closed::Restored,
        RestoreResult::Theirs { .. } => Closed::Yielded,
        RestoreResult::Gone => Closed::Gone,
        RestoreResult::Failed { .. } => return None,
    };
    Some(Record::closed(entry, why))
}

/// What is left after recovery.
pub(super) struct Recovered {
    pub report: RecoveryReport,
    /// Entries that could not be restored.
    pub left: BTreeMap<Key, Entry>,
    /// A new journal, holding `left`.
    pub journal: io::Result<Journal>,
}

/// Restores what the journal in `folder` says is changed, keeps that journal aside if it is
/// damaged, and begins a new one. The caller holds the lock.
pub(super) fn recover(
    folder: &Path,
    boot: &str,
    connect: &mut dyn FnMut() -> Option<Hypervisor>,
) -> Result<Recovered, ActError> {
    let failed = |source| ActError::StateFolder { path: folder.into(), source };
    let found = journal::read(folder).map_err(failed)?;
    let Replay { entries, earlier_boot, damage } =
        found.as_deref().map(|bytes| replay(bytes, boot)).unwrap_or_default();
    let mut report =
        RecoveryReport { earlier_boot: earlier_boot.len() as u64, ..Default::default() };
    let hypervisor = entries.values().any(|entry| entry.domain.is_some()).then(connect).flatten();
    let kept_before = journal::kept_aside(folder).map_err(failed)?;
    let damaged = damage.is_some() || kept_before.is_some();
    let mut left = BTreeMap::new();
    let all: Vec<&Entry> = entries.values().collect();
    report.restored.knobs = late::restore_entries(&all, Writer::Dead, damaged, hypervisor.as_ref());
    for ((key, entry), restored) in entries.into_iter().zip(&report.restored.knobs) {
        if closing(&entry, &restored.result).is_none() {
            left.insert(key, entry);
        }
    }
    let aside = match &damage {
        Some(_) => journal::set_aside(folder).map(Some),
        None => Ok(kept_before),
    };
    let (kept, journal) = match aside {
        Ok(kept) => (kept, Journal::create(folder, boot, left.values())),
        Err(error) => (None, Err(error)),
    };
    report.damaged = match (damage, kept) {
        (Some(what), Some(kept)) => Some(format!(
            "the journal was damaged ({what}) and is kept as {}: check the VMs' cpu weights, \
             then delete it to enforce again",
            kept.display()
        )),
        (Some(what), None) => {
            Some(format!("the journal in {} is damaged ({what})", folder.display()))
        }
        (None, Some(kept)) => Some(format!(
            "a damaged journal is kept as {}: check the VMs' cpu weights, then delete it to \
             enforce again",
            kept.display()
        )),
        (None, None) => None,
    };
    Ok(Recovered { report, left, journal })
}

/// Restores without the daemon: what `formtune restore` does. Connects to libvirt only if
/// the journal names a VM that libvirt owns. A state folder that does not exist, or cannot
/// be written any more, is no obstacle.
///
/// # Errors
/// [`ActError::Locked`] while an agent runs: it would fight with it. [`ActError::StateFolder`]
/// if the journal cannot be read.
pub fn restore(
    state_dir: &Path,
    mut connect: impl FnMut() -> Option<Hypervisor>,
) -> Result<RecoveryReport, ActError> {
    let failed = |source| ActError::StateFolder { path: state_dir.into(), source };
    if !state_dir.try_exists().map_err(failed)? {
        return Ok(RecoveryReport::default());
    }
    let _lock = match Lock::take(state_dir) {
        Ok(lock) => Some(lock),
        Err(NotLocked::Held(pid)) => {
            return Err(ActError::Locked { path: Lock::path(state_dir), pid });
        }
        // No agent runs without the file.
        Err(NotLocked::Failed(_)) if !Lock::path(state_dir).exists() => None,
        Err(NotLocked::Failed(error)) => return Err(failed(error)),
    };
    let recovered = recover(state_dir, &super::boot_id()?, &mut connect)?;
    let mut report = recovered.report;
    report.restored.journal = recovered.journal.err().map(|error| failed(error).to_string());
    Ok(report)
}
