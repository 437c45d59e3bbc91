//! Which cgroups are VMs: a tree of watched directories.
//!
//! Every directory that may hold a VM, and every directory of a VM, is watched by inotify;
//! the watch is set before the directory is listed, so nothing that is made meanwhile is
//! missed. A periodic scan covers what inotify drops (queue overflow, watch limit).

use super::CgroupPattern;
use super::cgroup;
use super::libvirt_names::{self, Machine};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

/// Where libvirt puts VMs: with systemd, without it, and in resource partitions of either
/// (src/util/vircgroup.c, src/util/virsystemd.c). Only directories that bear a machine name
/// count here; other drivers (`lxc`) and other tools use the same places.
const LIBVIRT: &[&str] = &[
    "*.slice/{name}",
    "*.slice/*.slice/{name}",
    "machine/{name}",
    "machine/*.partition/{name}",
    "machine/*.partition/*.partition/{name}",
    "*.partition/{name}",
    "*.partition/*.partition/{name}",
];

/// A cgroup at which a VM competes with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Absolute path.
    pub path: PathBuf,
    /// The kernel's id of it.
    pub id: u64,
    /// What its path says the VM is called.
    pub name: String,
    /// libvirt's machine, if it is one.
    pub machine: Option<Machine>,
    /// Directories `vcpuN` below it.
    pub vcpus: u32,
}

/// What happened to the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A VM, with the ids of its cgroups (its own among them).
    Appeared(Group, BTreeSet<u64>),
    /// The cgroups of a VM are others now.
    Regrouped(Group, BTreeSet<u64>),
    /// Its directory is gone.
    Gone(PathBuf),
}

/// The watched tree.
pub struct Tree {
    root: PathBuf,
    rules: Vec<Rule>,
    inotify: Option<Inotify>,
    watched: HashMap<WatchDescriptor, PathBuf>,
    descriptors: BTreeMap<PathBuf, WatchDescriptor>,
    vms: BTreeMap<PathBuf, Known>,
    /// Some directory could not be watched: only scans find what happens there.
    partly_blind: bool,
}

struct Rule {
    pattern: CgroupPattern,
    libvirt: bool,
}

#[derive(PartialEq, Eq, Clone)]
struct Known {
    group: Group,
    ids: BTreeSet<u64>,
}

/// How far below a VM's directory groups are followed: scope, `libvirt`, `vcpuN`, and what
/// a guest agent or another tool may make below.
const MAX_DEPTH: u8 = 6;

impl Tree {
    /// Below `root`, the mount point of the `cpu` hierarchy. Finds nothing yet.
    pub fn new(root: &Path, patterns: &[CgroupPattern]) -> Self {
        let own = patterns.iter().map(|p| Rule { pattern: p.clone(), libvirt: false });
        let libvirt = LIBVIRT.iter().map(|text| {
            let pattern = text.parse().expect("a constant that parses");
            Rule { pattern, libvirt: true }
        });
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).ok();
        Self {
            root: root.into(),
            rules: own.chain(libvirt).collect(),
            partly_blind: inotify.is_none(),
            inotify,
            watched: HashMap::new(),
            descriptors: BTreeMap::new(),
            vms: BTreeMap::new(),
        }
    }

    /// Whether only [`Tree::scan`] finds some of the changes.
    pub fn partly_blind(&self) -> bool {
        self.partly_blind
    }

    /// Readable when [`Tree::follow`] has something to do.
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Looks at the whole tree.
    pub fn scan(&mut self, changes: &mut Vec<Change>) {
        let mut seen = BTreeSet::new();
        self.visit(&mut Vec::new(), &mut seen, changes);
        let gone: Vec<_> = self.vms.keys().filter(|path| !seen.contains(*path)).cloned().collect();
        for path in gone {
            self.drop_vm(&path, changes);
        }
        let stale: Vec<_> = self.descriptors.keys().filter(|p| !p.exists()).cloned().collect();
        for path in stale {
            self.unwatch_below(&path);
        }
    }

    /// Looks at what inotify reported.
    pub fn follow(&mut self, changes: &mut Vec<Change>) {
        let mut vms = BTreeSet::new();
        let mut others = BTreeSet::new();
        let mut overflow = false;
        while let Some(Ok(events)) = self.inotify.as_ref().map(Inotify::read_events) {
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    overflow = true;
                    continue;
                }
                let Some(dir) = self.watched.get(&event.wd).cloned() else { continue };
                let Some(name) = event.name else { continue };
                let path = dir.join(name);
                // Whatever was watched there before is another directory or none now.
                self.unwatch_below(&path);
                match path.ancestors().find(|path| self.vms.contains_key(*path)) {
                    Some(vm) => vms.insert(vm.to_owned()),
                    None => others.insert(path),
                };
            }
        }
        if overflow {
            return self.scan(changes);
        }
        for vm in vms {
            self.refresh(&vm, changes);
        }
        for path in others {
            if let Some(mut components) = self.components(&path) {
                self.visit(&mut components, &mut BTreeSet::new(), changes);
            }
        }
    }

    /// Components of `path` below the root.
    fn components(&self, path: &Path) -> Option<Vec<String>> {
        let relative = path.strip_prefix(&self.root).ok()?;
        relative.iter().map(|part| part.to_str().map(Into::into)).collect()
    }

    /// A directory that may be a VM or hold one.
    fn visit(
        &mut self,
        components: &mut Vec<String>,
        seen: &mut BTreeSet<PathBuf>,
        changes: &mut Vec<Change>,
    ) {
        let relative: PathBuf = components.iter().collect();
        let path = self.root.join(&relative);
        if let Some((name, machine)) = self.classify(&relative) {
            seen.insert(path.clone());
            if self.vms.contains_key(&path) {
                self.refresh(&path, changes);
            } else if let Some(known) = self.look(&path, name, machine) {
                changes.push(Change::Appeared(known.group.clone(), known.ids.clone()));
                self.vms.insert(path, known);
            }
            return;
        }
        let depth = components.len();
        let leads_on = |p: &CgroupPattern| p.depth() > depth && p.may_hold(&relative);
        if !self.rules.iter().any(|rule| leads_on(&rule.pattern)) {
            return;
        }
        self.watch(&path);
        for name in directories(&path) {
            components.push(name);
            self.visit(components, seen, changes);
            components.pop();
        }
    }

    /// The VM's name and machine, if the path is one.
    fn classify(&self, relative: &Path) -> Option<(String, Option<Machine>)> {
        self.rules.iter().find_map(|rule| {
            let name = rule.pattern.vm(relative)?;
            match libvirt_names::machine(relative.file_name()?.to_str()?) {
                Some(machine) => Some((machine.short_name.clone(), Some(machine))),
                None => (!rule.libvirt).then_some((name.to_string(), None)),
            }
        })
    }

    /// Compares a known VM with what is there.
    fn refresh(&mut self, path: &Path, changes: &mut Vec<Change>) {
        let Some(known) = self.vms.get(path) else { return };
        let (name, machine, id) =
            (known.group.name.clone(), known.group.machine.clone(), known.group.id);
        match self.look(path, name, machine) {
            None => self.drop_vm(path, changes),
            Some(now) if now.group.id != id => {
                changes.push(Change::Gone(path.into()));
                changes.push(Change::Appeared(now.group.clone(), now.ids.clone()));
                self.vms.insert(path.into(), now);
            }
            Some(now) => {
                if self.vms.get(path) != Some(&now) {
                    changes.push(Change::Regrouped(now.group.clone(), now.ids.clone()));
                    self.vms.insert(path.into(), now);
                }
            }
        }
    }

    fn drop_vm(&mut self, path: &Path, changes: &mut Vec<Change>) {
        self.vms.remove(path);
        self.unwatch_below(path);
        changes.push(Change::Gone(path.into()));
    }

    /// A VM's directory and all below it, watched; `None` if it is gone.
    fn look(&mut self, path: &Path, name: String, machine: Option<Machine>) -> Option<Known> {
        let id = cgroup::id(path).ok()?;
        let mut known = Known {
            group: Group { path: path.into(), id, name, machine, vcpus: 0 },
            ids: BTreeSet::from([id]),
        };
        self.look_below(path, &mut known, 0);
        // Removed and made again meanwhile: the next event or scan sees it as it is then.
        (cgroup::id(path).ok()? == id).then_some(known)
    }

    fn look_below(&mut self, dir: &Path, known: &mut Known, depth: u8) {
        self.watch(dir);
        for name in directories(dir) {
            let path = dir.join(&name);
            let Ok(id) = cgroup::id(&path) else { continue };
            known.ids.insert(id);
            if name.strip_prefix("vcpu").is_some_and(|n| n.parse::<u32>().is_ok()) {
                known.group.vcpus += 1;
            }
            if depth < MAX_DEPTH {
                self.look_below(&path, known, depth + 1);
            }
        }
    }

    /// Ends the watches at and below `path`. They do not end by themselves with a cgroup's
    /// removal: kernfs leaves the link count as it was, so the kernel does not see that the
    /// inode is dead (`fsnotify_inoderemove()` in `d_delete()`, fs/dcache.c).
    fn unwatch_below(&mut self, path: &Path) {
        let below: Vec<PathBuf> = self
            .descriptors
            .range::<Path, _>((Bound::Included(path), Bound::Unbounded))
            .map(|(watched, _)| watched.clone())
            .take_while(|watched| watched.starts_with(path))
            .collect();
        for path in below {
            let Some(descriptor) = self.descriptors.remove(&path) else { continue };
            self.watched.remove(&descriptor);
            if let Some(inotify) = &self.inotify {
                // Fails where the kernel ended it after all.
                let _ = inotify.rm_watch(descriptor);
            }
        }
    }

    fn watch(&mut self, path: &Path) {
        if self.descriptors.contains_key(path) {
            return;
        }
        let Some(inotify) = &self.inotify else { return };
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ONLYDIR;
        match inotify.add_watch(path, flags) {
            Ok(descriptor) => {
                self.watched.insert(descriptor, path.into());
                self.descriptors.insert(path.into(), descriptor);
            }
            Err(nix::errno::Errno::ENOENT) => {}
            Err(error) => {
                if !self.partly_blind {
                    tracing::warn!(
                        "failed to watch {}: {error}; new VMs are found by scans every {:?}",
                        path.display(),
                        super::discover::SCAN_BLIND
                    );
                }
                self.partly_blind = true;
            }
        }
    }
}

/// Names of the directories in `dir`; none if it is gone.
fn directories(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake {
        dir: tempfile::TempDir,
        tree: Tree,
    }

    impl Fake {
        fn new(patterns: &[&str]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let patterns: Vec<_> = patterns.iter().map(|p| p.parse().unwrap()).collect();
            let tree = Tree::new(dir.path(), &patterns);
            Self { dir, tree }
        }
        fn make(&self, path: &str) -> u64 {
            let path = self.dir.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            cgroup::id(&path).unwrap()
        }
        fn remove(&self, path: &str) {
            std::fs::remove_dir_all(self.dir.path().join(path)).unwrap();
        }
        fn scan(&mut self) -> Vec<Change> {
            let mut changes = Vec::new();
            self.tree.scan(&mut changes);
            changes
        }
        fn follow(&mut self) -> Vec<Change> {
            let mut changes = Vec::new();
            self.tree.follow(&mut changes);
            changes
        }
    }

    fn names(changes: &[Change]) -> Vec<String> {
        let mut names: Vec<_> = changes
            .iter()
            .map(|change| match change {
                Change::Appeared(group, _) => format!("+{}", group.name),
                Change::Regrouped(group, ids) => format!("={} {}", group.name, ids.len()),
                Change::Gone(path) => format!("-{}", path.file_name().unwrap().to_str().unwrap()),
            })
            .collect();
        names.sort();
        names
    }

    #[test]
    fn layouts_with_and_without_systemd_and_patterns() {
        let mut fake = Fake::new(&["ft-demo/{name}", "pods/{name}/vm"]);
        let scope = fake.make(r"machine.slice/machine-qemu\x2d1\x2dweb\x2d1.scope");
        let vcpu = fake.make(r"machine.slice/machine-qemu\x2d1\x2dweb\x2d1.scope/libvirt/vcpu0");
        fake.make(r"machine.slice/machine-qemu\x2d1\x2dweb\x2d1.scope/libvirt/emulator");
        fake.make(r"machine.slice/machine-lxc\x2d2\x2dct.scope/libvirt");
        fake.make("machine/qemu-3-db.libvirt-qemu/vcpu0");
        fake.make("machine/gold.partition/qemu-4-gold.libvirt-qemu/iothread1");
        fake.make("production.partition/qemu-5-shop.libvirt-qemu/vcpu0");
        fake.make(r"production.slice/production-eu.slice/machine-qemu\x2d6\x2deu.scope/libvirt");
        fake.make("system.slice/libvirtd.service");
        fake.make("ft-demo/a");
        fake.make("pods/b/vm/x/y");
        let changes = fake.scan();
        assert_eq!(names(&changes), ["+a", "+b", "+db", "+eu", "+gold", "+shop", "+web-1"]);
        let (group, ids) = changes
            .iter()
            .find_map(|change| match change {
                Change::Appeared(group, ids) if group.name == "web-1" => Some((group, ids)),
                _ => None,
            })
            .unwrap();
        assert_eq!((group.id, group.vcpus, ids.len()), (scope, 1, 4));
        assert!(ids.contains(&vcpu));
        assert_eq!(group.machine.as_ref().unwrap().domain_id, 1);
        assert_eq!(fake.scan(), []);
    }

    #[test]
    fn events_tell_of_starts_vcpus_and_stops() {
        let mut fake = Fake::new(&[]);
        assert_eq!(fake.scan(), []);
        // Not even the slice is there yet, and all of it comes at once.
        fake.make("machine/qemu-1-a.libvirt-qemu/vcpu0");
        assert_eq!(names(&fake.follow()), ["+a"]);
        fake.make("machine/qemu-1-a.libvirt-qemu/vcpu1");
        fake.make("machine/qemu-2-b.libvirt-qemu");
        assert_eq!(names(&fake.follow()), ["+b", "=a 3"]);
        fake.make("machine/qemu-2-b.libvirt-qemu/emulator/deep");
        assert_eq!(names(&fake.follow()), ["=b 3"]);
        fake.remove("machine/qemu-1-a.libvirt-qemu/vcpu1");
        assert_eq!(names(&fake.follow()), ["=a 2"]);
        fake.remove("machine/qemu-1-a.libvirt-qemu");
        assert_eq!(names(&fake.follow()), ["-qemu-1-a.libvirt-qemu"]);
        fake.remove("machine");
        assert_eq!(names(&fake.follow()), ["-qemu-2-b.libvirt-qemu"]);
        assert!(fake.tree.vms.is_empty());
        fake.follow();
        assert_eq!(fake.tree.watched.len(), fake.tree.descriptors.len());
        assert_eq!(fake.tree.watched.len(), 1, "only the root");
    }

    #[test]
    fn a_directory_made_again_is_another_vm() {
        let mut fake = Fake::new(&["vms/{name}"]);
        let first = fake.make("vms/a");
        fake.scan();
        // Kept busy, so that the new directory cannot get the same inode.
        std::fs::rename(fake.dir.path().join("vms/a"), fake.dir.path().join("kept")).unwrap();
        let second = fake.make("vms/a");
        assert_ne!(first, second);
        assert_eq!(names(&fake.follow()), ["+a", "-a"]);
    }
}
