//! From figures to setpoints: who suffers, who is to blame, what may be changed, whether it
//! helped, and when to give it back.

pub mod blame;
pub mod budget;
pub mod cpu;
pub mod knob;
pub mod relax;
pub mod verdict;
pub mod verify;
