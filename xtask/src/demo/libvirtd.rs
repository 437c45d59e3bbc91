//! A libvirt daemon of our own beside any other on the machine: its own mount and UTS
//! namespace, all of its state in one folder. It needs no systemd, D-Bus or machined, and
//! puts its guests into `machine/qemu-N-NAME.libvirt-qemu` cgroups.

use super::interrupt;
use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::CString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Connecting for the first time takes long: libvirt asks QEMU for its capabilities.
const FIRST_ANSWER: Duration = Duration::from_secs(60);
/// Then SIGKILL.
const STOP: Duration = Duration::from_secs(10);

/// A running daemon; stopped when dropped. Its guests are not: see [`super::domain`].
pub struct Libvirtd {
    child: Child,
    folder: PathBuf,
    virsh: PathBuf,
}

impl Libvirtd {
    /// Starts one whose state is in `folder` and waits until it answers. What an earlier
    /// one left in that folder is ended and removed first; its cache is kept, since it
    /// saves some seconds.
    ///
    /// # Errors
    /// When libvirt is not installed, the daemon ends early, or it does not answer.
    pub fn start(folder: &Path) -> Result<Self> {
        let daemon = program("libvirtd", "libvirt-daemon")?;
        let virsh = program("virsh", "libvirt-clients")?;
        remove_leftovers(folder)?;
        for name in ["etc/qemu", "lib", "run", "log", "cache"] {
            let path = folder.join(name);
            fs::create_dir_all(&path)
                .with_context(|| format!("failed to make {}", path.display()))?;
        }
        write_configuration(folder)?;
        let log = fs::File::create(folder.join("log/stderr.log"))?;
        let namespace = Namespace::prepare(folder)?;
        let mut command = Command::new(daemon);
        command
            .args(["--config", "/etc/libvirt/libvirtd.conf"])
            .args(["--pid-file", "/run/libvirt/libvirtd.pid"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // A Ctrl-C on the terminal is for xtask alone, which then ends things in order.
            .process_group(0);
        // SAFETY: `enter` only makes system calls, on strings that were allocated before the fork.
        unsafe { command.pre_exec(move || namespace.enter().map_err(Into::into)) };
        let child = command.spawn().context("failed to start libvirtd")?;
        let mut new = Self { child, folder: folder.to_owned(), virsh };
        progress::during("starting a libvirt daemon of our own", |tick| new.wait_for_answer(tick))?;
        Ok(new)
    }

    /// For `virsh -c` and for formtune's configuration.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.folder.join("run/libvirt-sock").display())
    }

    /// Where libvirt keeps the process ids of its guests, among others.
    pub fn run_folder(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// Runs `virsh` and returns what it printed.
    ///
    /// # Errors
    /// With virsh's own message.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        let out = self.try_virsh(args)?;
        if !out.status.success() {
            let message = String::from_utf8_lossy(&out.stderr);
            bail!("virsh {}: {}", args.join(" "), message.trim());
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    fn try_virsh(&self, args: &[&str]) -> Result<Output> {
        Command::new(&self.virsh)
            .args(["-q", "-c", &self.uri()])
            .args(args)
            .stdin(Stdio::null())
            // See `start`: a Ctrl-C must not cut an answer short.
            .process_group(0)
            .output()
            .context("failed to start virsh")
    }

    fn wait_for_answer(&mut self, tick: &mut dyn FnMut()) -> Result<()> {
        let log = self.folder.join("log/stderr.log");
        interrupt::until(FIRST_ANSWER, "libvirtd's first answer", || {
            tick();
            if let Some(status) = self.child.try_wait()? {
                bail!("libvirtd ended with {status}; {}", progress::tail(&log, 5));
            }
            if !self.folder.join("run/libvirt-sock").exists() {
                return Ok(None);
            }
            Ok(self.try_virsh(&["version"])?.status.success().then_some(()))
        })
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        let mut step = progress::Step::start("stopping our libvirt daemon");
        stop(&mut self.child, STOP, &mut || step.tick());
        step.end("done");
    }
}

/// SIGTERM, and after `limit` SIGKILL, calling `tick` now and then. Works on the way out of
/// an interrupt, too. Returns how it ended, `None` after SIGKILL.
pub fn stop(
    child: &mut Child,
    limit: Duration,
    tick: &mut dyn FnMut(),
) -> Option<std::process::ExitStatus> {
    // An error means that it is gone already, which is what is wanted.
    let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
    let polls = limit.as_millis() / 20;
    for _ in 0..polls {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        tick();
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

fn program(name: &str, package: &str) -> Result<PathBuf> {
    sh::find_program(name).with_context(|| {
        format!("{name} is missing; `cargo xtask setup` installs the package {package}")
    })
}

/// Ends daemon and guests of an earlier run that was killed, and empties the folder.
fn remove_leftovers(folder: &Path) -> Result<()> {
    let mut files = vec![folder.join("run/libvirtd.pid")];
    if let Ok(entries) = fs::read_dir(folder.join("run/qemu")) {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let ours = folder.to_string_lossy();
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "pid")) {
        let Some(pid) = read_pid(file) else { continue };
        // A process id may have a new owner by now: only one of our mount namespace is ours.
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        if mounts.contains(&*ours) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            interrupt::until(STOP, "the end of a leftover guest", || {
                Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
            })?;
        }
    }
    for name in ["etc", "lib", "run", "log"] {
        let path = folder.join(name);
        if path.exists() {
            fs::remove_dir_all(&path)
                .with_context(|| format!("failed to remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// The number in a pid file.
pub fn read_pid(file: &Path) -> Option<i32> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn write_configuration(folder: &Path) -> Result<()> {
    let libvirtd = format!(
        "unix_sock_group = \"root\"\nunix_sock_rw_perms = \"0700\"\nauth_unix_ro = \"none\"\n\
         auth_unix_rw = \"none\"\nlog_outputs = \"2:file:{}\"\nhost_uuid = \"{}\"\n",
        folder.join("log/libvirtd.log").display(),
        fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim(),
    );
    // stdio_handler "file" makes virtlogd unnecessary; without mount namespaces per guest
    // the guests stay in the daemon's, where `remove_leftovers` recognises them.
    let qemu = "security_driver = \"none\"\nuser = \"root\"\ngroup = \"root\"\n\
                remember_owner = 0\nnamespaces = []\nstdio_handler = \"file\"\n";
    fs::write(folder.join("etc/libvirtd.conf"), libvirtd)?;
    fs::write(folder.join("etc/qemu.conf"), qemu)?;
    Ok(())
}

/// What the child needs between fork and exec, allocated beforehand.
struct Namespace {
    binds: Vec<(CString, CString)>,
    run: CString,
    run_libvirt: CString,
    ours_run: CString,
}

impl Namespace {
    fn prepare(folder: &Path) -> Result<Self> {
        let mut binds = Vec::new();
        for (ours, theirs) in [
            ("etc", "/etc/libvirt"),
            ("lib", "/var/lib/libvirt"),
            ("log", "/var/log/libvirt"),
            ("cache", "/var/cache/libvirt"),
        ] {
            if !Path::new(theirs).is_dir() {
                bail!("{theirs} is missing: is the package libvirt-daemon-system installed?");
            }
            binds.push((path(&folder.join(ours))?, CString::new(theirs)?));
        }
        let socket = folder.join("run/libvirt-sock-ro");
        // sun_path of unix(7) has 108 bytes.
        if socket.as_os_str().len() >= 108 {
            bail!("the path of libvirt's socket is longer than 107 bytes: {}", socket.display());
        }
        Ok(Self {
            binds,
            run: CString::new("/run")?,
            run_libvirt: CString::new("/run/libvirt")?,
            ours_run: path(&folder.join("run"))?,
        })
    }

    /// In the child: a private mount namespace with our folders in libvirt's places, and an
    /// own host name, which two libvirt daemons must not share.
    fn enter(&self) -> nix::Result<()> {
        const NONE: Option<&str> = None;
        nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
        nix::unistd::sethostname("formtune-demo")?;
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        let bind = |from: &CString, to: &CString| {
            mount(Some(from.as_c_str()), to.as_c_str(), NONE, MsFlags::MS_BIND, NONE)
        };
        for (ours, theirs) in &self.binds {
            bind(ours, theirs)?;
        }
        // An empty /run also hides systemd and D-Bus, so libvirt makes its cgroups itself.
        mount(Some("run"), self.run.as_c_str(), Some("tmpfs"), MsFlags::empty(), NONE)?;
        nix::unistd::mkdir(self.run_libvirt.as_c_str(), nix::sys::stat::Mode::S_IRWXU)?;
        bind(&self.ours_run, &self.run_libvirt)
    }
}

fn path(path: &Path) -> Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    Ok(CString::new(path.as_os_str().as_bytes())?)
}
