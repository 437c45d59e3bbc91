//! `formtune explain VM`: why is it as it is, and what would change it.

mod block;

use super::advice::would_change;
use super::client::{self, At, ClientError};
use super::state::State;
use super::style::{self, Style, cut, grouped, latency};
use super::{GOOD, Global, OneLine, error, fail, print};
use crate::export::culprits::{Blamed, Holder};
use crate::export::recent::SPAN;
use crate::export::routes::{DecisionsAnswer, NodeAnswer, VmAnswer};
use crate::export::snapshot::{
    DecisionRecord, OwnerKind, RecentRunq, VmState, action_name, mode_name,
};
use formtune_core::plan::{Action, OutcomeResult};
use formtune_core::policy::{Mode, Slo};
use formtune_core::reason::Quantile;
use formtune_core::units::Nanos;
use serde::Serialize;
use std::fmt::Write;
use std::process::ExitCode;
use std::sync::Arc;

/// Decisions shown, newest first.
const SHOWN: usize = 8;
/// Width of the labels on the left.
const INDENT: usize = 10;

/// Arguments of `formtune explain`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Name or libvirt UUID of the VM
    vm: String,
    #[command(flatten)]
    at: At,
}

#[derive(Serialize)]
struct Json<'a> {
    state: State,
    #[serde(flatten)]
    vm: &'a VmAnswer,
    would_change: Vec<String>,
    decisions: &'a [Arc<DecisionRecord>],
}

/// Asks and prints. 2 if there is no such VM.
///
/// # Errors
/// The agent cannot be asked.
pub fn run(global: &Global, args: &Args) -> anyhow::Result<ExitCode> {
    let socket = args.at.socket(global)?;
    let path = format!("/v1/vms/{}", client::segment(&args.vm));
    let vm: VmAnswer = match client::get(&socket, &path) {
        Ok(vm) => vm,
        Err(ClientError::Refused { status: 404, error: what, hint }) => {
            fail(format_args!("{what}; {hint}"));
            return Ok(error());
        }
        Err(error) => return Err(error.into()),
    };
    let node: NodeAnswer = client::get(&socket, "/v1/node")?;
    let all: DecisionsAnswer = client::get(&socket, "/v1/decisions?limit=1000")?;
    let id = &vm.vm.id;
    let concerns = |record: &Arc<DecisionRecord>| {
        record.vm == *id || record.victim.as_ref().is_some_and(|victim| victim == id)
    };
    let decisions: Vec<_> = all.decisions.into_iter().filter(concerns).collect();
    if global.json {
        let json = Json {
            state: State::of(&vm.vm, node.node.probe.blind.is_some()),
            would_change: would_change(&vm.vm, &node.node),
            vm: &vm,
            decisions: &decisions,
        };
        print(format_args!("{}\n", serde_json::to_string_pretty(&json)?))?;
    } else {
        let style = Style::of_stdout();
        print(style.finish(&render(&vm, &node, &decisions, style)))?;
    }
    Ok(GOOD)
}

/// The whole text; `decisions` are those that concern the VM, oldest first.
pub fn render(
    answer: &VmAnswer,
    node: &NodeAnswer,
    decisions: &[Arc<DecisionRecord>],
    style: Style,
) -> String {
    let vm = &answer.vm;
    let mut text = String::new();
    let mut line = |label: &str, what: &str| {
        let what = style.wrap(INDENT, what);
        let _ = writeln!(text, "{label:INDENT$}{what}");
    };
    line("VM", &identity(vm, answer.at));
    let state = State::of(vm, node.node.probe.blind.is_some());
    line("State", &format!("{}{}", state.word(), state_details(vm, state, node)));
    if let Some(slo) = &vm.slo {
        line("Promise", &promise(vm, slo));
    }
    line("Waits", &waits(vm.recent.as_ref()));
    if let Some(because) = because(vm) {
        line("Because", &because);
    }
    if node.node.block.is_some() {
        line("Block I/O", &block::block(vm, node.node.block.as_ref()));
    }
    line("CPU", &cpu(vm));
    if let Some(memory) = memory(vm) {
        line("Memory", &memory);
    }
    if let Some(tcp) = vm.tcp.as_ref().and_then(super::tcp::line) {
        line("TCP", &tcp);
    }
    line("Weight", &weight(vm));
    line("Decision", &decision(vm, node.node.modes.cpu_weight));
    let mut label = "Remedy";
    for advice in would_change(vm, &node.node) {
        line(label, &advice);
        label = "";
    }
    history(&mut text, vm, decisions, answer.at, style);
    text
}

fn identity(vm: &VmState, now: Nanos) -> String {
    let owner = match vm.owner {
        OwnerKind::Libvirt => "a libvirt domain",
        OwnerKind::Cgroup => "found by its cgroup",
    };
    let vcpus = match vm.vcpus {
        0 => String::new(),
        1 => ", 1 vCPU".into(),
        n => format!(", {n} vCPUs"),
    };
    let uuid = vm.uuid.as_ref().map_or(String::new(), |uuid| format!(", {}", OneLine(uuid)));
    format!(
        "{}, class {}, {owner}{vcpus}{uuid}, known for {}",
        OneLine(&vm.id),
        OneLine(&vm.class),
        style::age(now.since(vm.seen_at)),
    )
}

fn state_details(vm: &VmState, state: State, node: &NodeAnswer) -> String {
    let evidence = vm.evidence();
    let measured = evidence.and_then(|evidence| evidence.measured).zip(vm.slo.as_ref());
    match (state, measured) {
        (State::Unknown, _) => match &node.node.probe.blind {
            Some(why) => format!(": the probe is blind ({})", OneLine(why)),
            None if vm.runq.is_none() => ": not measured yet".into(),
            None => ": nothing was decided yet".into(),
        },
        (State::Quiet, _) => {
            let had = evidence.map_or(0, |evidence| evidence.samples);
            let need = vm.slo.as_ref().map_or(0, |slo| slo.min_samples);
            format!(": too few waits to tell ({had} in the last window, {need} needed)")
        }
        (_, Some((measured, slo))) => format!(
            ": {} {} in the last window, {} at most {}",
            Quantile::from_share(slo.quantile),
            latency(Some(measured)),
            if state == State::Missed { "promised" } else { "allowed" },
            latency(Some(slo.threshold)),
        ),
        _ => String::new(),
    }
}

fn promise(vm: &VmState, slo: &Slo) -> String {
    let kept = match vm.attainment.and_then(|kept| Some((kept.ratio()?, kept.windows))) {
        Some((ratio, windows)) => {
            format!("; kept in {:.1} % of {} so far", ratio * 100.0, grouped(windows))
        }
        None => "; no window could be judged so far".into(),
    };
    format!(
        "run-queue {} at most {} in {:.0} % of the windows of {}{kept}",
        Quantile::from_share(slo.quantile),
        latency(Some(slo.threshold)),
        slo.share * 100.0,
        latency(Some(slo.window)),
    )
}

fn waits(recent: Option<&RecentRunq>) -> String {
    let Some(recent) = recent else { return "not measured".into() };
    if recent.samples == 0 {
        return format!("none in the last {}: it did not run", style::age(recent.span));
    }
    format!(
        "p50 {}, p99 {}, longest {}; {} waits in the last {}",
        latency(recent.p50),
        latency(recent.p99),
        latency(recent.max),
        grouped(recent.samples),
        style::age(recent.span),
    )
}

/// What made it wait lately: its own quota before anybody else, as whoever had the CPU
/// meanwhile, and be it nobody, did not make it wait then.
fn because(vm: &VmState) -> Option<String> {
    let stopped = vm.throttled_lately.filter(|time| time.0 > 0).map(|time| {
        let span = style::age(SPAN);
        format!("its own quota stopped it for {} in the last {span}", latency(Some(time)))
    });
    let held = vm.held_by.as_ref().filter(|blamed| blamed.total.0 > 0).map(held_by);
    let parts: Vec<String> = stopped.into_iter().chain(held).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// `of 1.9 s of long waits, hog-1 held the CPU for 52 %, tasks of the host for 3 %`, or
/// `of 1.9 s of long waits, the CPU was idle for 90 %, tasks of the host held it for 8 %`.
fn held_by(blamed: &Blamed) -> String {
    let mut text = format!("of {} of long waits,", latency(Some(blamed.total)));
    let (mut cpu, mut verb) = ("the CPU", true);
    for (i, held) in blamed.top.iter().enumerate() {
        let who = match &held.holder {
            Holder::Vm(vm) => OneLine(vm).to_string(),
            Holder::Itself => "its own vCPUs".into(),
            Holder::Host => "tasks of the host".into(),
            Holder::Idle => String::new(),
            Holder::Unknown => "nobody knows who".into(),
        };
        let percent = blamed.share(held) * 100.0;
        let comma = if i > 0 { "," } else { "" };
        let _ = match (&held.holder, verb) {
            (Holder::Idle, _) => write!(text, "{comma} {cpu} was idle for {percent:.0} %"),
            (_, true) => write!(text, "{comma} {who} held {cpu} for {percent:.0} %"),
            (_, false) => write!(text, "{comma} {who} for {percent:.0} %"),
        };
        (cpu, verb) = ("it", held.holder == Holder::Idle);
    }
    text
}

fn cpu(vm: &VmState) -> String {
    let mut text = match vm.evidence().and_then(|evidence| evidence.cpus_used) {
        Some(used) => format!("uses {used:.2} CPUs"),
        None => "usage not known".into(),
    };
    if let Some(throttled) = vm.throttled_ns.filter(|&ns| ns > 0) {
        let since = style::age(Nanos(throttled));
        let _ = write!(text, "; its own quota has stopped it for {since} in all");
        if let Some(periods) = vm.quota_periods.filter(|periods| periods.throttled > 0) {
            let (throttled, all) = (grouped(periods.throttled), grouped(periods.all));
            let _ = write!(text, ", in {throttled} of {all} periods");
        }
    }
    text
}

/// Share of the time in which waiting for memory is worth a line.
const MEMORY_PRESSURE: f64 = 0.01;

/// What memory has to do with it; `None` where that is nothing.
fn memory(vm: &VmState) -> Option<String> {
    let mut found = Vec::new();
    let stalled = vm.pressure.memory.and_then(|stalls| stalls.some);
    if let Some(stall) = stalled.filter(|stall| stall.avg10_ratio >= MEMORY_PRESSURE) {
        found.push(format!("waits for it {:.0} % of the time", stall.avg10_ratio * 100.0));
    }
    let events = &vm.memory_events;
    let mut event = |count: Option<u64>, one: &str, what: &str| match count {
        None | Some(0) => {}
        Some(1) => found.push(one.to_owned()),
        Some(count) => found.push(format!("{what} {} times", grouped(count))),
    };
    event(
        events.high,
        "was slowed down above memory.high once",
        "was slowed down above memory.high",
    );
    event(events.max, "reached its limit once", "reached its limit");
    event(events.oom_kill, "lost a process to the OOM killer", "lost a process to the OOM killer");
    (!found.is_empty()).then(|| found.join("; "))
}

fn weight(vm: &VmState) -> String {
    let Some(now) = vm.cpu_weight else { return "none, or not to be read".into() };
    let mut text = match vm.cpu_weight_original {
        Some(original) if original == now => format!("{now}, as found"),
        Some(original) => format!("{now}, found at {original}"),
        None => now.to_string(),
    };
    if let Some(entitlement) = vm.cpu_weight_entitlement {
        let _ = write!(text, "; entitled to {entitlement}");
    }
    if let Some((floor, ceiling)) = vm.cpu_weight_bounds {
        let _ = write!(text, ", may move from {floor} to {ceiling}");
    }
    text
}

fn decision(vm: &VmState, mode: Mode) -> String {
    let Some(decision) = &vm.decision else {
        return match mode {
            Mode::Observe => "none: mode observe only measures".into(),
            _ => "none yet".into(),
        };
    };
    format!("{}: {}", action_name(decision.action), OneLine(&decision.reason))
}

fn history(
    text: &mut String,
    vm: &VmState,
    decisions: &[Arc<DecisionRecord>],
    now: Nanos,
    style: Style,
) {
    if decisions.is_empty() {
        text.push_str("\nNothing was decided about it among the last decisions.\n");
        return;
    }
    text.push_str("\nLast decisions, newest first\n");
    for record in decisions.iter().rev().take(SHOWN) {
        let ago = format!("{} ago", style::age_short(now.since(record.at)));
        let what = style.wrap(INDENT, &summary(record, vm));
        let _ = writeln!(text, "{ago:INDENT$}{what}");
        let why = style.wrap(INDENT, &OneLine(&record.sentence).to_string());
        let _ = writeln!(text, "{:INDENT$}{why}", "");
    }
    if decisions.len() > SHOWN {
        let _ = writeln!(text, "and {} earlier: --json", decisions.len() - SHOWN);
    }
}

/// `lower hog-1 from 100 to 80 for web-1: applied`.
fn summary(record: &DecisionRecord, about: &VmState) -> String {
    let mut text = action_name(record.action).to_owned();
    if record.vm != about.id {
        let _ = write!(text, " {}", cut(&record.vm.0, 40));
    }
    if let Some(change) = record.change {
        let _ = write!(text, " from {} to {}", change.from, change.to);
    }
    if let Some(victim) = record.victim.as_ref().filter(|victim| **victim != about.id) {
        let _ = write!(text, " for {}", cut(&victim.0, 40));
    }
    let became = match (&record.outcome, record.mode) {
        (Some(OutcomeResult::Applied { .. }), _) => "applied".into(),
        (Some(OutcomeResult::Unchanged), _) => "it had that value already".into(),
        (Some(OutcomeResult::Clamped { value }), _) => format!("the kernel made {value} of it"),
        (Some(OutcomeResult::Yielded { found }), _) => {
            format!("not written, somebody else had set {found}")
        }
        (Some(OutcomeResult::Refused { why }), _) => format!("refused: {}", OneLine(why)),
        (None, _) if record.action == Action::Hold || record.change.is_none() => return text,
        (None, Mode::Enforce) => "outcome not known yet".into(),
        (None, mode) => format!("announced only, mode {}", mode_name(mode)),
    };
    let _ = write!(text, ": {became}");
    text
}
