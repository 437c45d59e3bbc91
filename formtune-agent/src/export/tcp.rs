//! TCP retransmissions, as `/v1/*` shows them.

use crate::sense::ProbeState;
use crate::sense::tcp::{GuestCounts, HostCounts, TcpCounts, TcpHealth};
use formtune_common::tcp::Way;
use serde::{Deserialize, Serialize};

/// One VM's TCP since it was first seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmTcp {
    /// What the host's own TCP sent again for the VM's processes; `None` while not measured.
    pub host: Option<HostTcp>,
    /// The guest's own TCP; `None` while no tap device of the VM is known.
    pub guest: Option<GuestTcp>,
}

/// Sent again by the host's own TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostTcp {
    /// Segments, SYN-ACKs among them.
    pub retransmitted: u64,
    /// Of these, SYN-ACKs.
    pub syn_acks: u64,
}

/// A guest's own TCP, seen on its tap devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestTcp {
    /// What the guest sent.
    pub sent: TcpWay,
    /// What it was sent.
    pub received: TcpWay,
    /// The devices looked at now.
    pub taps: Vec<String>,
}

/// One direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpWay {
    /// Segments with data, SYN or FIN.
    pub segments: u64,
    /// Their payload, bytes.
    pub bytes: u64,
    /// Of `segments`, those sent again.
    pub retransmitted: u64,
    /// Of `segments`, those that came late.
    pub reordered: u64,
    /// Packets that claim to be TCP and could not be read.
    pub unread: u64,
    /// Of `segments`, those of flows for which there was no room.
    pub untracked: u64,
}

impl TcpWay {
    /// Share of the segments that were sent again; `None` without any.
    pub fn ratio(&self) -> Option<f64> {
        (self.segments > 0).then(|| self.retransmitted as f64 / self.segments as f64)
    }
}

/// What is measured of TCP on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeTcp {
    /// How the host's sockets are watched, e.g. `tp_btf`; `None`: they are not.
    pub host_method: Option<String>,
    /// How tap devices are watched, `tcx` or `clsact`; `None`: they are not.
    pub guest_method: Option<String>,
    /// Why one of them is not, or the last device that could not be watched.
    pub why: Vec<String>,
    /// Sent again by sockets of no VM.
    pub no_vm: HostTcp,
    /// VMs whose sockets are not told apart, as all slots are taken.
    pub unmeasured_vms: u32,
    /// cgroups of VMs for which the probe has no room.
    pub unmeasured_cgroups: u32,
    /// Tap devices looked at.
    pub taps: u32,
    /// Tap devices of VMs that are not.
    pub unmeasured_taps: u32,
    /// One in 2^this of the guests' flows is followed, and what it sends again counts 2^this
    /// times.
    #[serde(default)]
    pub sampling_shift: u32,
    /// Segments of the guests' flows that were left out for that reason; `None` while tap devices
    /// are not watched.
    #[serde(default)]
    pub unsampled: Option<u64>,
}

impl From<TcpCounts> for VmTcp {
    fn from(counts: TcpCounts) -> Self {
        Self { host: counts.host.map(Into::into), guest: counts.guest.map(Into::into) }
    }
}

impl From<HostCounts> for HostTcp {
    fn from(counts: HostCounts) -> Self {
        Self { retransmitted: counts.retransmitted, syn_acks: counts.syn_acks }
    }
}

impl From<GuestCounts> for GuestTcp {
    fn from(counts: GuestCounts) -> Self {
        Self { sent: counts.sent.into(), received: counts.received.into(), taps: counts.taps }
    }
}

impl From<Way> for TcpWay {
    fn from(way: Way) -> Self {
        Self {
            segments: way.segments,
            bytes: way.bytes,
            retransmitted: way.retransmitted,
            reordered: way.reordered,
            unread: way.unread,
            untracked: way.untracked,
        }
    }
}

impl From<TcpHealth> for NodeTcp {
    fn from(TcpHealth { host, guest }: TcpHealth) -> Self {
        let loaded = |state: &ProbeState, method: &str| {
            (*state == ProbeState::Loaded).then(|| method.to_owned())
        };
        let why = [&host.state, &guest.state].into_iter().filter_map(|state| match state {
            ProbeState::Loaded => None,
            ProbeState::Unavailable { program, why, .. } => {
                Some(format!("program {program} is not loaded: {why}"))
            }
        });
        Self {
            host_method: loaded(&host.state, "tp_btf"),
            guest_method: loaded(&guest.state, guest.method.name()),
            why: why.chain(guest.why).collect(),
            no_vm: host.no_vm.into(),
            unmeasured_vms: host.not_measured,
            unmeasured_cgroups: host.cgroups_not_measured,
            taps: guest.taps,
            unmeasured_taps: guest.taps_not_measured,
            sampling_shift: guest.sampling_shift,
            unsampled: (guest.state == ProbeState::Loaded).then_some(guest.unsampled),
        }
    }
}
