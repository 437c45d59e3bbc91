//! The tap devices of one VM that are looked at, and what was counted on them. Counters are read
//! when somebody asks, so a device nobody asks about costs nothing.

use super::super::probes::TapRows;
use formtune_common::tcp::{RECEIVED, SENT, TapRow, Way};
use std::collections::BTreeMap;

/// A VM's counts since it was first seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestCounts {
    /// What the guest sent.
    pub sent: Way,
    /// What it was sent.
    pub received: Way,
    /// The devices looked at now.
    pub taps: Vec<String>,
}

/// A VM's devices.
#[derive(Debug, Default)]
pub struct Watched {
    /// By interface index.
    taps: BTreeMap<u32, Tap>,
    /// Counted on devices that are no longer among them.
    gone: TapRow,
}

#[derive(Debug)]
struct Tap {
    name: String,
    place: u32,
    /// What had been counted at its place before.
    before: TapRow,
}

impl Tap {
    fn add_to(&self, counted: &mut TapRow, rows: &TapRows) {
        let now = rows.at(self.place);
        let ways = now.ways.iter().zip(&self.before.ways);
        for (sum, (now, before)) in counted.ways.iter_mut().zip(ways) {
            sum.add(&now.since(before));
        }
    }
}

impl Watched {
    /// From now on a device is looked at, with this place of the probe's; `before` it, so much
    /// had been counted there.
    pub fn add(&mut self, index: u32, name: &str, place: u32, before: TapRow) {
        self.taps.insert(index, Tap { name: name.to_owned(), place, before });
    }

    /// A device is no longer looked at; its place may be another's after this.
    pub fn remove(&mut self, index: u32, rows: &TapRows) {
        if let Some(tap) = self.taps.remove(&index) {
            tap.add_to(&mut self.gone, rows);
        }
    }

    /// As of now.
    pub fn counts(&self, rows: &TapRows) -> GuestCounts {
        let mut counted = self.gone;
        for tap in self.taps.values() {
            tap.add_to(&mut counted, rows);
        }
        GuestCounts {
            sent: counted.ways[SENT],
            received: counted.ways[RECEIVED],
            taps: self.taps.values().map(|tap| tap.name.clone()).collect(),
        }
    }
}
