//! One measured figure, as `--json` writes it and as the table prints it.

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
    /// Ours, median.
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
