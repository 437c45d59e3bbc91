//! A recorded run: one header, then one [`Sample`] per line, each line a JSON
//! object. Types only; files are the agent's (`record.rs`).
//!
//! The header holds the policy, so that a trace alone is enough to see the same plans again.

use crate::policy::Policy;
use crate::{Plan, Sample, State, step};
use alloc::string::String;
use serde::{Deserialize, Serialize};

/// Counts up when a reader of the old format could misread the new one. Added optional
/// fields do not count.
pub const VERSION: u32 = 2;

/// First line of a trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`] of the writer. Named so that the first bytes of the file tell what it is.
    #[serde(rename = "formtune_trace")]
    pub version: u32,
    /// Where it was recorded.
    pub host: HostFacts,
    /// What the operator had decided.
    pub policy: Policy,
}

impl Header {
    /// A header of the present version.
    pub fn new(host: HostFacts, policy: Policy) -> Self {
        Self { version: VERSION, host, policy }
    }
}

/// What does not change while an agent runs. For the reader of a trace; nothing is decided
/// by it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Online CPUs at the start.
    pub cpus: u32,
    /// `uname -r`.
    pub kernel: String,
    /// Version of the agent.
    pub agent: String,
    /// What the run was, where somebody wrote it down.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// The plans that the samples of a trace lead to, one per sample, the same each time.
pub fn replay<'a, S: core::borrow::Borrow<Sample>>(
    header: &'a Header,
    samples: impl IntoIterator<Item = S> + 'a,
) -> impl Iterator<Item = Plan> + 'a {
    let mut state = State::default();
    samples.into_iter().map(move |sample| step(&mut state, &header.policy, sample.borrow()))
}
