//! The agent's filters where there is no TCX (before 6.6), and the qdisc `clsact` around them.
//!
//! Both outlive an agent that is killed, so each filter says what must be known to clear up: by
//! its name that it is formtune's, by its handle whether the qdisc is too. Unlike a note in a
//! file, that goes with the qdisc, and so cannot be about another one of the same device.
//!
//! One agent per network namespace has filters there ([`Owner`]): what is found by whoever has
//! that right was left by an agent that is dead.

use super::tap::PROGRAMS;
use aya::programs::TcAttachType;
use aya::programs::tc::{TcError, TcHandle, qdisc_add_clsact, qdisc_detach_program};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::net::if_::{if_nameindex, if_nametoindex};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use serde::Serialize;
use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;

/// Handles of filters: in a qdisc that the agent made, and in one that it found. Nobody else
/// has such, so that what has another one at the same priority is not taken for ours.
const IN_OURS: u32 = 0x666d_0001;
const IN_THEIRS: u32 = 0x666d_0002;

/// `ffff:`, the handle that this kind of qdisc always has, and what it hangs on
/// (linux/pkt_sched.h: `TC_H_CLSACT`).
const QDISC: u32 = 0xffff_0000;
const PARENT: u32 = 0xffff_fff1;
/// Both directions' filters: `TC_H_MIN_INGRESS`, `TC_H_MIN_EGRESS`.
const HOOKS: [u32; 2] = [0xffff_fff2, 0xffff_fff3];
/// The attribute `TCA_KIND`, padded: length, type, `clsact`.
const KIND: [u8; 12] = {
    let ([a, b], [c, d]) = (11_u16.to_ne_bytes(), 1_u16.to_ne_bytes());
    [a, b, c, d, b'c', b'l', b's', b'a', b'c', b't', 0, 0]
};

/// The right to have filters on the devices of the calling thread's network namespace; given
/// back when dropped or when the process ends.
///
/// The lock is on the namespace itself, opened for reading, so that every agent finds the same.
#[derive(Debug)]
pub struct Owner(#[expect(dead_code, reason = "held for its lock")] Flock<File>);

impl Owner {
    /// Takes it without waiting.
    ///
    /// # Errors
    /// Who has it, or why the namespace cannot be locked; one line.
    pub fn take() -> Result<Self, String> {
        let file = File::open("/proc/thread-self/ns/net")
            .map_err(|error| format!("failed to open the network namespace: {error}"))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_, Errno::EWOULDBLOCK)) => {
                Err("another formtune has its filters on this network namespace's devices".into())
            }
            Err((_, errno)) => Err(format!("failed to lock the network namespace: {errno}")),
        }
    }

    /// Removes what dead agents left on any device of the namespace: their filters, and then the
    /// qdisc if it was theirs and is empty. Only devices with something of that are in the answer.
    ///
    /// # Errors
    /// If the devices cannot be listed; one line.
    pub fn clear(&self) -> Result<Vec<Left>, String> {
        let devices =
            if_nameindex().map_err(|errno| format!("failed to list network devices: {errno}"))?;
        let devices = devices.iter().filter_map(|device| {
            let name = device.name().to_str().ok()?;
            clear_device(name, device.index())
        });
        Ok(devices.collect())
    }
}

/// What a dead agent had left on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Left {
    /// The device.
    pub device: String,
    /// Whether the qdisc `clsact` was removed too.
    pub qdisc: bool,
    /// Why filters are still there, one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, qdisc, failed } = self;
        match (failed, qdisc) {
            (Some(why), _) => write!(f, "{device}: formtune's filters NOT removed: {why}"),
            (None, true) => write!(f, "{device}: formtune's filters and qdisc clsact removed"),
            (None, false) => write!(f, "{device}: formtune's filters removed"),
        }
    }
}

fn clear_device(name: &str, interface: u32) -> Option<Left> {
    // Most have none, or are gone meanwhile. The names decide whose they are.
    let found = filters(interface).ok().filter(|found| !found.is_empty())?;
    let mut left = Left { device: name.to_owned(), qdisc: false, failed: None };
    let mut any = false;
    for (program, hook) in PROGRAMS {
        match qdisc_detach_program(name, hook, program) {
            Ok(()) => any = true,
            Err(TcError::IoError(error)) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => left.failed = Some(super::one_line(&error)),
        }
    }
    if any && left.failed.is_none() && found.iter().any(|filter| filter.handle == IN_OURS) {
        left.qdisc = remove_empty(interface).unwrap_or(false);
    }
    (any || left.failed.is_some()).then_some(left)
}

/// A qdisc that the agent made; removed when dropped, if nobody has a filter in it then.
pub(super) struct Made(u32);

impl Drop for Made {
    fn drop(&mut self) {
        match remove_empty(self.0) {
            // It went with its device.
            Ok(_) | Err(Errno::ENODEV | Errno::ENOENT) => {}
            Err(error) => tracing::warn!("the qdisc clsact of interface {} stays: {error}", self.0),
        }
    }
}

/// Has a device have the qdisc; it is the agent's if there was none.
pub(super) fn make(device: &str) -> Result<Option<Made>, String> {
    let interface = if_nametoindex(device).map_err(|errno| errno.to_string())?;
    match qdisc_add_clsact(device) {
        Ok(()) => Ok(Some(Made(interface))),
        // Its older sibling `ingress` is in the same place. It has one list of filters only, and
        // what is attached for the other direction would see this one.
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {
            match clsact(libc::RTM_GETQDISC, interface) {
                Ok(_) => Ok(None),
                Err(Errno::EINVAL) => {
                    Err("it has a qdisc `ingress`, beside which there can be no `clsact`".into())
                }
                Err(errno) => Err(format!("failed to read its qdisc: {errno}")),
            }
        }
        Err(error) => Err(super::one_line(&error)),
    }
}

/// The handle of a filter in that qdisc.
pub(super) fn handle(made: Option<&Made>) -> TcHandle {
    if made.is_some() { IN_OURS } else { IN_THEIRS }.into()
}

/// Whether it was empty, and is removed. Who attaches in between loses the filter: the kernel has
/// no way to do both at once.
fn remove_empty(interface: u32) -> nix::Result<bool> {
    if !filters(interface)?.is_empty() {
        return Ok(false);
    }
    clsact(libc::RTM_DELQDISC, interface)?;
    Ok(true)
}

/// The priority at which a filter has its turn before all that are there; 0, the kernel's choice,
/// where there are none, so that whoever comes later finds low ones free.
pub(super) fn priority(device: &str, hook: TcAttachType) -> u16 {
    let [ingress, egress] = HOOKS;
    let hook = if hook == TcAttachType::Egress { egress } else { ingress };
    let found = if_nametoindex(device).and_then(|interface| filters_of(interface, hook));
    let found = found.unwrap_or_default();
    match found.iter().map(|filter| filter.priority).min() {
        None => 0,
        // Of programs at one priority, the last to come is the first to have its turn.
        Some(first) => first.saturating_sub(1).max(1),
    }
}

/// A filter, or (handle 0) the head of the list of those that have one priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Filter {
    handle: u32,
    priority: u16,
}

/// All filters of a device, in both directions.
fn filters(interface: u32) -> nix::Result<Vec<Filter>> {
    let [ingress, egress] = HOOKS.map(|hook| filters_of(interface, hook));
    Ok([ingress?, egress?].concat())
}

fn filters_of(interface: u32, hook: u32) -> nix::Result<Vec<Filter>> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    ask(&request(libc::RTM_GETTFILTER, flags, interface, [0, hook], &[]))
}

/// Asks for the qdisc `clsact` of a device, or removes it. `EINVAL` if it is of another kind.
fn clsact(kind: u16, interface: u32) -> nix::Result<Vec<Filter>> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    ask(&request(kind, flags, interface, [QDISC, PARENT], &KIND))
}

/// `struct nlmsghdr`, `struct tcmsg` (linux/rtnetlink.h), and attributes of a multiple of four
/// bytes.
fn request(kind: u16, flags: i32, interface: u32, at: [u32; 2], attributes: &[u8]) -> Vec<u8> {
    let length = (HEADER + 20 + attributes.len()) as u32;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((flags as u16).to_ne_bytes());
    // Number of the request, sender, family: none.
    message.extend([0; 12]);
    let [handle, parent] = at;
    for field in [interface, handle, parent, 0] {
        message.extend(field.to_ne_bytes());
    }
    message.extend(attributes);
    message
}

/// Size of `struct nlmsghdr`.
const HEADER: usize = 16;

/// Sends a request; the answer is the filters that the kernel lists.
fn ask(request: &[u8]) -> nix::Result<Vec<Filter>> {
    let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
    let socket = socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkRoute)?;
    send(socket.as_raw_fd(), request, MsgFlags::empty())?;
    let mut buffer = vec![0; 1 << 16];
    let mut found = Vec::new();
    loop {
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
            Err(Errno::EINTR) => continue,
            length => length?,
        };
        // None of the messages that the kernel makes is longer.
        let answer = buffer.get(..length).ok_or(Errno::EMSGSIZE)?;
        if read(answer, &mut found)? {
            return Ok(found);
        }
    }
}

/// Reads the messages of a datagram; whether the answer ends with it.
fn read(mut datagram: &[u8], found: &mut Vec<Filter>) -> nix::Result<bool> {
    let number = |bytes: &[u8], at: usize| {
        let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_ne_bytes).ok_or(Errno::EBADMSG)
    };
    while !datagram.is_empty() {
        let length = number(datagram, 0)? as usize;
        let message = datagram.get(..length.max(HEADER)).ok_or(Errno::EBADMSG)?;
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        match i32::from(kind) {
            // Both begin with a negative error number, or 0.
            libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                return match number(message, HEADER)?.cast_signed() {
                    0 => Ok(true),
                    error => Err(Errno::from_raw(-error)),
                };
            }
            _ if kind == libc::RTM_NEWTFILTER => found.push(Filter {
                handle: number(message, HEADER + 8)?,
                // Protocol below it.
                priority: (number(message, HEADER + 16)? >> 16) as u16,
            }),
            _ => {}
        }
        datagram = datagram.get(length.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: i32, body: &[u32]) -> Vec<u8> {
        let mut message = ((HEADER + body.len() * 4) as u32).to_ne_bytes().to_vec();
        message.extend((kind as u16).to_ne_bytes());
        message.extend([0; 10]);
        message.extend(body.iter().flat_map(|field| field.to_ne_bytes()));
        message
    }

    #[test]
    fn an_answer_lists_filters_until_it_ends() {
        let info = |priority| u32::from(priority) << 16 | 0x300;
        let filter = |Filter { handle, priority }| {
            let kind = libc::RTM_NEWTFILTER.into();
            message(kind, &[0, 7, handle, HOOKS[0], info(priority)])
        };
        let filters = [(0, 9), (IN_OURS, 9), (3, 49_152)];
        let filters = filters.map(|(handle, priority)| Filter { handle, priority });
        let mut found = Vec::new();
        let first = filters[..2].iter().flat_map(|f| filter(*f)).collect::<Vec<_>>();
        assert_eq!(read(&first, &mut found), Ok(false));
        let last = [filter(filters[2]), message(libc::NLMSG_DONE, &[0])].concat();
        assert_eq!(read(&last, &mut found), Ok(true));
        assert_eq!(found, filters);
        let refused = message(libc::NLMSG_ERROR, &[(-libc::EPERM).cast_unsigned()]);
        assert_eq!(read(&refused, &mut found), Err(Errno::EPERM));
        for cut in 1..last.len() {
            let answer = read(&last[..cut], &mut Vec::new());
            assert!(matches!(answer, Ok(false) | Err(Errno::EBADMSG)), "{cut}: {answer:?}");
        }
    }

    #[test]
    fn the_loopback_device_has_no_qdisc_of_this_kind() {
        let lo = if_nametoindex("lo").unwrap();
        assert_eq!(filters(lo), Ok(Vec::new()));
        assert!(clsact(libc::RTM_GETQDISC, lo).is_err());
    }
}
