//! Who occupies a device: the time that requests of each VM spent in it, over the last
//! seconds. Divided by those seconds it is how many of them were in it on average.

use formtune_core::units::Nanos;
use std::collections::BTreeMap;

/// Time looked back on.
pub const SPAN: Nanos = Nanos::from_secs(10);
/// Times are added up to slots of this length.
const SLOTS: usize = 10;
const SLOT_NS: u64 = SPAN.0 / SLOTS as u64;

/// The last [`SPAN`] of every device and everybody who used it.
#[derive(Debug, Default)]
pub struct Occupancy {
    /// By device, then by whose requests they were.
    by: BTreeMap<(u32, u32), Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    /// By slot number modulo the length: slot number and nanoseconds.
    slots: [(u64, u64); SLOTS],
}

impl Ring {
    fn sum(&self, now: u64) -> u64 {
        let recent = |&&(slot, _): &&(u64, u64)| now - slot < SLOTS as u64;
        self.slots.iter().filter(recent).map(|&(_, ns)| ns).sum()
    }
}

impl Occupancy {
    /// Adds what came since the last reading.
    pub fn add(&mut self, device: u32, who: u32, ns: u64, now: Nanos) {
        if ns == 0 {
            return;
        }
        let now = now.0 / SLOT_NS;
        let ring = self.by.entry((device, who)).or_default();
        let slot = &mut ring.slots[(now % SLOTS as u64) as usize];
        if slot.0 != now {
            *slot = (now, 0);
        }
        slot.1 += ns;
    }

    /// Everybody who used a device, and for how long, nanoseconds, most first; by device.
    pub fn all(&self, now: Nanos) -> BTreeMap<u32, Vec<(u32, u64)>> {
        let now = now.0 / SLOT_NS;
        let mut devices: BTreeMap<u32, Vec<(u32, u64)>> = BTreeMap::new();
        for (&(device, who), ring) in &self.by {
            let ns = ring.sum(now);
            if ns > 0 {
                devices.entry(device).or_default().push((who, ns));
            }
        }
        for all in devices.values_mut() {
            all.sort_by_key(|&(who, ns)| (std::cmp::Reverse(ns), who));
        }
        devices
    }

    /// Forgets who used nothing lately.
    pub fn prune(&mut self, now: Nanos) {
        let now = now.0 / SLOT_NS;
        self.by.retain(|_, ring| ring.sum(now) > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_first_and_forgotten_after_a_while() {
        let mut occupancy = Occupancy::default();
        let at = Nanos::from_secs;
        occupancy.add(7, 1, 100, at(1_000));
        occupancy.add(7, 2, 300, at(1_001));
        occupancy.add(7, 1, 50, at(1_005));
        occupancy.add(8, 1, 9, at(1_005));
        assert_eq!(occupancy.all(at(1_005))[&7], [(2, 300), (1, 150)]);
        assert_eq!(occupancy.all(at(1_010))[&7], [(2, 300), (1, 50)]);
        occupancy.add(7, 1, 1, at(1_010));
        assert_eq!(occupancy.all(at(1_011))[&7], [(1, 51)]);
        assert_eq!(occupancy.all(at(1_011)).keys().collect::<Vec<_>>(), [&7, &8]);
        occupancy.prune(at(1_016));
        assert_eq!(occupancy.by.len(), 1);
        assert_eq!(occupancy.all(at(1_016)), BTreeMap::from([(7, vec![(1, 1)])]));
    }
}
