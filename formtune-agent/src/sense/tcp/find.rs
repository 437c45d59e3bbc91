//! Which tap devices a VM's processes hold.
//!
//! A process that has a tap device open (QEMU; with vhost-net as well) has a descriptor of
//! `/dev/net/tun`, and `/proc/PID/fdinfo/N` names the device in a line `iff:`
//! (`tun_chr_show_fdinfo()`, drivers/net/tun.c).

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;

/// How far below a VM's directory its processes are looked for.
const MAX_DEPTH: u8 = 6;

/// Tap devices of this network namespace that the processes in a cgroup hold: index and name.
pub fn taps_of(cgroup: &Path) -> BTreeMap<u32, String> {
    let mut processes = BTreeSet::new();
    processes_below(cgroup, &mut processes, 0);
    let mut taps = BTreeMap::new();
    for process in processes {
        // A device of the same name in another namespace would be taken for ours.
        if !same_network(process) {
            continue;
        }
        for name in devices(process) {
            taps.extend(tap_index(&name).map(|index| (index, name)));
        }
    }
    taps
}

fn processes_below(dir: &Path, processes: &mut BTreeSet<u32>, depth: u8) {
    // In a threaded cgroup it cannot be read; the one above it lists the processes.
    let listed = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    processes.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()));
    if depth == MAX_DEPTH {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            processes_below(&entry.path(), processes, depth + 1);
        }
    }
}

fn same_network(process: u32) -> bool {
    let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let ours = of("thread-self");
    ours.is_some() && ours == of(&process.to_string())
}

/// Names of the tun and tap devices that a process holds; it may end meanwhile.
fn devices(process: u32) -> BTreeSet<String> {
    let folder = format!("/proc/{process}/fd");
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // Most descriptors are something else, and this is the cheap question.
        if fs::read_link(entry.path()).is_ok_and(|to| to == Path::new("/dev/net/tun")) {
            let number = entry.file_name();
            let info = format!("/proc/{process}/fdinfo/{}", number.to_string_lossy());
            names.extend(fs::read_to_string(info).ok().as_deref().and_then(interface));
        }
    }
    names
}

/// The interface in `fdinfo` of a tun descriptor; none before one was chosen.
fn interface(fdinfo: &str) -> Option<String> {
    let name = fdinfo.lines().find_map(|line| line.strip_prefix("iff:"))?.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// The index of a device, if it carries Ethernet frames (a tap; a tun carries bare IP).
fn tap_index(name: &str) -> Option<u32> {
    // Not from sysfs, which shows the network namespace in which it was mounted.
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, flags, None).ok()?;
    // SAFETY: plain numbers and a union of such.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.iter_mut().zip(name.bytes());
    room.for_each(|(to, byte)| *to = byte.cast_signed());
    // SAFETY: the request is what this call takes and fills in.
    let asked = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    // SAFETY: filled in by the call.
    let kind = unsafe { request.ifr_ifru.ifru_hwaddr.sa_family };
    if asked != 0 || kind != libc::ARPHRD_ETHER {
        return None;
    }
    nix::net::if_::if_nametoindex(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_is_named_in_fdinfo() {
        let info = "pos:\t0\nflags:\t0104002\nmnt_id:\t30\nino:\t172\niff:\tvnet3\n";
        assert_eq!(interface(info).as_deref(), Some("vnet3"));
        assert_eq!(interface("pos:\t0\niff:\t\n"), None);
        assert_eq!(interface("pos:\t0\n"), None);
    }

    #[test]
    fn what_is_no_tap_has_no_index() {
        assert_eq!(tap_index("lo"), None);
        assert_eq!(tap_index("no-such-device"), None);
    }
}
