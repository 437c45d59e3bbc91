//! What guests' own TCP sends again: the handle of the thread that follows tap devices.

use super::super::ProbeState;
use super::super::probes::{FORMTUNE_TAP_TX, ProbeError, TapMethod, TapProbe, TapRows, TapSizes};
use super::super::slots::possible_cpus;
use super::taps::{Follower, Order};
use super::unavailable;
use super::watched::{GuestCounts, Watched};
use formtune_common::tcp::{TapControl, TapRow};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What is missing without it.
pub(super) const WITHOUT: &str = "without it retransmissions of the guests' TCP are not counted";
/// Tap devices per VM to make room for.
const TAPS_PER_VM: u32 = 2;
/// Most kernel memory that rows may take, bytes.
const ROWS_MAX_BYTES: u64 = 64 << 20;
/// 65,536 flows, 4 MiB.
const FLOW_SETS: u32 = 1 << 14;

/// What is seen and what is not.
#[derive(Clone, Debug)]
pub struct GuestHealth {
    /// The probe.
    pub state: ProbeState,
    /// How it gets onto devices.
    pub method: TapMethod,
    /// Devices looked at.
    pub taps: u32,
    /// Devices of VMs that are not looked at: no room, or attaching failed.
    pub taps_not_measured: u32,
    /// Why, of the last one; `None` if there never was one.
    pub why: Option<String>,
    /// One in 2^this flows is followed, and what it sends again counts 2^this times.
    pub sampling_shift: u32,
    /// Segments of flows that were left out for that reason.
    pub unsampled: u64,
}

/// What the thread tells: which devices are whose, and its state.
pub(super) struct Published {
    /// By cgroup; as bytes, which are fast to compare.
    pub vms: BTreeMap<OsString, Watched>,
    pub health: GuestHealth,
}

pub(super) struct Guest {
    published: Arc<Mutex<Published>>,
    /// `None` without the probe.
    rows: Option<Arc<TapRows>>,
    orders: Option<Sender<Order>>,
    /// The probe's, to be asked what they cost.
    programs: Vec<OwnedFd>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    /// Loads the probe, and starts the thread. Without either, all else still works.
    pub fn open(max_vms: u32, method: TapMethod) -> Self {
        let (probe, state, sizes) = match load(max_vms, method) {
            Ok((probe, sizes)) => (Some((probe, sizes)), ProbeState::Loaded, sizes.places),
            Err(error) => (None, unavailable(FORMTUNE_TAP_TX, &error, WITHOUT), 0),
        };
        tracing::debug!("tap devices: {state:?} by {}, {sizes} at most", method.name());
        let health = GuestHealth {
            state,
            method,
            taps: 0,
            taps_not_measured: 0,
            why: None,
            sampling_shift: 0,
            unsampled: 0,
        };
        let published = Published { vms: BTreeMap::new(), health };
        let mut guest = Self {
            published: Arc::new(Mutex::new(published)),
            rows: probe.as_ref().map(|(probe, _)| probe.rows()),
            orders: None,
            programs: probe.as_ref().map_or_else(Vec::new, |(probe, _)| probe.programs()),
            stop: Arc::new(AtomicBool::new(false)),
            thread: None,
        };
        if let Some((probe, sizes)) = probe {
            guest.start(probe, sizes);
        }
        guest
    }

    fn start(&mut self, probe: TapProbe, sizes: TapSizes) {
        let (orders, inbox) = channel();
        let follower = Follower::new(probe, sizes, self.published.clone());
        let stop = self.stop.clone();
        let started = std::thread::Builder::new()
            .name("formtune-taps".into())
            .spawn(move || follower.run(&inbox, &stop));
        match started {
            Ok(thread) => (self.thread, self.orders) = (Some(thread), Some(orders)),
            Err(error) => {
                lock(&self.published).health.state = ProbeState::Unavailable {
                    program: FORMTUNE_TAP_TX,
                    why: format!("no thread: {error}"),
                    remedy: format!("raise the limit on threads; {WITHOUT}"),
                };
            }
        }
    }

    /// Takes the probe's programs.
    pub fn programs(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.programs)
    }

    pub fn track(&self, vm: &Path) {
        self.order(Order::Track(vm.into()));
    }

    pub fn untrack(&self, vm: &Path) {
        // Another VM may get its path before the thread has obeyed.
        lock(&self.published).vms.remove(vm.as_os_str());
        self.order(Order::Untrack(vm.into()));
    }

    /// From now on one in 2^shift flows is followed.
    pub fn set_sampling_shift(&self, shift: u32) {
        self.order(Order::Sample(shift));
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // Fails only where the thread has panicked, which the counts then show.
            let _ = orders.send(order);
        }
    }

    /// As of now; `None` before the first device of the VM is known.
    pub fn counts(&self, vm: &Path) -> Option<GuestCounts> {
        let rows = self.rows.as_ref()?;
        Some(lock(&self.published).vms.get(vm.as_os_str())?.counts(rows))
    }

    pub fn health(&self) -> GuestHealth {
        let unsampled = self.rows.as_ref().map_or(0, |rows| rows.unsampled());
        GuestHealth { unsampled, ..lock(&self.published).health.clone() }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // At most one poll; it takes the programs off the devices.
            let _ = thread.join();
        }
    }
}

/// Nothing is ever held while something can panic.
pub(super) fn lock(published: &Mutex<Published>) -> MutexGuard<'_, Published> {
    published.lock().unwrap_or_else(PoisonError::into_inner)
}

fn load(max_vms: u32, method: TapMethod) -> Result<(TapProbe, TapSizes), ProbeError> {
    let cpus = possible_cpus();
    let most = ROWS_MAX_BYTES / (u64::from(cpus) * size_of::<TapRow>() as u64);
    let places = max_vms.saturating_mul(TAPS_PER_VM).clamp(1, most.clamp(1, 1 << 20) as u32);
    let table = places.saturating_mul(4).next_power_of_two().clamp(1 << 8, 1 << 16);
    let sizes = TapSizes { places, cpus, table, flow_sets: FLOW_SETS };
    Ok((TapProbe::load(sizes, method, TapControl::default(), seed())?, sizes))
}

/// From the kernel's random numbers; without them, which cannot be, from the clock.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}
