//! `formtune run`: one loop, which alone owns all state.
//!
//! Each tick: read ([`Sense`]), compose a [`Sample`], [`step`], carry out what is to be
//! enforced ([`Act`]), log what is new. Between two ticks it answers requests for a
//! [`Snapshot`](crate::export::Snapshot). HTTP, libvirt's events and signals have threads of
//! their own and reach it by messages only.

mod alone;
mod block;
mod logging;
mod privileges;
mod publish;
mod recording;
mod runq;
mod signals;
mod weights;

pub use logging::Format;

use crate::act::Act;
use crate::config::Config;
use crate::export::{
    Culprits, DecisionLog, HdrLog, Listen, Recent, Server, ServerHandle, SnapshotRequest,
    Snapshots, source,
};
use crate::hypervisor::Hypervisor;
use crate::record;
use crate::sense::Sense;
use crate::vm::Vm;
use alone::Alone;
use anyhow::{Context, Result, bail};
use formtune_core::plan::{Outcome, Plan};
use formtune_core::policy::Mode;
use formtune_core::sample::{HostSample, VmSample};
use formtune_core::units::{Nanos, VmId};
use formtune_core::{Sample, State, step};
use nix::time::{ClockId, clock_gettime};
use publish::{Facts, Seen};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use weights::Weights;

/// What `formtune run` was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration, command line applied.
    pub config: Config,
    /// Where it was read from.
    pub config_path: Option<PathBuf>,
    /// Form of the log.
    pub format: Format,
}

/// All that can happen to the loop.
#[derive(Debug)]
enum Event {
    /// Time for a sample.
    Tick,
    /// Somebody wants to see.
    Look(SnapshotRequest),
    /// Restore and leave.
    Stop(signals::Signal),
}

/// Runs until a signal asks it to stop, and restores every knob then.
///
/// # Errors
/// It cannot start: one line, nothing changed. Where it is the kernel that is not fit, what an
/// earlier, dead agent had left changed is restored first. Or a knob could not be restored on
/// the way out.
pub fn run(options: Options) -> Result<()> {
    // Before the first thread: threads inherit the mask, and only one shall get signals.
    let stops = signals::catch().context("failed to catch signals")?;
    logging::init(options.format);
    for notice in &options.config.notices {
        tracing::warn!("{notice}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .context("failed to make an event loop")?;
    let (mut agent, requests, http) = Agent::start(options)?;
    let stop = runtime.block_on(agent.until_stopped(requests, stops));
    tracing::info!("{stop}: restoring");
    agent.stop(http)
}

/// The loop's state.
struct Agent {
    config: Config,
    facts: Facts,
    sense: Sense,
    act: Act,
    recorder: Option<record::Writer>,
    hdr_log: Option<HdrLog>,
    state: State,
    seq: u64,
    /// Of the last sample; the next one is later.
    last_at: Nanos,
    host: Option<HostSample>,
    weights: Weights,
    vms: BTreeMap<VmId, Seen>,
    /// What became of the last plan's setpoints; goes into the next sample.
    outcomes: Vec<Outcome>,
    plan: Option<Plan>,
    recent: Recent,
    culprits: Culprits,
    recent_block: Recent,
    decisions: DecisionLog,
    enforcing: bool,
    /// Held as long as knobs may be turned.
    _alone: Option<Alone>,
}

impl Agent {
    /// Everything that can go wrong before the first tick goes wrong here, what leaves no
    /// trace first.
    fn start(options: Options) -> Result<(Self, mpsc::Receiver<SnapshotRequest>, ServerHandle)> {
        let Options { mut config, config_path, .. } = options;
        privileges::check(config.policy.modes.cpu_weight)?;
        recording::check(&config)?;
        let listen = Listen { socket: config.socket.clone(), tcp: config.listen };
        let server = Server::bind(&listen)?;
        let alone = (config.policy.modes.cpu_weight == Mode::Enforce)
            .then(|| Alone::on(&config.sense.cgroup_root))
            .transpose()?;
        let hypervisor = connect(&config);
        // What an earlier agent left is put back whether or not the probe can be loaded; where
        // none was before, a refusal leaves no folder.
        let before = config.state_dir.exists();
        let open = || Act::open(&config.state_dir, hypervisor.clone());
        let recovered = before.then(open).transpose()?;
        let sense = Sense::open(&config.sense, hypervisor.clone())?;
        let without_runq = runq::missing(&sense)?;
        let (act, recovery) = match recovered {
            Some(recovered) => recovered,
            None => Act::open(&config.state_dir, hypervisor.clone())?,
        };
        if recovery.earlier_boot > 0 {
            tracing::info!(
                "{} knobs changed before the last boot: ended with it",
                recovery.earlier_boot
            );
        }
        let mode = &mut config.policy.modes.cpu_weight;
        let mut barred = act.enforce_barred().map(str::to_owned);
        if let Some(why) = &barred {
            tracing::error!("not enforcing: {why}");
            *mode = (*mode).min(Mode::Shadow);
        }
        if let Some(why) = without_runq {
            tracing::warn!("measuring only, as in mode observe: {why}");
            barred = barred.or_else(|| (*mode == Mode::Enforce).then_some(why));
            *mode = Mode::Observe;
        }
        let facts = Facts::gather(&config, config_path, hypervisor.as_ref(), barred);
        let recorder = recording::begin(&config, &facts)?;
        let (snapshots, requests): (Snapshots, _) = source::channel(config.policy.tick);
        let http = server.spawn(snapshots.clone()).context("failed to start the HTTP interface")?;
        let hdr_log =
            config.hdr_log.clone().map(|log| HdrLog::start(log, snapshots)).transpose()?;
        let mode = config.policy.modes.cpu_weight;
        tracing::info!(
            "formtune {} started: mode {}, tick {}, {}",
            env!("CARGO_PKG_VERSION"),
            crate::export::snapshot::mode_name(mode),
            config.policy.tick,
            config
                .listen
                .map_or("no TCP port".to_owned(), |address| format!("http://{address}/metrics")),
        );
        let agent = Self {
            _alone: alone,
            facts,
            sense,
            act,
            recorder,
            hdr_log,
            state: State::default(),
            seq: 0,
            last_at: Nanos(0),
            host: None,
            weights: Weights::default(),
            vms: BTreeMap::new(),
            outcomes: Vec::new(),
            plan: None,
            recent: Recent::default(),
            culprits: Culprits::default(),
            recent_block: Recent::default(),
            decisions: DecisionLog::default(),
            enforcing: mode == Mode::Enforce,
            config,
        };
        Ok((agent, requests, http))
    }

    async fn until_stopped(
        &mut self,
        mut requests: mpsc::Receiver<SnapshotRequest>,
        mut stops: mpsc::UnboundedReceiver<signals::Signal>,
    ) -> signals::Signal {
        let period = Duration::from_nanos(self.config.policy.tick.0);
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            let event = tokio::select! {
                biased;
                Some(signal) = stops.recv() => Event::Stop(signal),
                _ = ticks.tick() => Event::Tick,
                Some(request) = requests.recv() => Event::Look(request),
            };
            match event {
                Event::Stop(signal) => return signal,
                Event::Tick => self.tick(),
                // Whoever asked may have gone away meanwhile.
                Event::Look(request) => drop(request.send(Arc::new(self.snapshot(monotonic())))),
            }
        }
    }

    fn tick(&mut self) {
        let at = monotonic().max(Nanos(self.last_at.0 + 1));
        let late = at.since(self.last_at).0 >= 2 * self.config.policy.tick.0;
        self.facts.follow_libvirt();
        self.facts.late += u64::from(self.seq > 0 && late);
        self.last_at = at;
        self.seq += 1;
        let sample = self.sample(at);
        self.record(&sample);
        let plan = step(&mut self.state, &self.config.policy, &sample);
        self.carry_out(&plan);
        self.note(plan);
        self.facts.took = Some(monotonic().since(at));
    }

    /// Reads the node.
    fn sample(&mut self, at: Nanos) -> Sample {
        let reading = self.sense.sample(at);
        for id in &reading.gone {
            self.forget(id);
        }
        self.weights.begin(at);
        let mut vms = Vec::with_capacity(reading.vms.len());
        // Both are in the order of the names.
        let mut readings = reading.vms.into_iter().peekable();
        for (id, vm) in self.sense.vms() {
            let Some((_, read)) = readings.next_if(|(of, _)| of == id) else { continue };
            let seen = match self.vms.get_mut(id) {
                Some(seen) => seen,
                None => {
                    let class = self.config.classes_of.class_of(id).clone();
                    self.vms.entry(id.clone()).or_insert(Seen::new(at, class))
                }
            };
            if let Some(runq) = &read.runq {
                self.recent.add(id, at, runq);
            }
            if let Some(held) = &read.held {
                self.culprits.add(id, at, held);
            }
            if let Some(block) = &read.block {
                self.recent_block.add(id, at, block);
            }
            seen.usage(at, &read);
            let active = read.runq.as_ref().is_none_or(|runq| !runq.counts.is_empty());
            let (cpu_weight, first_read) = self.weights.get(&self.act, vm, active);
            let original = self.act.original(id).or(first_read);
            let sample = VmSample {
                class: seen.class.clone(),
                vcpus: vm.vcpus,
                runq: read.runq,
                held: read.held,
                cpu_usage_ns: read.cpu_usage_ns,
                throttled_ns: read.throttled_ns,
                cpu_weight,
                cpu_weight_original: original,
            };
            vms.push((id.clone(), sample));
        }
        self.facts.busy(at, &reading.host);
        self.host = Some(reading.host.clone());
        Sample {
            seq: self.seq,
            at,
            host: reading.host,
            vms: BTreeMap::from_iter(vms),
            outcomes: std::mem::take(&mut self.outcomes),
        }
    }

    fn forget(&mut self, id: &VmId) {
        self.act.forget(id);
        self.weights.forget(id);
        self.recent.forget(id);
        self.culprits.forget(id);
        self.recent_block.forget(id);
        self.decisions.forget(id);
        self.vms.remove(id);
    }

    /// Does what the plan says is to be written; in other modes nothing is.
    fn carry_out(&mut self, plan: &Plan) {
        if let Some(shift) = plan.sampling_shift {
            self.sense.sample_one_in(shift);
            tracing::warn!("{}", logging::sampling(shift, self.config.policy.probe_budget));
        }
        for setpoint in plan.setpoints.iter().filter(|setpoint| setpoint.mode == Mode::Enforce) {
            let Some(vm): Option<Arc<Vm>> = self.sense.vms().get(&setpoint.vm).cloned() else {
                continue;
            };
            let outcome = self.act.execute(&vm, setpoint, plan.seq);
            self.weights.outcome(&outcome);
            self.outcomes.push(outcome);
        }
        if self.enforcing && !self.act.enforce_allowed() {
            self.stop_enforcing();
        }
    }

    /// A journal that cannot be written must not leave knobs turned until the agent ends.
    fn stop_enforcing(&mut self) {
        self.enforcing = false;
        self.facts.barred = self.act.enforce_barred().map(str::to_owned);
        for knob in self.act.restore_all().knobs {
            tracing::warn!("{knob}");
            self.weights.forget(&knob.vm);
        }
        // As an agent that starts without the right to enforce: what the knobs should be is
        // forgotten, or core would take the originals for somebody else's values.
        self.config.policy.modes.cpu_weight = Mode::Shadow;
        self.state = State::default();
        self.record_anew();
    }

    fn note(&mut self, plan: Plan) {
        let mode = self.config.policy.modes.cpu_weight;
        for record in self.decisions.note(&plan, mode, SystemTime::now()) {
            logging::decision(&record);
        }
        for outcome in &self.outcomes {
            self.decisions.outcome(outcome);
            // Where enforcement has ended, a line has said so and why.
            if self.enforcing {
                logging::outcome(outcome);
            }
        }
        for decision in &plan.decisions {
            if let Some(seen) = self.vms.get_mut(&decision.vm) {
                seen.decided(decision);
            }
        }
        self.plan = Some(plan);
    }

    /// Restores every knob, then lets go of socket and lock.
    fn stop(mut self, http: ServerHandle) -> Result<()> {
        let report = self.act.restore_all();
        for knob in &report.knobs {
            tracing::info!("{knob}");
        }
        self.end_record();
        if let Some(log) = self.hdr_log.take() {
            log.finish(Arc::new(self.snapshot(monotonic())));
        }
        drop(http);
        if !report.is_complete() {
            let failed: Vec<String> = report
                .knobs
                .iter()
                .filter(|knob| matches!(knob.result, crate::act::RestoreResult::Failed { .. }))
                .map(ToString::to_string)
                .collect();
            bail!("not everything was restored: {}", failed.join("; "));
        }
        tracing::info!("stopped");
        Ok(())
    }
}

/// libvirt, if it is wanted. Until it is there, cgroups alone say which VMs there are.
fn connect(config: &Config) -> Option<Hypervisor> {
    let uri = config.libvirt_uri.as_deref()?;
    let (hypervisor, error) = match Hypervisor::attach(uri) {
        Ok((hypervisor, None)) => return Some(hypervisor),
        Ok((hypervisor, Some(error))) => (Some(hypervisor), error),
        Err(error) => (None, error),
    };
    let until = if hypervisor.is_some() { "until it answers" } else { "only" };
    tracing::warn!("{error}; finding VMs by their cgroups {until}");
    hypervisor
}

/// `CLOCK_MONOTONIC`, the clock of the probe's time stamps.
fn monotonic() -> Nanos {
    // The call cannot fail: the clock exists on every Linux, and the pointer is valid.
    let now =
        clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap_or(nix::sys::time::TimeSpec::new(0, 0));
    Nanos(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}
