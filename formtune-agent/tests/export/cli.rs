//! The commands themselves, against a served snapshot.

use crate::fixture::{Served, snapshot};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

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
