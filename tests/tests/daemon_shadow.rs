//! That `observe` and `shadow` write nothing, at the level of system calls: of a real
//! `formtune run` under real contention, with a real libvirtd and domain.
#![cfg(feature = "libvirt")]

use formtune_tests::agent::Site;
use formtune_tests::contention::{Contention, eager};
use formtune_tests::libvirtd::Libvirtd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::Command;
use std::time::{Duration, Instant};

/// Whatever changes a file, a folder or a mount, and whatever is sent to libvirt.
const CALLS: &str = "trace=open,openat,openat2,creat,write,writev,pwrite64,pwritev,pwritev2,\
                     truncate,ftruncate,fallocate,mkdir,mkdirat,rmdir,unlink,unlinkat,rename,\
                     renameat,renameat2,link,linkat,symlink,symlinkat,chmod,fchmod,fchmodat,\
                     chown,fchown,lchown,fchownat,mount,umount2,setxattr,fsetxattr,sendto,\
                     sendmsg,sendmmsg,sched_setaffinity,sched_setscheduler,sched_setattr,\
                     setpriority,sendfile,splice,copy_file_range,io_uring_setup,ioctl";

/// libvirt's procedures that set scheduler parameters, without and with flags
/// (`src/remote/remote_protocol.x`, `enum remote_procedure`).
const SETTERS: [u32; 2] = [58, 219];
/// `REMOTE_PROGRAM` there.
const REMOTE_PROGRAM: u32 = 0x2000_8086;

struct Seen {
    /// Calls that open for writing, or change, something below `/sys/fs/cgroup`.
    cgroup_writes: Vec<String>,
    /// Procedures that libvirt was asked for.
    procedures: Vec<u32>,
}

#[test]
fn observe_and_shadow_write_nothing_and_enforce_is_seen_to() {
    let name = format!("ft-daemon-shadow-{}", std::process::id());
    let dir = tempfile::Builder::new().prefix("ft-").tempdir().unwrap();
    let libvirtd = Libvirtd::start(dir.path()).unwrap();
    let domain = format!("ft-daemon-dom-{}", std::process::id());
    libvirtd.start_spinning(&domain).unwrap();
    let contention = Contention::start(&name).unwrap();
    // The domain is one of the neighbours that are to blame.
    let eager = eager(&name, &libvirtd.uri(), &[&domain]);
    let site = Site::new(&eager).unwrap();
    let originals = contention.raw();

    let observe = trace(&site, "observe", |_| std::thread::sleep(Duration::from_secs(3)));
    assert_eq!(observe.cgroup_writes, Vec::<String>::new());
    let shadow = trace(&site, "shadow", |agent| {
        // Setpoints for our cgroups and for the domain have been announced.
        for vm in ["loud", domain.as_str()] {
            until(|| agent.log().contains(&format!("{vm}: lower cpu_weight")), || agent.log());
        }
    });
    assert_eq!(shadow.cgroup_writes, Vec::<String>::new());
    for seen in [&observe, &shadow] {
        assert!(!seen.procedures.is_empty(), "the connection to libvirt was not seen");
        assert!(!seen.procedures.iter().any(|procedure| SETTERS.contains(procedure)));
    }
    assert_eq!(contention.raw(), originals);

    // The same eyes see what `enforce` does; so they would have seen it above.
    let enforce = trace(&site, "enforce", |agent| {
        contention.wait_for_change(&originals, Duration::from_secs(60));
        let lowered = format!("{domain}: lower cpu_weight");
        until(|| agent.log().contains(&lowered), || agent.log());
    });
    assert!(
        enforce.cgroup_writes.iter().any(|call| call.contains("cpu.")),
        "{:?}",
        enforce.cgroup_writes
    );
    assert!(enforce.procedures.iter().any(|procedure| SETTERS.contains(procedure)));
    assert_eq!(contention.raw(), originals);
}

fn until(mut done: impl FnMut() -> bool, state: impl Fn() -> String) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "not within 60 s: {}", state());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs the agent in `mode` under strace until `during` returns.
fn trace(site: &Site, mode: &str, during: impl FnOnce(&Site)) -> Seen {
    let file = site.path().join(format!("strace-{mode}"));
    let run = site.command(&["run", "--mode", mode]);
    let mut command = Command::new("strace");
    // -D: the agent itself is our child, strace its detached grandchild.
    command.args(["-D", "-f", "-yy", "-xx", "-s", "64", "-e", CALLS, "-o"]).arg(&file);
    command.arg(run.get_program()).args(run.get_args());
    let agent = site.start(command).unwrap();
    during(site);
    let pid = Pid::from_raw(agent.pid() as i32);
    assert_eq!(agent.end(Signal::SIGTERM).unwrap().code(), Some(0), "{}", site.log());
    // strace ends a moment after its tracee.
    until(
        || std::fs::read_to_string(&file).is_ok_and(|trace| ended(&trace, pid)),
        || "strace".into(),
    );
    let _ = kill(pid, None);
    let trace = std::fs::read_to_string(&file).unwrap();
    assert!(trace.contains("cpu.shares") || trace.contains(&hex("cpu.")), "nothing was traced");
    read(&trace)
}

fn ended(trace: &str, pid: Pid) -> bool {
    trace.lines().any(|line| line.starts_with(&pid.to_string()) && line.contains("+++ exited"))
}

/// `-xx` writes every string in hexadecimal.
fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("\\x{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    text.split("\\x")
        .skip(1)
        .filter_map(|byte| u8::from_str_radix(byte.get(..2)?, 16).ok())
        .collect()
}

fn read(trace: &str) -> Seen {
    let mut seen = Seen { cgroup_writes: Vec::new(), procedures: Vec::new() };
    let root = hex("/sys/fs/cgroup");
    for line in trace.lines() {
        let Some((_, call)) = line.split_once(char::is_whitespace) else { continue };
        // `<... openat resumed>`: what it was asked for was in the line that was broken off.
        let call = call.trim_start();
        let call = call.strip_prefix("<... ").unwrap_or(call);
        let opens = call.starts_with("open");
        let writes =
            ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"].iter().any(|flag| call.contains(flag));
        // Paths are in hexadecimal, those behind descriptors (-yy) are not always.
        let in_cgroup = call.contains(&root) || call.contains("/sys/fs/cgroup");
        if in_cgroup && (!opens || writes) {
            seen.cgroup_writes.push(readable(call));
        }
        if !opens && let Some(procedure) = procedure(call) {
            seen.procedures.push(procedure);
        }
    }
    seen
}

/// A call with its strings in plain text.
fn readable(call: &str) -> String {
    let parts: Vec<String> = call
        .split('"')
        .map(|part| match part.starts_with("\\x") {
            true => String::from_utf8_lossy(&unhex(part)).into_owned(),
            false => part.to_owned(),
        })
        .collect();
    parts.join("\"")
}

/// The procedure that a message to libvirt asks for: length, program, version, procedure,
/// 32 bits each.
fn procedure(call: &str) -> Option<u32> {
    let data = unhex(call.split('"').nth(1)?);
    let word = |at: usize| Some(u32::from_be_bytes(data.get(at..at + 4)?.try_into().ok()?));
    (word(4)? == REMOTE_PROGRAM).then(|| word(12)).flatten()
}
