//! Shared pieces of the root tests.
