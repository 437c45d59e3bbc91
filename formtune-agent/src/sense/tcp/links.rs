//! News of network devices, from the kernel's routing socket (rtnetlink(7)).

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// `RTMGRP_LINK`: devices come, change and go.
const GROUP_LINK: u32 = 1;

/// The subscription.
pub struct Links(OwnedFd);

impl Links {
    /// Subscribes.
    ///
    /// # Errors
    /// Those of `socket` and `bind`.
    pub fn open() -> nix::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let route = SockProtocol::NetlinkRoute;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, route)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUP_LINK))?;
        Ok(Self(fd))
    }

    /// Whether anything happened since the last call; also if news were lost.
    pub fn changed(&self) -> bool {
        let mut buffer = [0; 8192];
        let mut changed = false;
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(0) | Err(nix::errno::Errno::EAGAIN) => return changed,
                // News that did not fit are news as well.
                Ok(_) | Err(nix::errno::Errno::ENOBUFS) => changed = true,
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => return changed,
            }
        }
    }
}

impl AsFd for Links {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
