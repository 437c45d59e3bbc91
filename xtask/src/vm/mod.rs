//! Test machines under QEMU: kernels, initramfs, root image, one run.
