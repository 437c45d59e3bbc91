//! Rates of cumulative counters.

use crate::units::Nanos;
use alloc::vec::Vec;

/// A counter that stands still this long is idle; until then it may just not have been
/// refreshed, as readers may serve a value again without reading it.
const STILL_IS_IDLE: Nanos = Nanos::from_secs(1);

/// Without a reading for this long a rate is not known any more.
const STALE: Nanos = Nanos::from_secs(5);

/// Weight of the newest rate in the average. With a tick of 250 ms a step in the rate is
/// seen to 94 % after a second, and a single tick's burst does not make a culprit.
const NEWEST: f64 = 0.5;

/// Rate of a cumulative time: nanoseconds per nanosecond, that is CPUs.
#[derive(Clone, Debug, Default)]
pub struct Rate {
    last: Option<(Nanos, u64)>,
    rate: Option<f64>,
}

impl Rate {
    /// Takes one reading. A counter that went backwards is a new start, not a rate.
    pub fn read(&mut self, at: Nanos, reading: Option<u64>) {
        let Some((last_at, last)) = self.last else {
            self.last = reading.map(|value| (at, value));
            return;
        };
        let span = at.since(last_at);
        match reading {
            None if span > STALE => *self = Self::default(),
            None => {}
            Some(value) if value < last => *self = Self { last: Some((at, value)), rate: None },
            Some(_) if span.0 == 0 => {}
            Some(value) if value == last && span >= STILL_IS_IDLE => {
                *self = Self { last: Some((at, value)), rate: Some(0.0) };
            }
            Some(value) if value == last => {}
            Some(value) => {
                let newest = (value - last) as f64 / span.0 as f64;
                self.rate = Some(match self.rate {
                    Some(rate) => rate + NEWEST * (newest - rate),
                    None => newest,
                });
                self.last = Some((at, value));
            }
        }
    }

    /// Averaged over about the last second; `None` before the second reading.
    pub fn get(&self) -> Option<f64> {
        self.rate
    }
}

/// Growth of a cumulative time within a window.
#[derive(Clone, Debug, Default)]
pub struct Growth {
    last: Option<u64>,
    grown: Vec<(Nanos, u64)>,
}

impl Growth {
    /// Takes one reading and forgets what lies `window` or more back.
    pub fn read(&mut self, at: Nanos, reading: Option<u64>, window: Nanos) {
        if let (Some(value), Some(last)) = (reading, self.last)
            && value > last
        {
            self.grown.push((at, value - last));
        }
        self.last = reading.or(self.last);
        if !self.grown.is_empty() {
            self.grown.retain(|(grown_at, _)| at.since(*grown_at) < window);
        }
    }

    /// Sum over the window.
    pub fn get(&self) -> Nanos {
        Nanos(self.grown.iter().fold(0, |sum, (_, grown)| sum.saturating_add(*grown)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Nanos {
        Nanos::from_millis(ms)
    }

    #[test]
    fn backwards_is_no_reading() {
        let mut rate = Rate::default();
        rate.read(ms(0), Some(1_000_000_000));
        rate.read(ms(250), Some(1_250_000_000));
        assert_eq!(rate.get(), Some(1.0));
        rate.read(ms(500), Some(5));
        assert_eq!(rate.get(), None);
        rate.read(ms(750), Some(5 + 125_000_000));
        assert_eq!(rate.get(), Some(0.5));
    }

    #[test]
    fn a_value_served_again_is_not_idleness() {
        let mut rate = Rate::default();
        for tick in 0..40 {
            let refreshed = tick / 2 * 2;
            rate.read(ms(tick * 250), Some(refreshed * 250_000_000));
        }
        assert!((rate.get().unwrap() - 1.0).abs() < 0.01, "{rate:?}");
        rate.read(ms(40 * 250 + 1_000), Some(38 * 250_000_000));
        assert_eq!(rate.get(), Some(0.0));
    }

    #[test]
    fn no_reading_for_long_is_unknown() {
        let mut rate = Rate::default();
        rate.read(ms(0), Some(0));
        rate.read(ms(250), Some(250_000_000));
        rate.read(ms(500), None);
        assert_eq!(rate.get(), Some(1.0));
        rate.read(ms(6_000), None);
        assert_eq!(rate.get(), None);
    }

    #[test]
    fn growth_within_the_window_only() {
        let mut growth = Growth::default();
        growth.read(ms(0), Some(100), ms(1_000));
        growth.read(ms(250), Some(150), ms(1_000));
        growth.read(ms(500), Some(10), ms(1_000));
        assert_eq!(growth.get(), Nanos(50));
        growth.read(ms(750), Some(30), ms(1_000));
        assert_eq!(growth.get(), Nanos(70));
        growth.read(ms(1_250), Some(30), ms(1_000));
        assert_eq!(growth.get(), Nanos(20));
    }
}
