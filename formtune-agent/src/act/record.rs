//! What stands in the journal, and what follows from it. Pure: bytes in, entries out.
//!
//! A line is the CRC-32 of its JSON in eight hexadecimal digits, a space, the JSON and a
//! newline. Every intent repeats all that is needed to undo it, so a line that cannot be
//! read costs that change only.

use super::weight::Place;
use crate::vm::Owner;
use formtune_core::plan::Knob;
use formtune_core::units::VmId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Format of the journal; another one is not read.
const VERSION: u32 = 1;

/// Which knob of which VM.
pub(super) type Key = (VmId, Knob);

/// A knob that formtune changed, or is about to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Where it is.
    pub place: Place,
    /// Which knob of it.
    pub knob: Knob,
    /// libvirt's name of the VM, where libvirt writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// libvirt's UUID of the VM, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Raw value as first found.
    pub original: u64,
    /// Raw values that may be there because of formtune, apart from `to`: the one found
    /// before the last write, and those of earlier writes whose outcome is not known (a
    /// libvirt that hung may still set them).
    pub before: Vec<u64>,
    /// Raw value of the last write, which may or may not have happened.
    pub to: u64,
    /// Plan that asked for the last write.
    pub plan_seq: u64,
}

impl Entry {
    pub(super) fn key(&self) -> Key {
        (self.place.vm.clone(), self.knob)
    }

    pub(super) fn owner(&self) -> Owner {
        match &self.domain {
            Some(domain) => Owner::Libvirt { domain: domain.clone() },
            None => Owner::Cgroup,
        }
    }

    /// Whether a value found at the knob can be formtune's own.
    pub(super) fn is_ours(&self, found: u64) -> bool {
        found == self.to || self.before.contains(&found)
    }

    /// The last write was seen at the knob, as `value`: nothing earlier can come any more.
    pub(super) fn settle(&mut self, value: u64) {
        self.before = vec![value];
        self.to = value;
    }

    /// Whether it is known what became of the last write.
    pub(super) fn is_settled(&self) -> bool {
        self.before == [self.to]
    }

    /// Whether libvirt, or systemd behind it, may have another value in mind than the
    /// original, whatever the cgroup holds.
    pub(super) fn may_differ_elsewhere(&self) -> bool {
        let mut values = self.before.iter().chain([&self.to]);
        self.domain.is_some() && values.any(|value| *value != self.original)
    }

    /// What restoring means with `found` at the knob. `damaged`: lines of the journal
    /// could not be read, so a value not known may still be formtune's.
    pub(super) fn verdict(&self, found: u64, damaged: bool) -> Verdict {
        if found == self.original {
            Verdict::AlreadyOriginal
        } else if self.is_ours(found) {
            Verdict::Restore
        } else if damaged {
            Verdict::Unknown
        } else {
            Verdict::Theirs
        }
    }
}

/// See [`Entry::verdict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing to write.
    AlreadyOriginal,
    /// formtune wrote it: the original is written.
    Restore,
    /// Somebody else changed it since: it is left.
    Theirs,
    /// It cannot be told whose it is: it is left and named.
    Unknown,
}

/// Why an entry needs no restoring any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Closed {
    /// The original is back.
    Restored,
    /// Somebody else changed the knob.
    Yielded,
    /// The VM is gone, and the cgroup with it.
    Gone,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(super) enum Record {
    /// First line of a file.
    Header { version: u32 },
    /// Durable before the knob is written.
    Intent { entry: Entry },
    /// The kernel or libvirt made another value of the one written.
    Observed { vm: VmId, knob: Knob, cgroup_id: u64, value: u64 },
    /// See [`Closed`].
    Closed { vm: VmId, knob: Knob, cgroup_id: u64, why: Closed },
}

impl Record {
    pub(super) const HEADER: Self = Self::Header { version: VERSION };

    pub(super) fn closed(entry: &Entry, why: Closed) -> Self {
        let (vm, knob) = entry.key();
        Self::Closed { vm, knob, cgroup_id: entry.place.cgroup_id, why }
    }
}

#[derive(Serialize, Deserialize)]
struct Line {
    /// Counts up by one per line of a file: a missing line is noticed.
    n: u64,
    /// `boot_id` of the boot in which it was written.
    boot: String,
    #[serde(flatten)]
    record: Record,
}

/// One line with its newline.
///
/// # Errors
/// A cgroup path that is not UTF-8.
pub(super) fn encode(n: u64, boot: &str, record: Record) -> serde_json::Result<String> {
    let json = serde_json::to_string(&Line { n, boot: boot.into(), record })?;
    Ok(format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())))
}

fn decode(line: &[u8]) -> Option<Line> {
    let (crc, json) = line.split_at_checked(9)?;
    let crc = std::str::from_utf8(crc.strip_suffix(b" ")?).ok()?;
    // As `encode` writes it: `from_str_radix` alone would also take a sign or capitals.
    if crc != format!("{:08x}", crc32fast::hash(json)) {
        return None;
    }
    serde_json::from_slice(json).ok()
}

/// What a journal says.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// Changes of this boot that were not closed.
    pub entries: BTreeMap<Key, Entry>,
    /// Changes of an earlier boot that were not closed: their knobs went with it.
    pub earlier_boot: Vec<Entry>,
    /// First thing that cannot have been left by a crash, for people.
    pub damage: Option<String>,
}

/// Reads a journal. A last line without its newline is what a crash leaves: it is used if
/// it is whole and dropped if not. Anything else that cannot be read is damage.
pub(super) fn replay(bytes: &[u8], boot: &str) -> Replay {
    let mut replay = Replay::default();
    let mut open: BTreeMap<Key, (Entry, String)> = BTreeMap::new();
    let mut expected = 0;
    for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let ended = line.strip_suffix(b"\n");
        let mut bad = |why: &str| {
            replay.damage.get_or_insert_with(|| format!("line {} {why}", index + 1));
        };
        let read = match (decode(ended.unwrap_or(line)), ended) {
            (Some(read), _) => read,
            (None, Some(_)) => {
                bad("does not match its checksum");
                continue;
            }
            // Only the last line can lack its newline, which may have become another byte.
            (None, None) => match line.split_last().and_then(|(_, line)| decode(line)) {
                Some(read) => {
                    bad("does not end as it should");
                    read
                }
                None => continue,
            },
        };
        if read.n != expected {
            bad(&format!("is number {}, not {expected}", read.n));
        }
        expected = read.n.saturating_add(1);
        match read.record {
            Record::Header { version: VERSION } if index == 0 => {}
            Record::Header { version } => {
                bad(&format!("begins a journal of version {version}"));
            }
            Record::Intent { entry } => {
                open.insert(entry.key(), (entry, read.boot));
            }
            Record::Observed { vm, knob, cgroup_id, value } => {
                let entry = open.get_mut(&(vm, knob)).map(|(entry, _)| entry);
                if let Some(entry) = entry.filter(|entry| entry.place.cgroup_id == cgroup_id) {
                    entry.settle(value);
                }
            }
            Record::Closed { vm, knob, cgroup_id, .. } => {
                let key = (vm, knob);
                if open.get(&key).is_some_and(|(entry, _)| entry.place.cgroup_id == cgroup_id) {
                    open.remove(&key);
                }
            }
        }
    }
    if expected == 0 {
        // The file gets its name only when its first line is durable.
        replay.damage.get_or_insert_with(|| "it has no first line".into());
    }
    for (key, (entry, written_in)) in open {
        if written_in == boot {
            replay.entries.insert(key, entry);
        } else {
            replay.earlier_boot.push(entry);
        }
    }
    replay
}

#[cfg(test)]
mod tests;
