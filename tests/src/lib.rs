//! Shared pieces of the root tests.

pub mod libvirtd;
