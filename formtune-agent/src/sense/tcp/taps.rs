//! The thread that follows tap devices: finds those of each VM, and attaches the probe. Attaching
//! waits for a lock of the kernel's, reading `/proc` takes time: neither must hold up the sampling
//! loop.
//!
//! A VM's devices are looked for when it appears, some more times at growing intervals, and
//! when the kernel reports new devices. One that vanishes takes the programs with it; its
//! place is freed then. A device is one VM's at a time.

use super::super::probes::{Owner, TapLinks, TapMethod, TapProbe, TapSizes};
use super::super::table::Table;
use super::find::taps_of;
use super::guest::{Published, lock};
use super::links::Links;
use super::places::{Places, REST, Refused};
use formtune_common::tcp::TapControl;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Orders and the request to stop are looked for this often.
const POLL_MS: u8 = 100;
/// A VM's devices are looked for again after this, doubled each time.
const LOOK_FIRST: Duration = Duration::from_millis(100);
const LOOK_LAST: Duration = Duration::from_secs(60);
/// With a new device all VMs' devices are looked for after this, for the one that is to get it
/// must open it first; and again after that.
const LOOK_NEWS: Duration = Duration::from_millis(300);
const LOOK_NEWS_AGAIN: Duration = Duration::from_secs(6);
/// The longest pause where the kernel's news of devices cannot be had.
const LOOK_LAST_BLIND: Duration = Duration::from_secs(2);

/// What the thread is told.
pub enum Order {
    /// The cgroup of a VM that appeared, or whose groups are others now.
    Track(PathBuf),
    /// It is gone.
    Untrack(PathBuf),
    /// Follow one in 2^this flows.
    Sample(u32),
}

pub struct Follower {
    probe: TapProbe,
    control: TapControl,
    published: Arc<Mutex<Published>>,
    links: Option<Links>,
    table: Table,
    places: Places,
    /// Whether it was said that they do not suffice.
    no_room_said: bool,
    vms: BTreeMap<PathBuf, Vm>,
    /// All network devices there were at the last news.
    devices: BTreeSet<u32>,
    why: Option<String>,
    /// Given back last. Links need none.
    owner: Option<Owner>,
}

struct Vm {
    /// Devices that are looked at; what is counted there is published.
    taps: BTreeMap<u32, Tap>,
    /// Devices that are not.
    failed: BTreeSet<u32>,
    look_at: Instant,
    look_next: Duration,
}

struct Tap {
    place: u32,
    links: TapLinks,
}

impl Follower {
    pub fn new(probe: TapProbe, sizes: TapSizes, published: Arc<Mutex<Published>>) -> Self {
        let links = Links::open();
        if let Err(error) = &links {
            tracing::debug!("no news of network devices: {error}");
        }
        Self {
            probe,
            control: TapControl::default(),
            published,
            links: links.ok(),
            table: Table::new(sizes.table),
            places: Places::new(sizes.places),
            no_room_said: false,
            vms: BTreeMap::new(),
            devices: devices(),
            why: None,
            owner: None,
        }
    }

    /// Until told to stop; the programs leave the devices when this returns.
    pub fn run(mut self, orders: &Receiver<Order>, stop: &AtomicBool) {
        // Also where no VM comes. Whether it works matters when a device is to be looked at.
        if let Err(why) = self.own() {
            tracing::debug!("network devices: {why}");
        }
        while !stop.load(Ordering::Relaxed) {
            self.wait();
            let mut changed = false;
            for order in orders.try_iter() {
                changed |= self.obey(order);
            }
            if self.links.as_ref().is_some_and(Links::changed) {
                self.heed_news();
            }
            changed |= self.look();
            if changed {
                self.publish();
            }
        }
    }

    fn wait(&self) {
        match &self.links {
            Some(links) => {
                let mut fds = [PollFd::new(links.as_fd(), PollFlags::POLLIN)];
                // Interrupted: looked for again below.
                let _ = poll(&mut fds, PollTimeout::from(POLL_MS));
            }
            None => std::thread::sleep(Duration::from_millis(POLL_MS.into())),
        }
    }

    /// Whether something is to be published.
    fn obey(&mut self, order: Order) -> bool {
        match order {
            Order::Track(path) => {
                let now = Instant::now();
                self.vms.entry(path).or_insert_with(|| Vm::new(now)).look_soon(now);
                false
            }
            Order::Untrack(path) => {
                let Some(vm) = self.vms.remove(&path) else { return false };
                for (index, tap) in vm.taps {
                    self.let_go(&path, index, tap);
                }
                // What it counted is not the next VM's that gets its path.
                lock(&self.published).vms.remove(path.as_os_str());
                true
            }
            Order::Sample(shift) => {
                let control = self.control.with_shift(shift);
                match self.probe.control(control) {
                    Ok(()) => self.control = control,
                    Err(error) => {
                        tracing::warn!("as many TCP flows are followed as before: {error}");
                    }
                }
                true
            }
        }
    }

    /// Something happened to some network device.
    fn heed_news(&mut self) {
        let (now, devices) = (Instant::now(), devices());
        let new = !devices.is_subset(&self.devices);
        for vm in self.vms.values_mut() {
            if vm.taps.keys().any(|index| !devices.contains(index)) {
                vm.look_at = now;
            }
            if new && vm.look_next > LOOK_NEWS {
                vm.look_at = vm.look_at.min(now + LOOK_NEWS);
                vm.look_next = LOOK_NEWS_AGAIN;
            }
        }
        self.devices = devices;
    }

    /// Looks for the devices of the VMs whose turn it is; whether there are others now.
    fn look(&mut self) -> bool {
        let now = Instant::now();
        let last = if self.links.is_some() { LOOK_LAST } else { LOOK_LAST_BLIND };
        let due: Vec<PathBuf> =
            self.vms.iter().filter(|(_, vm)| vm.look_at <= now).map(|(p, _)| p.clone()).collect();
        let mut changed = false;
        for path in due {
            let Some(mut vm) = self.vms.remove(&path) else { continue };
            vm.look_at = now + vm.look_next;
            vm.look_next = (vm.look_next * 2).min(last);
            let found = taps_of(&path);
            let gone: Vec<u32> =
                vm.taps.keys().filter(|index| !found.contains_key(index)).copied().collect();
            for index in gone {
                if let Some(tap) = vm.taps.remove(&index) {
                    self.let_go(&path, index, tap);
                    changed = true;
                }
            }
            vm.failed.retain(|index| found.contains_key(index));
            for (index, name) in found {
                if vm.taps.contains_key(&index) {
                    continue;
                }
                changed = true;
                match self.attach(&path, index, &name) {
                    Ok(tap) => {
                        vm.failed.remove(&index);
                        vm.taps.insert(index, tap);
                    }
                    Err(why) => self.refuse(&mut vm, index, &name, &why),
                }
            }
            self.vms.insert(path, vm);
        }
        changed
    }

    /// A device of `vm` is not looked at. Says so once for each; of those for which there is no
    /// room, for the first one only.
    fn refuse(&mut self, vm: &mut Vm, index: u32, name: &str, why: &Refused) {
        let first = match why {
            // What rests is free in a moment.
            Refused::NoRoom(_) if self.places.expects() => {
                vm.look_at = vm.look_at.min(Instant::now() + REST);
                vm.failed.insert(index);
                return;
            }
            Refused::NoRoom(_) => !std::mem::replace(&mut self.no_room_said, true),
            Refused::Other(_) => !vm.failed.contains(&index),
        };
        vm.failed.insert(index);
        self.why = Some(format!("{name}: {why}"));
        if first {
            tracing::warn!("tap device {name} is not looked at: {why}");
        }
    }

    /// Sees to it that filters on devices may be this agent's, and that no dead one has any there.
    ///
    /// # Errors
    /// Why not, one line.
    fn own(&mut self) -> Result<(), String> {
        if self.probe.method() == TapMethod::Tcx || self.owner.is_some() {
            return Ok(());
        }
        let owner = Owner::take()?;
        for left in owner.clear()? {
            match &left.failed {
                None => tracing::info!("{left}"),
                Some(_) => tracing::warn!("{left}"),
            }
        }
        self.owner = Some(owner);
        Ok(())
    }

    /// # Errors
    /// Why not.
    fn attach(&mut self, vm: &Path, index: u32, name: &str) -> Result<Tap, Refused> {
        self.own()?;
        self.take_over(index)?;
        let place = self.places.take(Instant::now())?;
        let before = self.probe.rows().at(place);
        let attached =
            self.table.insert(&mut self.probe.interfaces, index.into(), place).and_then(|()| {
                self.probe.attach(name).inspect_err(|_| {
                    let _ = self.table.remove(&mut self.probe.interfaces, index.into(), place);
                })
            });
        match attached {
            Ok(links) => {
                let mut published = lock(&self.published);
                published.vms.entry(vm.into()).or_default().add(index, name, place, before);
                Ok(Tap { place, links })
            }
            Err(why) => {
                self.places.put_back(place);
                Err(why.into())
            }
        }
    }

    /// Sees to it that no VM but the one that is looked at has a device. Its process may have
    /// moved, and the VM that it has left is not looked at every time.
    ///
    /// # Errors
    /// Another VM has it still, one line.
    fn take_over(&mut self, index: u32) -> Result<(), String> {
        let other = self.vms.iter_mut().find(|(_, vm)| vm.taps.contains_key(&index));
        let Some((path, vm)) = other else { return Ok(()) };
        if taps_of(path).contains_key(&index) {
            return Err(format!("{} has it as well", path.display()));
        }
        let path = path.clone();
        if let Some(tap) = vm.taps.remove(&index) {
            self.let_go(&path, index, tap);
        }
        Ok(())
    }

    fn let_go(&mut self, vm: &Path, index: u32, tap: Tap) {
        // Off the device first; it may be gone already.
        drop(tap.links);
        if let Some(watched) = lock(&self.published).vms.get_mut(vm.as_os_str()) {
            watched.remove(index, &self.probe.rows());
        }
        let interfaces = &mut self.probe.interfaces;
        if let Err(error) = self.table.remove(interfaces, index.into(), tap.place) {
            tracing::warn!("interface {index} may be counted on: {error}");
        }
        let now = Instant::now();
        self.places.free(tap.place, now);
        // Somebody may be waiting for it.
        for vm in self.vms.values_mut().filter(|vm| !vm.failed.is_empty()) {
            vm.look_at = vm.look_at.min(now + REST);
        }
    }

    /// Tells the state.
    fn publish(&self) {
        let mut published = lock(&self.published);
        published.health.taps = self.vms.values().map(|vm| vm.taps.len() as u32).sum();
        published.health.taps_not_measured =
            self.vms.values().map(|vm| vm.failed.len() as u32).sum();
        published.health.why.clone_from(&self.why);
        published.health.sampling_shift = self.control.sampling_shift;
    }
}

impl Vm {
    fn new(now: Instant) -> Self {
        Self { taps: BTreeMap::new(), failed: BTreeSet::new(), look_at: now, look_next: LOOK_FIRST }
    }

    /// Looks now, and again shortly: a device is there before the VM's process holds it.
    fn look_soon(&mut self, now: Instant) {
        self.look_at = now;
        self.look_next = LOOK_FIRST;
    }
}

/// Indices of all network devices.
fn devices() -> BTreeSet<u32> {
    let listed = nix::net::if_::if_nameindex();
    listed.iter().flatten().map(|device| device.index()).collect()
}
