//! What a running agent in `enforce` does when the ground gives way: its journal can no
//! longer be written, or somebody else turns a knob that it has turned.

use formtune_tests::agent::{Agent, Site};
use formtune_tests::contention::Contention;
use nix::sys::signal::Signal;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

fn contention(name: &str) -> Contention {
    Contention::start(&format!("ft-faults-{name}-{}", std::process::id())).unwrap()
}

#[track_caller]
fn until(what: &str, site: &Site, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < LIMIT, "not within {LIMIT:?}: {what}: {}", site.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Starts an agent that enforces, whose state folder is a tmpfs of 64 KiB of its own.
fn on_a_small_disk(site: &Site) -> Agent {
    fs::create_dir(site.state()).unwrap();
    let run = site.command(&["run", "--mode", "enforce"]);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg("mount -t tmpfs -o size=64k none \"$STATE\" && exec \"$@\"")
        .arg("sh")
        .arg(run.get_program())
        .args(run.get_args())
        .env("STATE", site.state());
    site.start(command).unwrap()
}

#[test]
fn a_journal_that_fails_ends_enforcement_and_not_the_agent() {
    let mut contention = contention("journal");
    let mut originals = contention.raw();
    let site = Site::new(&contention.eager()).unwrap();
    let agent = on_a_small_disk(&site);
    until("a turned knob", &site, || contention.raw() != originals);
    assert_eq!(agent.status("/readyz").unwrap().0, 200);

    // The agent's mounts, seen from outside.
    let state = format!("/proc/{}/root{}", agent.pid(), site.state().display());
    let fill = fs::write(format!("{state}/fill"), vec![0; 1 << 20]);
    assert_eq!(fill.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    // The journal's last page has some room left. Neighbours that are new have to be lowered,
    // and with such names six of them need more than that page.
    for more in 0..6 {
        contention.add_noisy(&format!("-{more}-{}", "x".repeat(180))).unwrap();
    }
    // All of them begin with the kernel's default.
    originals.resize(contention.vms.len(), originals[0]);
    until("the end of enforcement", &site, || site.log().contains("enforcement ends"));
    until("the originals", &site, || contention.raw() == originals);
    let (status, reasons) = agent.status("/readyz").unwrap();
    assert_eq!(status, 503, "{reasons}");
    assert!(reasons.contains("enforce is held back: failed to write the journal"), "{reasons}");
    let node = agent.get("/v1/node").unwrap();
    assert!(node.contains("No space left on device"), "{node}");
    assert!(node.contains("\"cpu_weight\":\"shadow\""), "{node}");

    // It measures and decides on, and touches nothing any more.
    let before = agent.get("/metrics").unwrap();
    for _ in 0..40 {
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(contention.raw(), originals, "{}", site.log());
    }
    assert_ne!(before, agent.get("/metrics").unwrap());
    // One line about it; the originals are nobody else's values; what is decided is announced.
    let log = site.log();
    assert_eq!(log.matches("failed to write the journal").count(), 1, "{log}");
    assert!(!log.contains("somebody else"), "{log}");
    let after = log.split("enforcement ends").nth(1).unwrap();
    until("a decision in shadow", &site, || site.log().contains("(shadow)"));
    assert!(!after.contains("not written"), "{log}");
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0), "{}", site.log());
    assert_eq!(contention.raw(), originals, "{}", site.log());
}

#[test]
fn a_value_of_somebody_else_is_named_once_and_left() {
    let contention = contention("foreign");
    let originals = contention.raw();
    let site = Site::new(&contention.eager()).unwrap();
    let agent = site.run(&["--mode", "enforce"]).unwrap();
    until("a turned knob", &site, || contention.raw() != originals);
    let turned = (0..originals.len()).find(|&vm| contention.raw()[vm] != originals[vm]).unwrap();
    let knob = &contention.vms[turned];
    knob.set_raw(777);
    let name = knob.path().file_name().unwrap().to_string_lossy().into_owned();
    until("a word about it", &site, || {
        site.log().lines().any(|line| line.contains(&name) && line.contains("somebody else"))
    });
    // Several cool-downs: it is neither changed again nor spoken of again.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(knob.raw(), 777, "{}", site.log());
    let log = site.log();
    let said = log.lines().filter(|line| line.contains(&name) && line.contains("somebody else"));
    assert_eq!(said.count(), 1, "{log}");
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0), "{}", site.log());
    let mut expected = originals;
    expected[turned] = 777;
    assert_eq!(contention.raw(), expected, "{}", site.log());
}
