//! What people and machines see of the agent: metrics, JSON and the words of the CLI.
//!
//! This room sees [`Snapshot`]s only. The daemon's loop builds one when somebody asks
//! ([`source::channel`]); while nobody asks, nothing is copied. What the loop must
//! remember for a snapshot between ticks is kept in [`DecisionLog`], [`Recent`] and [`Culprits`].

pub mod block;
pub mod culprits;
pub mod decisions;
pub mod hdr;
pub mod hdr_log;
pub mod http;
pub mod latency;
pub mod listen;
pub mod metrics;
mod pieces;
pub mod recent;
pub mod routes;
pub mod series;
pub mod snapshot;
pub mod source;
pub mod tcp;

pub use culprits::Culprits;
pub use decisions::DecisionLog;
pub use hdr_log::{HdrLog, HdrLogConfig};
pub use http::{Server, ServerHandle};
pub use listen::{Listen, ListenError};
pub use recent::Recent;
pub use snapshot::Snapshot;
pub use source::{SnapshotRequest, Snapshots};
