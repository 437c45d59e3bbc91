//! Loads the probes and owns their maps: one object and one file here per probe family. The
//! only room that names aya.

mod block;
mod clsact;
mod cost;
mod floor;
mod mapped;
mod retransmit;
mod runq;
mod tap;

pub use block::{BLOCK_RQ_COMPLETE, BlockProbe, BlockSizes};
pub use clsact::{Left, Owner};
pub use cost::{Cost, CostMeter};
pub use floor::Floor;
pub use retransmit::{RetransmitProbe, RetransmitSizes, TCP_RETRANSMIT_SKB};
pub use runq::{RunqProbe, SCHED_SWITCH, Sizes};
pub use tap::{FORMTUNE_TAP_TX, TapLinks, TapMethod, TapProbe, TapRows, TapSizes};

use super::btf::{self, Btf, BtfError};
use super::table::TableMaps;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use aya::programs::{BtfTracePoint, ProgramError};
use aya::{Ebpf, EbpfLoader};
use formtune_common::table::TableEntry;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// What the running kernel says of itself. Read once for all probes: it is some megabytes.
pub struct Kernel {
    offsets: Btf,
    types: aya::Btf,
}

impl Kernel {
    /// Reads the kernel's BTF.
    ///
    /// # Errors
    /// [`ProbeError::Btf`] if it has none or it is damaged.
    pub fn open() -> Result<Self, ProbeError> {
        let offsets = Btf::read(Path::new(btf::VMLINUX))?;
        Ok(Self { offsets, types: aya::Btf::from_sys_fs().map_err(aya::EbpfError::from)? })
    }

    /// Constants of a probe that are offsets: name, structure, member.
    fn offsets<'n>(&self, of: &[(&'n str, &str, &str)]) -> Result<Vec<(&'n str, u32)>, ProbeError> {
        of.iter().map(|(name, of, member)| Ok((*name, self.offsets.offset(of, member)?))).collect()
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // Parsing leaves tens of megabytes to the allocator, which would keep them for good.
        #[cfg(target_env = "gnu")]
        // SAFETY: no arguments that could be wrong; glibc locks its arenas.
        unsafe {
            nix::libc::malloc_trim(0);
        }
    }
}

/// Creates an object's maps with these lengths, its constants set.
fn load(
    object: &[u8],
    constants: &[(&str, u32)],
    lengths: &[(&str, u32)],
) -> Result<Ebpf, ProbeError> {
    let mut loader = EbpfLoader::new();
    // aya would parse the kernel's BTF for CO-RE relocations, of which there are none.
    loader.btf(None);
    for (name, value) in constants {
        loader.override_global(name, value, true);
    }
    for (name, length) in lengths {
        loader.map_max_entries(name, *length);
    }
    Ok(loader.load(object)?)
}

/// Loads a program and attaches it to its tracepoint.
fn attach(
    ebpf: &mut Ebpf,
    kernel: &Kernel,
    program: &'static str,
    tracepoint: &str,
) -> Result<(), ProbeError> {
    let program: &mut BtfTracePoint =
        ebpf.program_mut(program).ok_or(ProbeError::Object(program))?.try_into()?;
    verified(|| program.load(tracepoint, &kernel.types))?;
    program.attach()?;
    Ok(())
}

/// Most that a program is given to the verifier, as libbpf does (`PROG_LOAD_ATTEMPTS`).
const LOADS: usize = 5;

/// Loads a program; once more if the kernel broke off verifying it, as it does for a signal.
fn verified(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    for _ in 1..LOADS {
        match load() {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.kind() == std::io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
    load()
}

/// Descriptors of the programs of an object that are loaded, to be asked what they cost.
fn programs(ebpf: &Ebpf) -> Vec<OwnedFd> {
    let of =
        |program: &aya::programs::Program| program.fd().ok()?.as_fd().try_clone_to_owned().ok();
    ebpf.programs().filter_map(|(_, program)| of(program)).collect()
}

fn take(ebpf: &mut Ebpf, map: &'static str) -> Result<Map, ProbeError> {
    ebpf.take_map(map).ok_or(ProbeError::Object(map))
}

/// What a probe did not look at, as it samples: the map `UNSAMPLED` of an object.
struct Unsampled(PerCpuArray<MapData, u64>);

impl Unsampled {
    fn of(ebpf: &mut Ebpf) -> Result<Self, ProbeError> {
        Ok(Self(take(ebpf, "UNSAMPLED")?.try_into().map_err(aya::EbpfError::from)?))
    }

    /// On all CPUs, since the probe was loaded. Reading a map of this kind cannot fail.
    fn count(&self) -> u64 {
        self.0.get(&0, 0).map_or(0, |of_cpus| of_cpus.iter().sum())
    }
}

/// The maps `TABLE` and `SPILL` of an object.
pub struct CgroupTable {
    table: Array<MapData, TableEntry>,
    spill: HashMap<MapData, u64, u32>,
}

impl CgroupTable {
    fn of(ebpf: &mut Ebpf) -> Result<Self, ProbeError> {
        let table = take(ebpf, "TABLE")?.try_into().map_err(aya::EbpfError::from)?;
        let spill = take(ebpf, "SPILL")?.try_into().map_err(aya::EbpfError::from)?;
        Ok(Self { table, spill })
    }
}

impl TableMaps for CgroupTable {
    type Error = String;

    fn set(&mut self, index: u32, entry: TableEntry) -> Result<(), String> {
        let known = self.table.get(&index, 0);
        let mut write =
            |entry| self.table.set(index, entry, 0).map_err(|error| map_error("TABLE", &error));
        // The kernel copies an entry in no particular order while the probe reads: a new
        // cgroup is made visible only once its slot is there. Meanwhile the probe looks in
        // `SPILL`, where it may have been until now.
        let same = |now: TableEntry| (now.cgroup_id, now.slot) == (entry.cgroup_id, entry.slot);
        if entry.cgroup_id != 0 && !known.is_ok_and(same) {
            write(TableEntry { cgroup_id: 0, spilled: 1, ..entry })?;
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
    Program(Box<ProgramError>),
    /// aya lists neither; cannot happen with the object built from this tree.
    #[error("the probes' object has no {0}")]
    Object(&'static str),
    /// A map's rows.
    #[error("failed to map {0} into memory: {1}")]
    Mmap(&'static str, #[source] std::io::Error),
}

impl From<aya::EbpfError> for ProbeError {
    fn from(error: aya::EbpfError) -> Self {
        Self::Load(Box::new(error))
    }
}

impl From<ProgramError> for ProbeError {
    fn from(error: ProgramError) -> Self {
        Self::Program(Box::new(error))
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
fn program_error(error: &ProgramError) -> String {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
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
