//! From a time to its bucket.

use core::arch::asm;
use core::ptr::read_volatile;
use formtune_common::histogram::{BUCKETS, CELLS, Cell, LOG2, bucket_by_table};

/// In `.rodata`.
static LOGARITHMS: [u8; 256] = LOG2;
/// In `.rodata`.
static OCTAVE: [Cell; 32] = CELLS;

/// Bucket of a time in nanoseconds, known to the verifier to be less than [`BUCKETS`].
#[inline(always)]
pub fn bucket(ns: u64) -> Option<usize> {
    // Volatile, so that the compiler cannot tell what comes out and leaves the masks that
    // the verifier needs.
    // SAFETY: the indices are masked, so both are in bounds.
    let log2 = |n| u64::from(unsafe { read_volatile(&raw const LOGARITHMS[n as usize & 255]) });
    let cell = |n| {
        let cell = &raw const OCTAVE[n as usize & 31];
        // SAFETY: as above.
        unsafe {
            (read_volatile(&raw const (*cell).bound), read_volatile(&raw const (*cell).before))
        }
    };
    let mut bucket = bucket_by_table(ns, log2, cell);
    // The compiler knows that this is in bounds, and makes `|` of its sums. Kernels before
    // 6.4 know nothing of what comes out of a `|`, so a mask that the compiler cannot take
    // away tells them. (An `asm!` without an instruction breaks the line numbers in BTF.)
    // SAFETY: changes nothing but its operand.
    unsafe { asm!("{0} &= 1023", inout(reg) bucket, options(nomem, nostack)) };
    (bucket < BUCKETS as u64).then_some(bucket as usize)
}
