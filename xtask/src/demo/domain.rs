//! One guest: its definition, its console, its cgroup and its knobs.

use super::cgroups::Partition;
use super::libvirtd::{Libvirtd, read_pid};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// What all guests have in common.
pub struct Image {
    /// ELF kernel.
    pub vmlinux: PathBuf,
    /// Initramfs whose `/init` is the guest program.
    pub initrd: PathBuf,
    /// That program, which runs on the host as well.
    pub program: PathBuf,
    /// The emulator.
    pub qemu: PathBuf,
    /// Whether the processor's virtualisation is used.
    pub kvm: bool,
}

/// What is special about one guest.
pub struct Guest<'a> {
    /// Its libvirt name.
    pub name: &'a str,
    /// The host's CPU that all of its threads are kept on.
    pub cpu: usize,
    /// Settings of the guest program, for the kernel's command line.
    pub settings: &'a str,
}

/// A running guest; destroyed when dropped.
pub struct Domain {
    name: String,
    libvirtd: Rc<Libvirtd>,
    console: PathBuf,
    pid: i32,
    cgroup: PathBuf,
}

/// The CPU knobs of a guest: everything that formtune might have touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Knobs {
    /// `cpu_shares` as libvirt reports it.
    pub libvirt_shares: String,
    /// Every `cpu.shares` or `cpu.weight` of the guest's cgroup and those below it.
    pub files: BTreeMap<PathBuf, String>,
}

impl Domain {
    /// Starts a guest whose console goes to `console`.
    ///
    /// # Errors
    /// When libvirt refuses, or its cgroup cannot be found.
    pub fn start(
        libvirtd: &Rc<Libvirtd>,
        image: &Image,
        guest: &Guest<'_>,
        console: PathBuf,
    ) -> Result<Self> {
        // The file must be there for its first reader, even before the guest's first word.
        fs::write(&console, "").with_context(|| format!("failed to make {}", console.display()))?;
        let xml = console.with_extension("xml");
        fs::write(&xml, definition(image, guest, &console))?;
        let path = xml.to_str().context("the project's path is not UTF-8")?;
        libvirtd.virsh(&["create", path])?;
        let mut new = Self {
            name: guest.name.to_owned(),
            libvirtd: Rc::clone(libvirtd),
            console,
            pid: 0,
            cgroup: PathBuf::new(),
        };
        let pid_file = libvirtd.run_folder().join("qemu").join(format!("{}.pid", guest.name));
        new.pid = read_pid(&pid_file)
            .with_context(|| format!("no process id in {}", pid_file.display()))?;
        new.cgroup = vm_cgroup(new.pid)
            .with_context(|| format!("failed to find the cgroup of guest {}", guest.name))?;
        Ok(new)
    }

    /// Its libvirt name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file with all it printed so far.
    pub fn console(&self) -> &Path {
        &self.console
    }

    /// Stops its virtual CPUs.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn suspend(&self) -> Result<()> {
        self.libvirtd.virsh(&["suspend", &self.name]).map(drop)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn resume(&self) -> Result<()> {
        self.libvirtd.virsh(&["resume", &self.name]).map(drop)
    }

    /// Reads them all, from libvirt and from the files.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn knobs(&self) -> Result<Knobs> {
        let text = self.libvirtd.virsh(&["schedinfo", &self.name])?;
        let shares = text
            .lines()
            .find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == "cpu_shares"))
            .with_context(|| format!("virsh schedinfo {} shows no cpu_shares", self.name))?;
        let mut files = BTreeMap::new();
        read_knobs(&self.cgroup, &mut files)?;
        if files.is_empty() {
            bail!("no cpu.shares and no cpu.weight in {}", self.cgroup.display());
        }
        Ok(Knobs { libvirt_shares: shares.1.trim().to_owned(), files })
    }

    /// The value of the knob at which guests compete with each other, as the kernel has it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn weight(&self) -> Result<String> {
        let mut files = BTreeMap::new();
        read_knobs(&self.cgroup, &mut files)?;
        let top = files.into_iter().find(|(path, _)| path.parent() == Some(&self.cgroup));
        Ok(top.with_context(|| format!("no CPU knob in {}", self.cgroup.display()))?.1)
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        if self.libvirtd.virsh(&["destroy", &self.name]).is_ok() {
            return;
        }
        // libvirt does not answer: the process id is still ours if its console is.
        let arguments = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let console = self.console.to_string_lossy();
        if self.pid > 0 && String::from_utf8_lossy(&arguments).contains(&*console) {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

fn read_knobs(folder: &Path, into: &mut BTreeMap<PathBuf, String>) -> Result<()> {
    for entry in
        fs::read_dir(folder).with_context(|| format!("failed to read {}", folder.display()))?
    {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            read_knobs(&path, into)?;
        } else if matches!(entry.file_name().to_str(), Some("cpu.shares" | "cpu.weight")) {
            let value = fs::read_to_string(&path)
                .with_context(|| format!("failed to read {}", path.display()))?;
            into.insert(path, value.trim().to_owned());
        }
    }
    Ok(())
}

/// The folder of the guest as a whole in the hierarchy that carries the `cpu` controller.
fn vm_cgroup(pid: i32) -> Result<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let field = |line: &str| -> Option<(String, String)> {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some((controllers.to_owned(), path.to_owned()))
    };
    let lines: Vec<_> = groups.lines().filter_map(field).collect();
    let v1 = lines.iter().find(|(controllers, _)| controllers.split(',').any(|c| c == "cpu"));
    let (root, path) = match v1 {
        Some((controllers, path)) => (PathBuf::from("/sys/fs/cgroup").join(controllers), path),
        None => {
            let v2 = lines.iter().find(|(controllers, _)| controllers.is_empty());
            (PathBuf::from("/sys/fs/cgroup"), &v2.context("no cgroup")?.1)
        }
    };
    // QEMU's main thread lies in `emulator`, under systemd one more level below `libvirt`.
    let path =
        path.trim_start_matches('/').trim_end_matches("/emulator").trim_end_matches("/libvirt");
    let folder = root.join(path);
    if path.is_empty() || !folder.is_dir() {
        bail!("{} is no guest's cgroup", folder.display());
    }
    Ok(folder)
}

fn definition(image: &Image, guest: &Guest<'_>, console: &Path) -> String {
    let (kind, model) = if image.kvm { ("kvm", "host-passthrough") } else { ("qemu", "maximum") };
    format!(
        "<domain type='{kind}'>
 <name>{name}</name><memory unit='MiB'>192</memory>
 <vcpu placement='static' cpuset='{cpu}'>1</vcpu>
 <resource><partition>{partition}</partition></resource>
 <os><type arch='x86_64' machine='q35'>hvm</type>
  <kernel>{vmlinux}</kernel><initrd>{initrd}</initrd>
  <cmdline>console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr no_timer_check {settings}</cmdline>
 </os>
 <features><acpi/></features><cpu mode='{model}'/>
 <on_reboot>destroy</on_reboot>
 <devices><emulator>{qemu}</emulator>
  <controller type='usb' model='none'/><memballoon model='none'/>
  <serial type='file'><source path='{console}'/><target port='0'/></serial>
 </devices>
</domain>
",
        name = escape(guest.name),
        cpu = guest.cpu,
        partition = Partition::NAME,
        vmlinux = escape(&image.vmlinux.to_string_lossy()),
        initrd = escape(&image.initrd.to_string_lossy()),
        settings = escape(guest.settings),
        qemu = escape(&image.qemu.to_string_lossy()),
        console = escape(&console.to_string_lossy()),
    )
}

/// For an attribute or the text of an element.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}
