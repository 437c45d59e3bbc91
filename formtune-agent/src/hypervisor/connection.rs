//! The thread that owns the connection, and the handle through which it is asked.

use super::sys::{self, Listener, Watched};
use super::{CALL_LIMIT, CONNECT_LIMIT, Domain, DomainEvent, HypervisorError, Version, Versions};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use virt::domain::SchedulerInfo;
use virt::enumutil::Enum;
use virt::error::{Error, ErrorNumber};
use virt::sys::{VIR_CONNECT_LIST_DOMAINS_ACTIVE, VIR_DOMAIN_AFFECT_LIVE};

/// First pause between two attempts to connect again; doubled up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(8);

/// A handle to libvirt; clones share one connection, which ends with the last of them.
#[derive(Clone, Debug)]
pub struct Hypervisor {
    handle: Arc<Handle>,
}

#[derive(Debug)]
struct Handle {
    uri: String,
    messages: Sender<Message>,
    shared: Shared,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _ = self.messages.send(Message::End);
    }
}

/// What the thread, its callbacks and the handles have in common.
#[derive(Clone, Debug, Default)]
struct Shared {
    subscribers: Arc<Mutex<Vec<Sender<DomainEvent>>>>,
    /// Somebody waited in vain: until the thread comes back, further calls fail at once.
    stuck: Arc<AtomicBool>,
    connected: Arc<AtomicBool>,
}

impl Shared {
    fn publish(&self, event: &DomainEvent) {
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|subscriber| subscriber.send(event.clone()).is_ok());
    }
}

enum Message {
    Call(Call),
    Closed { generation: u64 },
    End,
}

/// Whether the caller still waits; a call that was given up before it began is not made.
#[derive(Clone, Default)]
struct GivenUp(Arc<AtomicBool>);

/// Asks its question of the connection, or passes on why there is none.
type Make = Box<dyn FnOnce(Result<&Watched, HypervisorError>) + Send>;

struct Call {
    given_up: GivenUp,
    make: Make,
}

impl Hypervisor {
    /// Connects to libvirt, e.g. `qemu:///system` or
    /// `qemu+unix:///system?socket=/run/libvirt/libvirt-sock`. Waits up to
    /// [`CONNECT_LIMIT`].
    ///
    /// # Errors
    /// [`HypervisorError::Connect`] with libvirt's words, [`HypervisorError::NoAnswer`].
    pub fn connect(uri: &str) -> Result<Self, HypervisorError> {
        match Self::attach(uri)? {
            (hypervisor, None) => Ok(hypervisor),
            // Dropping the handle ends the attempts.
            (_, Some(error)) => Err(error),
        }
    }

    /// As [`Hypervisor::connect`], but a libvirt that is not there (yet) is no failure: the
    /// second value says why, the handle goes on trying in the background, and subscribers
    /// hear [`DomainEvent::Reconnected`] when it succeeds.
    ///
    /// # Errors
    /// [`HypervisorError::Connect`] where no attempt can be made at all.
    pub fn attach(uri: &str) -> Result<(Self, Option<HypervisorError>), HypervisorError> {
        let failed = |why: String| HypervisorError::Connect { uri: uri.into(), why };
        sys::start_event_loop().map_err(failed)?;
        let (messages, inbox) = mpsc::channel();
        let (opened, first) = mpsc::channel();
        let shared = Shared::default();
        let worker = Worker {
            uri: uri.to_owned(),
            shared: shared.clone(),
            // The thread's own sender, for the callbacks it registers.
            messages: messages.clone(),
            generation: 0,
        };
        std::thread::Builder::new()
            .name("libvirt-calls".into())
            .spawn(move || worker.run(&inbox, &opened))
            .map_err(|e| failed(format!("no thread: {e}")))?;
        let handle = Handle { uri: uri.to_owned(), messages, shared };
        let error = match first.recv_timeout(CONNECT_LIMIT) {
            Ok(Ok(())) => None,
            Ok(Err(why)) => Some(failed(why)),
            Err(_) => Some(HypervisorError::NoAnswer {
                uri: uri.into(),
                call: "connect".into(),
                limit: CONNECT_LIMIT,
            }),
        };
        Ok((Self { handle: Arc::new(handle) }, error))
    }

    /// Whether there is a connection at this moment.
    pub fn is_connected(&self) -> bool {
        self.handle.shared.connected.load(Ordering::Acquire)
    }

    /// As configured.
    pub fn uri(&self) -> &str {
        &self.handle.uri
    }

    /// The running domains.
    ///
    /// # Errors
    /// See [`HypervisorError`]. Waits up to [`CALL_LIMIT`].
    pub fn domains(&self) -> Result<Vec<Domain>, HypervisorError> {
        self.call("list domains", |connection| {
            let running = connection.connect().list_all_domains(VIR_CONNECT_LIST_DOMAINS_ACTIVE)?;
            // A domain that stops between the list and the questions is left out.
            Ok(running.iter().filter_map(describe).collect())
        })?
        .map_err(|e| refused("list domains", &e))
    }

    /// Version of libvirt and of the hypervisor behind it.
    ///
    /// # Errors
    /// See [`HypervisorError`]. Waits up to [`CALL_LIMIT`].
    pub fn versions(&self) -> Result<Versions, HypervisorError> {
        self.call("read versions", |connection| {
            let connect = connection.connect();
            let (libvirt, hypervisor) = (connect.lib_version()?, connect.hyp_version()?);
            Ok(Versions { libvirt: Version(libvirt), hypervisor: Version(hypervisor) })
        })?
        .map_err(|e| refused("read versions", &e))
    }

    /// Tells the receiver, from now on, what starts and stops. Any number may listen; one
    /// that falls behind is not waited for.
    pub fn subscribe(&self) -> Receiver<DomainEvent> {
        let (sender, receiver) = mpsc::channel();
        let shared = &self.handle.shared;
        shared.subscribers.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        receiver
    }

    /// The running domain's `cpu_shares`: `cpu.shares` on cgroup v1, `cpu.weight` on v2
    /// (libvirt does not convert).
    ///
    /// # Errors
    /// See [`HypervisorError`]. Waits up to [`CALL_LIMIT`].
    pub fn cpu_shares(&self, domain: &str) -> Result<u64, HypervisorError> {
        let name = domain.to_owned();
        let call = format!("read cpu_shares of domain {domain}");
        self.call(&call, move |connection| {
            let found = connection.connect().lookup_domain_by_name(&name)?;
            Ok(found.scheduler_parameters_flags(VIR_DOMAIN_AFFECT_LIVE)?.cpu_shares)
        })?
        .map_err(|e| about(domain, &call, &e))?
        .ok_or_else(|| HypervisorError::NoCpuShares { domain: domain.into() })
    }

    /// Sets the running domain's `cpu_shares`; its configuration is not touched. The scale
    /// is that of [`Hypervisor::cpu_shares`]; libvirt refuses more than 10,000 on cgroup v2.
    /// Where systemd is in charge the call can return shortly before the cgroup has it.
    ///
    /// # Errors
    /// See [`HypervisorError`]. Waits up to [`CALL_LIMIT`]; after
    /// [`HypervisorError::NoAnswer`] the value may still be set later.
    pub fn set_cpu_shares(&self, domain: &str, shares: u64) -> Result<(), HypervisorError> {
        let name = domain.to_owned();
        let call = format!("set cpu_shares of domain {domain} to {shares}");
        self.call(&call, move |connection| {
            let found = connection.connect().lookup_domain_by_name(&name)?;
            let shares = SchedulerInfo { cpu_shares: Some(shares), ..Default::default() };
            found.set_scheduler_parameters_flags(&shares, VIR_DOMAIN_AFFECT_LIVE)
        })?
        .map_err(|e| about(domain, &call, &e))
    }

    /// Has the thread do `ask`, and waits for it up to [`CALL_LIMIT`].
    fn call<T: Send + 'static>(
        &self,
        call: &str,
        ask: impl FnOnce(&Watched) -> Result<T, Error> + Send + 'static,
    ) -> Result<Result<T, Error>, HypervisorError> {
        let Handle { uri, messages, shared } = &*self.handle;
        let no_answer =
            || HypervisorError::NoAnswer { uri: uri.clone(), call: call.into(), limit: CALL_LIMIT };
        if shared.stuck.load(Ordering::Acquire) {
            return Err(no_answer());
        }
        let (answer, answered) = mpsc::channel();
        let given_up = GivenUp::default();
        let make = Box::new(move |connection: Result<&Watched, HypervisorError>| {
            let _ = answer.send(connection.map(ask));
        });
        let sent = messages.send(Message::Call(Call { given_up: given_up.clone(), make }));
        if sent.is_err() {
            return Err(HypervisorError::Disconnected { uri: uri.clone() });
        }
        match answered.recv_timeout(CALL_LIMIT) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => {
                given_up.0.store(true, Ordering::Release);
                shared.stuck.store(true, Ordering::Release);
                Err(no_answer())
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(HypervisorError::Disconnected { uri: uri.clone() })
            }
        }
    }
}

fn describe(domain: &virt::domain::Domain) -> Option<Domain> {
    Some(Domain {
        name: domain.name().ok()?,
        uuid: domain.uuid_string().ok()?,
        id: domain.id()?,
        vcpus: domain.info().ok()?.nr_virt_cpu,
    })
}

/// libvirt's answer about one domain, as an error of ours.
fn about(domain: &str, call: &str, error: &Error) -> HypervisorError {
    // A domain that does not run is "invalid operation: domain is not running".
    let absent = [ErrorNumber::NoDomain, ErrorNumber::OperationInvalid].map(Enum::Known);
    if absent.contains(&error.code()) {
        HypervisorError::NoDomain { domain: domain.into() }
    } else {
        refused(call, error)
    }
}

fn refused(call: &str, error: &Error) -> HypervisorError {
    HypervisorError::Call { call: call.into(), why: one_line(error) }
}

/// libvirt's message, which may span lines, on one.
fn one_line(error: &Error) -> String {
    error.message().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The callbacks' way to the thread and to the subscribers.
#[derive(Clone)]
struct Callbacks {
    shared: Shared,
    messages: Sender<Message>,
    generation: u64,
}

impl Listener for Callbacks {
    fn domain(&self, event: DomainEvent) {
        self.shared.publish(&event);
    }
    fn closed(&self) {
        let _ = self.messages.send(Message::Closed { generation: self.generation });
    }
}

struct Worker {
    uri: String,
    shared: Shared,
    messages: Sender<Message>,
    /// Counts connections, so that the end of an old one is not taken for the new one's.
    generation: u64,
}

impl Worker {
    fn run(mut self, inbox: &Receiver<Message>, opened: &Sender<Result<(), String>>) {
        let mut connection = None;
        match self.open() {
            Ok(opened_now) => {
                connection = Some(opened_now);
                // Whoever gave up waiting for it may have subscribed meanwhile. Whoever still
                // waits has not, and is not told of what never broke.
                self.shared.publish(&DomainEvent::Reconnected);
                let _ = opened.send(Ok(()));
            }
            Err(error) => drop(opened.send(Err(one_line(&error)))),
        }
        let mut backoff = BACKOFF_MIN;
        let mut retry_at = Instant::now() + backoff;
        loop {
            let message = if connection.is_some() {
                inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                inbox.recv_timeout(retry_at.saturating_duration_since(Instant::now()))
            };
            match message {
                Ok(Message::Call(call)) => self.make(call, connection.as_ref()),
                Ok(Message::Closed { generation }) if generation == self.generation => {
                    if let Some(broken) = connection.take() {
                        tracing::warn!(
                            uri = self.uri,
                            "libvirt went away; trying to connect again"
                        );
                        broken.close::<Callbacks>();
                        self.shared.connected.store(false, Ordering::Release);
                        self.shared.publish(&DomainEvent::Disconnected);
                    }
                    backoff = BACKOFF_MIN;
                    retry_at = Instant::now() + backoff;
                }
                Ok(Message::Closed { .. }) => {}
                Err(RecvTimeoutError::Timeout) => {
                    if let Ok(opened) = self.open() {
                        connection = Some(opened);
                        tracing::info!(uri = self.uri, "libvirt answers");
                        self.shared.publish(&DomainEvent::Reconnected);
                    } else {
                        backoff = (backoff * 2).min(BACKOFF_MAX);
                        retry_at = Instant::now() + backoff;
                    }
                }
                Ok(Message::End) | Err(RecvTimeoutError::Disconnected) => break,
            }
            self.shared.stuck.store(false, Ordering::Release);
        }
        if let Some(connection) = connection {
            connection.close::<Callbacks>();
        }
    }

    fn make(&self, call: Call, connection: Option<&Watched>) {
        if call.given_up.0.load(Ordering::Acquire) {
            return;
        }
        let disconnected = || HypervisorError::Disconnected { uri: self.uri.clone() };
        let Some(connection) = connection else { return (call.make)(Err(disconnected())) };
        (call.make)(Ok(connection));
        // The close callback may come late or, with a broken event loop, never.
        if !connection.connect().is_alive().unwrap_or(false) {
            let _ = self.messages.send(Message::Closed { generation: self.generation });
        }
    }

    fn open(&mut self) -> Result<Watched, Error> {
        self.generation += 1;
        let watched = Watched::open(
            &self.uri,
            Callbacks {
                shared: self.shared.clone(),
                messages: self.messages.clone(),
                generation: self.generation,
            },
        )?;
        self.shared.connected.store(true, Ordering::Release);
        Ok(watched)
    }
}
