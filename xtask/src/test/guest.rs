//! Tier `guest`: root tests that start a guest with a Linux of its own; what it boots is
//! made here.

use super::{Binaries, Count, Tier, binaries};
use crate::sh;
use crate::vm::initramfs::{INIT_PAYLOAD, Initramfs};
use crate::vm::kernel::{self, Series};
use anyhow::Result;

/// What the guest of `guest_retransmit` runs.
const SEND: &str = include_str!("guest-send.sh");

/// Makes the image, runs the tests.
pub fn run(binaries: &Binaries) -> Result<Count> {
    // The series with which the test bed is known to work well under TCG.
    let kernel = kernel::get(Series::Release("6.1"))?;
    let folder = tempfile::tempdir_in(sh::target())?;
    let file = folder.path().join("initramfs");
    let mut initramfs = Initramfs::new(&kernel, INIT_PAYLOAD)?;
    initramfs.add("payload/run", 0o755, SEND.as_bytes()).modules(&["virtio_pci", "virtio_net"]);
    initramfs.write(&file)?;
    let variables =
        [("FORMTUNE_GUEST_KERNEL", kernel.vmlinux.as_path()), ("FORMTUNE_GUEST_INITRAMFS", &file)];
    binaries.run_with(Tier::Guest, binaries::guest, &variables)
}
