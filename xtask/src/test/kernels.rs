//! Tier `vm`: one static program (tests/src/bin/vm_payload.rs) checks on each of Debian's
//! kernels, with a real cgroup v2, that formtune loads, attributes, acts and restores.
//!
//! The results go to `target/kernels.json` and, as the README's table, to standard output.

use super::{Count, readme};
use crate::vm::initramfs::{INIT_PAYLOAD, Initramfs};
use crate::vm::kernel::{self, Kernel, Series};
use crate::vm::run::{Ended, Machine, run as run_machine};
use crate::{progress, sh};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// The target that the static program is built for; naming it keeps its files apart.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What precedes a result on the machine's console.
const MARK: &str = "CHECK ";

/// Tap devices, and tc programs where there is no TCX.
const MODULES: &[&str] = &["tun", "sch_ingress", "cls_bpf"];
/// The disk of every machine: so slow that what its requests take is its own time.
const DISK: &str = "format=raw,if=virtio,throttling.iops-total=400";
const DISK_BYTES: u64 = 16 << 20;
/// Rings so short that a large read fills one, as it takes a place for each piece of memory.
const RING: &[&str] = &["indirect_desc=off", "queue-size=32"];

/// A machine takes one to four minutes; the newest kernel is the slowest.
const LIMIT: Duration = Duration::from_secs(700);

/// One check, as the payload prints it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Check {
    /// e.g. `attributes`.
    check: String,
    ok: bool,
    /// What was measured, or what went wrong.
    detail: String,
    /// What to show in the table in place of "yes".
    #[serde(default)]
    figure: Option<String>,
}

/// The README's columns: heading, and the checks that stand in it. A check in none of them
/// has a column of its own at the end.
const COLUMNS: &[(&str, &[&str])] = &[
    ("loads", &["loads"]),
    ("attributes waits", &["attributes"]),
    ("acts (4:1 weights)", &["acts"]),
    ("closes the loop", &["closes the loop"]),
    ("restores after SIGKILL, on stop", &["restores after SIGKILL", "restores on stop"]),
    ("TCP, taps by", &["retransmit"]),
    ("block I/O, times", &["block", "block without times"]),
    ("pressure", &["pressure"]),
];

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.ok { "ok" } else { "FAILED" };
        write!(f, "{}: {verdict}, {}", self.check, self.detail)
    }
}

/// All checks on one kernel.
#[derive(Debug, Serialize)]
struct Checked {
    kernel: String,
    seconds: f64,
    checks: Vec<Check>,
}

/// Builds the payload and runs it on these kernels, oldest first.
pub fn run(kernels: &[Series]) -> Result<Count> {
    let programs = build()?;
    let mut count = Count::default();
    let mut all = Vec::new();
    for series in kernels {
        let kernel = kernel::get(*series)?;
        match run_on(&kernel, series.name(), &programs) {
            Ok((checked, counted)) => {
                count.add(counted);
                all.push(checked);
            }
            // Another kernel may still do.
            Err(error) => {
                count.failed += 1;
                count.notes.push(format!("{error:#}"));
            }
        }
    }
    let path = sh::target().join("kernels.json");
    fs::write(&path, serde_json::to_vec_pretty(&all)?)
        .with_context(|| format!("failed to write {}", path.display()))?;
    let table = table(&all);
    println!("{table}");
    count.add(readme::compare(&table)?);
    Ok(count)
}

/// Prints the row of this machine's own kernel, from what its tests printed.
pub fn natively(output: &str) -> Result<Count> {
    let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let series: Vec<&str> = release.split('.').take(2).collect();
    let kernel = format!("{}, natively", series.join("."));
    let table = table(&[Checked { kernel, seconds: 0.0, checks: checks(output)? }]);
    println!("{table}");
    readme::compare(&table)
}

/// The static programs.
struct Programs {
    payload: PathBuf,
    formtune: PathBuf,
}

/// Builds them, without libvirt, which there is no static library of.
fn build() -> Result<Programs> {
    progress::run(
        "building the static test program",
        "build-static",
        Command::new("cargo")
            .current_dir(sh::root())
            .args(["build", "--package", "formtune-tests", "--bin", "vm_payload"])
            .args(["--package", "formtune-agent", "--bin", "formtune"])
            .args(["--no-default-features", "--target", TARGET])
            // A quarter of the size: it is unpacked into the memory of four machines.
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Ctarget-feature=+crt-static"),
    )?;
    let folder = sh::target().join(TARGET).join("debug");
    Ok(Programs { payload: folder.join("vm_payload"), formtune: folder.join("formtune") })
}

/// Runs the payload on one kernel.
fn run_on(kernel: &Kernel, name: &str, programs: &Programs) -> Result<(Checked, Count)> {
    let folder = tempfile::tempdir_in(sh::target())?;
    let file = folder.path().join("initramfs");
    let mut initramfs = Initramfs::new(kernel, INIT_PAYLOAD)?;
    initramfs
        .modules(&["virtio_pci", "virtio_blk"])
        .copy("payload/run", &programs.payload)?
        .copy("payload/formtune", &programs.formtune)?
        .modules(MODULES);
    initramfs.write(&file)?;
    let disk = folder.path().join("disk");
    fs::File::create(&disk)?.set_len(DISK_BYTES)?;
    let mut devices = vec!["-drive".to_owned(), format!("file={},{DISK}", disk.display())];
    for setting in RING {
        devices.extend(["-global".to_owned(), format!("virtio-blk-pci.{setting}")]);
    }
    let ended = run_machine(&Machine {
        name: &format!("kernel-{name}"),
        kernel,
        initramfs: &file,
        memory: 1024,
        // Debian leaves pressure off by default.
        append: "psi=1",
        devices: &devices,
        limit: LIMIT,
    })?;
    let checks =
        checks(&ended.console).with_context(|| format!("results in {}", ended.log.display()))?;
    let count = judge(&kernel.release, &checks, &ended);
    let seconds = ended.elapsed.as_secs_f64();
    Ok((Checked { kernel: kernel.release.clone(), seconds, checks }, count))
}

/// Counts the checks of one machine. A machine whose exit status does not fit its checks, or that
/// made none, is one more failure.
pub fn judge(machine: &str, checks: &[Check], ended: &Ended) -> Count {
    let mut count = Count::default();
    for check in checks {
        if check.ok {
            count.passed += 1;
        } else {
            count.failed += 1;
            count.notes.push(format!("failed on {machine}: {check}"));
        }
    }
    if checks.is_empty() || (ended.status != 0) != (count.failed > 0) {
        count.failed += 1;
        count.notes.push(format!(
            "on {machine} the test program ended with {} after {} checks",
            ended.status,
            checks.len(),
        ));
    }
    if count.failed > 0 {
        count.notes.push(progress::tail(&ended.log, 20));
    }
    count
}

/// The results on a console.
pub fn checks(console: &str) -> Result<Vec<Check>> {
    console
        .lines()
        .filter_map(|line| line.split_once(MARK))
        .map(|(_, json)| {
            serde_json::from_str(json.trim()).with_context(|| format!("not a result: {json}"))
        })
        .collect()
}

/// Kernels × checks, in Markdown: the README's table, to be copied there.
fn table(all: &[Checked]) -> String {
    let mut columns: Vec<(&str, Vec<&str>)> =
        COLUMNS.iter().map(|(heading, checks)| (*heading, checks.to_vec())).collect();
    for Check { check, .. } in all.iter().flat_map(|checked| &checked.checks) {
        if !columns.iter().any(|(_, checks)| checks.contains(&check.as_str())) {
            columns.push((check, vec![check]));
        }
    }
    let headings: Vec<&str> = columns.iter().map(|(heading, _)| *heading).collect();
    let mut lines = vec![
        format!("| kernel | {} |", headings.join(" | ")),
        format!("| --- |{}", " --- |".repeat(headings.len())),
    ];
    for checked in all {
        let cell = |name: &&str| match checked.checks.iter().find(|check| check.check == *name) {
            Some(Check { ok: true, figure, .. }) => figure.as_deref().unwrap_or("yes"),
            Some(_) => "**no**",
            None => "–",
        };
        let cells: Vec<String> = columns
            .iter()
            .map(|(_, checks)| checks.iter().map(cell).collect::<Vec<_>>().join(", "))
            .collect();
        lines.push(format!("| {} | {} |", checked.kernel, cells.join(" | ")));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::{Check, Checked, checks, table};

    #[test]
    fn results_are_read_off_a_console_between_kernel_messages() {
        let console = "[ 2.1] CHECK {\"check\":\"loads\",\"ok\":true,\"detail\":\"0.2 s\"}\r\n\
            [    3.0] random: crng init done\r\nCHECK {\"check\":\"acts\",\"ok\":false,\
            \"detail\":\"ratio 1.0\"}\r\nVMEXIT:1\r\n";
        let found = checks(console).unwrap();
        assert_eq!(found.len(), 2);
        assert!(found[0].ok && !found[1].ok);
        assert!(checks("CHECK {broken\n").is_err());
    }

    #[test]
    fn the_table_tells_failed_from_not_reached() {
        let check = |name: &str, ok, figure: Option<&str>| Check {
            check: name.to_owned(),
            ok,
            detail: String::new(),
            figure: figure.map(str::to_owned),
        };
        let all = [
            Checked {
                kernel: "5.10.0-32-cloud-amd64".to_owned(),
                seconds: 1.0,
                checks: vec![
                    check("loads", true, None),
                    check("acts", true, Some("4.02")),
                    check("restores on stop", true, None),
                    check("sings", true, None),
                ],
            },
            Checked {
                kernel: "7.3.4+deb13-cloud-amd64".to_owned(),
                seconds: 1.0,
                checks: vec![check("loads", true, None), check("acts", false, None)],
            },
        ];
        assert_eq!(
            table(&all),
            "| kernel | loads | attributes waits | acts (4:1 weights) | closes the loop | \
             restores after SIGKILL, on stop | TCP, taps by | block I/O, times | pressure | \
             sings |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n\
             | 5.10.0-32-cloud-amd64 | yes | – | 4.02 | – | –, yes | – | –, – | – | yes |\n\
             | 7.3.4+deb13-cloud-amd64 | yes | – | **no** | – | –, – | – | –, – | – | – |"
        );
    }

    /// Heading and columns of the README are those that are printed; what is in them is
    /// compared when it has been seen (`readme`).
    #[test]
    fn the_table_is_the_readmes() {
        let readme = std::fs::read_to_string(crate::sh::root().join("README.md")).unwrap();
        let (_, rows) = readme.split_once(&format!("\n{}\n", table(&[]))).unwrap();
        let rows: Vec<&str> = rows.lines().take_while(|line| line.starts_with('|')).collect();
        let cells = table(&[]).lines().next().unwrap().matches('|').count();
        for row in &rows {
            assert_eq!(row.matches('|').count(), cells, "{row}");
            // Nothing that was not reached.
            assert!(!row.contains('–') && !row.contains("**no**"), "{row}");
        }
        for tested in ["| 5.10.", "| 6.1.", "| 6.12.", ", natively |"] {
            assert_eq!(rows.iter().filter(|row| row.contains(tested)).count(), 1, "{tested}");
        }
        assert!(rows.len() >= 5, "{rows:?}");
    }
}
