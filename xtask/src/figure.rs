//! One measured figure, as `--json` writes it and as the table prints it.

use crate::stats;
use serde::Serialize;

/// The interchange format of `cargo xtask bench|sim NAME --json FILE`: a list of these.
/// `None` where there is no such thing.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// e.g. `runq.in_vm`.
    pub name: String,
    /// e.g. `ns/switch`.
    pub unit: String,
    /// Rounds, or repetitions, behind the medians.
    pub rounds: u32,
    /// Ours: the median, or a single value (see [`Figure::total`]).
    pub ours: Option<f64>,
    /// The peer's, median.
    pub peer: Option<f64>,
    /// The floor's, median.
    pub floor: Option<f64>,
    /// `ours / peer`.
    pub ratio_to_peer: Option<f64>,
    /// `ours / floor`.
    pub ratio_to_floor: Option<f64>,
    /// 95 % bootstrap interval of the figure that the target is about.
    pub ci95: Option<[f64; 2]>,
    /// e.g. `ratio_to_peer <= 0.35`.
    pub target: Option<String>,
    /// Whether the target was met.
    pub met: Option<bool>,
}

impl Figure {
    /// From one value per round. Peer's and floor's rounds are those of the same index, if
    /// there are any. `target` reads `<field> <= <number>` (or `>=`), the field being
    /// `ours`, `ratio_to_peer` or `ratio_to_floor`.
    ///
    /// # Panics
    /// If `target` does not read like that: it is a constant of the benchmark.
    pub fn measured(
        name: &str,
        unit: &str,
        ours: &[f64],
        peer: Option<&[f64]>,
        floor: Option<&[f64]>,
        target: Option<&str>,
    ) -> Self {
        let median = |values: &[f64]| Some(stats::median(values)).filter(|v| v.is_finite());
        let ratio = |other: Option<f64>| Some(median(ours)? / other?).filter(|r| r.is_finite());
        let (peer_median, floor_median) = (peer.and_then(median), floor.and_then(median));
        let mut figure = Self {
            name: name.into(),
            unit: unit.into(),
            rounds: ours.len() as u32,
            ours: median(ours),
            peer: peer_median,
            floor: floor_median,
            ratio_to_peer: ratio(peer_median),
            ratio_to_floor: ratio(floor_median),
            ci95: stats::median_ci95(ours),
            target: target.map(Into::into),
            met: None,
        };
        if let Some(target) = target {
            let [field, op, bound] = target.split(' ').collect::<Vec<_>>()[..] else {
                panic!("target {target:?} does not read `field <= number`")
            };
            let value = match field {
                "ours" => figure.ours,
                "ratio_to_peer" => {
                    figure.ci95 = peer.and_then(|peer| stats::ratio_ci95(ours, peer));
                    figure.ratio_to_peer
                }
                "ratio_to_floor" => {
                    figure.ci95 = floor.and_then(|floor| stats::ratio_ci95(ours, floor));
                    figure.ratio_to_floor
                }
                other => panic!("target {target:?}: no field {other:?}"),
            };
            let bound: f64 = bound.parse().unwrap_or_else(|_| panic!("target {target:?}"));
            figure.met = value.map(|value| match op {
                "<=" => value <= bound,
                ">=" => value >= bound,
                other => panic!("target {target:?}: no comparison {other:?}"),
            });
        }
        figure
    }

    /// A single value, such as a total over some time or a peak. `parts`, if there are any,
    /// are what it is the mean of: they give the interval and nothing else. `target` is
    /// about `ours`.
    ///
    /// # Panics
    /// As [`Figure::measured`].
    pub fn total(name: &str, unit: &str, ours: f64, parts: &[f64], target: Option<&str>) -> Self {
        let figure = Self::measured(name, unit, &[ours], None, None, target);
        Self { ci95: stats::mean_ci95(parts), ..figure }
    }
}

/// Prints the figures as a table of at most 80 columns: two lines each, the second holding
/// interval and target where there is one.
pub fn print_table(figures: &[Figure]) {
    println!(
        "{:<26} {:<10} {:>7} {:>8} {:>8} {:>7} {:>7}",
        "figure", "unit", "ours", "peer", "floor", "/peer", "/floor"
    );
    for figure in figures {
        println!(
            "{:<26} {:<10} {:>7} {:>8} {:>8} {:>7} {:>7}",
            figure.name,
            figure.unit,
            short(figure.ours),
            short(figure.peer),
            short(figure.floor),
            short(figure.ratio_to_peer),
            short(figure.ratio_to_floor),
        );
        let plural = if figure.rounds == 1 { "" } else { "s" };
        let mut notes = format!("  {} round{plural}", figure.rounds);
        if let Some([low, high]) = figure.ci95 {
            notes += &format!(", 95 % CI {} to {}", short(Some(low)), short(Some(high)));
        }
        if let Some(target) = &figure.target {
            let verdict = match figure.met {
                Some(true) => "met",
                Some(false) => "NOT met",
                None => "not judged",
            };
            notes += &format!(", {target}: {verdict}");
        }
        println!("{notes}");
    }
}

/// A number in at most seven columns with about four significant digits; `-` for none.
fn short(value: Option<f64>) -> String {
    let Some(value) = value else { return "-".into() };
    match value.abs() {
        0.0 => "0".into(),
        v if !(0.001..10_000_000.0).contains(&v) => format!("{value:.1e}"),
        v if v >= 1_000.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 10.0 => format!("{value:.2}"),
        v if v >= 0.01 => format!("{value:.3}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_judged_on_their_field() {
        let ours = [1.0, 1.1, 0.9];
        let peer = [4.0, 4.0, 4.0];
        let target = Some("ratio_to_peer <= 0.35");
        let figure = Figure::measured("a", "ns", &ours, Some(&peer), None, target);
        assert_eq!((figure.met, figure.ratio_to_peer), (Some(true), Some(0.25)));
        let figure = Figure::measured("a", "ns", &ours, None, None, Some("ours <= 0.5"));
        assert_eq!(figure.met, Some(false));
        let figure = Figure::measured("a", "ns", &ours, None, None, target);
        assert_eq!(figure.met, None);
    }

    #[test]
    fn a_total_is_judged_itself_and_not_its_parts() {
        // Quiet but for one burst: the median of the parts would be 0.1.
        let mut parts = [0.1; 12];
        parts[5] = 12.0;
        let total = parts.iter().sum::<f64>() / 12.0;
        let figure = Figure::total("a", "%", total, &parts, Some("ours <= 0.5"));
        assert_eq!((figure.ours, figure.rounds, figure.met), (Some(total), 1, Some(false)));
        let [low, high] = figure.ci95.unwrap();
        assert!(low <= total && total <= high, "{low} to {high}");
        assert_eq!(Figure::total("a", "MiB", 30.0, &[], Some("ours <= 32")).ci95, None);
    }

    #[test]
    fn numbers_fit_their_columns() {
        for v in [0.0, 0.00012, 0.0123, 1.2, 12.3, 123.4, 1234.5, 123_456.7, 9_999_999.0, 3e9] {
            assert!(short(Some(v)).len() <= 7, "{v}: {}", short(Some(v)));
        }
    }
}
