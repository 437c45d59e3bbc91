//! What `explain` says of block I/O.

use super::super::OneLine;
use super::super::style::{self, grouped, latency};
use crate::export::block::{BlockDevice, BlockNode, BlockState, Who};
use crate::export::snapshot::VmState;
use std::fmt::Write;

/// Occupants named per device.
const NAMED: usize = 3;

/// How long its requests take, and who else is in its devices.
pub(super) fn block(vm: &VmState, node: Option<&BlockNode>) -> String {
    let Some(state) = &vm.block else {
        return match node.and_then(|node| node.unsupported.as_ref()) {
            Some(why) => format!("not measured: {}", OneLine(why)),
            None => "not measured: it is charged to no cgroup of the VM's".into(),
        };
    };
    let mut text = times(state);
    for device in state.devices.iter().filter(|device| !device.occupants.is_empty()) {
        let _ = write!(text, "; {}", occupants(vm, device));
    }
    text
}

fn times(state: &BlockState) -> String {
    let recent = &state.recent;
    let span = style::age(recent.span);
    if recent.samples == 0 {
        return format!("none in the last {span}");
    }
    format!(
        "p50 {}, p99 {}, longest {}; {} requests in the last {span}",
        latency(recent.p50),
        latency(recent.p99),
        latency(recent.max),
        grouped(recent.samples),
    )
}

/// `in sda: this one 12 %, hog-1 80 %, the host 8 %`.
fn occupants(vm: &VmState, device: &BlockDevice) -> String {
    let named = device.occupants.iter().take(NAMED).map(|occupant| {
        let who = match &occupant.who {
            Who::Vm(id) if *id == vm.id => "this one".to_owned(),
            Who::Vm(id) => OneLine(id).to_string(),
            Who::Host => "the host".to_owned(),
            Who::Gone => "a VM that is gone".to_owned(),
        };
        format!("{who} {:.0} %", occupant.share * 100.0)
    });
    format!("in {}: {}", OneLine(&device.device), named.collect::<Vec<_>>().join(", "))
}
