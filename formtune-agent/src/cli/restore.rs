//! `formtune restore`: bring every original back without the daemon.

use super::{Global, OneLine, findings, print};
use crate::act::{self, ActError, RecoveryReport};
use crate::config;
use crate::hypervisor::Hypervisor;
use crate::sense::probes::Left;
use crate::sense::tcp;
use anyhow::{Result, anyhow};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  formtune restore
  formtune restore --state-dir /var/lib/formtune --json")]
pub(super) struct Args {
    /// State folder of the agent, instead of the configured one; with it, a configuration
    /// that cannot be read is no obstacle
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<ExitCode> {
    let (state_dir, libvirt_uri) = match (config::load(global.config.as_deref()), &args.state_dir) {
        (Ok(config), dir) => (dir.clone().unwrap_or(config.state_dir), config.libvirt_uri),
        (Err(error), Some(dir)) => {
            super::fail(format_args!("{error}; restoring all the same, through cgroups"));
            (dir.clone(), None)
        }
        (Err(error), None) => return Err(error.into()),
    };
    let report = act::restore(&state_dir, || match Hypervisor::attach(libvirt_uri.as_deref()?) {
        // One that hangs may still make a call: the handle tells it from one that is dead.
        Ok((hypervisor, error)) => {
            if let Some(error) = error {
                super::fail(format_args!("{error}; restoring through cgroups"));
            }
            Some(hypervisor)
        }
        Err(error) => {
            super::fail(format_args!("{error}; restoring through cgroups"));
            None
        }
    })
    .map_err(|error| match error {
        ActError::Locked { pid, path } => anyhow!(
            "formtune is running{} and holds {}: stop it and it restores by itself; `formtune \
             restore` is for an agent that died",
            pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(),
            path.display()
        ),
        error => error.into(),
    })?;
    let (taps, taps_note) = match tcp::clear_taps() {
        Ok(taps) => (taps, None),
        Err(why) => (Vec::new(), Some(format!("filters of tap devices were left: {why}"))),
    };
    let report = Report { knobs: report, taps, taps_note };
    match global.json {
        true => print(format_args!("{}\n", serde_json::to_string(&report)?))?,
        false => print(text(&report))?,
    }
    // What a damaged journal no longer tells may still be changed.
    let good = report.knobs.restored.is_complete()
        && report.knobs.damaged.is_none()
        && report.taps.iter().all(|left| left.failed.is_none());
    Ok(if good { super::GOOD } else { findings() })
}

/// What was done.
#[derive(Debug, serde::Serialize)]
struct Report {
    #[serde(flatten)]
    knobs: RecoveryReport,
    /// Devices on which an agent had left filters; only kernels without TCX have any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    taps: Vec<Left>,
    /// Why nobody looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    taps_note: Option<String>,
}

fn text(Report { knobs: report, taps, taps_note }: &Report) -> String {
    let mut text = String::new();
    if report.restored.knobs.is_empty() && taps.is_empty() {
        text += "nothing to restore\n";
    }
    for knob in &report.restored.knobs {
        let _ = writeln!(text, "{}", OneLine(knob));
    }
    for left in taps {
        let _ = writeln!(text, "{}", OneLine(left));
    }
    if report.earlier_boot > 0 {
        let _ =
            writeln!(text, "{} changed before the last boot: ended with it", report.earlier_boot);
    }
    for note in report.damaged.iter().chain(&report.restored.journal).chain(taps_note) {
        let _ = writeln!(text, "note: {}", OneLine(note));
    }
    text
}
