//! `formtune status`: the node in a few lines, and a line per VM.

use super::client::{self, At};
use super::state::{State, wants_attention};
use super::style::{self, Style, Tone, age_short, cut, latency};
use super::{GOOD, Global, findings, print};
use crate::export::routes::{NodeAnswer, VmsAnswer};
use crate::export::snapshot::{LibvirtState, VmState, action_name, mode_name};
use crate::vm::CgroupVersion;
use formtune_core::policy::Mode;
use formtune_core::units::{Nanos, Weight};
use serde::Serialize;
use std::fmt::Write;
use std::process::ExitCode;

/// VMs that want attention, at most.
const NOTES: usize = 8;
/// The agent's share of a CPU is told once it has been up this long.
const SHARE_AFTER: Nanos = Nanos::from_secs(10);

/// Arguments of `formtune status`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Args {
    #[command(flatten)]
    at: At,
}

#[derive(Serialize)]
struct Json<'a> {
    node: &'a NodeAnswer,
    vms: Vec<JsonVm<'a>>,
}

#[derive(Serialize)]
struct JsonVm<'a> {
    state: State,
    #[serde(flatten)]
    vm: &'a VmState,
}

/// Asks and prints. 1 while the agent is not ready, e.g. blind.
///
/// # Errors
/// The agent cannot be asked.
pub fn run(global: &Global, args: &Args) -> anyhow::Result<ExitCode> {
    let socket = args.at.socket(global)?;
    let node: NodeAnswer = client::get(&socket, "/v1/node")?;
    let vms: VmsAnswer = client::get(&socket, "/v1/vms")?;
    if global.json {
        let blind = node.node.probe.blind.is_some();
        let with_state = |vm| JsonVm { state: State::of(vm, blind), vm };
        let json = Json { node: &node, vms: vms.vms.iter().map(with_state).collect() };
        print(format_args!("{}\n", serde_json::to_string_pretty(&json)?))?;
    } else {
        let style = Style::of_stdout();
        print(style.finish(&render(&node, &vms, style)))?;
    }
    Ok(if node.not_ready.is_empty() { GOOD } else { findings() })
}

/// The whole text.
pub fn render(node: &NodeAnswer, vms: &VmsAnswer, style: Style) -> String {
    let mut text = String::new();
    node_lines(&mut text, node, style);
    text.push('\n');
    if vms.vms.is_empty() {
        let hint =
            "No VM is running here that formtune knows of. `formtune doctor` says where it looks.";
        let _ = writeln!(text, "{}", style.wrap(0, hint));
        return text;
    }
    let blind = node.node.probe.blind.is_some();
    table(&mut text, vms, blind, style);
    notes(&mut text, vms, style);
    text
}

fn node_lines(text: &mut String, answer: &NodeAnswer, style: Style) {
    let node = &answer.node;
    let busy =
        node.busy_ratio.map_or("load unknown".into(), |b| format!("{:.0} % busy", b * 100.0));
    let cpus = if node.cpus == 1 { "CPU" } else { "CPUs" };
    let facts = format!(
        "{}: {} {cpus}, {busy}; Linux {}, cgroup {}",
        cut(&node.name, 30),
        node.cpus,
        cut(&node.kernel, 30),
        match node.cgroup.version {
            CgroupVersion::V1 => "v1",
            CgroupVersion::V2 => "v2",
        },
    );
    let _ = writeln!(text, "{}", style.wrap(2, &facts));
    let libvirt = match &node.libvirt {
        LibvirtState::NotUsed => "libvirt not used".into(),
        LibvirtState::Connected { .. } => "libvirt connected".into(),
        LibvirtState::Unreachable { why, .. } => {
            format!("libvirt NOT REACHABLE ({}), using cgroups", cut(why, 60))
        }
    };
    let method = node.probe.method.as_deref().unwrap_or("none");
    let does = match (node.modes.cpu_weight, node.enforce_blocked.is_some()) {
        (Mode::Observe, _) => "measures only",
        (Mode::Shadow, _) => "decides, writes nothing",
        (Mode::Enforce, false) => "decides and writes",
        (Mode::Enforce, true) => "writing is held back",
    };
    let facts =
        format!("mode {} ({does}); probe {method}; {libvirt}", mode_name(node.modes.cpu_weight));
    let _ = writeln!(text, "{}", style.wrap(2, &facts));
    let agent = &node.agent;
    let up = answer.at.since(agent.started_at);
    // At first it is the start that costs, which says nothing about a share.
    let cpu = if up < SHARE_AFTER {
        format!("{} of CPU time", Nanos(agent.cost.cpu_ns))
    } else {
        format!("{:.1} % of a CPU", 100.0 * agent.cost.cpu_ns as f64 / up.0 as f64)
    };
    let mib = agent.cost.resident_bytes as f64 / f64::from(1 << 20);
    let facts =
        format!("agent {} up {}, itself {cpu} and {mib:.0} MiB", agent.version, style::age(up));
    let _ = writeln!(text, "{}", style.wrap(2, &facts));
    for reason in &answer.not_ready {
        let line = style.wrap(2, &format!("✗ not ready: {}", super::OneLine(reason)));
        let _ = writeln!(text, "{}", style.paint(Tone::Bad, &line));
    }
}

/// One column: its cells, and where they are flush.
struct Column {
    title: &'static str,
    right: bool,
    cells: Vec<String>,
    /// Dropped in this order on narrow terminals; 0: never.
    drop: u8,
}

impl Column {
    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| cell.chars().count());
        cells.chain([self.title.len()]).max().unwrap_or(0)
    }
}

fn table(text: &mut String, vms: &VmsAnswer, blind: bool, style: Style) {
    let of = |title, right, drop, cell: &dyn Fn(&VmState) -> String| Column {
        title,
        right,
        drop,
        cells: vms.vms.iter().map(cell).collect(),
    };
    let mut columns = vec![
        of("VM", false, 0, &|vm| cut(&vm.id.0, usize::MAX)),
        of("CLASS", false, 1, &|vm| cut(&vm.class.0, 10)),
        of("STATE", false, 0, &|vm| State::of(vm, blind).word().into()),
        of("P50", true, 3, &|vm| latency(vm.recent.and_then(|recent| recent.p50))),
        of("P99", true, 0, &|vm| latency(vm.recent.and_then(|recent| recent.p99))),
        of("TARGET", true, 2, &|vm| latency(vm.slo.as_ref().map(|slo| slo.threshold))),
        of("WEIGHT", true, 0, &weights),
        of("LAST", false, 0, &|vm| last_action(vm, vms.at)),
    ];
    fit(&mut columns, style.width);
    let widths: Vec<usize> = columns.iter().map(Column::width).collect();
    let line = |cells: Vec<&str>, state: Option<Tone>| {
        let mut line = String::new();
        for ((column, width), cell) in columns.iter().zip(&widths).zip(cells) {
            let pad = " ".repeat(width - cell.chars().count());
            let cell = match state {
                Some(tone) if column.title == "STATE" => style.paint(tone, cell),
                _ => cell.to_owned(),
            };
            let gap = if line.is_empty() { "" } else { "  " };
            let _ = match column.right {
                true => write!(line, "{gap}{pad}{cell}"),
                false => write!(line, "{gap}{cell}{pad}"),
            };
        }
        line.trim_end().to_owned()
    };
    let head = line(columns.iter().map(|column| column.title).collect(), None);
    let _ = writeln!(text, "{}", style.paint(Tone::Dim, &head));
    for (row, vm) in vms.vms.iter().enumerate() {
        let cells = columns.iter().map(|column| column.cells[row].as_str()).collect();
        let _ = writeln!(text, "{}", line(cells, Some(State::of(vm, blind).tone())));
    }
    let legend = "P50, P99: run-queue waits of the last 10 s; WEIGHT: now/found";
    let _ = writeln!(text, "{}", style.paint(Tone::Dim, &style.wrap(0, legend)));
}

/// Makes the columns fit: names are cut to no less than twelve columns, then columns go,
/// the least needed first.
fn fit(columns: &mut Vec<Column>, width: usize) {
    loop {
        let total = columns.iter().map(|column| column.width() + 2).sum::<usize>() - 2;
        let name = columns[0].width();
        if total <= width {
            return;
        }
        let excess = total - width;
        if name > 12 {
            let room = name.saturating_sub(excess).max(12);
            columns[0].cells.iter_mut().for_each(|cell| *cell = cut(cell, room));
        } else if let Some(next) = columns.iter().map(|c| c.drop).filter(|&drop| drop > 0).min() {
            columns.retain(|column| column.drop != next);
        } else {
            return;
        }
    }
}

fn weights(vm: &VmState) -> String {
    let text = |weight: Option<Weight>| weight.map_or("–".into(), |weight| weight.to_string());
    match (vm.cpu_weight, vm.cpu_weight_original) {
        (now, original) if now == original || original.is_none() => text(now),
        (now, original) => format!("{}/{}", text(now), text(original)),
    }
}

fn last_action(vm: &VmState, now: Nanos) -> String {
    vm.last_action.as_ref().map_or("–".into(), |last| {
        format!("{} {}", action_name(last.action), age_short(now.since(last.at)))
    })
}

/// VMs a human should look at, each with the reason.
fn notes(text: &mut String, vms: &VmsAnswer, style: Style) {
    let noted: Vec<_> = vms
        .vms
        .iter()
        .filter_map(|vm| Some((vm, &vm.decision.as_ref()?.reason)))
        .filter(|(_, reason)| wants_attention(reason))
        .collect();
    if noted.is_empty() {
        return;
    }
    text.push('\n');
    for (vm, reason) in noted.iter().take(NOTES) {
        let reason = reason.to_string();
        let note = format!("! {}: {}", super::OneLine(&vm.id), super::OneLine(&reason));
        let _ = writeln!(text, "{}", style.wrap(2, &note));
    }
    if noted.len() > NOTES {
        let _ = writeln!(text, "! and {} more: `formtune explain VM`", noted.len() - NOTES);
    }
}
