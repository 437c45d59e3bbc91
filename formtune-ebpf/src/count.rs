//! Adding to counters in map values.

use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};

/// Adds to a counter that no other CPU writes.
///
/// # Safety
/// Points into a map value, as the verifier checks.
#[inline(always)]
pub unsafe fn add_u32(counter: *mut u32, n: u32) {
    // SAFETY: as demanded of the caller.
    unsafe { write_volatile(counter, read_volatile(counter).wrapping_add(n)) }
}

/// Adds to a counter that no other CPU writes.
///
/// # Safety
/// Points into a map value, as the verifier checks.
#[inline(always)]
pub unsafe fn add_u64(counter: *mut u64, n: u64) {
    // SAFETY: as demanded of the caller.
    unsafe { write_volatile(counter, read_volatile(counter).wrapping_add(n)) }
}

/// Adds to a counter that several CPUs write. Nothing comes back: Linux before 5.12 has no
/// atomics that fetch, and rustc offers none without.
///
/// # Safety
/// Points into a map value, as the verifier checks.
#[inline(always)]
pub unsafe fn add_shared_u32(counter: *mut u32, n: u32) {
    // SAFETY: as demanded of the caller; map values are aligned.
    unsafe { asm!("lock *(u32 *)({0} + 0) += {1}", in(reg) counter, in(reg) u64::from(n)) }
}

/// Adds to a counter that several CPUs write; see [`add_shared_u32`].
///
/// # Safety
/// Points into a map value, as the verifier checks.
#[inline(always)]
pub unsafe fn add_shared_u64(counter: *mut u64, n: u64) {
    // SAFETY: as demanded of the caller; map values are aligned.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) n) }
}
