//! The log: one line per decision that is news, on standard error.
//!
//! As text the line is a sentence; as JSON the same, with its parts as fields.

use crate::export::snapshot::{DecisionRecord, action_name, mode_name, result_name};
use formtune_core::plan::{Action, Outcome, OutcomeResult, Reason};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use tracing_subscriber::EnvFilter;

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Fields are for machines; a person's line says it all already.
static FIELDS: AtomicBool = AtomicBool::new(false);

/// Starts logging, at level `info` unless `FORMTUNE_LOG` says otherwise. A second call in
/// one process (tests) changes nothing.
pub(super) fn init(format: Format) {
    let filter = EnvFilter::try_from_env("FORMTUNE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    let _ = match format {
        Format::Text => builder.try_init(),
        Format::Json => {
            FIELDS.store(true, Ordering::Relaxed);
            builder.json().flatten_event(true).with_current_span(false).try_init()
        }
    };
}

/// Says what was decided, and why. Of the decisions to do nothing only those that a person
/// would ask about are said at level `info`.
pub(super) fn decision(record: &DecisionRecord) {
    let vm = record.vm.as_str();
    let action = action_name(record.action);
    let line = match record.change {
        Some(change) => format!(
            "{vm}: {action} cpu_weight {} -> {} ({}): {}",
            change.from,
            change.to,
            mode_name(record.mode),
            record.sentence
        ),
        None => format!("{vm}: {action}: {}", record.sentence),
    };
    let line = crate::cli::OneLine(line);
    macro_rules! say {
        ($level:ident) => {
            if FIELDS.load(Ordering::Relaxed) {
                let reason = serde_json::to_string(&record.reason).unwrap_or_default();
                tracing::$level!(
                    vm,
                    action,
                    mode = mode_name(record.mode),
                    from = record.change.map(|change| change.from.get()),
                    to = record.change.map(|change| change.to.get()),
                    victim = record.victim.as_ref().map(|victim| victim.as_str()),
                    plan = record.plan_seq,
                    reason,
                    "{line}"
                )
            } else {
                tracing::$level!("{line}")
            }
        };
    }
    match record.action == Action::Hold && is_calm(&record.reason) {
        true => say!(debug),
        false => say!(info),
    }
}

/// Nothing is wrong and nothing is held back.
fn is_calm(reason: &Reason) -> bool {
    matches!(
        reason,
        Reason::NoSlo
            | Reason::WithinSlo(_)
            | Reason::LittleSlack(_)
            | Reason::Observing
            | Reason::NotMeasured
            | Reason::TooFewSamples { .. }
            | Reason::AwaitingOutcome { .. }
            | Reason::Verifying { .. }
            | Reason::Cooldown { .. }
    )
}

/// Says what became of a setpoint, unless it went as asked.
pub(super) fn outcome(outcome: &Outcome) {
    let vm = outcome.vm.as_str();
    let what = match &outcome.result {
        OutcomeResult::Applied { .. } | OutcomeResult::Unchanged => return,
        OutcomeResult::Clamped { value } => {
            format!("{vm}: asked for cpu_weight {}, got {value}", outcome.asked)
        }
        OutcomeResult::Yielded { found } => {
            format!("{vm}: somebody else set its cpu_weight to {found}: leaving it alone")
        }
        OutcomeResult::Refused { why } => format!("{vm}: cpu_weight not written: {why}"),
    };
    let line = crate::cli::OneLine(what);
    if FIELDS.load(Ordering::Relaxed) {
        let (plan, asked) = (outcome.plan_seq, outcome.asked.get());
        tracing::warn!(vm, result = result_name(&outcome.result), asked, plan, "{line}");
    } else {
        tracing::warn!("{line}");
    }
}

/// How much the probes look at from now on, and why.
pub(super) fn sampling(shift: u8, budget: f64) -> String {
    match shift {
        0 => format!("the probes look at every event again: well within {budget} CPUs"),
        shift => format!(
            "the probes look at one event in {} and count it as so many, to stay within {budget} \
             CPUs (`probe_budget`); nobody is blamed meanwhile",
            1_u32 << shift
        ),
    }
}
