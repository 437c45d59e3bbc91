//! Plain records that cross the boundary between kernel and agent. `no_std`, no logic
//! beyond the bucket arithmetic that both sides must share.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod block;
pub mod histogram;
pub mod runq;
pub mod sampling;
pub mod table;
pub mod tcp;
