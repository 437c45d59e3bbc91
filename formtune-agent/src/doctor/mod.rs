//! Is this node fit for formtune? Looks at everything the agent needs, and at everything
//! that gets in its way, and names a remedy for each finding. Changes nothing: the probe is
//! really loaded, and unloaded again.

mod block;
mod kernel;
mod node;
mod rivals;

pub use rivals::{Process, rivals};

use crate::config::Config;
use serde::Serialize;

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at, one word.
    pub name: &'static str,
    /// How it stands.
    pub verdict: Verdict,
    /// What was found, one sentence.
    pub found: String,
    /// What to do, and what works without it; only with a finding or a note.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// How something stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing needs to be done.
    Note,
    /// Something does not work, or not as well as it could.
    Finding,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }
    fn note(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Note, found: found.into(), remedy: Some(remedy.into()) }
    }
    fn finding(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Finding, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Looks at everything, in the order in which one thing needs another. `waiting` is told
/// what is waited for when that takes long.
pub fn examine(config: &Config, waiting: impl FnOnce() + Send + 'static) -> Vec<Check> {
    let mut checks = vec![kernel::release(), kernel::btf()];
    let (capabilities, may_load) = kernel::capabilities();
    checks.push(capabilities);
    let (cgroup, hierarchies) = node::cgroup(config);
    checks.push(cgroup);
    checks.push(kernel::program(hierarchies.as_ref(), may_load));
    checks.extend(kernel::tcp(hierarchies.as_ref(), may_load));
    checks.push(block::program(hierarchies.as_ref(), may_load));
    let (libvirt, domains) = node::libvirt(config, waiting);
    checks.push(libvirt);
    checks.extend(hierarchies.map(|hierarchies| node::vms(config, &hierarchies, &domains)));
    let running = node::agent_running(config);
    checks.push(node::journal(config, running));
    checks.push(node::socket(config, running));
    checks.extend(node::port(config, running));
    checks.extend(rivals::check());
    checks
}
