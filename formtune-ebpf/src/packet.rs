//! Packets, as [`formtune_common::tcp::frame`] reads them.

use core::arch::asm;
use core::ptr::read_volatile;
use formtune_common::tcp::frame::{Bytes, Header, MAX_DEPTH, MAX_HEADER};

/// The part of a packet that the kernel keeps in one piece, in place.
#[derive(Clone, Copy)]
pub struct InPlace {
    /// `__sk_buff.data`.
    pub data: usize,
    /// `__sk_buff.data_end`.
    pub end: usize,
}

impl Bytes for InPlace {
    type Header = At;
    #[inline(always)]
    fn header(&self, at: usize, len: usize) -> Option<At> {
        let begin = offset(self.data, at);
        (begin + len <= self.end).then_some(At(begin as *const u8))
    }
}

/// The beginning of a packet, copied.
#[derive(Clone, Copy)]
pub struct Copied<'a> {
    /// Where to.
    pub bytes: &'a [u8; MAX_DEPTH + MAX_HEADER],
    /// How much of it.
    pub len: usize,
}

impl Bytes for Copied<'_> {
    type Header = At;
    #[inline(always)]
    fn header(&self, at: usize, len: usize) -> Option<At> {
        if at + len > self.len {
            return None;
        }
        Some(At(offset(self.bytes.as_ptr() as usize, at) as *const u8))
    }
}

/// `base + at`, with what the verifier needs to know of it: a sum that the compiler cannot
/// take apart again, of something that is less than [`MAX_DEPTH`].
#[inline(always)]
fn offset(base: usize, at: usize) -> usize {
    let mut begin = base;
    // SAFETY: changes its operands only.
    unsafe {
        asm!(
            "{at} &= 255",
            "{begin} += {at}",
            at = inout(reg) at => _,
            begin = inout(reg) begin,
            options(nomem, nostack),
        );
    }
    begin
}

const _: () = assert!(MAX_DEPTH == 256);

/// A header.
#[derive(Clone, Copy)]
pub struct At(*const u8);

// SAFETY of the reads: within what was asked for, as the verifier checks. Loads need not be
// aligned where the kernel was told so (x86-64, arm64).
impl Header for At {
    #[inline(always)]
    fn u8(self, at: usize) -> u8 {
        // SAFETY: see above.
        unsafe { read_volatile(self.0.add(at)) }
    }
    #[inline(always)]
    fn u16(self, at: usize) -> u16 {
        // SAFETY: see above.
        u16::from_be(unsafe { read_volatile(self.0.add(at).cast()) })
    }
    #[inline(always)]
    fn u32(self, at: usize) -> u32 {
        // SAFETY: see above.
        u32::from_be(unsafe { read_volatile(self.0.add(at).cast()) })
    }
}
