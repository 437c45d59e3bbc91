//! Network of a test's own: a namespace, a lossy receiver, tap devices and frames.

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Puts the calling thread, and what it starts from now on, into a network namespace of its
/// own with `lo` up.
///
/// # Errors
/// Those of `unshare` and `ioctl`.
pub fn own_namespace() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    up("lo")
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: plain numbers and a union of such.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte.cast_signed();
    }
    request
}

/// Switches a device on.
///
/// # Errors
/// Those of `ioctl`.
pub fn up(name: &str) -> io::Result<()> {
    // SAFETY: a system call; the descriptor is a new one.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut request = request(name);
    // SAFETY: a request for a device's flags.
    unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Makes a tap device; it is there as long as the descriptor is.
///
/// # Errors
/// Those of `open` and `ioctl`.
pub fn tap(name: &str) -> io::Result<OwnedFd> {
    let tun = fs::File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: a request with name and flags.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    up(name)?;
    Ok(tun.into())
}

/// Makes a tap device that stays without anybody who holds it, until its namespace goes.
///
/// # Errors
/// Those of `open` and `ioctl`.
pub fn lasting_tap(name: &str) -> io::Result<()> {
    let tun = tap(name)?;
    // SAFETY: takes a number.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What sends whole frames out of a device, as the host does to a guest: one per `write`.
///
/// # Errors
/// Those of `socket` and `bind`.
pub fn sender(device: &str) -> io::Result<fs::File> {
    let index = nix::net::if_::if_nametoindex(device)?;
    // SAFETY: system calls; the descriptor is a new one, the address plain numbers.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = fs::File::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index.cast_signed();
        let length = size_of_val(&address) as u32;
        if libc::bind(fd, (&raw const address).cast(), length) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }
}

/// Gives a device an IPv4 address.
///
/// # Errors
/// Those of `ioctl`.
pub fn address(name: &str, address: [u8; 4], mask: [u8; 4]) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    for (call, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
        let mut request = request(name);
        let bytes = [0, 0].into_iter().chain(value);
        // SAFETY: an address family, a port that means nothing here, and an address.
        unsafe {
            request.ifr_ifru.ifru_addr.sa_family = libc::AF_INET as u16;
            let data = &mut request.ifr_ifru.ifru_addr.sa_data;
            data.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte.cast_signed());
            if libc::ioctl(socket.as_raw_fd(), call, &raw const request) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// Has a socket (and those that it accepts) drop this share of the segments that it is sent:
/// before TCP sees them, so that the sender has to send them again. In 65,536ths.
///
/// # Errors
/// Those of `setsockopt`.
pub fn drop_some(socket: &impl AsRawFd, share: u16) -> io::Result<()> {
    let code = |code, k| libc::sock_filter { code, jt: 0, jf: 1, k };
    // A = random; if (A & 0xffff) >= share, accept the whole, else nothing
    // (linux/filter.h: SKF_AD_OFF + SKF_AD_RANDOM).
    let mut program = [
        code(0x20, 0xffff_f000 + 56),
        code(0x54, 0xffff),
        code(0x35, share.into()),
        code(0x06, 0x4_0000),
        code(0x06, 0),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: a program of that length.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as u32,
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A socket that connects and hears no answer; does not wait for one.
///
/// # Errors
/// Those of the system calls.
pub fn deaf_caller(address: SocketAddr) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let caller = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    drop_some(&caller, u16::MAX)?;
    match connect(caller.as_raw_fd(), &SockaddrStorage::from(address)) {
        Err(Errno::EINPROGRESS) => Ok(caller),
        done => Err(io::Error::other(format!("not in progress: {done:?}"))),
    }
}

/// How many segments a socket has sent again (`tcpi_total_retrans`).
///
/// # Errors
/// Those of `getsockopt`.
pub fn sent_again(socket: &impl AsRawFd) -> io::Result<u64> {
    // SAFETY: plain numbers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as u32;
    // SAFETY: an option of at most that size.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(info.tcpi_total_retrans.into()) }
}

/// Limits a socket's segments to `bytes` of payload.
///
/// # Errors
/// Those of `setsockopt`.
pub fn max_segment(socket: &impl AsRawFd, bytes: i32) -> io::Result<()> {
    // SAFETY: an option of that size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_MAXSEG,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as u32,
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Segments that TCP sent again in the calling thread's namespace, as the kernel counts them.
///
/// # Errors
/// If `/proc` does not say.
pub fn retransmitted_segments() -> io::Result<u64> {
    retrans_segs(&fs::read_to_string("/proc/thread-self/net/snmp")?)
        .ok_or_else(|| io::Error::other("no RetransSegs in /proc/net/snmp"))
}

/// `RetransSegs` in a text like that of `/proc/net/snmp`.
pub fn retrans_segs(snmp: &str) -> Option<u64> {
    let mut tcp = snmp.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (tcp.next()?, tcp.next()?);
    let at = names.split_whitespace().position(|name| name == "RetransSegs")?;
    values.split_whitespace().nth(at)?.parse().ok()
}

/// `BPF_TCX_INGRESS` (include/uapi/linux/bpf.h).
pub const INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`.
pub const EGRESS: u32 = 47;

/// Names of the programs that are attached to a device by TCX, in their order.
///
/// # Errors
/// Those of `bpf`: `EINVAL` where there is no TCX.
pub fn tcx_programs(device: &str, hook: u32) -> io::Result<Vec<String>> {
    /// `BPF_PROG_QUERY` and its part of `union bpf_attr`.
    #[repr(C)]
    struct Query {
        interface: u32,
        hook: u32,
        flags: [u32; 2],
        ids: *mut u32,
        count: u32,
        rest: [u32; 9],
    }
    let mut ids = [0; 16];
    let mut query = Query {
        interface: nix::net::if_::if_nametoindex(device)?,
        hook,
        flags: [0; 2],
        ids: ids.as_mut_ptr(),
        count: ids.len() as u32,
        rest: [0; 9],
    };
    bpf(16, &mut query)?;
    ids[..query.count as usize].iter().map(|id| program_name(*id)).collect()
}

/// Name of a loaded program.
fn program_name(id: u32) -> io::Result<String> {
    // BPF_PROG_GET_FD_BY_ID
    let fd = bpf(13, &mut [id, 0, 0, 0])?;
    // SAFETY: a new descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    /// `BPF_OBJ_GET_INFO_BY_FD` and its part of `union bpf_attr`.
    #[repr(C)]
    struct Info {
        fd: i32,
        length: u32,
        info: *mut u8,
    }
    // `struct bpf_prog_info` up to its name, which lies behind 64 bytes.
    let mut info = [0_u8; 80];
    let length = info.len() as u32;
    bpf(15, &mut Info { fd: fd.as_raw_fd(), length, info: info.as_mut_ptr() })?;
    let name = info[64..].split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

pub(crate) fn bpf<T>(command: i32, attributes: &mut T) -> io::Result<i32> {
    let (at, size) = (std::ptr::from_mut(attributes), size_of::<T>());
    // SAFETY: attributes as the command takes them; the kernel checks their size.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, at, size) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as i32) }
}
