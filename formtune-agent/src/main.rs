//! The binary `formtune`.
fn main() {}
