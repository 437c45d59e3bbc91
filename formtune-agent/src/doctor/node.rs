//! What the node offers: cgroups, libvirt, VMs, the state folder, socket and port.

use super::Check;
use crate::act;
use crate::config::Config;
use crate::hypervisor::{Domain, Hypervisor, HypervisorError};
use crate::sense::cgroup::Hierarchies;
use crate::sense::inventory::{Change, Tree};
use crate::vm::CgroupVersion;
use nix::unistd::{AccessFlags, access};
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

/// What takes longer is announced.
const LONG: Duration = Duration::from_secs(2);

pub(super) fn cgroup(config: &Config) -> (Check, Option<Hierarchies>) {
    let hierarchies = match Hierarchies::find(&config.sense.cgroup_root) {
        Ok(hierarchies) => hierarchies,
        Err(error) => {
            let remedy = "mount cgroup2 on /sys/fs/cgroup; without it no VM can be found";
            return (Check::finding("cgroup", error.to_string(), remedy), None);
        }
    };
    let (layout, file) = match (hierarchies.version, &hierarchies.unified) {
        (CgroupVersion::V2, _) => ("v2", "cpu.weight"),
        (CgroupVersion::V1, Some(_)) => ("hybrid (v1 with an empty v2 beside it)", "cpu.shares"),
        (CgroupVersion::V1, None) => ("v1", "cpu.shares"),
    };
    let cpu = hierarchies.cpu.display();
    let found = format!("{layout}; the cpu controller is at {cpu}, the knob is {file}");
    let check = match undelegated(&hierarchies) {
        Some(folder) => Check::finding(
            "cgroup",
            format!("{found}; but it is not enabled below {}", folder.display()),
            format!("`echo +cpu > {}/cgroup.subtree_control`", folder.display()),
        ),
        None => Check::ok("cgroup", found),
    };
    (check, Some(hierarchies))
}

/// On v2, a folder above the VMs that does not hand the cpu controller down. systemd hands
/// it down as soon as a scope asks for a weight, so only folders that hold VMs count.
fn undelegated(hierarchies: &Hierarchies) -> Option<std::path::PathBuf> {
    if hierarchies.version != CgroupVersion::V2 {
        return None;
    }
    let hands_down = |folder: &Path| {
        let path = folder.join("cgroup.subtree_control");
        std::fs::read_to_string(path).is_ok_and(|list| list.split_whitespace().any(|c| c == "cpu"))
    };
    let holds_vms = |folder: &Path| {
        std::fs::read_dir(folder).is_ok_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains("qemu"))
            })
        })
    };
    ["machine.slice", "machine"]
        .iter()
        .map(|name| hierarchies.cpu.join(name))
        .find(|folder| holds_vms(folder) && !hands_down(folder))
}

/// How libvirt stands, and which domains it has running.
pub(super) fn libvirt(
    config: &Config,
    waiting: impl FnOnce() + Send + 'static,
) -> (Check, Vec<Domain>) {
    let name = "libvirt";
    let Some(uri) = &config.libvirt_uri else {
        let remedy = "set `libvirt = \"qemu:///system\"` if libvirt runs these VMs: it owns their \
                      weights then";
        let found = "not used, as configured: VMs are found by cgroup only";
        return (Check::note(name, found, remedy), Vec::new());
    };
    let asked = with_notice(waiting, || {
        let hypervisor = Hypervisor::connect(uri)?;
        Ok((hypervisor.versions()?, hypervisor.domains()?))
    });
    let check = match asked {
        Ok((versions, domains)) => {
            let found = format!(
                "libvirt {} at {uri}, QEMU {}, running: {}",
                versions.libvirt,
                versions.hypervisor,
                match domains.len() {
                    1 => "1 domain".into(),
                    n => format!("{n} domains"),
                }
            );
            return (Check::ok(name, found), domains);
        }
        Err(error @ HypervisorError::NotBuilt) => Check::note(
            name,
            error.to_string(),
            "VMs are found by cgroup only; set `libvirt = \"off\"` to say that this is meant",
        ),
        Err(error) => Check::finding(
            name,
            error.to_string(),
            "start it (`systemctl start libvirtd` or `virtqemud`), or set `libvirt = \"off\"`; \
             without it VMs are found and changed through cgroups, which systemd may undo",
        ),
    };
    (check, Vec::new())
}

/// Does `work`, and calls `waiting` once if that takes long.
fn with_notice<T>(waiting: impl FnOnce() + Send + 'static, work: impl FnOnce() -> T) -> T {
    let (done, wait) = mpsc::channel::<()>();
    let notice = std::thread::spawn(move || {
        if wait.recv_timeout(LONG) == Err(mpsc::RecvTimeoutError::Timeout) {
            waiting();
        }
    });
    let result = work();
    drop(done);
    let _ = notice.join();
    result
}

/// Which VMs would be found; `domains` are those that libvirt has running.
pub(super) fn vms(config: &Config, hierarchies: &Hierarchies, domains: &[Domain]) -> Check {
    let mut changes = Vec::new();
    Tree::new(&hierarchies.cpu, &config.sense.patterns).scan(&mut changes);
    let groups = || {
        changes.iter().filter_map(|change| match change {
            Change::Appeared(group, _) => Some(group),
            _ => None,
        })
    };
    let has_cgroup = |domain: &&Domain| {
        groups().any(|group| {
            group.machine.as_ref().is_some_and(|machine| machine.is(domain.id, &domain.name))
        })
    };
    let without: Vec<&str> = domains
        .iter()
        .filter(|domain| !has_cgroup(domain))
        .map(|domain| domain.name.as_str())
        .collect();
    if !without.is_empty() {
        return Check::finding(
            "vms",
            format!(
                "no cgroup below {} is that of: {}",
                hierarchies.cpu.display(),
                without.join(", ")
            ),
            "look at /proc/PID/cgroup of its QEMU: `cpu` must be among `cgroup_controllers` of \
             libvirt's qemu.conf, and `cgroup_root` be the mount that QEMU is in; until then it \
             is neither measured nor changed",
        );
    }
    let found = groups().count();
    let patterns = config.sense.patterns.len();
    let by = match patterns {
        0 => "as libvirt names them".into(),
        1 => "as libvirt names them or by 1 pattern of the configuration".to_owned(),
        n => format!("as libvirt names them or by {n} patterns of the configuration"),
    };
    match found {
        0 => Check::note(
            "vms",
            format!("no cgroup of a VM below {}, {by}", hierarchies.cpu.display()),
            "nothing to do if none runs; VMs started without libvirt need a pattern in `cgroups`",
        ),
        1 => Check::ok("vms", format!("1 cgroup of a VM, {by}")),
        n => Check::ok("vms", format!("{n} cgroups of VMs, {by}")),
    }
}

/// Whether an agent answers on the configured socket.
pub(super) fn agent_running(config: &Config) -> bool {
    UnixStream::connect(&config.socket).is_ok()
}

pub(super) fn journal(config: &Config, running: bool) -> Check {
    let name = "journal";
    let folder = &config.state_dir;
    let shown = folder.display();
    let inspection = match act::inspect(folder) {
        Ok(inspection) => inspection,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match writable_parent(folder) {
                true => Check::ok(name, format!("none yet; {shown} is made at the first start")),
                false => Check::finding(
                    name,
                    format!("{shown} does not exist and cannot be made"),
                    "make it, or set another `state_dir`; without a journal nothing is written",
                ),
            };
        }
        Err(error) => {
            return Check::finding(
                name,
                format!("failed to read {shown}: {error}"),
                "run `formtune doctor` as root, or set another `state_dir`",
            );
        }
    };
    if let Some(damage) = inspection.damage {
        return Check::finding(
            name,
            format!("the journal in {shown} is damaged: {damage}"),
            "run `formtune restore`: it restores what can be read and keeps the damaged file",
        );
    }
    if let Some(kept) = inspection.set_aside {
        return Check::finding(
            name,
            format!("a damaged journal was set aside as {}: enforce is held back", kept.display()),
            "check the weights of your VMs, then remove that file",
        );
    }
    if access(folder, AccessFlags::W_OK).is_err() {
        let remedy = "make it writable, or set another `state_dir`; until then nothing is written";
        return Check::finding(name, format!("{shown} cannot be written"), remedy);
    }
    match (inspection.open.len(), running) {
        (0, _) => Check::ok(name, format!("in {shown}; no knob is changed")),
        (n, true) => Check::ok(name, format!("in {shown}; knobs changed now: {n}")),
        (n, false) => Check::finding(
            name,
            format!("knobs that an agent which died has left changed: {n}"),
            "run `formtune restore`; the next start of the agent does it too",
        ),
    }
}

fn writable_parent(folder: &Path) -> bool {
    let existing = folder.ancestors().find(|folder| folder.exists());
    existing.is_some_and(|folder| access(folder, AccessFlags::W_OK).is_ok())
}

pub(super) fn socket(config: &Config, running: bool) -> Check {
    let name = "agent";
    let path = config.socket.display();
    if running {
        return Check::ok(name, format!("running, answers on {path}"));
    }
    match UnixStream::connect(&config.socket) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Check::finding(
            name,
            format!("no permission to use {path}"),
            "run this as root, or have your user added to the group formtune",
        ),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Check::note(
            name,
            format!("not running; {path} is left over from one that died"),
            "start it: the file is replaced",
        ),
        _ => Check::note(name, "not running", "start it with `formtune run`"),
    }
}

pub(super) fn port(config: &Config, running: bool) -> Option<Check> {
    let address = config.listen?;
    // A running agent has it: to try would only show that.
    if running {
        return None;
    }
    Some(match TcpListener::bind(address) {
        Ok(_) => Check::ok("port", format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Check::finding(
            "port",
            format!("{address} is taken by another program"),
            format!(
                "find it with `ss -ltnp 'sport = :{}'`, or set another `listen`, or \"off\"",
                address.port()
            ),
        ),
        Err(error) => Check::finding(
            "port",
            format!("failed to listen on {address}: {error}"),
            "set another `listen`, or \"off\" for the Unix socket only",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use std::os::unix::net::UnixListener;

    fn config(folder: &Path) -> Config {
        Config {
            state_dir: folder.join("state"),
            socket: folder.join("formtune.sock"),
            listen: Some("127.0.0.1:0".parse().unwrap()),
            libvirt_uri: None,
            ..Config::default()
        }
    }

    #[test]
    fn socket_and_port_say_who_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        assert!(!agent_running(&config));
        assert_eq!(socket(&config, false).found, "not running");
        let listener = UnixListener::bind(&config.socket).unwrap();
        assert!(agent_running(&config));
        assert_eq!(socket(&config, true).verdict, Verdict::Ok);
        drop(listener);
        assert!(socket(&config, false).found.contains("left over"));

        assert_eq!(port(&config, false).unwrap().verdict, Verdict::Ok);
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        config.listen = Some(taken.local_addr().unwrap());
        let check = port(&config, false).unwrap();
        assert_eq!(check.verdict, Verdict::Finding);
        assert!(check.found.contains("taken by another program"), "{}", check.found);
        assert_eq!(port(&config, true), None);
        config.listen = None;
        assert_eq!(port(&config, false), None);
    }

    #[test]
    fn the_journal_is_looked_at_and_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        assert!(journal(&config, false).found.contains("none yet"));
        std::fs::create_dir(&config.state_dir).unwrap();
        assert!(journal(&config, false).found.contains("no knob is changed"));

        let file = config.state_dir.join("journal");
        std::fs::write(&file, "garbage\n").unwrap();
        let check = journal(&config, false);
        assert_eq!(check.verdict, Verdict::Finding);
        assert!(check.remedy.unwrap().contains("formtune restore"));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "garbage\n");

        std::fs::rename(&file, config.state_dir.join("journal.damaged-1")).unwrap();
        let check = journal(&config, false);
        assert!(check.found.contains("enforce is held back"), "{}", check.found);
    }

    #[test]
    fn libvirt_that_is_off_is_only_a_note() {
        let folder = tempfile::tempdir().unwrap();
        let (check, domains) = libvirt(&config(folder.path()), || panic!("nothing is waited for"));
        assert_eq!((check.verdict, domains), (Verdict::Note, Vec::new()));
    }

    #[test]
    fn a_domain_without_a_cgroup_is_a_finding() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let hierarchies = Hierarchies {
            version: CgroupVersion::V2,
            cpu: folder.path().to_owned(),
            ..Hierarchies::find(Path::new("/sys/fs/cgroup")).unwrap()
        };
        std::fs::create_dir_all(folder.path().join("machine/qemu-1-web.libvirt-qemu")).unwrap();
        let domain =
            |id, name: &str| Domain { name: name.into(), uuid: String::new(), id, vcpus: 1 };
        let seen = domain(1, "web");
        let check = vms(&config, &hierarchies, std::slice::from_ref(&seen));
        assert_eq!(
            (check.verdict, check.found.as_str().starts_with("1 cgroup")),
            (Verdict::Ok, true)
        );
        // Of that name, but started anew since.
        let check = vms(&config, &hierarchies, &[seen, domain(2, "db"), domain(3, "web")]);
        assert_eq!(check.verdict, Verdict::Finding);
        assert!(check.found.ends_with(" is that of: db, web"), "{}", check.found);
        assert_eq!(vms(&config, &hierarchies, &[]).verdict, Verdict::Ok);
    }

    #[test]
    fn what_takes_long_is_announced_once() {
        let (sender, receiver) = mpsc::channel();
        let waiting = move || sender.send(()).unwrap();
        let done = with_notice(waiting, || receiver.recv_timeout(Duration::from_secs(60)).is_ok());
        assert!(done);
    }
}
