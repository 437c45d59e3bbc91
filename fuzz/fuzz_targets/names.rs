//! Names of cgroups, and patterns for them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &str| formtune_agent::sense::fuzzing::names(data));
