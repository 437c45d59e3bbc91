//! The probe of what the host's own TCP sends again.

use super::mapped::Mapped;
use super::{CgroupTable, Kernel, ProbeError, attach, load};
use aya::{Ebpf, include_bytes_aligned};
use formtune_common::tcp::HostRow;
use std::os::fd::OwnedFd;

/// The object that build.rs made of `formtune-ebpf/src/bin/retransmit.rs`.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/formtune-retransmit"));

/// A program, and the tracepoint it is attached to.
pub const TCP_RETRANSMIT_SKB: &str = "tcp_retransmit_skb";
/// A program, and the tracepoint it is attached to.
const TCP_RETRANSMIT_SYNACK: &str = "tcp_retransmit_synack";

/// How large the maps are made.
#[derive(Clone, Copy, Debug)]
pub struct RetransmitSizes {
    /// VMs measured at once.
    pub slots: u32,
    /// Places of `TABLE`, a power of two.
    pub table: u32,
    /// cgroups that fit into `SPILL`.
    pub spill: u32,
}

/// The probe, attached; detached when dropped.
pub struct RetransmitProbe {
    /// Which cgroup of the v2 hierarchy is whose.
    pub cgroups: CgroupTable,
    rows: Mapped<HostRow>,
    /// Holds programs and links.
    ebpf: Ebpf,
}

impl RetransmitProbe {
    /// Looks up the offsets, loads, attaches.
    ///
    /// # Errors
    /// [`ProbeError`], one line.
    pub fn load(kernel: &Kernel, sizes: RetransmitSizes) -> Result<Self, ProbeError> {
        let offsets = &kernel.offsets;
        let cb = offsets.offset("sk_buff", "cb")?;
        let arguments = offsets.tracepoint_arguments(TCP_RETRANSMIT_SKB)?;
        let constants = [
            ("SOCK_CGROUP", offsets.offset("sock", "sk_cgrp_data")?),
            ("SKB_SEGMENTS", cb + offsets.offset("tcp_skb_cb", "tcp_gso_segs")?),
            ("CGROUP_KN", offsets.offset("cgroup", "kn")?),
            ("KN_ID", offsets.offset("kernfs_node", "id")?),
            ("HAS_ERROR", u32::from(arguments > 2)),
            ("TABLE_MASK", sizes.table - 1),
        ];
        let rows = formtune_common::tcp::host_row(sizes.slots);
        let lengths = [("ROWS", rows), ("TABLE", sizes.table), ("SPILL", sizes.spill)];
        let mut ebpf = load(OBJECT, &constants, &lengths)?;
        let rows = Mapped::of(&mut ebpf, "ROWS", rows)?;
        let cgroups = CgroupTable::of(&mut ebpf)?;
        for program in [TCP_RETRANSMIT_SKB, TCP_RETRANSMIT_SYNACK] {
            attach(&mut ebpf, kernel, program, program)?;
        }
        Ok(Self { cgroups, rows, ebpf })
    }

    /// Its programs, to be asked what they cost.
    pub fn programs(&self) -> Vec<OwnedFd> {
        super::programs(&self.ebpf)
    }

    /// A row, as it is now.
    pub fn row(&self, index: u32) -> HostRow {
        self.rows.get(index)
    }
}
