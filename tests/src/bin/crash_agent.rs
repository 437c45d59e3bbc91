//! The smallest agent that writes: what the crash tests kill and starve.
//!
//! `crash_agent once|recover|loop STATE_DIR CGROUP…`: `recover` opens the state folder;
//! `once` then carries out a few plans and restores; `loop` carries out plans until it is
//! killed. Prints one line when open and, after `once`, whether it still may enforce.
//! Errors on the way are what the tests provoke, so only `open`'s ends it (exit code 2).

use formtune_agent::act::Act;
use formtune_agent::vm::{CgroupVersion, Owner, Vm};
use formtune_core::plan::{Knob, Reason, Setpoint};
use formtune_core::policy::Mode;
use formtune_core::units::{VmId, Weight};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Weights per plan; the last goes back to the default.
const PLANS: [u32; 4] = [200, 50, 400, 100];

fn vm(cgroup: &Path) -> std::io::Result<Vm> {
    let v1 = cgroup.join("cpu.shares").exists();
    Ok(Vm {
        id: VmId(cgroup.file_name().unwrap_or_default().to_string_lossy().into_owned()),
        uuid: None,
        vcpus: 1,
        owner: Owner::Cgroup,
        cgroup: cgroup.to_owned(),
        cgroup_id: std::fs::metadata(cgroup)?.ino(),
        cgroup_version: if v1 { CgroupVersion::V1 } else { CgroupVersion::V2 },
    })
}

fn carry_out(act: &mut Act, vms: &[Vm], to: u32, plan_seq: u64) {
    for vm in vms {
        let (Ok(from), Some(to)) = (act.read_weight(vm), Weight::new(to)) else { continue };
        let setpoint = Setpoint {
            vm: vm.id.clone(),
            knob: Knob::CpuWeight,
            from,
            to,
            mode: Mode::Enforce,
            victim: None,
            reason: Reason::NoSlo,
        };
        act.execute(vm, &setpoint, plan_seq);
    }
}

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(what), Some(state)) = (args.next(), args.next()) else {
        eprintln!("usage: crash_agent once|recover|loop STATE_DIR CGROUP...");
        return ExitCode::from(2);
    };
    let vms: Result<Vec<Vm>, _> = args.map(|path| vm(&PathBuf::from(path))).collect();
    let Ok(vms) = vms else { return ExitCode::from(2) };
    let mut act = match Act::open(Path::new(&state), None) {
        Ok((act, _)) => act,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    println!("open");
    match what.to_str() {
        Some("recover") => {}
        Some("once") => {
            for (plan_seq, to) in (1..).zip(PLANS) {
                carry_out(&mut act, &vms, to, plan_seq);
                if plan_seq == 2 {
                    let _ = act.compact();
                }
            }
            act.restore_all();
            println!("enforce_allowed={}", act.enforce_allowed());
        }
        Some("loop") => {
            for (plan_seq, to) in (1..).zip(PLANS.into_iter().cycle()) {
                carry_out(&mut act, &vms, to, plan_seq);
                // Both ends of a knob's life are to be hit too.
                match plan_seq % 8 {
                    3 => {
                        let _ = act.compact();
                    }
                    7 => {
                        act.restore_all();
                    }
                    _ => {}
                }
            }
        }
        _ => return ExitCode::from(2),
    }
    ExitCode::SUCCESS
}
