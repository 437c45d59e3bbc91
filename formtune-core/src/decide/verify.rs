//! Verify, then keep: a change that did not help its victim is taken back.

use crate::policy::CpuLoop;
use crate::units::{Nanos, VmId, Weight};
use alloc::vec::Vec;

/// A trial without enough known windows is given up after this many times its regular
/// length: the victim went quiet, so there is nothing to judge.
const PATIENCE: u64 = 3;

/// Changes made in one step for one victim, being judged.
#[derive(Clone, Debug)]
pub struct Trial {
    started: Nanos,
    before: Nanos,
    /// Knobs changed and the values they had.
    pub changes: Vec<(VmId, Weight)>,
    next: Nanos,
    taken: Vec<Nanos>,
}

/// How a trial stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Not enough windows yet.
    Waiting,
    /// Kept.
    Helped {
        /// The indicator before the change.
        before: Nanos,
        /// And after.
        after: Nanos,
    },
    /// To be taken back.
    Failed {
        /// The indicator before the change.
        before: Nanos,
        /// And after.
        after: Nanos,
    },
    /// Cannot be judged; kept, as nothing says that it is wrong.
    Unknown,
}

impl Trial {
    /// Starts when the changes are asked for. `before` is the victim's indicator until then.
    /// The first window that counts begins a tick later, when the writes have been made.
    pub fn new(
        now: Nanos,
        tick: Nanos,
        window: Nanos,
        before: Nanos,
        changes: Vec<(VmId, Weight)>,
    ) -> Self {
        Self {
            started: now,
            before,
            changes,
            next: Nanos(now.0 + tick.0 + window.0),
            taken: Vec::new(),
        }
    }

    /// When the changes were asked for.
    pub fn started(&self) -> Nanos {
        self.started
    }

    /// Time left, if all windows are known.
    pub fn left(&self, now: Nanos, tick: Nanos, window: Nanos, cpu: &CpuLoop) -> Nanos {
        regular(tick, window, cpu).since(now.since(self.started))
    }

    /// Takes a window's value, if one is due: windows that count do not overlap. `good` is
    /// the greatest value that needs no action, and with which any change is kept.
    pub fn progress(
        &mut self,
        now: Nanos,
        tick: Nanos,
        window: Nanos,
        measured: Option<Nanos>,
        good: Nanos,
        cpu: &CpuLoop,
    ) -> Progress {
        let regular = regular(tick, window, cpu);
        // Half a tick of jitter must not cost a whole tick.
        if now.0 + tick.0 / 2 >= self.next.0
            && let Some(measured) = measured
        {
            self.taken.push(measured);
            self.next = Nanos(now.0 + window.0);
        }
        if self.taken.len() < usize::from(cpu.verify_windows.max(1)) {
            let patience = Nanos(PATIENCE * regular.0);
            let over = now.since(self.started) > patience;
            return if over { Progress::Unknown } else { Progress::Waiting };
        }
        self.taken.sort_unstable();
        let (before, after) = (self.before, self.taken[self.taken.len() / 2]);
        let enough = before.0 as f64 * (1.0 - cpu.verify_gain);
        if after <= good || after.0 as f64 <= enough {
            Progress::Helped { before, after }
        } else {
            Progress::Failed { before, after }
        }
    }
}

/// Length of a trial in which every window is known.
fn regular(tick: Nanos, window: Nanos, cpu: &CpuLoop) -> Nanos {
    Nanos(tick.0 + u64::from(cpu.verify_windows.max(1)) * window.0)
}
