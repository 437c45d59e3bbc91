//! The only room that writes to knobs.
//!
//! Every write goes one way: clamp to what the kernel takes, journal the original and the
//! intent durably, compare what is there with what is expected, write, read back. A value
//! that somebody else changed is theirs from then on. What the journal holds comes back at
//! the end, at the next start after a crash, and by `formtune restore`. `docs/journal.md`
//! describes the file and its invariants.

#[doc(hidden)]
pub mod fuzzing;
mod inspect;
mod journal;
mod late;
mod libvirt;
mod record;
mod restore;
mod weight;

pub use inspect::{Inspection, inspect};
pub use restore::{RecoveryReport, RestoreReport, RestoreResult, Restored, restore};
pub use weight::{raw_of, weight_of};

use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::vm::{Owner, Vm};
use formtune_core::plan::{Knob, Outcome, OutcomeResult, Setpoint};
use formtune_core::policy::Mode;
use formtune_core::units::{VmId, Weight};
use journal::{Journal, Lock, NotLocked};
use late::Writer;
use record::{Closed, Entry, Key, Record};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use weight::Place;

/// What can go wrong between a plan and a knob.
#[derive(Debug, thiserror::Error)]
pub enum ActError {
    /// The state folder cannot be read or written.
    #[error("failed to use state folder {}: {source}; it must be writable and have space", path.display())]
    StateFolder {
        /// As configured.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another agent is at work on this node.
    #[error("another formtune{} holds {}; stop it first (it restores when it stops)", pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), path.display())]
    Locked {
        /// The lock's file.
        path: PathBuf,
        /// The other agent's process id, where known.
        pid: Option<u32>,
    },
    /// The kernel's boot id cannot be read.
    #[error("failed to read {BOOT_ID}: {source}")]
    BootId {
        /// The cause.
        source: io::Error,
    },
    /// The cgroup was removed, or removed and made again.
    #[error("cgroup {} of vm {vm} is gone", cgroup.display())]
    Gone {
        /// Whose.
        vm: VmId,
        /// Where it was.
        cgroup: PathBuf,
    },
    /// The knob cannot be read.
    #[error("failed to read {} of vm {vm}: {source}", file.display())]
    Read {
        /// Whose.
        vm: VmId,
        /// Which file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The knob cannot be written.
    #[error("failed to write {} of vm {vm}: {source}", file.display())]
    Write {
        /// Whose.
        vm: VmId,
        /// Which file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The cgroup is set to run only when nothing else does; the kernel refuses weights.
    #[error("{} of vm {vm} has no weight: cpu.idle is set", file.display())]
    Idle {
        /// Whose.
        vm: VmId,
        /// Which file.
        file: PathBuf,
    },
    /// libvirt owns the VM and there is no connection.
    #[error("vm {vm} belongs to libvirt, which is not connected")]
    NoLibvirt {
        /// Whose.
        vm: VmId,
    },
    /// libvirt did not do it.
    #[error("failed to set the cpu weight of vm {vm}: {source}")]
    Libvirt {
        /// Whose.
        vm: VmId,
        /// libvirt's answer.
        source: HypervisorError,
    },
    /// Enforcement ended.
    #[error("not enforcing: {why}")]
    Barred {
        /// Since when and what to do.
        why: String,
    },
    /// The plan is older than one already carried out.
    #[error("plan {plan_seq} is older than plan {last}, which was carried out")]
    StalePlan {
        /// The plan refused.
        plan_seq: u64,
        /// The newest plan seen.
        last: u64,
    },
    /// The knob has a value of formtune's own, but not the one decided on.
    #[error("cpu weight of vm {vm} is {found}, decided on {from}: the decision is out of date")]
    StaleDecision {
        /// Whose.
        vm: VmId,
        /// What is there.
        found: Weight,
        /// What the decision was based on.
        from: Weight,
    },
    /// Too many writes in a row of which it is not known whether they will still happen.
    #[error(
        "the last {UNSETTLED_MAX} writes of the cpu weight of vm {vm} failed with unknown outcome"
    )]
    Unsettled {
        /// Whose.
        vm: VmId,
    },
    /// A setpoint that is not for this VM, or not to be written.
    #[error("setpoint for vm {vm} is not to be written: {why}")]
    NotForUs {
        /// The setpoint's VM.
        vm: VmId,
        /// Which rule it breaks.
        why: &'static str,
    },
}

impl ActError {
    /// Of a write: whether it is certain that it did not happen and will not.
    fn wrote_nothing(&self) -> bool {
        use HypervisorError::{Disconnected, NoDomain};
        matches!(
            self,
            Self::NoLibvirt { .. }
                | Self::StaleDecision { .. }
                | Self::Libvirt { source: Disconnected { .. } | NoDomain { .. }, .. }
        )
    }
}

/// Values of one knob that may still be set by writes that were given up.
const UNSETTLED_MAX: usize = 8;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

fn boot_id() -> Result<String, ActError> {
    let text = std::fs::read_to_string(BOOT_ID).map_err(|source| ActError::BootId { source })?;
    Ok(text.trim().to_owned())
}

/// The writer. One per node: it holds the lock of the state folder.
#[derive(Debug)]
pub struct Act {
    _lock: Lock,
    journal: Result<Journal, String>,
    hypervisor: Option<Hypervisor>,
    /// Knobs that are changed, or may be.
    entries: BTreeMap<Key, Entry>,
    /// Knobs that somebody else changed, by the cgroup in which that was.
    yielded: BTreeMap<Key, u64>,
    /// A line of the journal was lost: see [`Entry::verdict`].
    damaged: bool,
    last_plan: u64,
}

impl Act {
    /// Takes the lock of `state_dir` (made if absent), restores what a dead agent left
    /// changed, and begins a new journal. With a damaged journal it restores what can be
    /// read, keeps the file and does not enforce: see [`Act::enforce_barred`].
    ///
    /// # Errors
    /// [`ActError::Locked`] if another agent runs; [`ActError::StateFolder`] if the folder
    /// cannot be used, after restoring if the journal could be read.
    pub fn open(
        state_dir: &Path,
        hypervisor: Option<Hypervisor>,
    ) -> Result<(Self, RecoveryReport), ActError> {
        let failed = |source| ActError::StateFolder { path: state_dir.into(), source };
        journal::make_folder(state_dir).map_err(failed)?;
        let lock = match Lock::take(state_dir) {
            Ok(lock) => lock,
            Err(NotLocked::Held(pid)) => {
                return Err(ActError::Locked { path: Lock::path(state_dir), pid });
            }
            Err(NotLocked::Failed(error)) => return Err(failed(error)),
        };
        let recovered = restore::recover(state_dir, &boot_id()?, &mut || hypervisor.clone())?;
        let report = recovered.report;
        for knob in &report.restored.knobs {
            match knob.result {
                RestoreResult::Failed { .. } => tracing::error!("{knob}"),
                _ => tracing::info!("{knob}"),
            }
        }
        let journal = recovered.journal.map_err(failed)?;
        let act = Self {
            _lock: lock,
            journal: report.damaged.clone().map_or(Ok(journal), Err),
            hypervisor,
            entries: recovered.left,
            yielded: BTreeMap::new(),
            damaged: report.damaged.is_some(),
            last_plan: 0,
        };
        Ok((act, report))
    }

    /// Whether setpoints are carried out at all.
    pub fn enforce_allowed(&self) -> bool {
        self.journal.is_ok()
    }

    /// Why setpoints are refused: one line, with what to do. `None` while they are not.
    pub fn enforce_barred(&self) -> Option<&str> {
        self.journal.as_ref().err().map(String::as_str)
    }

    /// The knob as it stands, on the v2 scale: one read of one file, whoever owns the VM.
    ///
    /// # Errors
    /// [`ActError::Gone`], [`ActError::Read`], [`ActError::Idle`].
    pub fn read_weight(&self, vm: &Vm) -> Result<Weight, ActError> {
        Ok(weight_of(vm.cgroup_version, Place::of(vm).read()?))
    }

    /// The knob as formtune found it; `None` where formtune has not changed it.
    pub fn original(&self, vm: &VmId) -> Option<Weight> {
        let entry = self.entries.get(&(vm.clone(), Knob::CpuWeight))?;
        Some(weight_of(entry.place.cgroup_version, entry.original))
    }

    /// Carries out one setpoint of plan `plan_seq`, or says why not.
    pub fn execute(&mut self, vm: &Vm, setpoint: &Setpoint, plan_seq: u64) -> Outcome {
        let result = self.try_execute(vm, setpoint, plan_seq).unwrap_or_else(|error| {
            if matches!(error, ActError::Gone { .. }) {
                self.forget(&vm.id);
            }
            OutcomeResult::Refused { why: error.to_string() }
        });
        Outcome {
            plan_seq,
            vm: setpoint.vm.clone(),
            knob: setpoint.knob,
            asked: setpoint.to,
            result,
        }
    }

    fn try_execute(
        &mut self,
        vm: &Vm,
        setpoint: &Setpoint,
        plan_seq: u64,
    ) -> Result<OutcomeResult, ActError> {
        if setpoint.mode != Mode::Enforce || setpoint.vm != vm.id {
            let why = if setpoint.vm == vm.id { "its mode is not enforce" } else { "another vm's" };
            return Err(ActError::NotForUs { vm: setpoint.vm.clone(), why });
        }
        if plan_seq < self.last_plan {
            return Err(ActError::StalePlan { plan_seq, last: self.last_plan });
        }
        self.last_plan = plan_seq;
        if let Err(why) = &self.journal {
            return Err(ActError::Barred { why: why.clone() });
        }
        let key = (vm.id.clone(), setpoint.knob);
        let place = Place::of(vm);
        let scale = |raw| weight_of(place.cgroup_version, raw);
        let found = place.read()?;
        if self.yielded.get(&key).is_some_and(|cgroup| *cgroup == place.cgroup_id) {
            return Ok(OutcomeResult::Yielded { found: scale(found) });
        }
        // The VM was restarted under the same name: the old knob is gone.
        if self.entries.get(&key).is_some_and(|entry| entry.place.cgroup_id != place.cgroup_id) {
            self.close(&key, Closed::Gone)?;
        }
        let known = self.entries.get(&key);
        let ours = known.map_or(scale(found) == setpoint.from, |entry| entry.is_ours(found));
        if !ours {
            return self.give_up(&key, &place, found);
        }
        if scale(found) != setpoint.from {
            let (vm, from) = (vm.id.clone(), setpoint.from);
            return Err(ActError::StaleDecision { vm, found: scale(found), from });
        }
        let original = known.map_or(found, |entry| entry.original);
        // Back to the original means its raw value, which the scale may not have.
        let to = if setpoint.to == scale(original) {
            original
        } else {
            raw_of(place.cgroup_version, setpoint.to)
        };
        if found == to {
            return Ok(OutcomeResult::Unchanged);
        }
        let domain = match &vm.owner {
            Owner::Libvirt { domain } => Some(domain.clone()),
            Owner::Cgroup => None,
        };
        let mut before = known.map_or_else(Vec::new, |entry| entry.before.clone());
        before.extend(known.map(|entry| entry.to).into_iter().chain([found]));
        before.sort_unstable();
        before.dedup();
        if before.len() > UNSETTLED_MAX {
            return Err(ActError::Unsettled { vm: vm.id.clone() });
        }
        let (knob, uuid) = (setpoint.knob, vm.uuid.clone());
        let entry = Entry { place, knob, domain, uuid, original, before, to, plan_seq };
        let known = self.entries.insert(key.clone(), entry.clone());
        // The journal may hold the line even if its fsync failed: it then tells of a write that
        // did not happen, as after a crash just before it.
        let (nothing, result) = match self.record([Record::Intent { entry: entry.clone() }]) {
            Ok(()) => {
                let result = self.write(&key, &entry, found);
                (result.as_ref().is_err_and(ActError::wrote_nothing), result)
            }
            Err(error) => (true, Err(error)),
        };
        if nothing {
            match known {
                Some(known) => self.entries.insert(key, known),
                None => self.entries.remove(&key),
            };
        }
        result
    }

    /// Compares, writes and reads back; the intent is durable. `expected` was read before.
    fn write(
        &mut self,
        key: &Key,
        entry: &Entry,
        expected: u64,
    ) -> Result<OutcomeResult, ActError> {
        let Entry { place, to, .. } = entry;
        // Making the intent durable took its time: somebody may have been faster.
        let found = place.read()?;
        if found != expected {
            if entry.is_ours(found) {
                let scale = |raw| weight_of(place.cgroup_version, raw);
                let (found, from) = (scale(found), scale(expected));
                return Err(ActError::StaleDecision { vm: place.vm.clone(), found, from });
            }
            return self.give_up(key, place, found);
        }
        let value = match entry.owner() {
            Owner::Cgroup => {
                place.write(*to)?;
                place.read()?
            }
            Owner::Libvirt { domain } => {
                let written = libvirt::write(self.hypervisor.as_ref(), &domain, place, *to);
                if let Err(ActError::Gone { .. }) = &written {
                    self.undo_restarted(entry, &domain);
                }
                written?
            }
        };
        if let Some(entry) = self.entries.get_mut(key) {
            entry.settle(value);
        }
        let weight = weight_of(place.cgroup_version, value);
        if value == *to {
            return Ok(OutcomeResult::Applied { value: weight });
        }
        let (vm, knob) = key.clone();
        self.record([Record::Observed { vm, knob, cgroup_id: place.cgroup_id, value }])?;
        Ok(OutcomeResult::Clamped { value: weight })
    }

    /// libvirt knows domains by name: one that was restarted between the check and the
    /// write has got the old one's weight. Its own was most likely the same original.
    fn undo_restarted(&self, entry: &Entry, domain: &str) {
        let Some(hypervisor) = &self.hypervisor else { return };
        if hypervisor.cpu_shares(domain).is_ok_and(|shares| shares == entry.to) {
            let undone = hypervisor.set_cpu_shares(domain, entry.original);
            tracing::warn!(vm = %entry.place.vm, ?undone, "vm restarted during a write; undone");
        }
    }

    /// Somebody else changed the knob: it is theirs until the VM or the agent restarts.
    fn give_up(&mut self, key: &Key, place: &Place, found: u64) -> Result<OutcomeResult, ActError> {
        self.yielded.insert(key.clone(), place.cgroup_id);
        self.close(key, Closed::Yielded)?;
        Ok(OutcomeResult::Yielded { found: weight_of(place.cgroup_version, found) })
    }

    /// Ends an entry, in memory and in the journal.
    fn close(&mut self, key: &Key, why: Closed) -> Result<(), ActError> {
        match self.entries.remove(key) {
            Some(entry) => self.record([Record::closed(&entry, why)]),
            None => Ok(()),
        }
    }

    /// Appends durably. A failure is final: the journal is closed and nothing is enforced
    /// any more, as what is on disk is not known.
    fn record(&mut self, records: impl IntoIterator<Item = Record>) -> Result<(), ActError> {
        let journal = match &mut self.journal {
            Ok(journal) => journal,
            Err(why) => return Err(ActError::Barred { why: why.clone() }),
        };
        let mut written = journal.append(records);
        if written.is_ok() && journal.is_long() {
            written = journal.compact(self.entries.values());
        }
        written.map_err(|error| self.bar(&error))
    }

    /// Closes the journal for good.
    fn bar(&mut self, error: &io::Error) -> ActError {
        let why = format!(
            "failed to write the journal: {error}; originals are brought back; restart formtune to enforce again"
        );
        tracing::error!("enforcement ends: {why}");
        self.journal = Err(why.clone());
        ActError::Barred { why }
    }

    /// Rewrites the journal so that it holds open entries only. Done without being asked
    /// when it has become long.
    ///
    /// # Errors
    /// [`ActError::Barred`]: it failed, and enforcement has ended.
    pub fn compact(&mut self) -> Result<(), ActError> {
        let compacted = match &mut self.journal {
            Ok(journal) => journal.compact(self.entries.values()),
            Err(why) => return Err(ActError::Barred { why: why.clone() }),
        };
        compacted.map_err(|error| self.bar(&error))
    }

    /// The VM is gone: its entries are closed, and its knobs may be changed again if it
    /// comes back. Where its cgroup is still there (the VM is only out of sight), the
    /// original is brought back first.
    pub fn forget(&mut self, vm: &VmId) {
        self.yielded.retain(|key, _| key.0 != *vm);
        // A journal that fails bars enforcement and says so there; a line that stays open
        // names a cgroup that is gone or a knob at its original: nothing follows from it.
        for knob in self.restore_where(|key| key.0 == *vm).knobs {
            match knob.result {
                RestoreResult::Gone => {}
                RestoreResult::Failed { .. } => tracing::error!("{knob}"),
                _ => tracing::warn!("{knob}: the vm is out of sight, its cgroup is not"),
            }
        }
    }

    /// Brings every original back, whether or not the journal can still be written.
    pub fn restore_all(&mut self) -> RestoreReport {
        self.restore_where(|_| true)
    }

    fn restore_where(&mut self, wanted: impl Fn(&Key) -> bool) -> RestoreReport {
        let (keys, entries): (Vec<Key>, Vec<&Entry>) = self
            .entries
            .iter()
            .filter(|(key, _)| wanted(key))
            .map(|(key, entry)| (key.clone(), entry))
            .unzip();
        let (damaged, hypervisor) = (self.damaged, self.hypervisor.as_ref());
        let knobs = late::restore_entries(&entries, Writer::Ourselves, damaged, hypervisor);
        let mut closed = Vec::new();
        for (key, restored) in keys.iter().zip(&knobs) {
            if let Some(record) = restore::closing(&self.entries[key], &restored.result) {
                self.entries.remove(key);
                closed.push(record);
            }
        }
        let mut report = RestoreReport { knobs, journal: None };
        if !closed.is_empty() {
            report.journal = self.record(closed).err().map(|error| error.to_string());
        }
        report
    }
}
