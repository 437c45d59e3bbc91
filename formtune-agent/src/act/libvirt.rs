//! Writes that libvirt must make, because it owns the VM.

use super::ActError;
use super::weight::Place;
use crate::hypervisor::Hypervisor;
use std::time::{Duration, Instant};

/// systemd answers before the cgroup has the value: it writes when its queue comes round.
const SETTLE_LIMIT: Duration = Duration::from_millis(500);
const SETTLE_STEP: Duration = Duration::from_millis(2);

/// Has libvirt set the raw value, and returns what the cgroup then holds.
///
/// libvirt passes the number on as it is: `cpu.shares` on v1, `cpu.weight` on v2.
///
/// # Errors
/// [`ActError::NoLibvirt`], [`ActError::Libvirt`], and those of reading.
pub(super) fn write(
    hypervisor: Option<&Hypervisor>,
    domain: &str,
    place: &Place,
    raw: u64,
) -> Result<u64, ActError> {
    let hypervisor = hypervisor.ok_or_else(|| ActError::NoLibvirt { vm: place.vm.clone() })?;
    hypervisor
        .set_cpu_shares(domain, raw)
        .map_err(|source| ActError::Libvirt { vm: place.vm.clone(), source })?;
    let begin = Instant::now();
    loop {
        let found = place.read()?;
        if found == raw || begin.elapsed() >= SETTLE_LIMIT {
            return Ok(found);
        }
        std::thread::sleep(SETTLE_STEP);
    }
}
