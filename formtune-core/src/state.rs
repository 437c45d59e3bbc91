//! Everything that is remembered from one sample to the next.

use crate::decide::budget::Budget;
use crate::decide::knob::KnobState;
use crate::decide::relax::Backoff;
use crate::decide::verdict::History;
use crate::decide::verify::Trial;
use crate::estimate::counter::{Growth, Rate};
use crate::estimate::holders::Holders;
use crate::estimate::window::Window;
use crate::sample::{Sample, VmSample};
use crate::units::{Nanos, VmId};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// What [`step`](crate::step) remembers. Starts empty; nothing of it outlives the agent.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// `at` of the first sample.
    pub(crate) first_at: Option<Nanos>,
    /// `at` of the last sample.
    pub(crate) last_at: Option<Nanos>,
    /// CPU time in use on the node, in CPUs.
    pub(crate) busy: Rate,
    /// Since when the probe has been blind.
    pub(crate) blind_since: Option<Nanos>,
    /// What the probes may cost.
    pub(crate) budget: Budget,
    /// Ascending by id, the same VMs as in the last sample.
    pub(crate) vms: Vec<VmState>,
}

/// What is remembered of one VM.
#[derive(Clone, Debug)]
pub(crate) struct VmState {
    pub id: VmId,
    pub window: Window,
    pub usage: Rate,
    pub throttled: Growth,
    pub holders: Holders,
    pub history: History,
    /// The last known values of the indicator, newest last, as many as are averaged over
    /// before an action is taken.
    pub recent: [Nanos; 3],
    /// When the indicator was last known.
    pub known_at: Nanos,
    /// Since when it has not been measured.
    pub blind_since: Option<Nanos>,
    pub knob: KnobState,
    /// A change for its sake that is being judged.
    pub trial: Option<Box<Trial>>,
    /// Whose knob is not touched for its sake, and until when: that did not help before.
    pub barred: Vec<(VmId, Nanos)>,
    /// For whose sake its weight is low.
    pub lowered_for: Vec<VmId>,
    pub backoff: Backoff,
}

impl VmState {
    /// How much longer the knob of `other` is not touched for this VM's sake.
    pub fn barred(&self, other: &VmId, now: Nanos) -> Option<Nanos> {
        let (_, until) = self.barred.iter().find(|(id, until)| id == other && *until > now)?;
        Some(until.since(now))
    }

    fn new(id: VmId, at: Nanos) -> Self {
        Self {
            id,
            window: Window::default(),
            usage: Rate::default(),
            throttled: Growth::default(),
            holders: Holders::default(),
            history: History::default(),
            recent: [Nanos(0); 3],
            known_at: at,
            blind_since: None,
            knob: KnobState::default(),
            trial: None,
            barred: Vec::new(),
            lowered_for: Vec::new(),
            backoff: Backoff::default(),
        }
    }
}

impl State {
    /// Makes `vms` hold exactly those of the sample. Nearly always they are the same as
    /// last time, which one walk over both finds out.
    pub(crate) fn join(&mut self, sample: &Sample) {
        let same = self.vms.len() == sample.vms.len()
            && self.vms.iter().zip(sample.vms.keys()).all(|(vm, id)| vm.id == *id);
        if !same {
            self.vms = rejoin(core::mem::take(&mut self.vms), &sample.vms, sample.at);
        }
    }

    /// Index of a VM.
    pub(crate) fn find(&self, id: &VmId) -> Option<usize> {
        self.vms.binary_search_by(|vm| vm.id.cmp(id)).ok()
    }
}

fn rejoin(known: Vec<VmState>, present: &BTreeMap<VmId, VmSample>, at: Nanos) -> Vec<VmState> {
    let mut known = known.into_iter().peekable();
    present
        .keys()
        .map(|id| {
            while known.next_if(|vm| vm.id < *id).is_some() {}
            known.next_if(|vm| vm.id == *id).unwrap_or_else(|| VmState::new(id.clone(), at))
        })
        .collect()
}
