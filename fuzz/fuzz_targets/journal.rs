//! The journal as it lies on disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| formtune_agent::act::fuzzing::journal(data));
