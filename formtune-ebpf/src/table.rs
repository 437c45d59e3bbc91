//! Which VM a cgroup belongs to.

use aya_ebpf::maps::{Array, HashMap};
use formtune_common::table::TableEntry;

/// Slot of the VM that the cgroup belongs to. `mask`: length of `table` less one.
#[inline(always)]
pub fn slot(
    table: &Array<TableEntry>,
    mask: u32,
    spill: &HashMap<u64, u32>,
    id: u64,
) -> Option<u32> {
    let entry = table.get(id as u32 & mask)?;
    if entry.cgroup_id == id {
        Some(entry.slot)
    } else if entry.spilled == 0 {
        None
    } else {
        // SAFETY: entries are written by user space only and copied out at once.
        unsafe { spill.get(&id) }.copied()
    }
}
