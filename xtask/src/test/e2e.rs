//! Tier `e2e`: the real agent in a machine with systemd and libvirt and two spinning guests,
//! checked by tests/src/bin/e2e_payload.rs, and native tests on its pure cgroup v2.

use super::Count;
use super::binaries::Binaries;
use super::kernels::{checks, judge};
use crate::sh;
use crate::vm::initramfs::{INIT_ROOT, Initramfs};
use crate::vm::kernel::{self, Series};
use crate::vm::root;
use crate::vm::run::{Machine, run as run_machine};
use anyhow::{Context, Result};
use std::process::Command;
use std::time::Duration;

/// The machine takes some three minutes.
const LIMIT: Duration = Duration::from_secs(480);

/// Native tests that depend on the version of the cgroup interface or on libvirt.
const NATIVE: &[&str] = &["act_cgroup", "act_libvirt", "daemon_libvirt", "native_libvirt"];

/// Debian 12's own series.
const SERIES: Series = Series::Release("6.1");

/// Runs the machine and counts its checks.
pub fn run(binaries: &Binaries) -> Result<Count> {
    let kernel = kernel::get(SERIES)?;
    let disk = root::image()?;
    let folder = tempfile::tempdir_in(sh::target())?;
    let file = folder.path().join("initramfs");
    let mut initramfs = Initramfs::new(&kernel, INIT_ROOT)?;
    initramfs.modules(&["virtio_pci", "virtio_blk", "ext4"]);
    let mut programs = vec![
        ("payload/run".to_owned(), binaries.program("e2e_payload")?),
        ("payload/formtune".to_owned(), binaries.program("formtune")?),
    ];
    for test in NATIVE {
        programs.push((format!("payload/tests/{test}"), binaries.root_test(test)?));
    }
    let stripped = folder.path().join("stripped");
    for (path, program) in programs {
        // All of it is unpacked into the machine's memory.
        sh::run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(program))?;
        initramfs.copy(&path, &stripped)?;
    }
    initramfs.write(&file)?;
    let ended = run_machine(&Machine {
        name: "e2e",
        kernel: &kernel,
        initramfs: &file,
        memory: 2048,
        append: "systemd.show_status=0",
        devices: &[
            "-drive".to_owned(),
            format!("file={},format=raw,if=virtio,snapshot=on", disk.display()),
        ],
        limit: LIMIT,
    })?;
    let checks =
        checks(&ended.console).with_context(|| format!("results in {}", ended.log.display()))?;
    for check in &checks {
        eprintln!("  {check}");
    }
    Ok(judge("the machine with systemd", &checks, &ended))
}
