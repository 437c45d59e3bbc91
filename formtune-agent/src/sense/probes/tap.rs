//! The probe of what guests' TCP sends again, on their tap devices.

use super::clsact::{self, Made};
use super::mapped::Mapped;
use super::{CgroupTable, ProbeError, Unsampled, load, map_error, take, verified};
use crate::sense::table::TableMaps;
use aya::maps::{Array, MapData};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use aya::{Ebpf, include_bytes_aligned};
use formtune_common::table::TableEntry;
use formtune_common::tcp::{TapControl, TapRow};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The object that build.rs made of `formtune-ebpf/src/bin/tap.rs`.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/formtune-tap"));

/// The programs and their hooks. The guest sends what comes in at its tap.
pub(super) const PROGRAMS: [(&str, TcAttachType); 2] =
    [(FORMTUNE_TAP_TX, TcAttachType::Ingress), ("formtune_tap_rx", TcAttachType::Egress)];

/// The first of the programs; also the name of its filter where there is no TCX.
pub const FORMTUNE_TAP_TX: &str = "formtune_tap_tx";

/// How a program gets onto a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TapMethod {
    /// A link, which ends with the agent however it ends; from 6.6 on.
    Tcx,
    /// A filter of the qdisc `clsact`, which an agent that is killed leaves behind.
    Clsact,
}

impl TapMethod {
    /// What the running kernel has.
    pub fn of_kernel() -> Self {
        // Asks only; a kernel without TCX does not know the question.
        match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
            Ok(_) => Self::Tcx,
            Err(_) => Self::Clsact,
        }
    }

    /// For people and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// How large the maps are made.
#[derive(Clone, Copy, Debug)]
pub struct TapSizes {
    /// Devices looked at at once.
    pub places: u32,
    /// Rows per place: the greatest possible CPU number and one.
    pub cpus: u32,
    /// Places of `TABLE`, a power of two.
    pub table: u32,
    /// Sets of flows, a power of two.
    pub flow_sets: u32,
}

/// The probe, loaded. It sees the devices it is attached to.
pub struct TapProbe {
    /// Which interface index has which place.
    pub interfaces: CgroupTable,
    rows: Arc<TapRows>,
    control: Array<MapData, TapControl>,
    method: TapMethod,
    ebpf: Ebpf,
}

/// What the programs count, readable by everybody at any time.
pub struct TapRows {
    rows: Mapped<TapRow>,
    cpus: u32,
    unsampled: Unsampled,
}

impl TapRows {
    /// What all CPUs counted at a place since the probe was loaded.
    pub fn at(&self, place: u32) -> TapRow {
        let mut sum = TapRow::default();
        for cpu in 0..self.cpus {
            let row = self.rows.get(place * self.cpus + cpu);
            for (sum, way) in sum.ways.iter_mut().zip(row.ways) {
                sum.add(&way);
            }
        }
        sum
    }

    /// Segments of flows that are not followed, on all devices since it was loaded.
    pub fn unsampled(&self) -> u64 {
        self.unsampled.count()
    }
}

/// Both programs on one device; detached when dropped, and the qdisc that was made for them goes
/// then, if nobody else uses it.
pub struct TapLinks {
    #[expect(dead_code, reason = "detach when dropped, before the qdisc")]
    links: [SchedClassifierLink; 2],
    #[expect(dead_code, reason = "removed when dropped")]
    qdisc: Option<Made>,
}

impl TapProbe {
    /// Loads both programs.
    ///
    /// # Errors
    /// [`ProbeError`], one line.
    pub fn load(
        sizes: TapSizes,
        method: TapMethod,
        control: TapControl,
        seed: u64,
    ) -> Result<Self, ProbeError> {
        let constants = [
            ("TABLE_MASK", sizes.table - 1),
            ("FLOWS_MASK", sizes.flow_sets - 1),
            ("ROWS_PER_PLACE", sizes.cpus),
            ("SEED_LOW", seed as u32),
            ("SEED_HIGH", (seed >> 32) as u32),
        ];
        let rows = sizes.places * sizes.cpus;
        let lengths = [
            ("ROWS", rows),
            ("TABLE", sizes.table),
            ("SPILL", sizes.table),
            ("FLOWS", sizes.flow_sets),
        ];
        let mut ebpf = load(OBJECT, &constants, &lengths)?;
        let rows = Mapped::of(&mut ebpf, "ROWS", rows)?;
        let rows = TapRows { rows, cpus: sizes.cpus, unsampled: Unsampled::of(&mut ebpf)? };
        let interfaces = CgroupTable::of(&mut ebpf)?;
        let mut map = Array::try_from(take(&mut ebpf, "CONTROL")?).map_err(aya::EbpfError::from)?;
        map.set(0, control, 0).map_err(aya::EbpfError::from)?;
        let rows = Arc::new(rows);
        let mut probe = Self { interfaces, rows, control: map, method, ebpf };
        for (name, _) in PROGRAMS {
            let program = probe.program(name)?;
            verified(|| program.load())?;
        }
        Ok(probe)
    }

    /// Loads and attaches to one device only, which has place 0; for benchmarks.
    ///
    /// # Errors
    /// One line.
    pub fn alone(device: &str, sizes: TapSizes) -> Result<(Self, TapLinks), String> {
        let method = TapMethod::of_kernel();
        let mut probe = Self::load(sizes, method, TapControl::default(), 1)
            .map_err(|error| error.to_string())?;
        let index = nix::net::if_::if_nametoindex(device).map_err(|error| error.to_string())?;
        let entry = TableEntry { cgroup_id: index.into(), slot: 0, spilled: 0 };
        probe.interfaces.set(index & (sizes.table - 1), entry)?;
        let links = probe.attach(device)?;
        Ok((probe, links))
    }

    /// How it is attached.
    pub fn method(&self) -> TapMethod {
        self.method
    }

    /// Attaches both programs to a device, before whatever else is there.
    ///
    /// # Errors
    /// Why not, one line; the device is then as it was.
    pub fn attach(&mut self, device: &str) -> Result<TapLinks, String> {
        let qdisc = match self.method {
            TapMethod::Tcx => None,
            TapMethod::Clsact => clsact::make(device)?,
        };
        let handle = clsact::handle(qdisc.as_ref());
        let [tx, rx] = PROGRAMS;
        let tx = self.attach_one(device, tx, handle).map_err(|error| error.to_string())?;
        let rx = self.attach_one(device, rx, handle).map_err(|error| error.to_string())?;
        Ok(TapLinks { links: [tx, rx], qdisc })
    }

    fn attach_one(
        &mut self,
        device: &str,
        (name, hook): (&'static str, TcAttachType),
        handle: TcHandle,
    ) -> Result<SchedClassifierLink, ProbeError> {
        let method = self.method;
        let program = self.program(name)?;
        let link = match method {
            TapMethod::Tcx => {
                let first = TcAttachOptions::TcxOrder(LinkOrder::first());
                program.attach_with_options(device, hook, first)?
            }
            TapMethod::Clsact => {
                let mut attach = |priority| {
                    let options = NlOptions { priority, handle, ..NlOptions::default() };
                    program.attach_with_options(device, hook, TcAttachOptions::Netlink(options))
                };
                // The first priority may be that of another kind of filter.
                attach(clsact::priority(device, hook)).or_else(|_| attach(0))?
            }
        };
        Ok(program.take_link(link)?)
    }

    fn program(&mut self, name: &'static str) -> Result<&mut SchedClassifier, ProbeError> {
        let program = self.ebpf.program_mut(name).ok_or(ProbeError::Object(name))?;
        Ok(program.try_into()?)
    }

    /// Has the programs heed this from now on.
    ///
    /// # Errors
    /// One line; it is as it was then.
    pub fn control(&mut self, control: TapControl) -> Result<(), String> {
        self.control.set(0, control, 0).map_err(|error| map_error("CONTROL", &error))
    }

    /// Its programs, to be asked what they cost.
    pub fn programs(&self) -> Vec<OwnedFd> {
        super::programs(&self.ebpf)
    }

    /// What it counts.
    pub fn rows(&self) -> Arc<TapRows> {
        self.rows.clone()
    }
}
