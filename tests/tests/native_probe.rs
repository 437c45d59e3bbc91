//! The run-queue probe on the running kernel, against the kernel's own bookkeeping:
//! `/proc/PID/task/TID/schedstat` holds time on CPU, `run_delay` and `pcount` of a thread.

use formtune_agent::sense::{Sense, SenseConfig};
use formtune_core::units::VmId;

#[test]
fn it_loads() {
    let config = SenseConfig {
        patterns: vec!["ft-sense-load/{name}".parse().unwrap()],
        ..Default::default()
    };
    let sense = Sense::open(&config, None).unwrap();
    println!("{:#?}", sense.health());
    assert_eq!(sense.health().runq, formtune_agent::sense::ProbeState::Loaded);
    assert!(sense.runq(&VmId::from("x")).is_none());
}
