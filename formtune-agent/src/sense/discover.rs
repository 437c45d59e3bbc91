//! The thread that watches for VMs, so that neither a slow libvirtd nor a large cgroup tree
//! holds up the sampling loop.

use super::inventory::{Change, Tree};
use crate::hypervisor::{Domain, DomainEvent, Hypervisor};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between scans of the whole tree, as a safety net under inotify.
pub const SCAN: Duration = Duration::from_secs(30);
/// The same where inotify does not see everything.
pub const SCAN_BLIND: Duration = Duration::from_millis(500);
/// libvirt's events and the request to stop are looked for this often.
const POLL_MS: u8 = 100;
/// How often, one poll apart, libvirt is asked for its domains when something changed: a new
/// cgroup is there a little before its domain is reported as running, and a libvirtd that was
/// just started takes up its running domains in the background.
const ASK_AGAIN: u8 = 5;

/// What the thread found.
#[derive(Debug)]
pub enum Found {
    /// In the cgroup tree.
    Change(Change),
    /// All domains that run, as libvirt lists them.
    Domains(Vec<Domain>),
}

/// Runs until dropped.
pub struct Discovery {
    found: Receiver<Found>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Discovery {
    /// Starts the thread; the first scan has been made when this returns.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(mut tree: Tree, hypervisor: Option<Hypervisor>) -> std::io::Result<Self> {
        let (sender, found) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let mut watcher =
            Watcher { sender, stop: stop.clone(), hypervisor, ask: ASK_AGAIN, changes: vec![] };
        // Subscribed before the first list, so that no start falls in between.
        let events = watcher.hypervisor.as_ref().map(Hypervisor::subscribe);
        watcher.ask_domains();
        tree.scan(&mut watcher.changes);
        watcher.pass_on();
        let thread = std::thread::Builder::new()
            .name("formtune-discover".into())
            .spawn(move || watcher.run(tree, events))?;
        Ok(Self { found, stop, thread: Some(thread) })
    }

    /// What was found since the last call.
    pub fn take(&self) -> impl Iterator<Item = Found> {
        self.found.try_iter()
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // At most one poll, and one call to libvirt within its own time limit.
            let _ = thread.join();
        }
    }
}

struct Watcher {
    sender: Sender<Found>,
    stop: Arc<AtomicBool>,
    hypervisor: Option<Hypervisor>,
    /// Lists of domains still to be asked for.
    ask: u8,
    changes: Vec<Change>,
}

impl Watcher {
    fn run(mut self, mut tree: Tree, events: Option<Receiver<DomainEvent>>) {
        let mut scanned = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let readable = match tree.events() {
                Some(fd) => {
                    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
                    poll(&mut fds, PollTimeout::from(POLL_MS)).is_ok_and(|n| n > 0)
                }
                None => {
                    std::thread::sleep(Duration::from_millis(POLL_MS.into()));
                    false
                }
            };
            if readable {
                tree.follow(&mut self.changes);
            }
            let interval = if tree.partly_blind() { SCAN_BLIND } else { SCAN };
            if scanned.elapsed() >= interval {
                tree.scan(&mut self.changes);
                scanned = Instant::now();
                // Events can be missed here as well.
                self.ask = self.ask.max(1);
            }
            for event in events.iter().flat_map(Receiver::try_iter) {
                match event {
                    DomainEvent::Started { .. } | DomainEvent::Stopped { .. } => {
                        self.ask = self.ask.max(1);
                    }
                    DomainEvent::Reconnected => {
                        self.ask = ASK_AGAIN;
                        tree.scan(&mut self.changes);
                    }
                    DomainEvent::Disconnected => {}
                }
            }
            let new_machine = self.changes.iter().any(
                |change| matches!(change, Change::Appeared(group, _) if group.machine.is_some()),
            );
            if new_machine {
                self.ask = ASK_AGAIN;
            }
            if self.ask > 0 {
                self.ask -= 1;
                let answered = self.ask_domains();
                // One that is gone says so when it is back; one that is slow is asked again.
                if !answered && self.hypervisor.as_ref().is_some_and(Hypervisor::is_connected) {
                    self.ask = self.ask.max(1);
                }
            }
            self.pass_on();
        }
    }

    /// Whether there was an answer (where there is nobody to be asked, that is one).
    fn ask_domains(&self) -> bool {
        let Some(hypervisor) = &self.hypervisor else { return true };
        match hypervisor.domains() {
            Ok(domains) => {
                self.send(Found::Domains(domains));
                true
            }
            // Connection losses are logged where they happen; cgroups go on telling.
            Err(error) => {
                tracing::debug!("{error}");
                false
            }
        }
    }

    fn pass_on(&mut self) {
        for change in std::mem::take(&mut self.changes) {
            self.send(Found::Change(change));
        }
    }

    fn send(&self, found: Found) {
        // Nobody listens any more: about to be stopped.
        let _ = self.sender.send(found);
    }
}
