//! TCP retransmissions per VM, of two kinds: by the host's own TCP on behalf of the VM's
//! processes ([`host`]), and by the guest's, seen on its tap devices ([`guest`]).
//!
//! Each may be missing without the other, and neither is needed for anything else.

mod find;
mod guest;
mod host;
mod links;
mod places;
mod taps;
mod watched;

pub use guest::GuestHealth;
pub use host::{HostCounts, HostHealth};
pub use watched::GuestCounts;

use super::cgroup::Hierarchies;
use super::probes::{
    FORMTUNE_TAP_TX, Kernel, Left, Owner, ProbeError, RetransmitProbe, RetransmitSizes,
    TCP_RETRANSMIT_SKB, TapMethod, TapProbe, TapSizes,
};
use super::{ProbeState, SenseConfig};
use formtune_core::units::Nanos;
use guest::Guest;
use host::Host;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::Path;

/// What is known of one VM's TCP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TcpCounts {
    /// `None` while not measured.
    pub host: Option<HostCounts>,
    /// `None` while not measured: no tap device was ever known.
    pub guest: Option<GuestCounts>,
}

/// What is seen and what is not.
#[derive(Clone, Debug)]
pub struct TcpHealth {
    /// The probe of the host's sockets.
    pub host: HostHealth,
    /// The probe on tap devices.
    pub guest: GuestHealth,
}

/// Both sensors, running.
pub struct Tcp {
    host: Host,
    guest: Guest,
}

impl Tcp {
    /// Loads what can be loaded.
    pub fn open(
        kernel: Result<&Kernel, &ProbeError>,
        hierarchies: &Hierarchies,
        config: &SenseConfig,
    ) -> Self {
        let method = config.tap_method.unwrap_or_else(TapMethod::of_kernel);
        Self {
            host: Host::open(kernel, hierarchies, config.max_vms),
            guest: Guest::open(config.max_vms, method),
        }
    }

    /// Takes the programs of both, to be asked what they cost.
    pub fn programs(&mut self) -> Vec<OwnedFd> {
        let mut programs = self.host.programs();
        programs.extend(self.guest.programs());
        programs
    }

    /// A VM appeared, or its cgroups (in the `cpu` hierarchy) are others now.
    pub fn track(&mut self, vm: &Path, ids: &BTreeSet<u64>, now: Nanos) {
        self.host.track(vm, ids, now);
        self.guest.track(vm);
    }

    /// A VM is gone.
    pub fn untrack(&mut self, vm: &Path, now: Nanos) {
        self.host.untrack(vm, now);
        self.guest.untrack(vm);
    }

    /// From now on one in 2^shift of the guests' flows is followed, and counts as so many. The
    /// host's retransmissions are too rare to be sampled.
    pub fn set_sampling_shift(&mut self, shift: u32) {
        self.guest.set_sampling_shift(shift);
    }

    /// Tells the probes of cgroups that have come. Never waits for anything.
    pub fn look(&mut self, now: Nanos) {
        self.host.look(now);
    }

    /// A VM's counts since it was first seen, as of now.
    pub fn counts(&self, vm: &Path) -> TcpCounts {
        TcpCounts { host: self.host.counts(vm), guest: self.guest.counts(vm) }
    }

    /// What is seen and what is not.
    pub fn health(&self) -> TcpHealth {
        TcpHealth { host: self.host.health(), guest: self.guest.health() }
    }
}

/// Removes what agents that were killed left on the devices of this network namespace: filters,
/// which only kernels without TCX have.
///
/// # Errors
/// One line; among others, an agent that runs has filters there.
pub fn clear_taps() -> Result<Vec<Left>, String> {
    Owner::take()?.clear()
}

/// Loads the probe of the host's sockets with the least of maps, and unloads it again.
pub fn host_trial(hierarchies: &Hierarchies) -> ProbeState {
    if hierarchies.unified.is_none() {
        return host::no_unified();
    }
    let sizes = RetransmitSizes { slots: 1, table: 64, spill: 64 };
    let kernel = Kernel::open();
    let loaded = kernel.and_then(|kernel| RetransmitProbe::load(&kernel, sizes));
    match loaded {
        Ok(_) => ProbeState::Loaded,
        Err(error) => unavailable(TCP_RETRANSMIT_SKB, &error, host::WITHOUT),
    }
}

/// Loads the probe of tap devices with the least of maps, and unloads it again; says how it
/// would be attached.
pub fn guest_trial() -> (ProbeState, TapMethod) {
    let sizes =
        TapSizes { places: 1, cpus: super::slots::possible_cpus(), table: 64, flow_sets: 1 };
    let method = TapMethod::of_kernel();
    let state = match TapProbe::load(sizes, method, Default::default(), 0) {
        Ok(_) => ProbeState::Loaded,
        Err(error) => unavailable(FORMTUNE_TAP_TX, &error, guest::WITHOUT),
    };
    (state, method)
}

fn unavailable(program: &'static str, error: &ProbeError, without: &str) -> ProbeState {
    let remedy = match error {
        ProbeError::Btf(_) => "run a kernel 5.10 or later with CONFIG_DEBUG_INFO_BTF=y",
        ProbeError::Mmap(..) => "raise the limit on locked memory (LimitMEMLOCK=)",
        ProbeError::Load(_) | ProbeError::Program(_) | ProbeError::Object(_) => {
            "run a kernel 5.10 or later, not locked down, and the agent with CAP_NET_ADMIN"
        }
    };
    ProbeState::Unavailable {
        program,
        why: error.to_string(),
        remedy: format!("{remedy}; {without}"),
    }
}
