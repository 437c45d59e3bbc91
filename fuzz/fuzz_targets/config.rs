//! The configuration file.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &str| formtune_agent::config::fuzzing::config(data));
