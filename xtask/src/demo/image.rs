//! What the guests boot: a Debian kernel and an initramfs that holds one program.

use super::domain::Image;
use super::interrupt;
use crate::vm::{cpio, kernel};
use crate::{progress, sh};
use anyhow::{Context, Result};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// TCG reaches `/init` in 2 to 4 s; a KVM that works is faster.
const KVM_BOOT: Duration = Duration::from_secs(10);

/// Builds the guest program as a static binary, which also runs as a host process.
///
/// # Errors
/// When cargo fails.
pub fn guest_program() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let target = sh::target().join("guest");
    progress::run(
        "building the guest program",
        "guest-build",
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(sh::root())
            .args(["build", "--locked", "--release", "--package", "formtune-guest"])
            // An explicit target keeps the flags away from build scripts.
            .args(["--target", TARGET, "--target-dir"])
            .arg(&target)
            .env("RUSTFLAGS", "-C target-feature=+crt-static"),
    )?;
    Ok(target.join(TARGET).join("release/formtune-guest"))
}

/// Everything a guest boots from; the initramfs lies in `folder`.
///
/// # Errors
/// When the kernel cannot be had, or the program not be built.
pub fn prepare(folder: &Path) -> Result<Image> {
    let qemu = sh::find_program("qemu-system-x86_64")
        .context("qemu-system-x86_64 is missing; `cargo xtask setup` installs it")?;
    // The series with which the test bed is known to work well under TCG.
    let vmlinux = kernel::get(kernel::Series::Release("6.1"))?.vmlinux;
    let program = guest_program()?;
    let initrd = folder.join("initrd");
    let file = fs::File::create(&initrd)
        .with_context(|| format!("failed to write {}", initrd.display()))?;
    let mut archive = cpio::Writer::new(std::io::BufWriter::new(file));
    archive.file("init", 0o755, &fs::read(&program)?)?;
    archive.finish()?;
    let mut image = Image { vmlinux, initrd, program, qemu, kvm: false };
    image.kvm = kvm_works(&image)?;
    Ok(image)
}

/// Whether a guest boots under KVM. The device alone says nothing: a machine that is itself
/// a guest can have it without being able to run a kernel with it.
///
/// # Errors
/// On an interrupt.
fn kvm_works(image: &Image) -> Result<bool> {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !flags.split_whitespace().any(|word| word == "vmx" || word == "svm") {
        return Ok(false);
    }
    let mut step = progress::Step::start("trying to boot a guest under KVM");
    let child = Command::new(&image.qemu)
        .args(["-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "192M"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-append"])
        .arg("console=ttyS0 quiet panic=-1 reboot=t role=probe")
        .arg("-kernel")
        .arg(&image.vmlinux)
        .arg("-initrd")
        .arg(&image.initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else {
        step.end("it cannot be started");
        return Ok(false);
    };
    let mut waited = Ok(());
    while waited.is_ok() && matches!(child.try_wait(), Ok(None)) && step.elapsed() < KVM_BOOT {
        waited = interrupt::wait(Duration::from_millis(50), || step.tick());
    }
    // Killing one that is gone already fails, which is fine.
    let _ = child.kill();
    let mut said = String::new();
    if let Some(mut console) = child.stdout.take() {
        let _ = console.read_to_string(&mut said);
    }
    let _ = child.wait();
    let works = said.contains("probe ok");
    step.end(if works { "it works" } else { "it does not work here" });
    waited.map(|()| works)
}
