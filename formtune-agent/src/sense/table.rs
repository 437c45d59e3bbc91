//! Which cgroup leads to which slot: the user side of the probe's maps `TABLE` and `SPILL`.
//!
//! `TABLE` has one place per value of a cgroup id's low bits. The first cgroup to come gets
//! the place, the others go to the hash map `SPILL`, and the place is marked so that the
//! probe looks there too.

use formtune_common::table::TableEntry;
use std::collections::HashMap;

/// The maps behind a [`Table`].
pub trait TableMaps {
    /// Why a write failed, one line.
    type Error;
    /// Writes a place of `TABLE`.
    fn set(&mut self, index: u32, entry: TableEntry) -> Result<(), Self::Error>;
    /// Adds to `SPILL`.
    fn spill(&mut self, cgroup_id: u64, slot: u32) -> Result<(), Self::Error>;
    /// Removes from `SPILL`.
    fn unspill(&mut self, cgroup_id: u64) -> Result<(), Self::Error>;
}

/// Mirror of both maps.
pub struct Table {
    mask: u64,
    /// By place: the cgroup in `TABLE` first, then those in `SPILL`. Never empty.
    places: HashMap<u32, Vec<(u64, u32)>>,
    len: u32,
    spilled: u32,
}

impl Table {
    /// For a `TABLE` of `length` places, a power of two.
    pub fn new(length: u32) -> Self {
        assert!(length.is_power_of_two());
        Self { mask: u64::from(length) - 1, places: HashMap::new(), len: 0, spilled: 0 }
    }

    /// cgroups in both maps.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// cgroups in `SPILL`.
    pub fn spilled(&self) -> u32 {
        self.spilled
    }

    /// Has the probe count `cgroup_id` for `slot`, and for no other from now on: if another had
    /// it, that one's cgroup is gone, which is not yet known, and its id was given again.
    ///
    /// # Errors
    /// If a map cannot be written (full); nothing is changed then.
    pub fn insert<M: TableMaps>(
        &mut self,
        maps: &mut M,
        cgroup_id: u64,
        slot: u32,
    ) -> Result<(), M::Error> {
        let index = (cgroup_id & self.mask) as u32;
        debug_assert!(cgroup_id != 0, "no cgroup has the id 0");
        if let Some(place) = self.places.get_mut(&index)
            && let Some(at) = place.iter().position(|c| c.0 == cgroup_id)
        {
            let spilled = u32::from(place.len() > 1);
            match at {
                _ if place[at].1 == slot => {}
                0 => maps.set(index, TableEntry { cgroup_id, slot, spilled })?,
                _ => maps.spill(cgroup_id, slot)?,
            }
            place[at].1 = slot;
            return Ok(());
        }
        match self.places.get(&index).and_then(|place| place.first()).copied() {
            None => maps.set(index, TableEntry { cgroup_id, slot, spilled: 0 })?,
            Some((first, first_slot)) => {
                maps.spill(cgroup_id, slot)?;
                let marked = TableEntry { cgroup_id: first, slot: first_slot, spilled: 1 };
                if let Err(error) = maps.set(index, marked) {
                    let _ = maps.unspill(cgroup_id);
                    return Err(error);
                }
                self.spilled += 1;
            }
        }
        self.places.entry(index).or_default().push((cgroup_id, slot));
        self.len += 1;
        Ok(())
    }

    /// Has the probe forget `cgroup_id`, unless it is another's than `slot`'s by now.
    ///
    /// # Errors
    /// If a map cannot be written; the mirror forgets it all the same.
    pub fn remove<M: TableMaps>(
        &mut self,
        maps: &mut M,
        cgroup_id: u64,
        slot: u32,
    ) -> Result<(), M::Error> {
        let index = (cgroup_id & self.mask) as u32;
        let Some(place) = self.places.get_mut(&index) else { return Ok(()) };
        let Some(at) = place.iter().position(|c| *c == (cgroup_id, slot)) else {
            return Ok(());
        };
        place.remove(at);
        self.len -= 1;
        let heir = place.first().copied();
        let spilled = u32::from(place.len() > 1);
        if place.is_empty() {
            self.places.remove(&index);
        }
        let Some((heir, slot)) = heir else {
            return maps.set(index, TableEntry::default());
        };
        self.spilled -= 1;
        let set = maps.set(index, TableEntry { cgroup_id: heir, slot, spilled });
        // At 0 the heir has just moved from `SPILL` to the place.
        maps.unspill(if at == 0 { heir } else { cgroup_id }).and(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const LENGTH: u32 = 8;

    #[derive(Default)]
    struct Maps {
        table: BTreeMap<u32, TableEntry>,
        spill: BTreeMap<u64, u32>,
        room: usize,
    }

    impl TableMaps for Maps {
        type Error = ();
        fn set(&mut self, index: u32, entry: TableEntry) -> Result<(), ()> {
            self.table.insert(index, entry);
            Ok(())
        }
        fn spill(&mut self, cgroup_id: u64, slot: u32) -> Result<(), ()> {
            if self.spill.len() >= self.room && !self.spill.contains_key(&cgroup_id) {
                return Err(());
            }
            self.spill.insert(cgroup_id, slot);
            Ok(())
        }
        fn unspill(&mut self, cgroup_id: u64) -> Result<(), ()> {
            self.spill.remove(&cgroup_id).map(drop).ok_or(())
        }
    }

    impl Maps {
        /// What the probe does.
        fn slot(&self, cgroup_id: u64) -> Option<u32> {
            let entry = self.table.get(&(cgroup_id as u32 % LENGTH)).copied().unwrap_or_default();
            if entry.cgroup_id == cgroup_id {
                Some(entry.slot)
            } else if entry.spilled == 0 {
                None
            } else {
                self.spill.get(&cgroup_id).copied()
            }
        }
    }

    proptest! {
        /// An id that comes again without having been removed is its new owner's, whenever the
        /// old one lets go of it.
        #[test]
        fn the_probe_finds_what_was_inserted_last_and_nothing_else(
            steps in proptest::collection::vec((1u64..40, 0u32..3, any::<bool>()), 0..120),
            room in 0usize..20,
        ) {
            let mut maps = Maps { room, ..Maps::default() };
            let mut table = Table::new(LENGTH);
            let mut expected: BTreeMap<u64, u32> = BTreeMap::new();
            for (id, slot, insert) in steps {
                if !insert {
                    prop_assert_eq!(table.remove(&mut maps, id, slot), Ok(()));
                    if expected.get(&id) == Some(&slot) {
                        expected.remove(&id);
                    }
                } else if table.insert(&mut maps, id, slot).is_ok() {
                    expected.insert(id, slot);
                }
                for id in 1..40 {
                    prop_assert_eq!(maps.slot(id), expected.get(&id).copied());
                }
                prop_assert_eq!(table.len() as usize, expected.len());
                prop_assert_eq!(table.spilled() as usize, maps.spill.len());
            }
            for (id, slot) in expected {
                prop_assert_eq!(table.remove(&mut maps, id, slot), Ok(()));
            }
            prop_assert!(maps.spill.is_empty() && table.places.is_empty());
            prop_assert!(maps.table.values().all(|entry| *entry == TableEntry::default()));
        }
    }
}
