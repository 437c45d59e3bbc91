//! A simulated host that closes the loop: for tests and `cargo xtask sim`, not for the agent
//! (feature `plant`). Seeded and as pure as the rest: the same seed gives the same run.
//!
//! The model is as simple as the loop allows it to be. CPU is shared out by weight among
//! those who want it (weighted max-min fairness, which is what EEVDF approaches). A wait is
//! exponential, its p99 growing with how much more than the node has is asked for, and
//! falling with the VM's weight against that of its rivals as was measured on a real node
//! (2 CPUs, 6 spinning neighbours: p99 over the idle value 1 to 3.6 ms at equal weights,
//! 0.3 ms at 10:1, hardly any at 100:1, that is about ratio^-0.85).

mod host;
mod run;
mod scenario;

pub use host::{Host, Load, SimVm};
pub use run::{Report, Run, run};
pub use scenario::{Event, Scenario, Timed};

/// Sebastiano Vigna's splitmix64 (public domain): a seed, not a source of randomness.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// Next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// In `[low, high)`.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + self.unit() * (high - low)
    }

    /// In `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n.max(1)
    }
}
