//! The command line of the real program on a site of its own: exit codes, JSON, and errors
//! that are one line which says what, where, and what to do.

use formtune_tests::agent::Site;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::time::{Duration, Instant};

const QUIET: &str = "libvirt = \"off\"\nlisten = \"off\"\n";
/// A journal that cannot be read, which bars enforcement and is a finding.
const GARBAGE: &[u8] = b"what is this?\n\0\0\0";

/// A command and what is to come of it. `DIR` stands for the site's folder, in all of it.
struct Case {
    args: &'static [&'static str],
    code: i32,
    /// Parts of standard output.
    says: &'static [&'static str],
    /// Pointers into standard output, if it is JSON, and what is there.
    json: &'static [(&'static str, &'static str)],
    /// Parts of the one line on standard error; none: it must be empty.
    error: &'static [&'static str],
}

const CASE: Case = Case { args: &[], code: 0, says: &[], json: &[], error: &[] };

#[track_caller]
fn check(site: &Site, cases: &[Case]) {
    let dir = site.path().display().to_string();
    for case in cases {
        let args: Vec<String> = case.args.iter().map(|arg| arg.replace("DIR", &dir)).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = site.output(&args).unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        let seen = format!("formtune {}: {:?}\n{out}{error}", args.join(" "), output.status);
        assert_eq!(output.status.code(), Some(case.code), "{seen}");
        assert_eq!(error.lines().count(), usize::from(!case.error.is_empty()), "{seen}");
        assert!(error.is_empty() || error.starts_with("formtune: "), "{seen}");
        // Where a line is broken depends on how long the folder's path is.
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let has =
            |text: &str, part: &&str| words(text).contains(&words(&part.replace("DIR", &dir)));
        for part in case.says {
            assert!(has(&out, part), "no {part:?}: {seen}");
        }
        for part in case.error {
            assert!(has(&error, part), "no {part:?} in the error: {seen}");
        }
        if !case.json.is_empty() {
            let value: Value = serde_json::from_str(&out).expect(&seen);
            for (pointer, expected) in case.json {
                let expected: Value = serde_json::from_str(expected).unwrap();
                assert_eq!(value.pointer(pointer), Some(&expected), "{pointer}: {seen}");
            }
        }
    }
}

fn damage(site: &Site) {
    fs::create_dir_all(site.state()).unwrap();
    fs::write(site.state().join("journal"), GARBAGE).unwrap();
}

#[test]
fn a_configuration_that_is_good() {
    let site = Site::new(QUIET).unwrap();
    fs::write(site.path().join("guide.json"), r#"{"vm": {"numa_aware": true}}"#).unwrap();
    let text = fs::read_to_string(site.config()).unwrap();
    fs::write(site.path().join("noted.toml"), format!("{text}guide = \"guide.json\"\n")).unwrap();
    check(
        &site,
        &[
            Case { args: &["config", "check"], says: &["DIR/formtune.toml: good"], ..CASE },
            Case {
                args: &["config", "check", "--json"],
                json: &[("/good", "true"), ("/error", "null"), ("/notices", "[]")],
                ..CASE
            },
            // What cannot be honoured is said, and no error.
            Case {
                args: &["config", "check", "--config", "DIR/noted.toml"],
                says: &["DIR/guide.json:1:9: `vm.numa_aware` is not honoured"],
                ..CASE
            },
            Case {
                args: &["config", "check", "--config", "DIR/noted.toml", "--json"],
                json: &[("/good", "true"), ("/notices/0/key", "\"vm.numa_aware\"")],
                ..CASE
            },
            Case {
                args: &["config", "show"],
                says: &["state_dir = \"DIR/state\"", "tick = \"250ms\""],
                ..CASE
            },
            Case {
                args: &["config", "show", "--json"],
                json: &[("/tick", "\"250ms\""), ("/mode/cpu_weight", "\"shadow\"")],
                ..CASE
            },
        ],
    );
    // What is shown is a configuration.
    let shown = site.output(&["config", "show"]).unwrap();
    fs::write(site.path().join("shown.toml"), shown.stdout).unwrap();
    let args = &["config", "check", "--config", "DIR/shown.toml"];
    check(&site, &[Case { args, says: &["shown.toml: good"], ..CASE }]);
    assert!(!site.state().exists(), "a look at the configuration made the state folder");
}

#[test]
fn a_configuration_that_is_refused() {
    let site = Site::new("tik = \"250ms\"").unwrap();
    const AT: &[&str] = &["DIR/formtune.toml:3:1: unknown key `tik`, did you mean `tick`?"];
    check(
        &site,
        &[
            Case { args: &["config", "check"], code: 2, error: AT, ..CASE },
            Case {
                args: &["config", "check", "--json"],
                code: 2,
                json: &[("/good", "false"), ("/notices", "[]")],
                says: AT,
                error: AT,
            },
            Case { args: &["config", "show"], code: 2, error: AT, ..CASE },
            Case { args: &["config", "show", "--json"], code: 2, error: AT, ..CASE },
            Case { args: &["doctor"], code: 2, error: AT, ..CASE },
            Case { args: &["run"], code: 2, error: AT, ..CASE },
            Case { args: &["status"], code: 2, error: AT, ..CASE },
            Case { args: &["restore"], code: 2, error: AT, ..CASE },
            Case {
                args: &["config", "check", "--config", "DIR/none.toml"],
                code: 2,
                error: &["failed to read DIR/none.toml", "config show", "No such file"],
                ..CASE
            },
        ],
    );
}

#[test]
fn arguments_that_are_not_understood() {
    let site = Site::new(QUIET).unwrap();
    check(
        &site,
        &[
            Case {
                args: &["statsu"],
                code: 2,
                error: &["'statsu'", "'status'", "formtune --help"],
                ..CASE
            },
            Case {
                args: &["run", "--mode", "enforced"],
                code: 2,
                error: &["'enforced'", "shadow, enforce", "formtune --help"],
                ..CASE
            },
            Case { args: &["explain"], code: 2, error: &["<VM>", "formtune --help"], ..CASE },
            Case { args: &["replay"], code: 2, error: &["<FILE>", "formtune --help"], ..CASE },
        ],
    );
}

#[test]
fn doctor_with_a_finding() {
    let site = Site::new(QUIET).unwrap();
    damage(&site);
    const REMEDY: &str = "run `formtune restore`";
    check(
        &site,
        &[
            Case {
                args: &["doctor"],
                code: 1,
                says: &["finding", "the journal in DIR/state is damaged", REMEDY],
                ..CASE
            },
            Case {
                args: &["doctor", "--json"],
                code: 1,
                says: &["\"finding\"", "the journal in DIR/state is damaged", REMEDY],
                json: &[("/checks/0/name", "\"kernel\""), ("/checks/0/verdict", "\"ok\"")],
                ..CASE
            },
        ],
    );
    assert_eq!(fs::read(site.state().join("journal")).unwrap(), GARBAGE, "it was touched");
}

#[test]
fn restore_without_an_agent() {
    let site = Site::new(QUIET).unwrap();
    let nothing = Case { args: &["restore"], says: &["nothing to restore"], ..CASE };
    check(&site, &[nothing]);
    assert!(!site.state().exists(), "there was nothing to restore, and a folder was made");
    damage(&site);
    const KEPT: &str = "DIR/state/journal.damaged-1: check the VMs' cpu weights";
    check(
        &site,
        &[
            Case { args: &["restore"], code: 1, says: &["note: the journal was", KEPT], ..CASE },
            // It stays a finding until somebody has looked.
            Case {
                args: &["restore", "--json"],
                code: 1,
                says: &[KEPT],
                json: &[("/knobs", "[]"), ("/earlier_boot", "0")],
                ..CASE
            },
        ],
    );
    assert_eq!(fs::read(site.state().join("journal.damaged-1")).unwrap(), GARBAGE);
}

#[test]
fn beside_a_running_agent() {
    let site = Site::new(QUIET).unwrap();
    let agent = site.run(&[]).unwrap();
    // It answers before its first sample, and `status` then says that it is not ready.
    let start = Instant::now();
    while agent.status("/readyz").unwrap().0 != 200 {
        assert!(start.elapsed() < Duration::from_secs(10), "not ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    check(
        &site,
        &[
            Case {
                args: &["restore"],
                code: 2,
                error: &["formtune is running (pid", "DIR/state/lock", "stop it"],
                ..CASE
            },
            Case {
                args: &["explain", "no-such-vm"],
                code: 2,
                error: &["no vm \"no-such-vm\" is measured on this node", "`formtune status`"],
                ..CASE
            },
            Case {
                args: &["explain", "no-such-vm", "--json"],
                code: 2,
                error: &["no vm \"no-such-vm\""],
                ..CASE
            },
            Case { args: &["status"], ..CASE },
            Case {
                args: &["status", "--json"],
                json: &[("/node/modes/cpu_weight", "\"shadow\"")],
                ..CASE
            },
        ],
    );
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0), "{}", site.log());
    const GONE: &[&str] = &["not running", "DIR/formtune.sock", "start it with `formtune run`"];
    check(
        &site,
        &[
            Case { args: &["status"], code: 2, error: GONE, ..CASE },
            Case { args: &["explain", "a"], code: 2, error: GONE, ..CASE },
        ],
    );
}

#[test]
fn a_trace_that_cannot_be_written() {
    let site = Site::new(QUIET).unwrap();
    fs::write(site.path().join("file"), "precious").unwrap();
    const ADVICE: &str = "name a file in a folder that is there and can be written";
    check(
        &site,
        &[
            Case {
                args: &["run", "--record", "DIR/none/trace"],
                code: 2,
                error: &["failed to record to DIR/none/trace", ADVICE, "No such file"],
                ..CASE
            },
            Case {
                args: &["run", "--record", "DIR/file/trace", "--mode", "enforce"],
                code: 2,
                error: &["failed to record to DIR/file/trace", ADVICE, "ot a directory"],
                ..CASE
            },
            Case {
                args: &["run", "--record", "DIR"],
                code: 2,
                error: &["failed to record to DIR", ADVICE, "is a directory"],
                ..CASE
            },
        ],
    );
    let mut left: Vec<_> =
        fs::read_dir(site.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["file", "formtune.toml"], "something was made");
    assert_eq!(fs::read(site.path().join("file")).unwrap(), b"precious");
}

#[test]
fn a_file_that_is_no_trace() {
    let site = Site::new(QUIET).unwrap();
    fs::write(site.path().join("text"), "no trace\n").unwrap();
    fs::write(site.path().join("binary"), [0xff, 0, 0x1b, b'\n', 0xfe]).unwrap();
    const FOREIGN: &str = "is not a trace of formtune (`formtune run --record FILE` writes one)";
    check(
        &site,
        &[
            Case { args: &["replay", "DIR/text"], code: 2, error: &["DIR/text", FOREIGN], ..CASE },
            Case {
                args: &["replay", "DIR/binary", "--json"],
                code: 2,
                error: &["DIR/binary", FOREIGN],
                ..CASE
            },
            Case {
                args: &["replay", "DIR/none"],
                code: 2,
                error: &["failed to read DIR/none", "No such file"],
                ..CASE
            },
            Case { args: &["replay", "DIR"], code: 2, error: &["DIR", "directory"], ..CASE },
        ],
    );
}
