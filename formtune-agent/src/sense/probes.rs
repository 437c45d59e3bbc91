//! Loads the probes and owns their maps. The only file that names aya.

use super::btf::{self, Btf, BtfError};
use super::runq::SlotRows;
use super::table::TableMaps;
use crate::vm::CgroupVersion;
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use aya::programs::BtfTracePoint;
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use formtune_common::runq::{Row, TableEntry};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// The object that build.rs made of `formtune-ebpf`.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/formtune-ebpf"));

/// The one program, and the tracepoint it is attached to.
pub const SCHED_SWITCH: &str = "sched_switch";

/// Constants of `formtune-ebpf/src/runq.rs` that are offsets: name, structure, member.
const OFFSETS: &[(&str, &str, &str)] = &[
    ("TASK_LAST_QUEUED", "task_struct", "sched_info.last_queued"),
    ("TASK_CFS_RQ", "task_struct", "se.cfs_rq"),
    ("TASK_CGROUPS", "task_struct", "cgroups"),
    ("CFS_RQ_RQ", "cfs_rq", "rq"),
    ("RQ_CLOCK", "rq", "clock"),
    ("RQ_CPU", "rq", "cpu"),
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
    /// Kernel memory of `ROWS` and `TABLE`, bytes. `SPILL` takes some with every entry only.
    pub fn bytes(&self) -> u64 {
        let rows = u64::from(self.slots) * u64::from(self.cpus) * size_of::<Row>() as u64;
        rows + u64::from(self.table) * size_of::<TableEntry>() as u64
    }
}

/// Why a probe could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Offsets.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// Map creation or the object.
    #[error("{}", one_line(.0))]
    Load(Box<aya::EbpfError>),
    /// The verifier, or the tracepoint is not there.
    #[error("{}", program_error(.0))]
    Program(Box<aya::programs::ProgramError>),
    /// aya lists neither; cannot happen with the object built from this tree.
    #[error("the probes' object has no {0}")]
    Object(&'static str),
}

impl From<aya::EbpfError> for ProbeError {
    fn from(error: aya::EbpfError) -> Self {
        Self::Load(Box::new(error))
    }
}

impl From<aya::programs::ProgramError> for ProbeError {
    fn from(error: aya::programs::ProgramError) -> Self {
        Self::Program(Box::new(error))
    }
}

/// The run-queue probe, attached; detached when dropped.
pub struct Probes {
    table: Array<MapData, TableEntry>,
    spill: HashMap<MapData, u64, u32>,
    rows: MapData,
    cpus: u32,
    #[cfg(debug_assertions)]
    log: Option<aya_log::EbpfLogger<Log>>,
    /// Holds program and link.
    _ebpf: Ebpf,
}

impl Probes {
    /// Looks up the offsets, loads, attaches.
    ///
    /// # Errors
    /// [`ProbeError`], one line.
    pub fn load(version: CgroupVersion, sizes: Sizes) -> Result<Self, ProbeError> {
        let kernel = Btf::read(Path::new(btf::VMLINUX))?;
        let mut constants = Vec::with_capacity(OFFSETS.len() + 4);
        for &(name, structure, member) in OFFSETS {
            constants.push((name, kernel.offset(structure, member)?));
        }
        // Without the controller its enumerator is not there, nor ever used.
        let cpu_css = match (version, kernel.cgroup_subsys_id("cpu_cgrp_id")) {
            (CgroupVersion::V1, id) => {
                kernel.offset("css_set", "subsys")? + id? * size_of::<u64>() as u32
            }
            (CgroupVersion::V2, _) => 0,
        };
        drop(kernel);
        constants.extend([
            ("CSS_SET_CPU_CSS", cpu_css),
            ("CPU_ON_V1", u32::from(version == CgroupVersion::V1)),
            ("TABLE_MASK", sizes.table - 1),
            ("ROWS_PER_SLOT", sizes.cpus),
        ]);

        let mut loader = EbpfLoader::new();
        // aya would parse the kernel's BTF for CO-RE relocations, of which there are none.
        loader.btf(None);
        for (name, value) in &constants {
            loader.override_global(name, value, true);
        }
        loader
            .map_max_entries("ROWS", sizes.slots * sizes.cpus)
            .map_max_entries("TABLE", sizes.table)
            .map_max_entries("SPILL", sizes.spill);
        let mut ebpf = loader.load(OBJECT)?;
        #[cfg(debug_assertions)]
        let log = aya_log::EbpfLogger::init_with_logger(&mut ebpf, Log).ok();

        let program: &mut BtfTracePoint =
            ebpf.program_mut(SCHED_SWITCH).ok_or(ProbeError::Object(SCHED_SWITCH))?.try_into()?;
        program.load(SCHED_SWITCH, &aya::Btf::from_sys_fs().map_err(aya::EbpfError::from)?)?;
        release_memory();

        let Some(Map::Array(rows)) = ebpf.take_map("ROWS") else {
            return Err(ProbeError::Object("ROWS"));
        };
        let table = ebpf.take_map("TABLE").ok_or(ProbeError::Object("TABLE"))?;
        let table = table.try_into().map_err(aya::EbpfError::from)?;
        let spill = ebpf.take_map("SPILL").ok_or(ProbeError::Object("SPILL"))?;
        let spill = spill.try_into().map_err(aya::EbpfError::from)?;
        let program: &mut BtfTracePoint =
            ebpf.program_mut(SCHED_SWITCH).ok_or(ProbeError::Object(SCHED_SWITCH))?.try_into()?;
        program.attach()?;
        Ok(Self {
            table,
            spill,
            rows,
            cpus: sizes.cpus,
            #[cfg(debug_assertions)]
            log,
            _ebpf: ebpf,
        })
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

/// The empty program of the same tracepoint, attached: what any probe there costs.
pub struct Floor(#[expect(dead_code, reason = "holds program and link")] Ebpf);

impl Floor {
    /// Loads and attaches it.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn load() -> Result<Self, ProbeError> {
        let mut ebpf = EbpfLoader::new().btf(None).load(OBJECT)?;
        let program: &mut BtfTracePoint =
            ebpf.program_mut("floor").ok_or(ProbeError::Object("floor"))?.try_into()?;
        program.load(SCHED_SWITCH, &aya::Btf::from_sys_fs().map_err(aya::EbpfError::from)?)?;
        program.attach()?;
        Ok(Self(ebpf))
    }
}

impl TableMaps for Probes {
    type Error = String;

    fn set(&mut self, index: u32, entry: TableEntry) -> Result<(), String> {
        let mut write =
            |entry| self.table.set(index, entry, 0).map_err(|error| map_error("TABLE", &error));
        // The kernel copies an entry in no particular order while the probe reads: a new
        // cgroup is made visible only once its slot is there.
        if entry.cgroup_id != 0 {
            write(TableEntry { cgroup_id: 0, ..entry })?;
        }
        write(entry)
    }

    fn spill(&mut self, cgroup_id: u64, slot: u32) -> Result<(), String> {
        self.spill.insert(cgroup_id, slot, 0).map_err(|error| map_error("SPILL", &error))
    }

    fn unspill(&mut self, cgroup_id: u64) -> Result<(), String> {
        self.spill.remove(&cgroup_id).map_err(|error| map_error("SPILL", &error))
    }
}

fn map_error(map: &str, error: &MapError) -> String {
    format!("failed to write map {map}: {}", one_line(error))
}

/// An error and its causes, on one line.
fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text.lines().next().unwrap_or_default().trim_end_matches(':').to_owned()
}

/// The verifier's reason is the last line before its statistics.
fn program_error(error: &aya::programs::ProgramError) -> String {
    if let aya::programs::ProgramError::LoadError { io_error, verifier_log } = error {
        let log = verifier_log.to_string();
        let reason = log.lines().rev().find(|line| {
            !line.trim().is_empty()
                && !["processed ", "verification time", "stack depth", "max_states"]
                    .iter()
                    .any(|statistic| line.starts_with(statistic))
        });
        return match reason {
            Some(reason) => format!("the kernel refused it: {io_error}: {}", reason.trim()),
            None => format!("the kernel refused it: {io_error}"),
        };
    }
    one_line(error)
}

/// Parsing the kernel's BTF leaves tens of megabytes to the allocator, which would keep
/// them for good.
fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no arguments that could be wrong; glibc locks its arenas.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

/// What the probes log becomes an event of the agent's own log.
#[cfg(debug_assertions)]
struct Log;

#[cfg(debug_assertions)]
impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        tracing::debug!(target: "formtune_ebpf", "{}", record.args());
    }
    fn flush(&self) {}
}
