//! Test machines under QEMU: kernels, initramfs, root image, one run.

pub mod cpio;
pub mod initramfs;
pub mod kernel;
pub mod root;
pub mod run;
pub mod vmlinux;
