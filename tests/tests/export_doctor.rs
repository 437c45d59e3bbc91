//! `doctor` on the running kernel, as root: it really loads the probe.

use formtune_agent::config::Config;
use formtune_agent::doctor::{Verdict, examine};

#[test]
fn the_probe_is_loaded_and_the_rest_is_left_alone() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let folder = tempfile::tempdir().unwrap();
    let config = Config {
        state_dir: folder.path().join("state"),
        socket: folder.path().join("formtune.sock"),
        listen: None,
        libvirt_uri: None,
        ..Config::default()
    };
    let checks = examine(&config, || panic!("nothing is waited for"));
    for name in ["kernel", "btf", "rights", "cgroup", "program", "sockets", "taps", "journal"] {
        let check = checks.iter().find(|check| check.name == name).unwrap();
        assert_eq!(check.verdict, Verdict::Ok, "{check:?}");
    }
    for check in &checks {
        assert_eq!(check.verdict != Verdict::Ok, check.remedy.is_some(), "{check:?}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was made");
}
