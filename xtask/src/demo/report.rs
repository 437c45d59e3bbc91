//! What the demo found, as a table and for machines, and whether that was good enough.

use super::agent::Waits;
use super::phase::Phase;
use formtune_core::units::Nanos;
use serde::Serialize;

/// Least share by which the victim's excess must fall.
const LEAST_FALL: f64 = 0.80;
/// Greatest share of the neighbours' work that may get lost.
const GREATEST_LOSS: f64 = 0.05;
/// The neighbours must hurt at all: contended p99 over p99 alone.
const LEAST_HARM: f64 = 1.5;

/// One column. Times in nanoseconds.
#[derive(Serialize)]
pub struct Column {
    phase: &'static str,
    runq_count: u64,
    runq_p50_ns: Option<Nanos>,
    runq_p99_ns: Option<Nanos>,
    response_count: u64,
    response_p50_ns: Nanos,
    response_p99_ns: Nanos,
    neighbours_work_per_s: Option<f64>,
    /// `cpu.shares` or `cpu.weight` at the end of the phase, victim and neighbours.
    weights: Vec<String>,
}

impl Column {
    /// Puts together what host and guests saw.
    pub fn new(name: &'static str, phase: &Phase, waits: &Waits, weights: Vec<String>) -> Self {
        Self {
            phase: name,
            runq_count: waits.count(),
            runq_p50_ns: waits.quantile(0.50),
            runq_p99_ns: waits.quantile(0.99),
            response_count: phase.response.len(),
            response_p50_ns: phase.response_at(0.50),
            response_p99_ns: phase.response_at(0.99),
            neighbours_work_per_s: phase.work_per_s,
            weights,
        }
    }
}

/// The whole answer.
#[derive(Serialize)]
pub struct Report {
    /// How the guests ran, e.g. `TCG`.
    accelerator: &'static str,
    /// Alone, contended in observe, contended in enforce.
    phases: [Column; 3],
    /// Share of the victim's p99 excess over "alone" that went away; `None` where the
    /// neighbours did not hurt it.
    excess_fall: Option<f64>,
    /// Share of the neighbours' work that got lost; negative where they gained.
    work_loss: f64,
    /// Knobs that were not back at their originals: what was found instead.
    pub knobs_not_restored: Vec<String>,
    /// Whether all of it was good enough.
    met: bool,
}

impl Report {
    /// Judges three columns.
    pub fn new(kvm: bool, phases: [Column; 3], knobs_not_restored: Vec<String>) -> Self {
        let [alone, contended, enforced] = &phases;
        let excess =
            |column: &Column| column.response_p99_ns.0 as f64 - alone.response_p99_ns.0 as f64;
        let harm = contended.response_p99_ns.0 as f64 / alone.response_p99_ns.0 as f64;
        let excess_fall = (harm >= LEAST_HARM).then(|| 1.0 - excess(enforced) / excess(contended));
        let work = |column: &Column| column.neighbours_work_per_s.unwrap_or(f64::NAN);
        let work_loss = 1.0 - work(enforced) / work(contended);
        let met = excess_fall.is_some_and(|fall| fall >= LEAST_FALL)
            && work_loss <= GREATEST_LOSS
            && knobs_not_restored.is_empty();
        let accelerator = if kvm { "KVM" } else { "TCG" };
        Self { accelerator, phases, excess_fall, work_loss, knobs_not_restored, met }
    }

    /// Whether all of it was good enough.
    pub fn met(&self) -> bool {
        self.met
    }

    /// The table, at most 80 columns wide.
    pub fn table(&self) -> String {
        let mut lines = vec![row("", self.phases.each_ref().map(|column| column.phase.to_owned()))];
        lines.push("-".repeat(lines[0].chars().count()));
        let mut add = |label: &str, cell: &dyn Fn(&Column) -> String| {
            lines.push(row(label, self.phases.each_ref().map(cell)));
        };
        let time = |time: Option<Nanos>| time.map_or("-".to_owned(), |time| time.to_string());
        add("victim's run-queue p50 (host)", &|column| time(column.runq_p50_ns));
        add("victim's run-queue p99 (host)", &|column| time(column.runq_p99_ns));
        add("victim's response p50 (guest)", &|column| time(Some(column.response_p50_ns)));
        add("victim's response p99 (guest)", &|column| time(Some(column.response_p99_ns)));
        let contended = self.phases[1].neighbours_work_per_s;
        add("neighbours' work done", &|column| match (column.neighbours_work_per_s, contended) {
            (Some(work), Some(contended)) => format!("{:.1} %", work / contended * 100.0),
            _ => "stopped".to_owned(),
        });
        add("CPU weight, each", &|column| column.weights.join("/"));
        lines.join("\n")
    }

    /// One line per thing that had to be shown.
    pub fn verdict(&self) -> String {
        let mark = |good| if good { "met    " } else { "not met" };
        let excess = match self.excess_fall {
            Some(fall) => format!(
                "{}  the victim's p99 excess over \"alone\" fell by {:.1} % (at least {:.0} %)",
                mark(fall >= LEAST_FALL),
                fall * 100.0,
                LEAST_FALL * 100.0
            ),
            None => {
                format!("{}  the neighbours hardly hurt the victim: nothing to mend", mark(false))
            }
        };
        let work = format!(
            "{}  the neighbours lost {:.1} % of their work (at most {:.0} %)",
            mark(self.work_loss <= GREATEST_LOSS),
            self.work_loss * 100.0,
            GREATEST_LOSS * 100.0
        );
        let knobs = format!(
            "{}  every knob is back at its original",
            mark(self.knobs_not_restored.is_empty())
        );
        let mut lines = vec![excess, work, knobs];
        lines.extend(self.knobs_not_restored.iter().map(|knob| format!("         {knob}")));
        lines.join("\n")
    }
}

fn row(label: &str, cells: [String; 3]) -> String {
    let [a, b, c] = cells;
    format!("{label:<30} {a:>14} {b:>15} {c:>15}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(phase: &'static str, p99_us: u64, work: Option<f64>) -> Column {
        Column {
            phase,
            runq_count: 1,
            runq_p50_ns: Some(Nanos::from_micros(10)),
            runq_p99_ns: None,
            response_count: 1,
            response_p50_ns: Nanos::from_micros(900),
            response_p99_ns: Nanos::from_micros(p99_us),
            neighbours_work_per_s: work,
            weights: vec!["1024".into(), "20".into(), "20".into()],
        }
    }

    fn report(p99_us: [u64; 3], work: [f64; 2], knobs: Vec<String>) -> Report {
        let phases = [
            column("alone", p99_us[0], None),
            column("contended", p99_us[1], Some(work[0])),
            column("with formtune", p99_us[2], Some(work[1])),
        ];
        Report::new(false, phases, knobs)
    }

    #[test]
    fn all_three_conditions_count() {
        assert!(report([1_000, 6_000, 1_900], [100.0, 96.0], vec![]).met());
        assert!(!report([1_000, 6_000, 2_100], [100.0, 96.0], vec![]).met(), "excess");
        assert!(!report([1_000, 6_000, 1_900], [100.0, 94.0], vec![]).met(), "work");
        assert!(!report([1_000, 6_000, 1_900], [100.0, 96.0], vec!["x".into()]).met(), "knob");
    }

    #[test]
    fn no_harm_is_no_success() {
        let report = report([1_000, 1_100, 1_000], [100.0, 100.0], vec![]);
        assert!(!report.met() && report.excess_fall.is_none());
    }

    #[test]
    fn table_fits_80_columns() {
        let report = report([1_000, 6_000, 1_900], [100.0, 96.0], vec![]);
        for line in report.table().lines().chain(report.verdict().lines()) {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}
