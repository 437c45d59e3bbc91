//! A libvirtd of its own: in a mount and UTS namespace, with folders of its own, needing no
//! systemd, D-Bus or network; and the cheapest real domain there is.
//!
//! All state is below one folder, so a daemon that was killed can be started again in it
//! and finds its domains. Domain names must be unique on the machine: every daemon numbers
//! its domains from 1 and all share one cgroup file system. The folder's path must be short
//! (a socket path holds 107 bytes).
//!
//! A daemon without D-Bus makes the cgroups itself, in the layout of a host without systemd,
//! on v1 as on v2; systemd, where it runs, leaves them alone.

use crate::vm_cgroup::remove_with_all_below;
use anyhow::{Context, Result, bail, ensure};
use formtune_agent::sense::cgroup::Hierarchies;
use formtune_agent::vm::CgroupVersion;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// First start in an empty cache probes QEMU (about 8 s); loaded machines take longer.
const START_LIMIT: Duration = Duration::from_secs(90);

/// A running libvirtd. Dropping it destroys its domains and stops it.
#[derive(Debug)]
pub struct Libvirtd {
    child: Option<Child>,
    dir: PathBuf,
    cache: PathBuf,
}

impl Libvirtd {
    /// Starts a daemon with its state below `dir`.
    pub fn start(dir: &Path) -> Result<Self> {
        let cache = cache();
        for folder in ["etc", "lib", "log", "run"] {
            fs::create_dir_all(dir.join(folder))?;
        }
        fs::create_dir_all(&cache)?;
        for system in ["/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt"]
        {
            fs::create_dir_all(system).with_context(|| format!("failed to make {system}"))?;
        }
        fs::write(
            dir.join("etc/qemu.conf"),
            "security_driver = \"none\"\nuser = \"root\"\ngroup = \"root\"\nremember_owner = 0\n\
             stdio_handler = \"file\"\nnamespaces = []\n",
        )?;
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        fs::write(
            dir.join("etc/libvirtd.conf"),
            format!(
                "unix_sock_group = \"root\"\nunix_sock_rw_perms = \"0700\"\n\
                 auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nhost_uuid = \"{}\"\n\
                 log_outputs = \"3:file:{}\"\n",
                uuid.trim(),
                dir.join("log/libvirtd.log").display(),
            ),
        )?;
        let mut daemon = Self { child: None, dir: dir.to_owned(), cache };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Starts the daemon again after [`Libvirtd::kill`], on the same state.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "libvirtd runs already");
        // /run is private, so libvirt finds neither D-Bus nor another daemon's files.
        let script = "set -e\n\
             echo formtune-test > /proc/sys/kernel/hostname\n\
             mount --bind \"$D/etc\" /etc/libvirt\n\
             mount --bind \"$D/lib\" /var/lib/libvirt\n\
             mount --bind \"$D/log\" /var/log/libvirt\n\
             mount --bind \"$CACHE\" /var/cache/libvirt\n\
             mount -t tmpfs formtune /run\n\
             mkdir -p /run/libvirt\n\
             mount --bind \"$D/run\" /run/libvirt\n\
             exec libvirtd -f /etc/libvirt/libvirtd.conf --pid-file /run/libvirt/libvirtd.pid\n";
        // The script's binds hide what lies below /run otherwise.
        ensure!(!self.dir.starts_with("/run"), "{} lies below /run", self.dir.display());
        let log = fs::File::create(self.dir.join("log/start.log"))?;
        // A kill leaves the socket behind; a connection to it would be refused.
        let _ = fs::remove_file(self.socket());
        let child = Command::new("unshare")
            .args(["-m", "-u", "--propagation", "private", "sh", "-c", script])
            .env("D", &self.dir)
            .env("CACHE", &self.cache)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("failed to start unshare (util-linux)")?;
        self.child = Some(child);
        let begin = Instant::now();
        loop {
            if self.socket().exists() && self.virsh(&["version"])?.status.success() {
                return Ok(());
            }
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().transpose())
            {
                let log = fs::read_to_string(self.dir.join("log/start.log")).unwrap_or_default();
                bail!("libvirtd ended with {}: {}", status?, log.trim());
            }
            ensure!(begin.elapsed() < START_LIMIT, "libvirtd did not answer in {START_LIMIT:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Kills the daemon (SIGKILL); its domains run on.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Process id of the daemon, e.g. to stop it for a while.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/libvirt-sock")
    }

    /// The URI at which it answers, from outside of its namespace too.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    /// Runs `virsh` against the daemon.
    pub fn virsh(&self, args: &[&str]) -> Result<Output> {
        Command::new("virsh")
            .args(["-q", "-c", &self.uri()])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .context("failed to run virsh (libvirt-clients)")
    }

    /// As [`Libvirtd::virsh`]; an error unless it succeeds. Returns what it printed.
    pub fn virsh_ok(&self, args: &[&str]) -> Result<String> {
        let output = self.virsh(args)?;
        ensure!(
            output.status.success(),
            "virsh {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts a transient domain without an operating system: its boot sector jumps to
    /// itself, so its one vCPU spins from the first moment. Takes 0.3 to 0.9 s.
    pub fn start_spinning(&self, name: &str) -> Result<()> {
        let disk = self.dir.join(format!("{name}.raw"));
        let mut sector = [0u8; 512];
        sector[..2].copy_from_slice(&[0xeb, 0xfe]);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        fs::write(&disk, sector)?;
        self.create(&format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>\
             <vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os>\
             <features><acpi/></features><devices>\
             <emulator>/usr/bin/qemu-system-x86_64</emulator>\
             <controller type='usb' model='none'/>\
             <disk type='file' device='disk'><driver name='qemu' type='raw'/>\
             <source file='{}'/><target dev='hda' bus='ide'/></disk>\
             <memballoon model='none'/></devices></domain>",
            disk.display()
        ))
    }

    /// Starts a transient domain from its XML.
    pub fn create(&self, xml: &str) -> Result<()> {
        let file = self.dir.join("domain.xml");
        fs::write(&file, xml)?;
        self.virsh_ok(&["create", &file.display().to_string()]).map(drop)
    }

    /// Ends a domain at once.
    pub fn destroy(&self, name: &str) -> Result<()> {
        let cgroup = self.cpu_cgroup(name)?;
        let output = self.virsh(&["destroy", name])?;
        // A daemon that was just started, and still takes up its domains, may see the end of
        // this one before it is done with ending it.
        let error = String::from_utf8_lossy(&output.stderr);
        let ended = output.status.success() || error.contains("no domain with matching uuid");
        ensure!(ended, "virsh destroy {name}: {}", error.trim());
        remove_machine(&cgroup);
        Ok(())
    }

    /// The cgroup at which a running domain competes for CPU: the one that libvirt named
    /// after it, as its QEMU sees it (proc(5), `/proc/PID/cgroup`).
    pub fn cpu_cgroup(&self, name: &str) -> Result<PathBuf> {
        let file = self.dir.join(format!("run/qemu/{name}.pid"));
        let pid = fs::read_to_string(&file)
            .with_context(|| format!("failed to read {}", file.display()))?;
        let hierarchies = Hierarchies::find(Path::new("/sys/fs/cgroup"))?;
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", pid.trim()))?;
        // `3:cpu,cpuacct:/machine/qemu-1-a.libvirt-qemu/emulator`; on v2 `0::/machine/…`
        let own = groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let ours = match hierarchies.version {
                CgroupVersion::V1 => controllers.split(',').any(|name| name == "cpu"),
                CgroupVersion::V2 => controllers.is_empty(),
            };
            ours.then_some(path)
        });
        let machine = own.and_then(|path| {
            Path::new(path).ancestors().find(|dir| {
                dir.extension().is_some_and(|end| end == "libvirt-qemu" || end == "scope")
            })
        });
        let machine = machine.with_context(|| format!("{name} has no machine in {groups:?}"))?;
        Ok(hierarchies.cpu.join(machine.strip_prefix("/")?))
    }
}

/// What libvirtd learns of QEMU, which takes it 8 s: kept by the target folder and shared by
/// daemons, which must not start at the same time. `FORMTUNE_LIBVIRT_CACHE` names another
/// folder.
fn cache() -> PathBuf {
    match std::env::var_os("FORMTUNE_LIBVIRT_CACHE") {
        Some(folder) => folder.into(),
        None => crate::agent::build_folder().join("libvirt-cache"),
    }
}

/// Removes the cgroups of a machine in every hierarchy. libvirt does it, but gives up at the
/// first that the dying QEMU has not left yet; to every agent on this host what stays is a VM.
fn remove_machine(cgroup: &Path) {
    let root = Path::new("/sys/fs/cgroup");
    let Some(machine) = cgroup.file_name() else { return };
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in hierarchies.chain([root.to_owned()]) {
        let path = hierarchy.join("machine").join(machine);
        if path.is_dir() {
            remove_with_all_below(&path);
        }
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        // Domains outlive the daemon: end them by the pid files in this daemon's own folder.
        let pids = fs::read_dir(self.dir.join("run/qemu")).into_iter().flatten().flatten();
        for file in pids.filter(|file| file.path().extension().is_some_and(|e| e == "pid")) {
            let name = file.path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let cgroup = self.cpu_cgroup(&name);
            let destroyed = self.child.is_some()
                && self.virsh(&["destroy", &name]).is_ok_and(|output| output.status.success());
            if !destroyed
                && let Ok(text) = fs::read_to_string(file.path())
                && let Ok(pid) = text.trim().parse()
            {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            if let Ok(cgroup) = cgroup {
                remove_machine(&cgroup);
            }
        }
        if let Some(mut child) = self.child.take() {
            if let Ok(pid) = i32::try_from(child.id()) {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            }
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_secs(5) {
                if matches!(child.try_wait(), Ok(Some(_))) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
