//! Who else on this node sets what formtune sets, or moves what it measures.

use super::Check;
use std::collections::BTreeSet;
use std::path::Path;

/// A rival: how it is recognised, what it does, what to do.
struct Rival {
    /// Name people know it by.
    name: &'static str,
    /// File names of its executable or script.
    programs: &'static [&'static str],
    /// It writes what formtune writes; otherwise it is only worth knowing of.
    conflicts: bool,
    does: &'static str,
    remedy: &'static str,
}

const RIVALS: [Rival; 9] = [
    Rival {
        name: "TuneD",
        programs: &["tuned"],
        conflicts: false,
        does: "sets the CPU governor, kernel.sched_* and, by its cgroup and scheduler plug-ins, \
               priorities of processes",
        remedy: "keep it (profile virtual-host fits); do not let its [cgroup] or [scheduler] \
                 plug-in match QEMU",
    },
    Rival {
        name: "MOM",
        programs: &["momd", "mom-vdsm"],
        conflicts: true,
        does: "sets the CPU quota and the balloon of VMs",
        remedy: "`systemctl disable --now mom-vdsm momd`, or drop its CpuTune controller",
    },
    Rival {
        name: "ksmtuned",
        programs: &["ksmtuned"],
        conflicts: false,
        does: "tunes the merging of memory pages, which costs CPU time when memory is short",
        remedy: "keep it; if `ksmd` shows among the busiest threads, make KSM_SLEEP_MSEC larger",
    },
    Rival {
        name: "numad",
        programs: &["numad"],
        conflicts: true,
        does: "moves VMs between NUMA nodes while they run, which makes them wait for reasons \
               that weights cannot cure",
        remedy: "`systemctl disable --now numad`, and pin VMs by their NUMA configuration",
    },
    Rival {
        name: "Proxmox VE",
        programs: &["pvestatd"],
        conflicts: true,
        does: "sets `cpuunits` as CPU weight when a VM starts or is changed, and balloons memory",
        remedy: "keep it: formtune yields a weight that somebody else changed; express \
                 entitlements by `cpuunits`",
    },
    Rival {
        name: "koordlet",
        programs: &["koordlet"],
        conflicts: true,
        does: "writes CPU weights and quotas of cgroups in a loop of its own",
        remedy: "let one of the two set CPU weights: exclude VMs from its QoS strategies, or run \
                 formtune in mode shadow",
    },
    Rival {
        name: "Ananicy",
        programs: &["ananicy", "ananicy-cpp"],
        conflicts: true,
        does: "changes nice values and cgroups of processes by their name",
        remedy: "stop it, or remove its rules for QEMU",
    },
    Rival {
        name: "uresourced",
        programs: &["uresourced"],
        conflicts: true,
        does: "sets CPU weights of slices",
        remedy: "`systemctl disable --now uresourced`: it is made for desktops",
    },
    Rival {
        name: "auto-cpufreq",
        programs: &["auto-cpufreq"],
        conflicts: false,
        does: "changes CPU frequencies under the VMs",
        remedy: "prefer the governor `performance` on a hypervisor",
    },
];

/// A running process, as `/proc` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// `/proc/PID/comm`.
    pub comm: String,
    /// `/proc/PID/cmdline`, split; empty for kernel threads.
    pub argv: Vec<String>,
}

impl Process {
    /// Whether its executable or, where that is an interpreter, its script has this name.
    fn is(&self, program: &str) -> bool {
        let named = |path: &String| {
            Path::new(path).file_name().is_some_and(|name| name.to_string_lossy() == program)
        };
        if self.argv.is_empty() {
            return false;
        }
        let interpreter = Path::new(&self.argv[0]).file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            ["python", "perl", "bash", "sh", "dash"].iter().any(|known| {
                name.strip_prefix(known)
                    .is_some_and(|rest| rest.chars().all(|c| c.is_ascii_digit() || c == '.'))
            })
        });
        // Perl daemons such as pvestatd set their whole title, so comm counts as well.
        named(&self.argv[0])
            || self.comm == program
            || (interpreter
                && self.argv[1..].iter().find(|arg| !arg.starts_with('-')).is_some_and(named))
    }
}

/// One check per rival found, or one that says there is none.
pub(super) fn check() -> Vec<Check> {
    let mut checks = rivals(&processes());
    checks.extend(scheduler(Path::new("/sys/kernel/sched_ext")));
    if checks.is_empty() {
        checks.push(Check::ok("rivals", "nobody else who tunes this node is running"));
    }
    checks
}

/// The rivals among these processes.
pub fn rivals(processes: &[Process]) -> Vec<Check> {
    RIVALS
        .iter()
        .filter_map(|rival| {
            let is_it = |process: &&Process| rival.programs.iter().any(|name| process.is(name));
            let process = processes.iter().find(is_it)?;
            let found = format!("{} runs (pid {}): it {}", rival.name, process.pid, rival.does);
            Some(match rival.conflicts {
                true => Check::finding("rival", found, rival.remedy),
                false => Check::note("rival", found, rival.remedy),
            })
        })
        .collect()
}

/// A scheduler loaded by sched_ext may ignore weights, and bypasses the queues that the
/// probe watches only in part (Documentation/scheduler/sched-ext.rst).
fn scheduler(folder: &Path) -> Option<Check> {
    let state = std::fs::read_to_string(folder.join("state")).ok()?;
    if state.trim() != "enabled" {
        return None;
    }
    let ops = std::fs::read_to_string(folder.join("root/ops")).unwrap_or_default();
    let name = if ops.trim().is_empty() { "unknown" } else { ops.trim() };
    Some(Check::finding(
        "rival",
        format!("a sched_ext scheduler is loaded ({name}): CPU weights may have no effect"),
        "stop it (end its process, usually scx_…), or use one that honours cpu.weight and run \
         formtune in mode shadow first",
    ))
}

fn processes() -> Vec<Process> {
    let Ok(folder) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids: BTreeSet<u32> =
        folder.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.into_iter()
        .filter_map(|pid| {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let argv = cmdline
                .split(|byte| *byte == 0)
                .filter(|arg| !arg.is_empty())
                .map(|arg| String::from_utf8_lossy(arg).into_owned())
                .collect();
            Some(Process { pid, comm: comm.trim_end().into(), argv })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn process(comm: &str, argv: &[&str]) -> Process {
        Process { pid: 7, comm: comm.into(), argv: argv.iter().map(|&a| a.into()).collect() }
    }

    #[test]
    fn rivals_are_found_by_program_script_or_title() {
        let found = |process: Process| rivals(&[process]).pop().map(|check| check.found);
        let tuned = process("tuned", &["/usr/bin/python3", "-Es", "/usr/sbin/tuned", "-l", "-P"]);
        assert!(found(tuned).unwrap().starts_with("TuneD runs (pid 7)"));
        assert!(found(process("numad", &["/usr/bin/numad", "-i", "15"])).is_some());
        assert!(found(process("pvestatd", &["pvestatd"])).unwrap().contains("Proxmox"));
        let ksm = process("ksmtuned", &["/bin/bash", "/usr/sbin/ksmtuned"]);
        assert!(found(ksm).is_some());
    }

    #[test]
    fn what_only_mentions_a_rival_is_none() {
        assert!(rivals(&[process("vim", &["vim", "/etc/tuned/tuned"])]).is_empty());
        assert!(rivals(&[process("grep", &["grep", "numad"])]).is_empty());
        assert!(rivals(&[process("numad", &[])]).is_empty(), "a kernel thread of that name");
        let shell = process("bash", &["bash", "-c", "numad"]);
        assert!(rivals(std::slice::from_ref(&shell)).is_empty() || shell.is("numad"));
    }

    #[test]
    fn only_those_that_write_the_same_are_findings() {
        let all = [process("tuned", &["tuned"]), process("momd", &["momd"])];
        let verdicts: Vec<_> = rivals(&all).into_iter().map(|check| check.verdict).collect();
        assert_eq!(verdicts, [Verdict::Note, Verdict::Finding]);
    }

    #[test]
    fn a_loaded_scheduler_is_named() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(scheduler(folder.path()), None);
        std::fs::write(folder.path().join("state"), "disabled\n").unwrap();
        assert_eq!(scheduler(folder.path()), None);
        std::fs::write(folder.path().join("state"), "enabled\n").unwrap();
        std::fs::create_dir(folder.path().join("root")).unwrap();
        std::fs::write(folder.path().join("root/ops"), "lavd\n").unwrap();
        assert!(scheduler(folder.path()).unwrap().found.contains("(lavd)"));
    }
}
