//! The probes: count and time, never decide.
//!
//! Each file in `bin/` becomes one object, which the agent loads by itself; here is what
//! they share.
#![feature(asm_experimental_arch)]
#![no_std]

pub mod count;
pub mod histogram;
pub mod kernel;
pub mod packet;
pub mod table;

/// What every object needs besides its programs: the licence that the kernel checks, as
/// direct loads and some helpers are for GPL-compatible programs only.
#[macro_export]
macro_rules! object {
    () => {
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

        #[panic_handler]
        fn panic(_info: &core::panic::PanicInfo) -> ! {
            loop {}
        }
    };
}
