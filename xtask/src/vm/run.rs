//! One run of a test machine: QEMU without hardware help (TCG), a hard time limit, and the
//! exit status that the machine prints on its serial line as `VMEXIT:STATUS`.

use super::kernel::Kernel;
use crate::demo::interrupt;
use crate::progress;
use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A machine to be run.
pub struct Machine<'a> {
    /// For messages and for the log, `target/log/vm-NAME.log`.
    pub name: &'a str,
    /// What it boots.
    pub kernel: &'a Kernel,
    /// Its initramfs.
    pub initramfs: &'a Path,
    /// MiB.
    pub memory: u32,
    /// Added to the kernel's command line.
    pub append: &'a str,
    /// Added to QEMU's command line.
    pub devices: &'a [String],
    /// Killed when it has not ended by then.
    pub limit: Duration,
}

/// How a run ended.
pub struct Ended {
    /// Exit status of the payload.
    pub status: i32,
    /// Everything it printed on its serial line.
    pub console: String,
    /// The file that holds the same.
    pub log: PathBuf,
    /// From QEMU's start to its end.
    pub elapsed: Duration,
}

/// Runs the machine under one progress line.
///
/// Emulated machines now and then die while booting, through no fault of the payload: a run that
/// printed no exit status is repeated once. One that printed a bad status is not.
///
/// # Errors
/// When QEMU cannot be started, neither run printed an exit status in time, or on an interrupt.
pub fn run(machine: &Machine<'_>) -> Result<Ended> {
    for attempt in 1..=2 {
        let (log, _) = progress::log_file(&format!("vm-{}", machine.name))?;
        let start = Instant::now();
        let how = once(machine, &log)?;
        // The serial line starts with a NUL or two, which make a log a binary file to grep.
        let console = String::from_utf8_lossy(&fs::read(&log)?).replace('\0', "");
        fs::write(&log, &console)?;
        if let Some(status) = exit_status(&console) {
            return Ok(Ended { status, console, log, elapsed: start.elapsed() });
        }
        let tail = progress::tail(&log, 15);
        if attempt == 2 {
            bail!("machine {} {how} without an exit status, twice; {tail}", machine.name);
        }
        eprintln!("machine {} {how} without an exit status; once more. {tail}", machine.name);
        fs::copy(&log, log.with_extension("first.log"))?;
    }
    unreachable!("the second attempt returns")
}

/// One run; says how it ended.
fn once(machine: &Machine<'_>, log: &Path) -> Result<&'static str> {
    let mut command = qemu(machine, log);
    let mut step = progress::Step::start(format!("machine {}", machine.name));
    let mut child =
        command.spawn().with_context(|| format!("failed to start {:?}", command.get_program()))?;
    loop {
        if let Err(interrupted) = interrupt::check() {
            child.kill()?;
            child.wait()?;
            step.end("interrupted");
            return Err(interrupted);
        }
        if child.try_wait()?.is_some() {
            step.end("ended");
            return Ok("ended");
        }
        if step.elapsed() > machine.limit {
            child.kill()?;
            child.wait()?;
            step.end("stopped at its time limit");
            return Ok("was stopped at its time limit");
        }
        std::thread::sleep(Duration::from_millis(20));
        step.tick();
    }
}

fn qemu(machine: &Machine<'_>, log: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512"])
        .args(["-cpu", "max", "-smp", "2", "-m", &format!("{}M", machine.memory)])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-serial", &format!("file:{}", log.display())])
        .arg("-kernel")
        .arg(&machine.kernel.vmlinux)
        .arg("-initrd")
        .arg(machine.initramfs)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet panic=-1 reboot=t psi=1 cgroup_no_v1=all random.trust_cpu=on \
             no_timer_check mitigations=off nokaslr {}",
            machine.append
        ))
        .args(machine.devices)
        .stdin(Stdio::null());
    // SAFETY: prctl is a plain system call, allowed between fork and exec.
    unsafe {
        // No machine outlives the command that started it.
        command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
    command
}

/// The status in the last complete `VMEXIT:STATUS` line.
fn exit_status(console: &str) -> Option<i32> {
    console
        .lines()
        .rev()
        .find_map(|line| line.split_once("VMEXIT:"))
        .and_then(|(_, status)| status.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::exit_status;

    #[test]
    fn the_exit_status_is_the_last_one_printed() {
        assert_eq!(
            exit_status("boot\r\nVMEXIT:7\r\n[    3.0] reboot: machine restart\r\n"),
            Some(7)
        );
        assert_eq!(exit_status("Kernel panic - not syncing"), None);
        assert_eq!(exit_status("VMEXIT:"), None);
    }
}
