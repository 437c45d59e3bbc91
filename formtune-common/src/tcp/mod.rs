//! TCP retransmissions: the map rows of both probes, and what the one on a VM's tap device
//! knows of TCP. Pure, so that it can be tested outside the kernel.

pub mod flow;
pub mod frame;
#[cfg(test)]
mod tests;

/// What the host's own TCP sent again for one owner: the element of the map `ROWS` of the
/// probe `retransmit`, at [`host_row`]. Several CPUs add to it. Counters wrap around.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostRow {
    /// Segments sent again, SYN-ACKs not among them.
    pub segments: u64,
    /// SYN-ACKs sent again.
    pub syn_acks: u64,
}

/// Index of the row for sockets that are no VM's.
pub const NO_VM: u32 = 0;

/// Index of the row for a VM's slot.
pub const fn host_row(slot: u32) -> u32 {
    slot + 1
}

/// What one CPU counted on one tap device: the element of the map `ROWS` of the probe
/// `tap`, at index `place × cpus + cpu`. Only that CPU writes it, with bottom halves off, so
/// plain additions suffice. Counters wrap around.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapRow {
    /// [`SENT`] and [`RECEIVED`], as the guest sees it.
    pub ways: [Way; 2],
}

/// From the guest.
pub const SENT: usize = 0;
/// To the guest.
pub const RECEIVED: usize = 1;

/// One direction of one tap device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Segments that take up sequence numbers: with data, SYN or FIN.
    pub segments: u64,
    /// Their payload, bytes.
    pub bytes: u64,
    /// Of `segments`, those sent again.
    pub retransmitted: u64,
    /// Bytes of sequence space sent again.
    pub retransmitted_bytes: u64,
    /// Of `segments`, those that came late and had not been sent again.
    pub reordered: u64,
    /// Keep-alive probes of one byte: neither new nor sent again.
    pub keep_alives: u64,
    /// Packets that claim to be TCP and could not be read: fragments, truncated or false
    /// headers, too many headers.
    pub unread: u64,
    /// Of `segments`, those of flows for which there was no room.
    pub untracked: u64,
}

impl Way {
    /// Adds to each counter.
    pub fn add(&mut self, other: &Self) {
        self.each(other, u64::wrapping_add);
    }

    /// What was counted since `before`.
    #[must_use]
    pub fn since(mut self, before: &Self) -> Self {
        self.each(before, u64::wrapping_sub);
        self
    }

    fn each(&mut self, other: &Self, with: impl Fn(u64, u64) -> u64) {
        let Self { segments, bytes, retransmitted, retransmitted_bytes, reordered, .. } = self;
        let Self { keep_alives, unread, untracked, .. } = other;
        for (ours, theirs) in [
            (segments, other.segments),
            (bytes, other.bytes),
            (retransmitted, other.retransmitted),
            (retransmitted_bytes, other.retransmitted_bytes),
            (reordered, other.reordered),
            (&mut self.keep_alives, *keep_alives),
            (&mut self.unread, *unread),
            (&mut self.untracked, *untracked),
        ] {
            *ours = with(*ours, theirs);
        }
    }
}

/// What the agent may change while the tap probe runs: the only element of its map `CONTROL`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapControl {
    /// One in 2^this flows is followed, and what it sends again counts 2^this times.
    /// `segments` and `bytes` count every packet all the same.
    pub sampling_shift: u32,
    /// How often the shift was lowered. Of the flows that were left out and are followed again,
    /// what is known is from before, and gigabytes may have passed since: all begin anew.
    pub epoch: u32,
}

impl TapControl {
    /// Whether the flow with this key is among those that are followed.
    #[inline(always)]
    pub const fn follows(&self, key: u64) -> bool {
        // The low bits choose the set of flows.
        (key >> 32) & ((1 << (self.sampling_shift & 31)) - 1) == 0
    }

    /// The key under which the state of the flow with this key is kept, in the same set.
    #[inline(always)]
    pub const fn kept_as(&self, key: u64) -> u64 {
        key ^ (self.epoch as u64) << 32
    }

    /// The same, with one in 2^`shift` flows.
    #[must_use]
    pub const fn with_shift(self, shift: u32) -> Self {
        let lowered = shift < self.sampling_shift;
        Self { sampling_shift: shift, epoch: self.epoch.wrapping_add(lowered as u32) }
    }
}

/// Flows whose keys have the same low bits: the element of the map `FLOWS`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowSet {
    /// Each one cache line.
    pub flows: [flow::Flow; WAYS],
}

/// Flows per [`FlowSet`].
pub const WAYS: usize = 4;

// SAFETY: `repr(C)`, no padding (two u64), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for HostRow {}
// SAFETY: `repr(C)`, no padding (16 u64), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for TapRow {}
// SAFETY: `repr(C)`, no padding (two u32), any bits are valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for TapControl {}

const _: () = assert!(size_of::<flow::Flow>() == 64 && size_of::<FlowSet>() == 256);
