//! The run-queue probe.

use super::mapped::Mapped;
use super::{CgroupTable, Kernel, ProbeError, Unsampled, attach, load, take};
use crate::sense::runq::SlotRows;
use crate::vm::CgroupVersion;
use aya::maps::{Array, Map, MapData};
use aya::{Ebpf, include_bytes_aligned};
use formtune_common::runq::{Control, Row};
use formtune_common::table::TableEntry;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// The object that build.rs made of `formtune-ebpf/src/bin/runq.rs`.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/formtune-runq"));

/// The program, and the tracepoint it is attached to.
pub const SCHED_SWITCH: &str = "sched_switch";

/// Constants of `formtune-ebpf/src/runq.rs` that are offsets: name, structure, member.
const OFFSETS: &[(&str, &str, &str)] = &[
    ("TASK_PID", "task_struct", "pid"),
    ("TASK_LAST_QUEUED", "task_struct", "sched_info.last_queued"),
    ("TASK_CFS_RQ", "task_struct", "se.cfs_rq"),
    ("TASK_CGROUPS", "task_struct", "cgroups"),
    ("CFS_RQ_RQ", "cfs_rq", "rq"),
    ("RQ_CLOCK", "rq", "clock"),
    ("CSS_SET_DFL_CGRP", "css_set", "dfl_cgrp"),
    ("CSS_CGROUP", "cgroup_subsys_state", "cgroup"),
    ("CGROUP_KN", "cgroup", "kn"),
    ("KN_ID", "kernfs_node", "id"),
];

/// How large the maps are made.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// VMs measured at once.
    pub slots: u32,
    /// Rows per slot: the greatest possible CPU number and one.
    pub cpus: u32,
    /// Places of `TABLE`, a power of two.
    pub table: u32,
    /// cgroups that fit into `SPILL`.
    pub spill: u32,
}

impl Sizes {
    /// Kernel memory of `ROWS`, `SEEN` and `TABLE`, bytes. `SPILL` takes some with every entry only.
    pub fn bytes(&self) -> u64 {
        let row = (size_of::<Row>() + size_of::<u64>()) as u64;
        let rows = u64::from(self.slots) * u64::from(self.cpus) * row;
        rows + u64::from(self.table) * size_of::<TableEntry>() as u64
    }
}

/// The run-queue probe, attached; detached when dropped.
pub struct RunqProbe {
    /// Which cgroup is whose.
    pub cgroups: CgroupTable,
    control: Array<MapData, Control>,
    unsampled: Unsampled,
    rows: MapData,
    seen: Mapped<u64>,
    slots: u32,
    cpus: u32,
    #[cfg(debug_assertions)]
    log: Option<aya_log::EbpfLogger<super::Log>>,
    /// Holds program and link.
    ebpf: Ebpf,
}

impl RunqProbe {
    /// Looks up the offsets, loads, attaches.
    ///
    /// # Errors
    /// [`ProbeError`], one line.
    pub fn load(
        kernel: &Kernel,
        version: CgroupVersion,
        sizes: Sizes,
        control: Control,
    ) -> Result<Self, ProbeError> {
        let mut constants = kernel.offsets(OFFSETS)?;
        // Without the controller its enumerator is not there, nor ever used.
        let cpu_css = match (version, kernel.offsets.cgroup_subsys_id("cpu_cgrp_id")) {
            (CgroupVersion::V1, id) => {
                kernel.offsets.offset("css_set", "subsys")? + id? * size_of::<u64>() as u32
            }
            (CgroupVersion::V2, _) => 0,
        };
        constants.extend([
            ("CSS_SET_CPU_CSS", cpu_css),
            ("CPU_ON_V1", u32::from(version == CgroupVersion::V1)),
            ("TABLE_MASK", sizes.table - 1),
            ("ROWS_PER_SLOT", sizes.cpus),
            ("SLOTS", sizes.slots),
        ]);
        let lengths = [
            ("ROWS", sizes.slots * sizes.cpus),
            ("SEEN", sizes.slots * sizes.cpus),
            ("RUNNING", sizes.cpus),
            ("TABLE", sizes.table),
            ("SPILL", sizes.spill),
        ];
        let mut ebpf = load(OBJECT, &constants, &lengths)?;
        #[cfg(debug_assertions)]
        let log = aya_log::EbpfLogger::init_with_logger(&mut ebpf, super::Log).ok();
        let Map::Array(rows) = take(&mut ebpf, "ROWS")? else {
            return Err(ProbeError::Object("ROWS"));
        };
        let seen = Mapped::of(&mut ebpf, "SEEN", sizes.slots * sizes.cpus)?;
        let cgroups = CgroupTable::of(&mut ebpf)?;
        let unsampled = Unsampled::of(&mut ebpf)?;
        let map = take(&mut ebpf, "CONTROL")?.try_into().map_err(aya::EbpfError::from)?;
        let mut probe = Self {
            cgroups,
            control: map,
            unsampled,
            rows,
            seen,
            slots: sizes.slots,
            cpus: sizes.cpus,
            #[cfg(debug_assertions)]
            log,
            ebpf,
        };
        probe.control(control)?;
        attach(&mut probe.ebpf, kernel, SCHED_SWITCH, SCHED_SWITCH)?;
        Ok(probe)
    }

    /// Changes what may be changed while it runs.
    ///
    /// # Errors
    /// If the map cannot be written, which a map of this kind always can.
    pub fn control(&mut self, control: Control) -> Result<(), ProbeError> {
        Ok(self.control.set(0, control, 0).map_err(aya::EbpfError::from)?)
    }

    /// Switches that it did not look at, since it was loaded.
    pub fn unsampled(&self) -> u64 {
        self.unsampled.count()
    }

    /// Its programs, to be asked what they cost.
    pub fn programs(&self) -> Vec<OwnedFd> {
        super::programs(&self.ebpf)
    }

    /// Switches to tasks of the VM in a slot, on one CPU; the row tells of no more than these.
    pub fn seen(&self, slot: u32, cpu: usize) -> u64 {
        self.seen.get(cpu as u32 * self.slots + slot)
    }

    /// Maps the rows of a slot.
    ///
    /// # Errors
    /// Those of `mmap`.
    pub fn map_slot(&self, slot: u32) -> io::Result<SlotRows> {
        SlotRows::map(self.rows.fd().as_fd(), slot, self.cpus as usize)
    }

    /// Passes on what the probes logged (debug builds only).
    pub fn flush_log(&mut self) {
        #[cfg(debug_assertions)]
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }
}
