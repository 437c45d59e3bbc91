//! Reading fields of kernel structures at offsets that the agent looked up.
//!
//! rustc emits no CO-RE relocations, so each offset is a constant in `.rodata` that the
//! agent overrides from `/sys/kernel/btf/vmlinux` before loading. `.rodata` is frozen, so
//! the verifier knows the value, checks the access against the kernel's types, and accepts
//! a plain load; a wrong offset is refused when the program is loaded, not at run time.

use core::ptr::read_volatile;

/// A constant that the agent fills in before loading.
#[repr(transparent)]
pub struct Constant(u32);

impl Constant {
    /// 0 until overridden.
    pub const fn new() -> Self {
        Self(0)
    }

    /// Its value; volatile, as the compiler must not fold the 0 in.
    #[inline(always)]
    pub fn get(&self) -> u32 {
        // SAFETY: a reference is valid for reads.
        unsafe { read_volatile(&self.0) }
    }
}

/// The field at `offset` of the structure at `base`.
///
/// # Safety
/// `base` must be a pointer that the verifier knows as one to a kernel structure, and `T`
/// must be what lies at `offset`. Faults on stale pointers are handled by the kernel (the
/// load then yields 0).
#[inline(always)]
pub unsafe fn field<T: Copy>(base: *const u8, offset: &Constant) -> T {
    // SAFETY: as demanded of the caller; the verifier checks it again.
    unsafe { read_volatile(base.add(offset.get() as usize).cast()) }
}
