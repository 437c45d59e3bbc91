//! Estimate and decide.
//!
//! Everything observed enters as a [`Sample`], everything to be done leaves as a
//! [`Plan`]; [`step`] is the only way from one to the other. The crate is `no_std` on
//! purpose: it cannot name a file, a clock, a thread or a source of randomness, so a
//! recorded run replays to the same plans byte for byte.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod decide;
mod estimate;
pub mod plan;
#[cfg(feature = "plant")]
pub mod plant;
pub mod policy;
pub mod reason;
pub mod sample;
mod state;
mod step;
pub mod trace;
pub mod units;

pub use plan::Plan;
pub use policy::Policy;
pub use sample::Sample;
pub use state::State;
pub use step::step;
pub use trace::replay;
