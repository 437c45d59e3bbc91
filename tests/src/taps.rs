//! Tap devices of a VM: the process that holds them, and what is attached to them without TCX.

use crate::net;
use crate::vm_cgroup::{Member, VmCgroup};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::process::Command;

/// A process of a VM that holds tap devices and puts on the first one what it is told to, as a
/// guest would.
pub struct TapGuest {
    member: Member,
    /// Frames, each with its length before it.
    frames: File,
}

impl TapGuest {
    /// Starts it in the calling thread's network namespace.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(group: &VmCgroup, taps: &[&str]) -> Self {
        let (mut read, write) =
            nix::unistd::pipe().map(|(r, w)| (File::from(r), File::from(w))).unwrap();
        let writer = write.as_raw_fd();
        let member = Member::start(group, "emulator", None, || {
            let _ = nix::unistd::close(writer);
            let Ok(mut taps) = taps.iter().map(|t| net::tap(t)).collect::<Result<Vec<_>, _>>()
            else {
                return;
            };
            let mut first = File::from(taps.remove(0));
            let (mut length, mut frame) = ([0; 2], [0; 4096]);
            while read.read_exact(&mut length).is_ok() {
                let length = usize::from(u16::from_be_bytes(length));
                if read.read_exact(&mut frame[..length]).is_err() {
                    return;
                }
                let _ = first.write_all(&frame[..length]);
            }
        });
        Self { member, frames: write }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.member.id()
    }

    /// Puts a frame on the first device.
    ///
    /// # Panics
    /// If the process has ended.
    pub fn send(&mut self, frame: &[u8]) {
        self.frames.write_all(&(frame.len() as u16).to_be_bytes()).unwrap();
        self.frames.write_all(frame).unwrap();
    }

    /// Ends it, and its devices with it.
    pub fn end(self) {
        // Killed: closing the pipe is not enough, as later processes of the test have it, too.
        drop(self);
    }
}

/// What `tc` says to these words.
///
/// # Panics
/// Unless it does what it is told.
pub fn tc(words: &str) -> String {
    let output = Command::new("tc").args(words.split_whitespace()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tc {words}: {}", error.trim());
    String::from_utf8(output.stdout).unwrap()
}

/// Filters of a device in one direction, `ingress` or `egress`, in the order of their turns.
///
/// # Panics
/// As [`tc`].
pub fn filters(device: &str, hook: &str) -> String {
    tc(&format!("filter show dev {device} {hook}"))
}

/// How many filters on a device are the agent's.
///
/// # Panics
/// As [`tc`].
pub fn our_filters(device: &str) -> usize {
    let is_ours = |line: &&str| line.contains("formtune_tap");
    let on = |hook| filters(device, hook).lines().filter(is_ours).count();
    on("ingress") + on("egress")
}

/// Whether a device has the qdisc `clsact`.
///
/// # Panics
/// As [`tc`].
pub fn has_clsact(device: &str) -> bool {
    tc(&format!("qdisc show dev {device}")).contains("clsact")
}
