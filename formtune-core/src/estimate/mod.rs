//! From counters and counts to figures: windows, quantiles, rates. Knows what was measured
//! and what was not; knows nothing of promises or knobs.

pub mod counter;
pub mod holders;
pub mod window;

/// To three decimals, so that what is printed and recorded is the same on every machine.
pub fn rounded(value: f64) -> f64 {
    libm::round(value * 1e3) / 1e3
}
