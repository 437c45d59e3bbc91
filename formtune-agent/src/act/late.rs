//! What libvirt does late: it goes on with a call whose caller died, or lost its connection,
//! and such a call can take effect after the original was brought back.
//!
//! libvirt takes calls in the order of their arrival and works on several at a time. One that
//! arrived before ours waits for nothing but the domain's lock, for which ours, which was
//! answered, has waited too: it follows at once, if it comes at all.

use super::record::Entry;
use super::restore::{RestoreResult, Restored, restore_entry};
use crate::hypervisor::Hypervisor;
use std::time::{Duration, Instant};

/// Nothing comes any more once it was quiet for so long.
const QUIET: Duration = Duration::from_millis(500);
const STEP: Duration = Duration::from_millis(10);
/// Somebody who sets one of our values again and again is no late call.
const LIMIT: Duration = Duration::from_secs(5);

/// Who asked for what is to be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    /// This process: it knows of each call whether it was answered.
    Ourselves,
    /// One that died, at any moment.
    Dead,
}

impl Writer {
    /// Whether a call that changes this knob may still be made by libvirt.
    fn left_a_call(self, entry: &Entry) -> bool {
        entry.may_differ_elsewhere() && (self == Self::Dead || !entry.is_settled())
    }
}

/// Restores entries. Those of which a call may be left are watched afterwards, all at once,
/// and restored again should it be made. `damaged`: see [`Entry::verdict`].
pub(super) fn restore_entries(
    entries: &[&Entry],
    writer: Writer,
    damaged: bool,
    hypervisor: Option<&Hypervisor>,
) -> Vec<Restored> {
    let mut watched = Vec::new();
    let mut all = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let restored = restore_entry(entry, writer, damaged, hypervisor);
        let back = matches!(
            restored.result,
            RestoreResult::Restored { .. } | RestoreResult::AlreadyOriginal
        );
        if back && writer.left_a_call(entry) {
            watched.push((index, *entry));
        }
        all.push(restored);
    }
    let begin = Instant::now();
    let mut quiet = begin;
    while !watched.is_empty() && quiet.elapsed() < QUIET && begin.elapsed() < LIMIT {
        std::thread::sleep(STEP);
        watched.retain(|(index, entry)| {
            // One that is gone, or somebody else's by now, needs no more looks at it.
            match entry.place.read() {
                Ok(found) if found == entry.original => true,
                Ok(found) if entry.is_ours(found) => {
                    all[*index] = restore_entry(entry, writer, damaged, hypervisor);
                    quiet = Instant::now();
                    true
                }
                _ => false,
            }
        });
    }
    all
}
