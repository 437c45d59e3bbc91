//! The root image of the end-to-end machine: this machine's own Debian release, so that what is
//! built here runs there, with systemd, libvirt and QEMU 10 or newer.

use crate::{progress, setup, sh};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What it has beside Debian's minimal system. `libpam-systemd` and `dbus` are what machined and
/// polkit need to be configured at all.
const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "libpam-systemd",
    "dbus",
    "udev",
    "kmod",
    "iproute2",
    "procps",
    "libvirt-daemon-system",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "qemu-system-x86",
];

/// Units that only cost time in a machine that lives for a minute.
const MASKED: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "systemd-timesyncd.service",
    "libvirt-guests.service",
];

/// The unit that runs the payload and prints how it ended.
const UNIT: &str = "[Unit]
Description=The payload of this test machine
After=dbus.service libvirtd.socket

[Service]
Type=oneshot
ExecStart=/bin/sh -c '/run/payload/run; echo VMEXIT:$?'
ExecStopPost=/bin/systemctl --force --force reboot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
";

/// The ext4 image; made on first use. It is never written to: run it with `snapshot=on`.
///
/// # Errors
/// When not root, or debootstrap fails.
pub fn image() -> Result<PathBuf> {
    let release = setup::apt::codename().context("the root image is only made on Debian")?;
    let image = sh::cache().join("root").join(format!("{release}.img"));
    if image.is_file() {
        return Ok(image);
    }
    let _lock = sh::lock_cache("root")?;
    if !image.is_file() {
        make(&image, &release).context("failed to make the root image")?;
    }
    Ok(image)
}

fn make(image: &Path, release: &str) -> Result<()> {
    let folder = image.parent().expect("the image lies in a folder");
    let root = folder.join("tree");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fs::create_dir_all(folder)?;
    let debootstrap = sh::find_program("debootstrap").context("debootstrap is missing")?;
    progress::run(
        "making a Debian root image (some 70 s, once)",
        "debootstrap",
        Command::new(debootstrap)
            .args(["--variant=minbase", &format!("--include={}", PACKAGES.join(","))])
            .arg(release)
            .arg(&root)
            .arg(setup::apt::site()?)
            .env_remove("TMPDIR"),
    )?;
    if release == setup::OLD_QEMU_RELEASE {
        add_qemu(&root)?;
    }
    let units = root.join("etc/systemd/system");
    for unit in MASKED {
        let link = units.join(unit);
        if link.symlink_metadata().is_ok() {
            fs::remove_file(&link)?;
        }
        std::os::unix::fs::symlink("/dev/null", link)?;
    }
    fs::write(units.join("payload.service"), UNIT)?;
    let wants = units.join("multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    std::os::unix::fs::symlink("../payload.service", wants.join("payload.service"))?;
    for autostart in ["etc/libvirt/qemu/networks/autostart/default.xml", "etc/fstab"] {
        let path = root.join(autostart);
        if path.symlink_metadata().is_ok() {
            fs::remove_file(path)?;
        }
    }
    let partial = folder.join("partial.img");
    if partial.exists() {
        fs::remove_file(&partial)?;
    }
    progress::run(
        "packing the root image",
        "mke2fs",
        Command::new(sh::find_program("mke2fs").context("mke2fs is missing")?)
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d"])
            .arg(&root)
            .arg(&partial)
            .arg("1500M"),
    )?;
    fs::remove_dir_all(&root)?;
    fs::rename(partial, image)?;
    Ok(())
}

/// Puts QEMU 10 in place of the release's own.
fn add_qemu(root: &Path) -> Result<()> {
    let inside = root.join("var/cache/apt/archives");
    let mut names = Vec::new();
    for deb in setup::qemu_backport()? {
        let name = deb.file_name().expect("a package file").to_owned();
        fs::copy(&deb, inside.join(&name))?;
        names.push(Path::new("/var/cache/apt/archives").join(name));
    }
    progress::run(
        "putting QEMU 10 into the root image",
        "root-qemu",
        Command::new("chroot")
            .arg(root)
            .args(["dpkg", "--install"])
            .args(&names)
            .env_remove("TMPDIR")
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )?;
    for entry in fs::read_dir(&inside)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}
