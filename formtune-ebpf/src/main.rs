//! The probes: count and time, never decide.
#![feature(asm_experimental_arch)]
#![no_std]
#![no_main]

mod floor;
mod kernel;
mod runq;

/// Checked by the kernel: helpers and direct loads are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
