//! The commands themselves, against a served snapshot.

use crate::fixture::{Served, snapshot};
use formtune_agent::export::snapshot::LatencyCounts;
use formtune_common::histogram::{BUCKETS, bucket};
use formtune_core::units::{Nanos, VmId};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Exit code, standard output, standard error.
fn formtune(socket: &Path, args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_formtune"))
        .args(args)
        .arg("--socket")
        .arg(socket)
        .env("LANG", "C.UTF-8")
        .env_remove("LC_ALL")
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn status_and_explain_ask_the_agent() {
    let served = Served::new();
    let (code, text, errors) = formtune(&served.socket, &["status"]);
    assert_eq!((code, errors.as_str()), (0, ""));
    assert!(text.contains("web-1") && text.contains("✗ missed"), "{text}");
    assert!(!text.contains('\x1b'), "no colour where no terminal is");

    let (code, text, errors) = formtune(&served.socket, &["explain", "web-1"]);
    assert_eq!((code, errors.as_str()), (0, ""));
    assert!(text.contains("lower hog-1 from 100 to 80: applied"), "{text}");

    let (code, text, _) = formtune(&served.socket, &["status", "--json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(code, 0);
    let vms = json["vms"].as_array().unwrap();
    let web = vms.iter().find(|vm| vm["id"] == "web-1").unwrap();
    assert_eq!(web["state"], "missed");

    let (_, text, _) = formtune(&served.socket, &["explain", "a\"b\\c/d é", "--json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&json["state"], &json["owner"]), (&"unknown".into(), &"cgroup".into()));
}

#[test]
fn an_agent_that_is_not_ready_is_exit_code_one() {
    let served = Served::new();
    let mut changed = snapshot();
    changed.node.probe.blind = Some("table full".into());
    *served.snapshot.lock().unwrap() = changed;
    let (code, text, _) = formtune(&served.socket, &["status"]);
    assert_eq!(code, 1);
    assert!(text.contains("not ready: blind: table full"), "{text}");
}

#[test]
fn an_unknown_vm_is_one_line_with_the_nearest_name() {
    let served = Served::new();
    let (code, text, errors) = formtune(&served.socket, &["explain", "wbe-1"]);
    assert_eq!((code, text.as_str()), (2, ""));
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.contains("wbe-1") && errors.contains("did you mean web-1?"), "{errors}");
    let (code, _, errors) = formtune(&served.socket, &["explain", "evil\x1b[2J\nname"]);
    assert_eq!((code, errors.lines().count()), (2, 1), "{errors:?}");
    assert!(!errors.contains('\x1b'));
}

#[test]
fn no_agent_is_one_line_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("formtune.sock");
    for args in [["status"].as_slice(), &["explain", "web-1"]] {
        let (code, text, errors) = formtune(&socket, args);
        assert_eq!((code, text.as_str(), errors.lines().count()), (2, "", 1), "{errors}");
        assert!(errors.contains("not running") && errors.contains("formtune run"), "{errors}");
    }
    // A socket that nobody serves any more is the same.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(formtune(&socket, &["status"]).2.contains("not running"));
}

#[test]
fn something_else_on_the_socket_is_not_taken_for_the_agent() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("formtune.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
        }
    });
    let (code, _, errors) = formtune(&socket, &["status"]);
    assert_eq!((code, errors.lines().count()), (2, 1), "{errors}");
    assert!(errors.contains("is not understood"), "{errors}");
}

#[test]
fn export_writes_a_log_of_what_came_meanwhile() {
    let served = Served::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("l.hlog");
    let counted = served.snapshot.clone();
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        let mut snapshot = counted.lock().unwrap();
        snapshot.at = Nanos(snapshot.at.0 + 500_000_000);
        snapshot.unix_ms += 500;
        let mut dense = vec![0; BUCKETS];
        // The fixture's own 9,000 and 100, and three more.
        dense[bucket(3_000_000) as usize] = 9_003;
        dense[bucket(12_000_000) as usize] = 100;
        let hog = snapshot.vms.get_mut(&VmId::from("hog-1")).unwrap();
        hog.runq = Some(LatencyCounts::from_dense(&dense, 28_209_000_000));
    });
    let args = ["export", "hdr", "--for", "500ms", "--interval", "500ms", "--output"];
    let (code, text, errors) =
        formtune(&served.socket, &[&args[..], &[file.to_str().unwrap()]].concat());
    later.join().unwrap();
    assert_eq!((code, text.as_str(), errors.as_str()), (0, "", ""));
    let log = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<_> = log.lines().filter(|line| line.starts_with("Tag=")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].starts_with("Tag=hog-1:runqueue_latency,1790000000.000,0.500,"), "{log}");
    assert!(log.starts_with("#[Histogram log format version 1.3]\n"), "{log}");
    assert!(log.contains("#[StartTime: 1790000000.000 (seconds since epoch)]\n"), "{log}");
}

#[test]
fn export_refuses_what_it_cannot_do_in_one_line() {
    let served = Served::new();
    for (args, why) in [
        (["--interval", "1ms"], "250ms to 24h"),
        (["--interval", "5"], "not a time"),
        (["--output", "/nowhere/l.hlog"], "failed to make /nowhere/l.hlog"),
    ] {
        let args = [&["export", "hdr", "--for", "1s"][..], &args].concat();
        let (code, text, errors) = formtune(&served.socket, &args);
        assert_eq!((code, text.as_str(), errors.lines().count()), (2, "", 1), "{errors}");
        assert!(errors.contains(why), "{errors}");
    }
}
