//! Where the agent listens: a Unix socket for this node's users, and loopback TCP for a
//! Prometheus on the same node. Never any other address: what is shown is not encrypted
//! and asks for no password.

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::unistd::{Gid, Group, chown};
use std::fs::{self, Permissions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Members of this group, where it exists, may read the agent without being root.
pub const GROUP: &str = "formtune";

/// Where to listen.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Unix socket; its folder is made where it is missing.
    pub socket: PathBuf,
    /// Loopback address, or `None` for the socket only.
    pub tcp: Option<SocketAddr>,
}

/// Why the agent cannot listen. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another agent answers there.
    #[error(
        "another agent is listening on {} (stop it, or set another `socket` in the configuration)",
        .0.display()
    )]
    InUse(PathBuf),
    /// Something that is not a socket is there.
    #[error("{} exists and is not a socket (remove it, or set another `socket`)", .0.display())]
    NotASocket(PathBuf),
    /// The socket could not be made.
    #[error("failed to listen on {}: {cause}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The address is not on the loopback interface.
    #[error(
        "refusing to listen on {0}: only loopback addresses are allowed, as nothing is encrypted \
         (use 127.0.0.1 or [::1], and a proxy in front of it to reach it from elsewhere)"
    )]
    NotLoopback(SocketAddr),
    /// The port could not be had.
    #[error("failed to listen on {addr}: {cause}{hint}")]
    Tcp {
        /// Address and port.
        addr: SocketAddr,
        /// Why.
        cause: io::Error,
        /// What to do, where that is known.
        hint: &'static str,
    },
}

/// Bound, not yet served.
#[derive(Debug)]
pub(super) struct Bound {
    pub unix: UnixListener,
    pub tcp: Option<TcpListener>,
    pub file: SocketFile,
}

pub(super) fn bind_all(to: &Listen) -> Result<Bound, ListenError> {
    // An agent with this very configuration is better named than its port.
    clear_stale(&to.socket)?;
    // TCP first: what can fail without a trace comes before what leaves a file.
    let tcp = to.tcp.map(bind_tcp).transpose()?;
    let (unix, file) = bind_unix(&to.socket)?;
    Ok(Bound { unix, tcp, file })
}

fn bind_tcp(addr: SocketAddr) -> Result<TcpListener, ListenError> {
    if !addr.ip().is_loopback() {
        return Err(ListenError::NotLoopback(addr));
    }
    let bound = TcpListener::bind(addr).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|cause| ListenError::Tcp {
        addr,
        hint: match cause.kind() {
            io::ErrorKind::AddrInUse => " (set another `listen` in the configuration)",
            _ => "",
        },
        cause,
    })
}

fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    let failed = |cause: io::Error| ListenError::Socket { path: path.into(), cause };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    clear_stale(path)?;
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .map_err(|errno| failed(errno.into()))?;
    let addr = UnixAddr::new(path).map_err(|errno| failed(errno.into()))?;
    bind(fd.as_raw_fd(), &addr).map_err(|errno| failed(errno.into()))?;
    let file = SocketFile::of(path).map_err(failed)?;
    // Before `listen`, nobody can connect: there is no moment at which the mode is wrong.
    if let Ok(Some(group)) = Group::from_name(GROUP) {
        chown(path, None, Some(Gid::from_raw(group.gid.as_raw()))).map_err(|e| failed(e.into()))?;
    }
    fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(failed)?;
    let backlog = Backlog::new(64).expect("64 is a valid backlog");
    listen(&fd, backlog).map_err(|errno| failed(errno.into()))?;
    Ok((UnixListener::from(fd), file))
}

/// Removes the socket of an agent that is dead; refuses that of one that is alive.
fn clear_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |cause: io::Error| ListenError::Socket { path: path.into(), cause };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.into()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        // A full backlog (EAGAIN) is a live agent too.
        Ok(_) => Err(ListenError::InUse(path.into())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(ListenError::InUse(path.into()))
        }
        Err(error) => Err(failed(error)),
    }
}

/// Our socket file; dropping it removes the file, unless somebody else's is there by now.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::symlink_metadata(path)?;
        Ok(Self { path: path.into(), inode: (meta.dev(), meta.ino()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("failed to remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_for_owner_and_group_and_goes_with_its_server() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/formtune.sock");
        let (listener, file) = bind_unix(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o660);
        assert!(matches!(bind_unix(&path), Err(ListenError::InUse(_))), "a live one is refused");
        assert!(path.exists());

        // An agent that was killed leaves its file behind.
        std::mem::forget(file);
        drop(listener);
        assert!(path.exists());
        let (listener, file) = bind_unix(&path).unwrap();
        drop((listener, file));
        assert!(!path.exists());
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("formtune.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind_unix(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");

        fs::remove_file(&path).unwrap();
        let (_listener, file) = bind_unix(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists(), "a socket made by somebody else since is not removed");
    }

    #[test]
    fn only_loopback_addresses_are_taken() {
        for addr in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "10.0.0.1:19752"] {
            let error = bind_tcp(addr.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains("only loopback"), "{error}");
            assert!(!error.contains('\n'));
        }
        let taken = bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let error = bind_tcp(taken.local_addr().unwrap()).unwrap_err().to_string();
        assert!(error.contains("set another `listen`"), "{error}");
    }
}
