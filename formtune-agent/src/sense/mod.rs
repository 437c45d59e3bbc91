//! Reads the node and never writes.

mod config;

pub(crate) use config::matches;
pub use config::{CgroupPattern, CgroupPatternError, SenseConfig};
