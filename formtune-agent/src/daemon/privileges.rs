//! What the process may do, checked before anything is touched.

use crate::sense::missing_capabilities;
use anyhow::{Result, bail};
use formtune_core::policy::Mode;
use nix::unistd::geteuid;

/// `CAP_DAC_OVERRIDE` of capabilities(7).
const DAC_OVERRIDE: u64 = 1 << 1;

/// Names what is missing and what it is for.
pub(super) fn check(mode: Mode) -> Result<()> {
    let mut missing: Vec<String> = missing_capabilities()
        .into_iter()
        .map(|name| format!("{name} (to load the run-queue probe)"))
        .collect();
    // Weights belong to root; root needs no capability to write its own files.
    if mode == Mode::Enforce && !geteuid().is_root() && effective() & DAC_OVERRIDE == 0 {
        missing.push("CAP_DAC_OVERRIDE (to write cpu.weight, which belongs to root)".to_owned());
    }
    if !missing.is_empty() {
        bail!(
            "missing {}: run as root, or grant them with AmbientCapabilities= or setcap",
            missing.join(" and ")
        );
    }
    Ok(())
}

/// Effective capabilities, one bit each.
fn effective() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or("0");
    u64::from_str_radix(hex.trim(), 16).unwrap_or(0)
}
