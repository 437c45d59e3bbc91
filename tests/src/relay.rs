//! A relay in front of libvirtd's socket that looks at every message of a client's and can
//! break in at any of them: end the client, end the connection, or keep the message back.

use crate::injected::asked_of_libvirt;
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// No message is longer (`VIR_NET_MESSAGE_MAX` of libvirt).
const LONGEST: usize = 32 << 20;

/// What becomes of a message.
#[derive(Debug)]
pub enum Fate {
    /// It goes on to libvirtd.
    Pass,
    /// It goes on, and the client is told nothing any more: SIGKILL.
    PassAndKill,
    /// The client is killed and the message lost.
    Kill,
    /// It goes on, and the connection is cut.
    PassAndCut,
    /// The connection is cut and the message lost.
    Cut,
    /// The client is killed; the message goes on once that is asked for.
    KillAndHold(Receiver<()>),
    /// The connection is cut; the message goes on once that is asked for.
    CutAndHold(Receiver<()>),
}

/// Decides about a client's message; the second argument is what it has libvirt set, as
/// domain and value, if it does.
type Decide = Box<dyn FnMut(Option<(String, u64)>) -> Fate + Send>;

/// The running relay. Dropping it takes no new connections; those that are there go on.
#[derive(Debug)]
pub struct Relay {
    path: PathBuf,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Listens at `path` for clients of the libvirtd at `libvirtd`. `decide` sees the
    /// messages of all of them, in the order in which they arrive.
    pub fn start(
        libvirtd: &Path,
        path: PathBuf,
        decide: impl FnMut(Option<(String, u64)>) -> Fate + Send + 'static,
    ) -> Result<Self> {
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).context("failed to listen")?;
        let decide: Arc<Mutex<Decide>> = Arc::new(Mutex::new(Box::new(decide)));
        let ended = Arc::new(AtomicBool::new(false));
        let (until, libvirtd) = (Arc::clone(&ended), libvirtd.to_owned());
        let thread = std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if until.load(Ordering::SeqCst) {
                    return;
                }
                // A client that finds nobody is cut off, as it would be without the relay.
                let Ok(server) = UnixStream::connect(&libvirtd) else { continue };
                let decide = Arc::clone(&decide);
                std::thread::spawn(move || drop(relay(&client, &server, &decide)));
            }
        });
        Ok(Self { path, ended, thread: Some(thread) })
    }

    /// For clients.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.path.display())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Serves one connection to its end.
fn relay(client: &UnixStream, server: &UnixStream, decide: &Mutex<Decide>) -> io::Result<()> {
    let (mut answers, mut to_client) = (server.try_clone()?, client.try_clone()?);
    let back = std::thread::spawn(move || {
        let _ = io::copy(&mut answers, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Both);
    });
    let result = messages(client, server, decide);
    // libvirtd does what it was asked for before it notices that nobody waits any more.
    let _ = server.shutdown(Shutdown::Write);
    let _ = client.shutdown(Shutdown::Both);
    let _ = back.join();
    result
}

fn messages(
    mut client: &UnixStream,
    mut server: &UnixStream,
    decide: &Mutex<Decide>,
) -> io::Result<()> {
    let kill = || {
        let peer = getsockopt(client, PeerCredentials)?;
        io::Result::Ok(kill(Pid::from_raw(peer.pid()), Signal::SIGKILL)?)
    };
    loop {
        // Each begins with its length, which counts itself.
        let mut message = vec![0; 4];
        client.read_exact(&mut message)?;
        let length = u32::from_be_bytes([message[0], message[1], message[2], message[3]]) as usize;
        if !(4..=LONGEST).contains(&length) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        message.resize(length, 0);
        client.read_exact(&mut message[4..])?;
        let fate = {
            let mut decide = decide.lock().unwrap_or_else(PoisonError::into_inner);
            decide(asked_of_libvirt(&message))
        };
        let dies = matches!(fate, Fate::KillAndHold(_));
        match fate {
            Fate::Pass => server.write_all(&message)?,
            Fate::PassAndKill => {
                server.write_all(&message)?;
                return kill();
            }
            Fate::Kill => return kill(),
            Fate::PassAndCut => return server.write_all(&message),
            Fate::Cut => return Ok(()),
            Fate::KillAndHold(release) | Fate::CutAndHold(release) => {
                if dies {
                    kill()?;
                }
                client.shutdown(Shutdown::Both)?;
                // Nobody is left to ask for it: it is lost.
                if release.recv().is_ok() {
                    server.write_all(&message)?;
                }
                return Ok(());
            }
        }
    }
}
