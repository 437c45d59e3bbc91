//! The trace that `run --record` writes.

use super::Agent;
use super::publish::Facts;
use crate::config::Config;
use crate::record::{self, Writer};
use anyhow::{Context, Result};
use formtune_core::Sample;
use formtune_core::trace::{Header, HostFacts};
use std::path::Path;

/// Whether a trace can be begun where one is wanted; makes nothing.
///
/// # Errors
/// One line with what to do.
pub(super) fn check(config: &Config) -> Result<()> {
    let Some(path) = &config.record else { return Ok(()) };
    record::may_begin(path, &config.state_dir).with_context(|| failed(path))
}

/// Begins a trace, if one is wanted.
///
/// # Errors
/// As [`check`].
pub(super) fn begin(config: &Config, facts: &Facts) -> Result<Option<Writer>> {
    let Some(path) = &config.record else { return Ok(None) };
    let host = HostFacts {
        cpus: facts.cpus,
        kernel: facts.kernel.clone(),
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        note: String::new(),
    };
    Writer::create(path, &Header::new(host, config.policy.clone()))
        .map(Some)
        .with_context(|| failed(path))
}

fn failed(path: &Path) -> String {
    format!(
        "failed to record to {} (name a file in a folder that is there and can be written)",
        path.display()
    )
}

impl Agent {
    /// Adds a sample. A trace that cannot be written any more ends, and nothing else does.
    pub(super) fn record(&mut self, sample: &Sample) {
        let Some(recorder) = &mut self.recorder else { return };
        let written = recorder.sample(sample).and_then(|()| match self.seq.is_multiple_of(20) {
            true => recorder.flush(),
            false => Ok(()),
        });
        if let Err(error) = written {
            tracing::error!("recording ends: failed to write the trace: {error}");
            self.recorder = None;
        }
    }

    /// Ends the trace.
    pub(super) fn end_record(&mut self) -> bool {
        let Some(mut recorder) = self.recorder.take() else { return false };
        if let Err(error) = recorder.flush() {
            tracing::error!("failed to write the end of the trace: {error}");
        }
        true
    }

    /// Ends the trace and begins another, as after a change of policy or of core's state: a
    /// trace has one policy and begins with an empty state.
    pub(super) fn record_anew(&mut self) {
        if self.end_record() {
            match begin(&self.config, &self.facts) {
                Ok(recorder) => self.recorder = recorder,
                Err(error) => tracing::error!("recording ends: {error:#}"),
            }
        }
    }
}
