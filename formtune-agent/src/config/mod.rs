//! Placeholder, replaced by its first piece of work.
