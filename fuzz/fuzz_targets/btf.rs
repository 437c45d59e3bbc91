//! The kernel's types, as BTF.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| formtune_agent::sense::fuzzing::btf(data));
