//! libvirt: which domains run, when one starts or stops, and their `cpu_shares`.
//!
//! A [`Hypervisor`] is a cheap handle. Every call to libvirt is made by one thread of its
//! own and waited for with a time limit, so a libvirtd that hangs costs its callers that
//! limit once, and nothing after that until it answers again. The connection is watched by
//! libvirt's keep-alive and opened again, with back-off, when libvirtd goes away.
//!
//! Built without the feature `libvirt` (static test binaries), [`Hypervisor::connect`]
//! fails and says why.

use std::time::Duration;

#[cfg(feature = "libvirt")]
mod connection;
#[cfg(feature = "libvirt")]
mod sys;

/// How long [`Hypervisor::connect`] waits; libvirtd's first start probes QEMU for about
/// 8 s before it answers.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// How long any other call waits.
pub const CALL_LIMIT: Duration = Duration::from_secs(3);

/// A running domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Unique among the domains of one libvirtd.
    pub name: String,
    /// As libvirt prints it, in lower case with dashes.
    pub uuid: String,
    /// Unlike name and UUID, another one for every start.
    pub id: u32,
    /// Virtual CPUs online.
    pub vcpus: u32,
}

/// A version as libvirt counts: major × 1,000,000 + minor × 1,000 + release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(v) = self;
        write!(f, "{}.{}.{}", v / 1_000_000, v / 1_000 % 1_000, v % 1_000)
    }
}

/// Versions at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// Of libvirt's daemon.
    pub libvirt: Version,
    /// Of the hypervisor, usually QEMU.
    pub hypervisor: Version,
}

/// What a subscriber is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainEvent {
    /// A domain runs: started, restored from a file or migrated in.
    Started {
        /// The domain's name.
        name: String,
        /// Its UUID.
        uuid: String,
    },
    /// A domain no longer runs here: shut off, crashed, saved or migrated away.
    Stopped {
        /// The domain's name.
        name: String,
        /// Its UUID.
        uuid: String,
    },
    /// libvirtd is gone. Domains run on, and nothing is heard of them.
    Disconnected,
    /// libvirtd is back. What happened in between was not heard: list the domains again.
    Reconnected,
}

/// Why libvirt could not be asked, or what it answered.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The binary has no libvirt support.
    #[error("this formtune was built without libvirt support; build it with the feature `libvirt`")]
    NotBuilt,
    /// No connection could be made.
    #[error("failed to connect to libvirt at {uri}: {why}")]
    Connect {
        /// As configured.
        uri: String,
        /// libvirt's words.
        why: String,
    },
    /// The connection broke and is not back yet.
    #[error("libvirt at {uri} is not connected; trying again in the background")]
    Disconnected {
        /// As configured.
        uri: String,
    },
    /// libvirtd does not answer.
    #[error("libvirt at {uri} did not answer in {} s ({call})", limit.as_secs())]
    NoAnswer {
        /// As configured.
        uri: String,
        /// What was asked.
        call: String,
        /// How long was waited.
        limit: Duration,
    },
    /// No such domain, or it does not run.
    #[error("libvirt knows no running domain {domain}")]
    NoDomain {
        /// As asked for.
        domain: String,
    },
    /// The domain has no `cpu_shares`: no cpu controller, or a session connection.
    #[error("libvirt has no cpu_shares for domain {domain}: no cpu controller")]
    NoCpuShares {
        /// As asked for.
        domain: String,
    },
    /// Any other error.
    #[error("libvirt failed to {call}: {why}")]
    Call {
        /// What was asked.
        call: String,
        /// libvirt's words.
        why: String,
    },
}

#[cfg(feature = "libvirt")]
pub use connection::Hypervisor;

/// A connection to libvirt; without the feature `libvirt` there never is one.
#[cfg(not(feature = "libvirt"))]
#[derive(Clone, Debug)]
pub struct Hypervisor(std::convert::Infallible);

#[cfg(not(feature = "libvirt"))]
impl Hypervisor {
    /// # Errors
    /// Always [`HypervisorError::NotBuilt`].
    pub fn connect(_uri: &str) -> Result<Self, HypervisorError> {
        Err(HypervisorError::NotBuilt)
    }
    /// # Errors
    /// Always [`HypervisorError::NotBuilt`].
    pub fn attach(_uri: &str) -> Result<(Self, Option<HypervisorError>), HypervisorError> {
        Err(HypervisorError::NotBuilt)
    }
    /// Never called: there is no connection.
    pub fn is_connected(&self) -> bool {
        match self.0 {}
    }
    /// Never called: there is no connection.
    pub fn uri(&self) -> &str {
        match self.0 {}
    }
    /// Never called: there is no connection.
    pub fn domains(&self) -> Result<Vec<Domain>, HypervisorError> {
        match self.0 {}
    }
    /// Never called: there is no connection.
    pub fn versions(&self) -> Result<Versions, HypervisorError> {
        match self.0 {}
    }
    /// Never called: there is no connection.
    pub fn subscribe(&self) -> std::sync::mpsc::Receiver<DomainEvent> {
        match self.0 {}
    }
    /// Never called: there is no connection.
    pub fn cpu_shares(&self, _domain: &str) -> Result<u64, HypervisorError> {
        match self.0 {}
    }
    /// Never called: there is no connection.
    pub fn set_cpu_shares(&self, _domain: &str, _shares: u64) -> Result<(), HypervisorError> {
        match self.0 {}
    }
}
