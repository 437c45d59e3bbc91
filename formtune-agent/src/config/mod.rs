//! The operator's file: TOML, every key known, every number in range, or one line that says
//! where and what. All defaults are in the `Default` implementations here and in core.

mod classes;
mod document;
mod field;
mod file;
#[doc(hidden)]
pub mod fuzzing;
pub(crate) mod glob;
mod guide;
mod show;

pub use classes::ClassRules;
pub use field::duration;

use crate::export::HdrLogConfig;
use crate::sense::SenseConfig;
use classes::BASE_CLASS;
use formtune_core::policy::{Class, CpuLoop, Indicator, Mode, Modes, Policy, Priority, Slo};
use formtune_core::units::{ClassName, Nanos};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Read when no `--config` is given; need not exist.
pub const DEFAULT_PATH: &str = "/etc/formtune/formtune.toml";

/// Everything the operator decides. `Default` is what runs without any file.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where VMs are looked for.
    pub sense: SenseConfig,
    /// What core is given.
    pub policy: Policy,
    /// Which VM is of which class.
    pub classes_of: ClassRules,
    /// Journal and lock live here.
    pub state_dir: PathBuf,
    /// Unix socket of the HTTP interface.
    pub socket: PathBuf,
    /// TCP address of the HTTP interface; `None`: Unix socket only.
    pub listen: Option<SocketAddr>,
    /// libvirt connection URI; `None`: cgroups only.
    pub libvirt_uri: Option<String>,
    /// Trace file to be written by `run`.
    pub record: Option<PathBuf>,
    /// Interval log of all latencies, to be kept by `run`.
    pub hdr_log: Option<HdrLogConfig>,
    /// What was asked for and cannot be honoured.
    pub notices: Vec<Notice>,
}

/// A key that is understood but has no effect on this node or in this version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Notice {
    /// File it stands in.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// Its full name, e.g. `vm.numa_aware`.
    pub key: String,
    /// Why it has no effect, and what to do instead.
    pub why: String,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, key, why } = self;
        write!(f, "{}:{line}:{column}: `{key}` is not honoured: {why}", file.display())
    }
}

/// Why a configuration is refused; one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to read {} (`formtune config show` prints one to start from)", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// As the system says it.
        #[source]
        source: io::Error,
    },
    /// Something in the file is wrong.
    #[error("{}:{line}:{column}: {}", path.display(), crate::cli::OneLine(what))]
    At {
        /// Which file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// In characters, from 1.
        column: usize,
        /// What is wrong and what is allowed.
        what: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        let base = ClassName::from(BASE_CLASS);
        Self {
            sense: SenseConfig::default(),
            policy: Policy {
                modes: Modes { cpu_weight: Mode::default() },
                tick: Nanos::from_millis(250),
                probe_budget: 0.05,
                cpu: CpuLoop::default(),
                classes: BTreeMap::from([(base.clone(), base_class())]),
                default_class: base.clone(),
            },
            classes_of: ClassRules::new(Vec::new(), base),
            state_dir: PathBuf::from("/var/lib/formtune"),
            socket: PathBuf::from("/run/formtune/formtune.sock"),
            listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 19752))),
            libvirt_uri: Some("qemu:///system".to_owned()),
            record: None,
            hdr_log: None,
            notices: Vec::new(),
        }
    }
}

/// What every VM is promised unless the operator says otherwise.
///
/// 2 ms is below one default slice of the scheduler's (3 ms since 6.6, more before), so a
/// VM that only ever waits for one neighbour's slice already counts as disturbed; idle and
/// fully owned CPUs stay two orders below. A quarter of the entitlement leaves a neighbour
/// able to work under any pressure, four times is what three such neighbours give up.
fn base_class() -> Class {
    Class {
        priority: Priority::Normal,
        slo: Some(base_slo()),
        cpu_weight: None,
        floor_ratio: 0.25,
        ceiling_ratio: 4.0,
    }
}

fn base_slo() -> Slo {
    Slo {
        indicator: Indicator::RunqLatency,
        quantile: 0.99,
        threshold: Nanos::from_millis(2),
        window: Nanos::from_secs(1),
        share: 0.6,
        min_samples: 100,
    }
}

/// Reads the configuration: `path`, which must exist, or else [`DEFAULT_PATH`], which need not.
///
/// # Errors
///
/// One line naming file, line and column, what is wrong, and the nearest known name.
pub fn load(path: Option<&Path>) -> Result<Config, ConfigError> {
    match self::path(path) {
        Some(path) => file::read(&document::Source::read(&path)?),
        None => Ok(Config::default()),
    }
}

/// The file that [`load`] reads: `path`, or else [`DEFAULT_PATH`] where there is one.
pub fn path(path: Option<&Path>) -> Option<PathBuf> {
    let default = Path::new(DEFAULT_PATH);
    match path {
        Some(path) => Some(path.to_owned()),
        // A file that exists but cannot be looked at must fail to be read, not be left out.
        None => default.try_exists().unwrap_or(true).then(|| default.to_owned()),
    }
}

/// The effective configuration as a file that would give the same one.
pub fn show(config: &Config) -> String {
    show::toml(config)
}

/// The same as data.
pub fn table(config: &Config) -> impl Serialize {
    show::table(config)
}

#[cfg(test)]
mod tests;
