//! Everything that touches the world: the library behind the binary `formtune`.
//!
//! `sense` reads and never writes; `act` holds the only writers; `daemon` is the one loop
//! between them and owns all state; `export` sees snapshots only.

pub mod act;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod export;
pub mod hypervisor;
pub mod record;
pub mod sense;
pub mod vm;
