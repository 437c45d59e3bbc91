//! Reads the node and never writes.

mod config;

pub use config::{CgroupPattern, CgroupPatternError, SenseConfig};
