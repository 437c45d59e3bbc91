//! What becomes of the agent on a kernel that has no run-queue latency to give.

use crate::sense::{ProbeState, Sense};
use anyhow::{Result, bail};

/// `None` if the run-queue probe is loaded; else one line that says why not, and what would help.
/// The other sensors are worth running for.
///
/// # Errors
/// No other probe of the kernel's structures is loaded either: nothing is left to do. That of tap
/// devices reads packets alone, and is no reason to run.
pub(super) fn missing(sense: &Sense) -> Result<Option<String>> {
    let ProbeState::Unavailable { program, why, remedy } = &sense.health().runq else {
        return Ok(None);
    };
    let others = [sense.block().health().probe, sense.tcp_health().host.state];
    if !others.contains(&ProbeState::Loaded) {
        bail!(
            "failed to load program {program}, nor any other: {why} ({remedy}); `doctor`, \
             `restore`, `replay` and `config` work without them"
        );
    }
    Ok(Some(format!("program {program} is not loaded: {why} ({remedy})")))
}
