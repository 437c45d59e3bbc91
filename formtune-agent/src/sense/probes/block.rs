//! The block I/O probe.

use super::{CgroupTable, Kernel, ProbeError, load, take};
use crate::sense::btf::BtfError;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, Queue};
use aya::programs::BtfTracePoint;
use aya::{Ebpf, include_bytes_aligned};
use formtune_common::block::{Control, Counters, Key, Row, Start};
use formtune_common::table::TableEntry;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The object that build.rs made of `formtune-ebpf/src/bin/block.rs`.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/formtune-block"));

/// The program, and the tracepoint it is attached to.
pub const BLOCK_RQ_COMPLETE: &str = "block_rq_complete";
/// Where requests are given back to be tried again. The program is one for kernels whose
/// tracepoint has the request as first argument, or one for those where it is the second.
const REQUEUE: (&str, &str, &str) = ("block_rq_requeue", "block_rq_requeue_of", "block_rq_requeue");
/// The programs that note times, likewise, and their tracepoints.
const NOTE: [(&str, &str, &str); 2] = [
    ("block_rq_insert", "block_rq_insert_of", "block_rq_insert"),
    ("block_rq_issue", "block_rq_issue_of", "block_rq_issue"),
];

/// Constants of `formtune-ebpf/src/bin/block.rs` that are offsets: name, structure, member.
const OFFSETS: &[(&str, &str, &str)] = &[
    ("RQ_QUEUE", "request", "q"),
    ("RQ_CMD_FLAGS", "request", "cmd_flags"),
    ("RQ_FLAGS", "request", "rq_flags"),
    ("RQ_DATA_LEN", "request", "__data_len"),
    ("RQ_BIO", "request", "bio"),
    ("RQ_START_TIME", "request", "start_time_ns"),
    ("RQ_IO_START_TIME", "request", "io_start_time_ns"),
    ("QUEUE_FLAGS", "request_queue", "queue_flags"),
    ("DISK_MAJOR", "gendisk", "major"),
    ("DISK_FIRST_MINOR", "gendisk", "first_minor"),
    ("BIO_NEXT", "bio", "bi_next"),
    ("BIO_IO_VEC", "bio", "bi_io_vec"),
    ("BIO_BLKG", "bio", "bi_blkg"),
    ("BLKG_BLKCG", "blkcg_gq", "blkcg"),
    ("BLKCG_CGROUP", "blkcg", "css.cgroup"),
    ("CGROUP_KN", "cgroup", "kn"),
    ("KN_ID", "kernfs_node", "id"),
];

/// `RQF_FLUSH_SEQ` before it was an enumerator (Linux 6.11): `1 << 4`, include/linux/blkdev.h.
const FLUSH_SEQ_BIT: u32 = 4;
/// `QUEUE_FLAG_STATS` before it was an enumerator (Linux 6.11), include/linux/blkdev.h.
const QUEUE_STATS_BIT: u32 = 20;

/// How large the maps are made.
#[derive(Clone, Copy, Debug)]
pub struct BlockSizes {
    /// Rows: what is counted apart.
    pub rows: u32,
    /// Places of `TABLE`, a power of two.
    pub table: u32,
    /// cgroups that fit into `SPILL`.
    pub spill: u32,
}

impl BlockSizes {
    /// Kernel memory of `ROWS` and `TABLE`, bytes. The others take some hundredths of that.
    pub fn bytes(&self) -> u64 {
        u64::from(self.rows) * size_of::<Row>() as u64
            + u64::from(self.table) * size_of::<TableEntry>() as u64
    }
}

/// The block I/O probe, attached; detached when dropped.
pub struct BlockProbe {
    /// Which cgroup is whose.
    pub cgroups: CgroupTable,
    rows: MapData,
    row_of: HashMap<MapData, Key, u32>,
    free: Queue<MapData, u32>,
    control: Array<MapData, Control>,
    counters: PerCpuArray<MapData, Counters>,
    starts: HashMap<MapData, u64, Start>,
    /// Whether the programs that note times are attached.
    notes: bool,
    /// Which of both kinds of them this kernel takes; `None` if neither could be loaded.
    second_argument: Option<bool>,
    ebpf: Ebpf,
}

impl BlockProbe {
    /// Looks up the offsets, loads, attaches; all rows are free.
    ///
    /// # Errors
    /// [`ProbeError`], one line.
    pub fn load(kernel: &Kernel, sizes: BlockSizes) -> Result<Self, ProbeError> {
        let mut constants = kernel.offsets(OFFSETS)?;
        let types = &kernel.offsets;
        let disk_of_queue = types.offset("request_queue", "disk");
        let disk_of_request = types.offset("request", "rq_disk");
        if let (Err(error), Err(_)) = (&disk_of_queue, &disk_of_request) {
            return Err(BtfError::Missing(error.to_string()).into());
        }
        // Before they were enumerators (Linux 6.11) a time that is not noted is 0.
        let io_stat = types.enumerator("__RQF_IO_STAT").map_or(0, |bit| 1 << bit);
        let stats = types.enumerator("__RQF_STATS").map_or(0, |bit| 1 << bit);
        constants.extend([
            ("QUEUED_FLAG", io_stat),
            ("ISSUED_FLAG", stats),
            ("TABLE_MASK", sizes.table - 1),
            ("DISK_OF_QUEUE", u32::from(disk_of_queue.is_ok())),
            ("QUEUE_DISK", disk_of_queue.unwrap_or(0)),
            ("RQ_DISK", disk_of_request.unwrap_or(0)),
            ("OP_ZONE_APPEND", types.enumerator("REQ_OP_ZONE_APPEND").unwrap_or(u32::MAX)),
            ("FLUSH_SEQ_BIT", types.enumerator("__RQF_FLUSH_SEQ").unwrap_or(FLUSH_SEQ_BIT)),
            ("QUEUE_STATS_BIT", types.enumerator("QUEUE_FLAG_STATS").unwrap_or(QUEUE_STATS_BIT)),
        ]);
        let lengths = [
            ("ROWS", sizes.rows),
            ("ROW_OF", sizes.rows),
            ("FREE", sizes.rows),
            ("TABLE", sizes.table),
            ("SPILL", sizes.spill),
        ];
        let mut ebpf = load(OBJECT, &constants, &lengths)?;
        let Map::Array(rows) = take(&mut ebpf, "ROWS")? else {
            return Err(ProbeError::Object("ROWS"));
        };
        let cgroups = CgroupTable::of(&mut ebpf)?;
        let row_of = take(&mut ebpf, "ROW_OF")?.try_into().map_err(aya::EbpfError::from)?;
        let free = take(&mut ebpf, "FREE")?.try_into().map_err(aya::EbpfError::from)?;
        let control = take(&mut ebpf, "CONTROL")?.try_into().map_err(aya::EbpfError::from)?;
        let starts = take(&mut ebpf, "STARTS")?.try_into().map_err(aya::EbpfError::from)?;
        let counters = take(&mut ebpf, "COUNTERS")?.try_into().map_err(aya::EbpfError::from)?;
        let mut probe = Self {
            cgroups,
            rows,
            row_of,
            free,
            control,
            counters,
            starts,
            notes: false,
            second_argument: None,
            ebpf,
        };
        for number in 0..sizes.rows {
            probe.give_back(number).map_err(aya::EbpfError::from)?;
        }
        let second = kernel.offsets.tracepoint_arguments(REQUEUE.2)? > 1;
        let requeue = if second { REQUEUE.1 } else { REQUEUE.0 };
        super::attach(&mut probe.ebpf, kernel, BLOCK_RQ_COMPLETE, BLOCK_RQ_COMPLETE)?;
        super::attach(&mut probe.ebpf, kernel, requeue, REQUEUE.2)?;
        // Loaded now, while the kernel's types are at hand; attached when a device needs them.
        probe.second_argument = probe.load_notes(kernel, second);
        Ok(probe)
    }

    /// Loads the programs that note times; returns which kind if that works.
    fn load_notes(&mut self, kernel: &Kernel, second: bool) -> Option<bool> {
        for (first_argument, second_argument, tracepoint) in NOTE {
            let name = if second { second_argument } else { first_argument };
            let program: &mut BtfTracePoint = self.ebpf.program_mut(name)?.try_into().ok()?;
            if let Err(error) = super::verified(|| program.load(tracepoint, &kernel.types)) {
                tracing::warn!("{name} is not loaded: {}", super::program_error(&error));
                return None;
            }
        }
        Some(second)
    }

    /// Whether times are noted in a map where requests carry none.
    pub fn notes(&self) -> bool {
        self.notes
    }

    /// Requests under way whose times are noted in the map. Asks the kernel for one after
    /// the other.
    pub fn noted(&self) -> usize {
        self.starts.keys().count()
    }

    /// From now on, notes the times that requests do not carry. Does nothing where that is
    /// so already, or cannot be.
    ///
    /// # Errors
    /// If the programs cannot be attached; it is not tried again then.
    pub fn note(&mut self) -> Result<(), ProbeError> {
        let Some(second) = self.second_argument.take() else { return Ok(()) };
        for (first_argument, second_argument, _) in NOTE {
            let name = if second { second_argument } else { first_argument };
            let program: &mut BtfTracePoint =
                self.ebpf.program_mut(name).ok_or(ProbeError::Object("program"))?.try_into()?;
            program.attach()?;
        }
        self.notes = true;
        Ok(())
    }

    /// Changes what may be changed while it runs.
    ///
    /// # Errors
    /// If the map cannot be written, which a map of this kind always can.
    pub fn control(&mut self, control: Control) -> Result<(), ProbeError> {
        Ok(self.control.set(0, control, 0).map_err(aya::EbpfError::from)?)
    }

    /// What is not in the rows, since the probe was loaded.
    ///
    /// # Errors
    /// If the map cannot be read, which a map of this kind always can.
    pub fn counters(&self) -> Result<Counters, ProbeError> {
        let mut sum = Counters::default();
        for cpu in self.counters.get(&0, 0).map_err(aya::EbpfError::from)?.iter() {
            sum.add(cpu);
        }
        Ok(sum)
    }

    /// Requests not seen, as they were done while the same CPU looked at another; `None`
    /// where the kernel does not say (before 5.12).
    pub fn missed(&self) -> Option<u64> {
        let program: &BtfTracePoint = self.ebpf.program(BLOCK_RQ_COMPLETE)?.try_into().ok()?;
        let fd = program.fd().ok()?.as_fd().as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
        info.lines().find_map(|line| line.strip_prefix("recursion_misses:")?.trim().parse().ok())
    }

    /// Its programs, those that note times among them, to be asked what they cost.
    pub fn programs(&self) -> Vec<OwnedFd> {
        super::programs(&self.ebpf)
    }

    /// The map of rows, to be mapped.
    pub fn rows(&self) -> BorrowedFd<'_> {
        self.rows.fd().as_fd()
    }

    /// Has the probe forget whose a row is. Only where no request can lead to the key.
    ///
    /// # Errors
    /// If the map cannot be written.
    pub fn forget(&mut self, key: &Key) -> Result<(), MapError> {
        self.row_of.remove(key)
    }

    /// Lets the probe take a row; it must hold zeroes.
    ///
    /// # Errors
    /// If the map cannot be written.
    pub fn give_back(&mut self, number: u32) -> Result<(), MapError> {
        self.free.push(number, 0)
    }
}
