//! The smallest agent that writes: what the crash tests kill and starve.
//!
//! `crash_agent once|recover|loop|restore STATE_DIR [--libvirt URI DOMAIN] CGROUP…`:
//! `restore` does what `formtune restore` does. The others open the state folder, which is
//! all of `recover`; `once` then carries out a few plans and restores; `loop` carries out
//! plans until it is killed. With `--libvirt` the (one) cgroup is the domain's, and libvirt
//! is asked to write. Prints one line when open and, after `once`, whether it still may
//! enforce. Errors on the way are what the tests provoke, so only those of the beginning end
//! it (exit code 2).

use formtune_agent::act::{Act, restore};
use formtune_agent::hypervisor::Hypervisor;
use formtune_agent::vm::{CgroupVersion, Owner, Vm};
use formtune_core::plan::{Knob, Reason, Setpoint};
use formtune_core::policy::Mode;
use formtune_core::units::{VmId, Weight};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Weights per plan; the last goes back to the default.
const PLANS: [u32; 4] = [200, 50, 400, 100];

fn vm(cgroup: &Path, domain: Option<&str>) -> std::io::Result<Vm> {
    let v1 = cgroup.join("cpu.shares").exists();
    let name = cgroup.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Vm {
        id: VmId::from(domain.map_or(name, str::to_owned)),
        uuid: None,
        vcpus: 1,
        owner: match domain {
            Some(domain) => Owner::Libvirt { domain: domain.to_owned() },
            None => Owner::Cgroup,
        },
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

/// What the command line says.
struct Args {
    what: String,
    state: PathBuf,
    /// URI and domain.
    libvirt: Option<(String, String)>,
    cgroups: Vec<PathBuf>,
}

impl Args {
    fn read() -> Option<Self> {
        let mut args = std::env::args().skip(1).peekable();
        let (what, state) = (args.next()?, args.next()?.into());
        let libvirt = match args.next_if(|arg| arg == "--libvirt") {
            Some(_) => Some((args.next()?, args.next()?)),
            None => None,
        };
        Some(Self { what, state, libvirt, cgroups: args.map(PathBuf::from).collect() })
    }
}

fn main() -> ExitCode {
    let Some(Args { what, state, libvirt, cgroups }) = Args::read() else {
        eprintln!(
            "usage: crash_agent once|recover|loop|restore STATE_DIR [--libvirt URI DOMAIN] CGROUP..."
        );
        return ExitCode::from(2);
    };
    let connect = || Hypervisor::connect(&libvirt.as_ref()?.0).ok();
    if what == "restore" {
        return match restore(&state, connect) {
            Ok(report) if report.restored.is_complete() => ExitCode::SUCCESS,
            Ok(_) => ExitCode::from(1),
            Err(error) => {
                eprintln!("{error}");
                ExitCode::from(2)
            }
        };
    }
    let domain = libvirt.as_ref().map(|(_, domain)| domain.as_str());
    let vms: Result<Vec<Vm>, _> = cgroups.iter().map(|cgroup| vm(cgroup, domain)).collect();
    let Ok(vms) = vms else { return ExitCode::from(2) };
    let mut act = match Act::open(&state, connect()) {
        Ok((act, _)) => act,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    println!("open");
    match what.as_str() {
        "recover" => {}
        "once" => {
            for (plan_seq, to) in (1..).zip(PLANS) {
                carry_out(&mut act, &vms, to, plan_seq);
                if plan_seq == 2 {
                    let _ = act.compact();
                }
            }
            act.restore_all();
            println!("enforce_allowed={}", act.enforce_allowed());
        }
        "loop" => {
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
