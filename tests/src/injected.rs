//! An agent under strace: faults at chosen system calls, and whether what it wrote, it wrote
//! in the right order.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `REMOTE_PROC_DOMAIN_SET_SCHEDULER_PARAMETERS` of libvirt's `remote_protocol.x`, and the
/// same with flags.
const SETTERS: [u32; 2] = [58, 219];
/// `REMOTE_PROGRAM` there.
const REMOTE_PROGRAM: u32 = 0x2000_8086;

/// Runs `agent` (program and arguments) to its end under strace, with `inject` in strace's
/// syntax, and returns the log, which goes to `file`. Only calls on `paths` are seen; all
/// are, if there are none.
///
/// # Panics
/// If strace is missing.
pub fn traced(
    agent: &Command,
    file: &Path,
    paths: &[PathBuf],
    calls: &str,
    inject: Option<&str>,
) -> String {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-s", "100000", "-o"]).arg(file);
    for path in paths {
        strace.arg("-P").arg(path);
    }
    // The order of these must be seen in every run.
    strace.arg(format!("--trace={calls},write,fsync,fdatasync,rename"));
    if let Some(inject) = inject {
        strace.arg(format!("--inject={inject}"));
    }
    strace.arg(agent.get_program()).args(agent.get_args());
    let output = strace.stdin(std::process::Stdio::null()).output().expect("strace is missing");
    let killed = output.status.signal() == Some(9);
    assert!(killed || output.status.code().is_some(), "{output:?}");
    fs::read_to_string(file).expect("strace writes its log")
}

/// Whether the run met its fault.
pub fn met(log: &str) -> bool {
    log.contains("(INJECTED)") || log.contains("+++ killed by SIGKILL +++")
}

/// Checks a log: no knob is written, and no libvirt asked to write it, but with what the
/// durable journal allows, and nothing is done to a journal whose fsync failed.
///
/// # Errors
/// The call that was wrong.
pub fn order_of_writes(log: &str, journal_before: &str) -> Result<(), String> {
    let mut durable = journal_before.to_owned();
    let mut pending: BTreeMap<String, String> = BTreeMap::new();
    let mut failed: Option<String> = None;
    for call in calls(log) {
        let path = call.split_once('<').and_then(|(_, rest)| rest.split_once('>')).map(|s| s.0);
        let Some(path) = path else { continue };
        let done = !call.contains(" = -1 ") && !call.contains(" = ?");
        let file = path.rsplit('/').next().unwrap_or_default();
        if let Some(failed) = &failed {
            let touched = call.starts_with("write(") || call.starts_with("f");
            if touched && path == failed {
                return Err(format!("after its failed fsync: {call}"));
            }
        }
        let allowed = |vm: &str, value: &str| {
            durable.lines().any(|line| {
                line.contains(&format!("\"vm\":\"{vm}\""))
                    && [format!("\"to\":{value},"), format!("\"original\":{value},")]
                        .iter()
                        .any(|field| line.contains(field))
            })
        };
        if call.starts_with("write(") && file.starts_with("journal") {
            let text = String::from_utf8_lossy(&written(&call)).into_owned();
            *pending.entry(path.to_owned()).or_default() += &text;
        } else if call.starts_with("fsync(") || call.starts_with("fdatasync(") {
            if !done && file.starts_with("journal") && !call.contains(" = ?") {
                failed = Some(path.to_owned());
            } else if done {
                durable += &pending.remove(path).unwrap_or_default();
            }
        } else if call.starts_with("write(") && ["cpu.shares", "cpu.weight"].contains(&file) {
            let vm = path.rsplit('/').nth(1).unwrap_or_default();
            let value = String::from_utf8_lossy(&written(&call)).into_owned();
            // Where libvirt owns the VM, its cgroup bears another name.
            let vm = vm
                .strip_suffix(".libvirt-qemu")
                .map_or(vm, |vm| vm.splitn(3, '-').nth(2).unwrap_or(vm));
            if !allowed(vm, &value) {
                return Err(format!("{vm} is set to {value} before its journal entry: {log}"));
            }
        } else if call.starts_with("write(")
            && let Some((vm, value)) = asked_of_libvirt(&written(&call))
            && !allowed(&vm, &value.to_string())
        {
            return Err(format!("libvirt is to set {vm} to {value} before its entry: {log}"));
        }
    }
    Ok(())
}

/// How often libvirt was asked to set a weight.
pub fn libvirt_writes(log: &str) -> usize {
    calls(log).iter().filter(|call| asked_of_libvirt(&written(call)).is_some()).count()
}

/// The calls of all threads. One that another thread interrupts in the log stands where it
/// began if it writes, as it may have its effect from then on, and else where it ended.
fn calls(log: &str) -> Vec<String> {
    let mut calls = Vec::new();
    let mut open: BTreeMap<&str, &str> = BTreeMap::new();
    for line in log.lines() {
        // `PID call(fd<path>, …) = result`
        let Some((pid, call)) = line.split_once(' ') else { continue };
        let call = call.trim_start();
        if let Some(begun) = call.strip_suffix(" <unfinished ...>") {
            if begun.starts_with("write(") {
                calls.push(begun.to_owned());
            } else {
                open.insert(pid, begun);
            }
        } else if let Some((_, end)) = call.split_once(" resumed>") {
            calls.extend(open.remove(pid).map(|begun| format!("{begun}{end}")));
        } else {
            calls.push(call.to_owned());
        }
    }
    calls
}

/// The bytes that a call writes, as strace quotes them: C's escapes, octal ones among them.
fn written(call: &str) -> Vec<u8> {
    let Some((_, quoted)) = call.split_once('"') else { return Vec::new() };
    let mut bytes = Vec::new();
    let mut rest = quoted.bytes().peekable();
    while let Some(byte) = rest.next() {
        match byte {
            b'"' => break,
            b'\\' => bytes.push(match rest.next() {
                Some(b'n') => b'\n',
                Some(b't') => b'\t',
                Some(b'r') => b'\r',
                Some(b'v') => 0x0b,
                Some(b'f') => 0x0c,
                Some(first @ b'0'..=b'7') => {
                    let mut value = u32::from(first - b'0');
                    for _ in 0..2 {
                        let Some(digit) = rest.next_if(|digit| (b'0'..=b'7').contains(digit))
                        else {
                            break;
                        };
                        value = value * 8 + u32::from(digit - b'0');
                    }
                    value as u8
                }
                Some(other) => other,
                None => break,
            }),
            other => bytes.push(other),
        }
    }
    bytes
}

/// The domain and the value of a message that has libvirt set `cpu_shares`: length, program,
/// version, procedure, type, serial, status; the domain (name, UUID, id); the parameters
/// (XDR, RFC 4506).
pub(crate) fn asked_of_libvirt(message: &[u8]) -> Option<(String, u64)> {
    let word = |at: usize| Some(u32::from_be_bytes(message.get(at..at + 4)?.try_into().ok()?));
    if word(4)? != REMOTE_PROGRAM || !SETTERS.contains(&word(12)?) {
        return None;
    }
    let name = message.get(32..32 + word(28)? as usize)?;
    let key = b"cpu_shares\0\0";
    let at = message.windows(key.len()).position(|window| window == key)? + key.len();
    // The type of the value, then the value.
    let value = message.get(at + 4..at + 12)?;
    let value = u64::from_be_bytes(value.try_into().ok()?);
    Some((String::from_utf8_lossy(name).into_owned(), value))
}
