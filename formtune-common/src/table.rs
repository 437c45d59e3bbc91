//! Which VM a cgroup belongs to, as every probe looks it up.

/// Element of the direct-mapped table `TABLE`, at index `cgroup id & (length − 1)`.
/// cgroup ids are small and cyclic, so neighbours seldom collide; what does is in the hash
/// map `SPILL`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableEntry {
    /// The cgroup; 0 is no cgroup's id and means "empty".
    pub cgroup_id: u64,
    /// Its VM's slot.
    pub slot: u32,
    /// Not 0: other cgroups with the same index are in `SPILL`.
    pub spilled: u32,
}

// SAFETY: `repr(C)`, no padding (8 + 4 + 4), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for TableEntry {}
