//! The families of TCP retransmissions.

use super::{Families, Labels};
use crate::export::snapshot::{Node, VmState};
use crate::export::tcp::TcpWay;
use std::fmt;

impl Families<'_> {
    pub(super) fn tcp(&mut self, node: &Node, vms: &[&VmState]) -> fmt::Result {
        self.tcp_vms(vms)?;
        let tcp = &node.tcp;
        let up = [("host", &tcp.host_method), ("guest", &tcp.guest_method)];
        self.gauge(
            "formtune_tcp_probe_info",
            "How TCP retransmissions are seen; absent where they are not",
            up.iter().filter_map(|(scope, method)| {
                let method = method.as_deref()?;
                Some(([("scope", *scope), ("method", method)], Some(1.0)))
            }),
        )?;
        self.counter(
            "formtune_host_tcp_retransmits_total",
            "Segments that the host's TCP sent again over sockets of no VM",
            [([], tcp.host_method.as_ref().map(|_| tcp.no_vm.retransmitted as f64))],
        )?;
        let taps = tcp.guest_method.as_ref().map(|_| f64::from(tcp.taps));
        self.one("formtune_tcp_taps", "Tap devices of VMs that are looked at", taps)?;
        self.one(
            "formtune_tcp_unmeasured_taps",
            "Tap devices of VMs that are not looked at",
            Some(f64::from(tcp.unmeasured_taps)),
        )?;
        let followed = f64::exp2(-f64::from(tcp.sampling_shift));
        self.one(
            "formtune_tcp_flow_sampling_ratio",
            "Share of the guests' TCP flows that are followed; each counts as its reciprocal",
            tcp.guest_method.as_ref().map(|_| followed),
        )?;
        self.one(
            "formtune_tcp_unmeasured_vms",
            "VMs whose sockets are not told apart, as all slots are taken",
            Some(f64::from(tcp.unmeasured_vms)),
        )?;
        self.one(
            "formtune_tcp_unmeasured_cgroups",
            "cgroups of VMs for which the probe of sockets has no room",
            Some(f64::from(tcp.unmeasured_cgroups)),
        )
    }

    fn tcp_vms(&mut self, vms: &[&VmState]) -> fmt::Result {
        let host = vms.iter().filter_map(|vm| {
            let sent_again = vm.tcp.as_ref()?.host?.retransmitted;
            Some((labels(vm, "host", "sent"), Some(sent_again as f64)))
        });
        self.counter(
            "formtune_vm_tcp_retransmits_total",
            "Segments sent again: by the host's TCP for the VM's processes, by the guest's own",
            host.chain(guest(vms, |way| way.retransmitted)),
        )?;
        for (name, help, value) in FAMILIES {
            self.counter(name, help, guest(vms, value))?;
        }
        Ok(())
    }
}

type Value = fn(&TcpWay) -> u64;

/// Families of the guests' own TCP.
const FAMILIES: [(&str, &str, Value); 5] = [
    ("formtune_vm_tcp_segments_total", "TCP segments of the guest with data, SYN or FIN", |way| {
        way.segments
    }),
    ("formtune_vm_tcp_payload_bytes_total", "Payload of the guest's TCP segments", |way| way.bytes),
    (
        "formtune_vm_tcp_reordered_total",
        "TCP segments of the guest that came late and were not sent again",
        |way| way.reordered,
    ),
    (
        "formtune_vm_tcp_unread_total",
        "TCP packets of the guest that could not be read: fragments, false or too many headers",
        |way| way.unread,
    ),
    (
        "formtune_vm_tcp_untracked_total",
        "TCP segments of the guest whose flow could not be followed, as there was no room",
        |way| way.untracked,
    ),
];

fn guest<'v>(
    vms: &'v [&'v VmState],
    value: Value,
) -> impl Iterator<Item = (Labels<'v, 3>, Option<f64>)> {
    vms.iter().flat_map(move |vm| {
        let guest = vm.tcp.as_ref().and_then(|tcp| tcp.guest.as_ref());
        guest.into_iter().flat_map(move |guest| {
            [("sent", &guest.sent), ("received", &guest.received)]
                .map(|(direction, way)| (labels(vm, "guest", direction), Some(value(way) as f64)))
        })
    })
}

fn labels<'v>(vm: &'v VmState, scope: &'static str, direction: &'static str) -> Labels<'v, 3> {
    [("vm", vm.id.as_str()), ("scope", scope), ("direction", direction)]
}
