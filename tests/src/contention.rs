//! Real contention: a periodic victim and two spinning neighbours in VM-shaped cgroups.

use crate::knob::KnobCgroup;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The load ends by itself after so long.
const LONGEST: Duration = Duration::from_secs(180);

/// A neighbour's work.
const SPIN: &str = "while (1) {}";

/// Three VM-shaped cgroups below one of their own, with load in them. Dropping it ends the
/// load and removes the cgroups.
#[derive(Debug)]
pub struct Contention {
    // Dropped in this order: the load first, the parent cgroup last.
    load: Load,
    /// The victim and its neighbours.
    pub vms: Vec<KnobCgroup>,
    parent: KnobCgroup,
}

#[derive(Debug)]
struct Load(Vec<(String, Child)>);

/// A configuration under which the agent acts at once on the contention `name`: a promise
/// that any wait breaks, and a victim entitled to nearly all, so that its neighbours are to
/// blame however little the rest of a busy machine leaves them. `others` are blamed as the
/// neighbours are; VMs that are not ours have a higher priority, hence are left alone.
/// `libvirt` is a URI or `off`.
pub fn eager(name: &str, libvirt: &str, others: &[&str]) -> String {
    let neighbours = [&["loud", "noisy*"], others].concat();
    format!(
        "libvirt = \"{libvirt}\"\nlisten = \"off\"\ntick = \"100ms\"\n\
         cgroups = [\"{name}/{{name}}\"]\ncpu.cooldown = \"500ms\"\n\
         [classes.default]\nslo = \"off\"\npriority = \"high\"\n\
         [classes.neighbour]\npriority = \"normal\"\n\
         [classes.victim]\npriority = \"normal\"\ncpu_weight = 10000\n\
         [classes.victim.slo]\nquantile = 0.5\nthreshold = \"2us\"\nwindow = \"500ms\"\n\
         min_samples = 5\n\
         [[rules]]\nvms = [\"victim\"]\nclass = \"victim\"\n\
         [[rules]]\nvms = {neighbours:?}\nclass = \"neighbour\"\n"
    )
}

impl Contention {
    /// `name` must be unique on the machine.
    pub fn start(name: &str) -> Result<Self> {
        // Built before there is load: a build beside it would take for ever.
        crate::agent::program();
        let parent = KnobCgroup::make(name)?;
        let mut contention = Self { load: Load(Vec::new()), vms: Vec::new(), parent };
        contention.add(
            "victim",
            "while (1) { select(undef, undef, undef, 0.002); for (1..3000) {} }",
            2,
        )?;
        contention.add("loud", SPIN, 2)?;
        contention.add("noisy", SPIN, 2)?;
        Ok(contention)
    }

    /// One more neighbour, whose name begins with `noisy`.
    pub fn add_noisy(&mut self, more: &str) -> Result<()> {
        self.add(&format!("noisy{more}"), SPIN, 1)
    }

    fn add(&mut self, vm: &str, script: &str, tasks: u32) -> Result<()> {
        let parent = self.parent.path().file_name().unwrap_or_default().to_string_lossy();
        let cgroup = KnobCgroup::make(&format!("{parent}/{vm}"))?;
        for _ in 0..tasks {
            // perl is on every Debian (perl-base is essential); each wake-up is one wait. All of
            // it ends by itself, should the test be killed.
            let child = Command::new("perl")
                .args(["-e", &format!("alarm {}; {script}", LONGEST.as_secs())])
                .stdin(Stdio::null())
                .spawn()
                .context("failed to start perl")?;
            let pid = child.id();
            self.load.0.push((vm.to_owned(), child));
            fs::write(cgroup.path().join("cgroup.procs"), pid.to_string())?;
        }
        self.vms.push(cgroup);
        Ok(())
    }

    /// The folder of the VMs.
    pub fn folder(&self) -> &Path {
        self.parent.path()
    }

    /// Ends one of the VMs, cgroup and all.
    pub fn end(&mut self, vm: &str) {
        for (_, child) in self.load.0.iter_mut().filter(|(name, _)| name == vm) {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.load.0.retain(|(name, _)| name != vm);
        self.vms.retain(|cgroup| !cgroup.path().ends_with(vm));
    }

    /// The configuration under which the agent acts on this contention at once; see [`eager`].
    pub fn eager(&self) -> String {
        let name = self.folder().file_name().unwrap_or_default();
        eager(&name.to_string_lossy(), "off", &[])
    }

    /// Raw values of the knobs.
    pub fn raw(&self) -> Vec<u64> {
        self.vms.iter().map(KnobCgroup::raw).collect()
    }

    /// Waits until the knobs are no longer as `originals` says.
    pub fn wait_for_change(&self, originals: &[u64], limit: Duration) {
        let begin = Instant::now();
        while self.raw() == originals {
            assert!(begin.elapsed() < limit, "no knob was turned within {limit:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for (_, child) in &mut self.0 {
            let _ = child.kill();
        }
        for (_, child) in &mut self.0 {
            let _ = child.wait();
        }
    }
}
