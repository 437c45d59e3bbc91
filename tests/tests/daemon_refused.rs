//! What `formtune run` refuses: exit code 2, one line that says what and where, and
//! nothing changed.

use formtune_tests::agent::{Site, with_mounted};
use nix::sys::signal::Signal;
use std::net::TcpListener;
use std::process::{Command, Output};

const QUIET: &str = "libvirt = \"off\"\nlisten = \"off\"\n";

/// The one line, after checking that it is one and that the exit code is 2.
fn refusal(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("formtune: ")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    lines[0].to_owned()
}

#[track_caller]
fn says(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "no {part:?} in: {line}");
    }
}

#[test]
fn a_second_agent_on_the_same_site() {
    let site = Site::new(QUIET).unwrap();
    let agent = site.run(&[]).unwrap();
    let line = refusal(&site.output(&["run"]).unwrap());
    says(&line, &["another agent", "formtune.sock"]);
    // The same with another socket: the state folder is taken too.
    let other = site.path().join("other.toml");
    let text =
        std::fs::read_to_string(site.config()).unwrap().replace("formtune.sock", "other.sock");
    std::fs::write(&other, text).unwrap();
    let output = Command::new(formtune_tests::agent::program())
        .args(["run", "--config"])
        .arg(&other)
        .output()
        .unwrap();
    says(&refusal(&output), &[&agent.pid().to_string(), &site.state().display().to_string()]);
    assert!(agent.get("/healthz").is_ok(), "the first agent was disturbed");
    assert!(!site.path().join("other.sock").exists(), "the second left its socket");
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));
}

/// Two agents with nothing in common but the node.
#[test]
fn a_second_agent_that_enforces() {
    let site = Site::new(QUIET).unwrap();
    let agent = site.run(&["--mode", "enforce"]).unwrap();
    let other = Site::new(QUIET).unwrap();
    let line = refusal(&other.output(&["run", "--mode", "enforce"]).unwrap());
    says(&line, &["another formtune enforces on this node", "--mode shadow"]);
    assert!(!other.state().exists(), "the second made its state folder");
    let shadow = other.run(&["--mode", "shadow"]).unwrap();
    assert_eq!(shadow.end(Signal::SIGTERM).unwrap().code(), Some(0));
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));
    let next = other.run(&["--mode", "enforce"]).unwrap();
    assert_eq!(next.end(Signal::SIGTERM).unwrap().code(), Some(0));
}

/// A kernel without BTF, played by an empty folder.
#[test]
fn a_kernel_without_btf() {
    let site = Site::new(QUIET).unwrap();
    let empty = site.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let output = with_mounted(&empty, "/sys/kernel/btf", &site.command(&["run"]));
    says(&refusal(&output), &["sched_switch, nor any other", "BTF", "`doctor`, `restore`"]);
    assert!(!site.state().exists(), "the state folder was made");
}

#[test]
fn a_kernel_whose_btf_ends_early() {
    let site = Site::new(QUIET).unwrap();
    let cut = site.path().join("vmlinux");
    let whole = std::fs::read("/sys/kernel/btf/vmlinux").unwrap();
    std::fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let output = with_mounted(&cut, "/sys/kernel/btf/vmlinux", &site.command(&["run"]));
    says(&refusal(&output), &["sched_switch", "BTF is malformed", "`doctor`, `restore`"]);
    assert!(!site.state().exists(), "the state folder was made");
}

/// A kernel of before 5.10, played by another release and by such a kernel's answer to what
/// it does not know: the probe's maps are mapped into memory, and a map with a flag that is
/// not known (`BPF_F_MMAPABLE` came with Linux 5.5) is EINVAL.
#[test]
fn a_kernel_that_is_too_old() {
    let site = Site::new(QUIET).unwrap();
    let release = site.path().join("osrelease");
    std::fs::write(&release, "5.4.0-42-generic\n").unwrap();
    let old = |args: &[&str]| {
        let formtune = site.command(args);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-e", "trace=bpf", "-e", "inject=bpf:error=EINVAL", "-o"]);
        strace.arg(site.path().join("calls"));
        strace.arg(formtune.get_program()).args(formtune.get_args());
        with_mounted(&release, "/proc/sys/kernel/osrelease", &strace)
    };
    let line = refusal(&old(&["run"]));
    println!("{line}");
    assert!(!site.state().exists(), "the state folder was made");
    says(&line, &["program sched_switch", "Linux 5.4.0 is older than 5.10", "`doctor`, `restore`"]);
    let calls = std::fs::read_to_string(site.path().join("calls")).unwrap();
    assert!(calls.contains("BPF_MAP_CREATE") && calls.contains("(INJECTED)"), "{calls}");

    let doctor = old(&["doctor"]);
    let found = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert_eq!(doctor.status.code(), Some(1), "{found}");
    says(
        &found,
        &["Linux 5.4.0-42-generic", "sched_switch cannot be loaded: Linux 5.4.0 is older"],
    );
}

#[test]
fn a_port_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let site = Site::new(&format!("libvirt = \"off\"\nlisten = \"{address}\"")).unwrap();
    says(&refusal(&site.output(&["run"]).unwrap()), &[&address.to_string(), "listen"]);
    assert!(!site.path().join("formtune.sock").exists());
    assert!(!site.state().exists(), "the state folder was made");
}

#[test]
fn a_state_folder_that_is_read_only_or_full() {
    for (what, mount) in [
        ("read-only", "mount -t tmpfs -o ro none \"$STATE\""),
        (
            "full",
            "mount -t tmpfs -o size=8k none \"$STATE\" && { cat /dev/zero > \"$STATE/fill\" 2>/dev/null || true; }",
        ),
    ] {
        let site = Site::new(QUIET).unwrap();
        std::fs::create_dir(site.state()).unwrap();
        let run = site.command(&["run", "--mode", "enforce"]);
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg(format!("set -e; {mount}; exec \"$@\""))
            .arg("sh")
            .arg(run.get_program())
            .args(run.get_args())
            .env("STATE", site.state())
            .output()
            .unwrap();
        let line = refusal(&output);
        says(&line, &[&site.state().display().to_string()]);
        assert!(
            line.to_lowercase().contains(if what == "full" { "no space" } else { "read-only" }),
            "{line}"
        );
    }
}

#[test]
fn a_user_without_capabilities() {
    let site = Site::new(QUIET).unwrap();
    std::fs::copy(formtune_tests::agent::program(), site.path().join("formtune")).unwrap();
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(site.path(), all).unwrap();
    let mut user = Command::new("setpriv");
    user.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).args([
        "/mnt/formtune",
        "run",
        "--mode",
        "enforce",
        "--config",
        "/mnt/formtune.toml",
    ]);
    // That user may have no way to the site itself.
    let output = with_mounted(site.path(), "/mnt", &user);
    says(&refusal(&output), &["CAP_BPF", "CAP_PERFMON", "CAP_DAC_OVERRIDE", "probe", "cpu.weight"]);
    assert!(!site.state().exists());
}

#[test]
fn a_damaged_journal_is_kept_and_ends_enforcement_only() {
    let site = Site::new(QUIET).unwrap();
    std::fs::create_dir(site.state()).unwrap();
    std::fs::write(site.state().join("journal"), b"what is this?\n\0\0\0").unwrap();
    let agent = site.run(&["--mode", "enforce"]).unwrap();
    let node = agent.get("/v1/node").unwrap();
    assert!(node.contains("\"cpu_weight\":\"shadow\""), "{node}");
    assert!(site.log().contains("not enforcing: the journal was damaged"), "{}", site.log());
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));
    let kept = std::fs::read_dir(site.state()).unwrap().filter_map(Result::ok).any(|file| {
        file.file_name().to_string_lossy().starts_with("journal.damaged")
            && std::fs::read(file.path()).unwrap().starts_with(b"what is this?")
    });
    assert!(kept, "the damaged journal is gone");
}

#[test]
fn without_libvirt_cgroups_are_used_and_it_is_said_once() {
    let site = Site::new("listen = \"off\"\nlibvirt = \"qemu+unix:///system?socket=/nonexistent\"")
        .unwrap();
    let agent = site.run(&[]).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0));
    let log = site.log();
    assert_eq!(log.matches("WARN").count(), 1, "{log}");
    assert!(log.contains("finding VMs by their cgroups until it answers"), "{log}");
}

#[test]
fn a_mistyped_configuration() {
    let site = Site::new("tik = \"250ms\"").unwrap();
    let line = refusal(&site.output(&["run"]).unwrap());
    says(&line, &["formtune.toml:3:1: unknown key `tik`, did you mean `tick`?"]);
    assert!(!site.state().exists());
}
