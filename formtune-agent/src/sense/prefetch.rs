//! Asking for memory before it is needed. What a reading of a thousand VMs costs is to wait for
//! memory that was last read a quarter of a second ago, once after the other; asked for together
//! it comes together.

/// Bytes per cache line, on all that matters here.
pub const LINE: usize = 64;

/// Has the processor fetch what is at an address, which need not be valid. Does nothing where that
/// is not known how.
#[inline]
pub fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
