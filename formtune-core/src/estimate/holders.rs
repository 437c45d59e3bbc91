//! Who held the CPUs that a VM waited for, over the last window.

use crate::sample::HeldInterval;
use crate::units::Nanos;
use alloc::collections::VecDeque;

/// The long waits of the last window, by who had the CPU. Ticks without any cost nothing.
#[derive(Clone, Debug, Default)]
pub struct Holders {
    known: bool,
    ticks: VecDeque<(Nanos, HeldInterval)>,
}

impl Holders {
    /// Adds the waits that ended up to `at` (`None`: nobody knows), and drops what lies
    /// `window` or more back, give or take half a `tick`.
    pub fn push(&mut self, at: Nanos, held: Option<&HeldInterval>, window: Nanos, tick: Nanos) {
        let keep = Nanos(window.0.saturating_sub(tick.0 / 2));
        while self.ticks.front().is_some_and(|(then, _)| at.since(*then) >= keep) {
            self.ticks.pop_front();
        }
        self.known = held.is_some();
        if let Some(held) = held.filter(|held| held.total_ns() > 0) {
            self.ticks.push_back((at, held.clone()));
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The sum over the window; `None` where it is not known, or nobody waited long.
    pub fn sum(&self) -> Option<HeldInterval> {
        let ((_, first), rest) = (self.ticks.front()?, self.ticks.iter().skip(1));
        let mut sum = first.clone();
        rest.for_each(|(_, held)| sum.add(held));
        self.known.then_some(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slides_and_knows_when_it_does_not_know() {
        let (window, tick) = (Nanos::from_secs(1), Nanos::from_millis(250));
        let held = |ns| HeldInterval { by_vm: [("a".into(), ns)].into(), ..Default::default() };
        let mut holders = Holders::default();
        assert_eq!(holders.sum(), None);
        for n in 1..=8 {
            holders.push(Nanos(n * tick.0), Some(&held(n)), window, tick);
        }
        assert_eq!(holders.sum(), Some(held(5 + 6 + 7 + 8)));
        holders.push(Nanos(9 * tick.0), Some(&HeldInterval::default()), window, tick);
        assert_eq!(holders.sum(), Some(held(6 + 7 + 8)));
        holders.push(Nanos(10 * tick.0), None, window, tick);
        assert_eq!(holders.sum(), None);
    }
}
