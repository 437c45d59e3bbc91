//! What the probes may cost: above the budget they look at fewer events.

use crate::units::Nanos;

/// Below this share of the budget the probes may look at more again. Half as many events
/// cost at best half as much, so less than half must be left to have room for all of them.
const RETURN_BELOW: f64 = 0.4;

/// Least time between two steps towards looking at more. Load that comes and goes within it
/// would have the probes change all the time.
const RETURN_AFTER: Nanos = Nanos::from_secs(60);

/// How many events the probes look at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Budget {
    shift: u8,
    changed_at: Nanos,
}

impl Budget {
    /// Takes a measurement, in CPUs; `most` is the budget. `Some` is the new shift: one event
    /// in 2^shift is to be looked at.
    pub fn step(&mut self, at: Nanos, cost: f64, most: f64, max_shift: u8) -> Option<u8> {
        let shift = if cost > most {
            (self.shift + 1).min(max_shift)
        } else if cost < most * RETURN_BELOW && at.since(self.changed_at) >= RETURN_AFTER {
            self.shift.saturating_sub(1)
        } else {
            self.shift
        };
        if shift == self.shift {
            return None;
        }
        (self.shift, self.changed_at) = (shift, at);
        Some(shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node on which looking at everything costs `full` CPUs and looking at nothing `floor`.
    fn cost(full: f64, floor: f64, shift: u8) -> f64 {
        floor + (full - floor) / f64::from(1_u32 << shift)
    }

    #[test]
    fn sheds_until_it_fits_and_comes_back() {
        let mut budget = Budget::default();
        let mut shift = 0;
        let mut run = |budget: &mut Budget, from: u64, full: f64| {
            for second in from..from + 300 {
                let cost = cost(full, 0.005, shift);
                shift = budget.step(Nanos::from_secs(second), cost, 0.05, 10).unwrap_or(shift);
            }
            shift
        };
        assert_eq!(run(&mut budget, 100, 0.04), 0, "within the budget");
        assert_eq!(run(&mut budget, 400, 0.3), 3, "0.042 CPUs with one in eight");
        assert_eq!(run(&mut budget, 700, 0.3), 3, "and stays there");
        assert_eq!(run(&mut budget, 1_000, 0.015), 0);
        assert_eq!(run(&mut budget, 1_300, 900.0), 10, "no further than this");
    }
}
