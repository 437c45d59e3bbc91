//! What procfs and cgroupfs show.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &str| formtune_agent::sense::fuzzing::kernel_files(data));
