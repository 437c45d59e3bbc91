//! The small root file system in memory that a test machine starts with: busybox, chosen
//! kernel modules, an `/init` script and whatever files it is to run.

use super::cpio;
use super::kernel::Kernel;
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// An `/init` that mounts what a Linux program expects, loads the modules, runs
/// `/payload/run`, prints `VMEXIT:STATUS` and switches the machine off.
///
/// cgroup v2 is at `/sys/fs/cgroup` with all controllers switched on for the first level.
pub const INIT_PAYLOAD: &str = include_str!("init-payload.sh");

/// An `/init` that mounts the first virtio disk, copies `/payload` to `/run/payload` there and
/// hands over to its systemd.
pub const INIT_ROOT: &str = include_str!("init-root.sh");

/// What goes into an initramfs, built with [`Initramfs::write`].
pub struct Initramfs<'a> {
    kernel: &'a Kernel,
    modules: Vec<&'a str>,
    /// Path in the image (without the leading slash), permission bits, content.
    files: BTreeMap<String, (u32, Vec<u8>)>,
}

impl<'a> Initramfs<'a> {
    /// With busybox and this `/init` script.
    ///
    /// # Errors
    /// When busybox is missing.
    pub fn new(kernel: &'a Kernel, init: &str) -> Result<Self> {
        let mut new = Self { kernel, modules: Vec::new(), files: BTreeMap::new() };
        let busybox = crate::sh::find_program("busybox")
            .context("busybox (package busybox-static) is missing")?;
        new.copy("bin/busybox", &busybox)?;
        new.add("init", 0o755, init.as_bytes());
        Ok(new)
    }

    /// Adds kernel modules by name, with what they depend on; one that is built in is fine.
    pub fn modules(&mut self, names: &[&'a str]) -> &mut Self {
        self.modules.extend(names);
        self
    }

    /// Adds a file.
    pub fn add(&mut self, path: &str, permissions: u32, content: &[u8]) -> &mut Self {
        self.files.insert(path.to_owned(), (permissions, content.to_owned()));
        self
    }

    /// Adds a file of this machine with its permissions.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<&mut Self> {
        let content =
            fs::read(from).with_context(|| format!("failed to read {}", from.display()))?;
        let permissions = from.metadata()?.permissions().mode() & 0o777;
        Ok(self.add(path, permissions, &content))
    }

    /// Writes the archive, uncompressed.
    ///
    /// # Errors
    /// When a module does not exist or the file cannot be written.
    pub fn write(&self, to: &Path) -> Result<()> {
        let mut files = self.files.clone();
        let mut order = String::new();
        for (name, content) in load_order(self.kernel, &self.modules)? {
            order.push_str(&name);
            order.push('\n');
            files.insert(format!("lib/mods/{name}"), (0o644, content));
        }
        files.insert("lib/mods/order".to_owned(), (0o644, order.into_bytes()));

        let mut folders: BTreeSet<String> =
            ["dev", "mnt", "proc", "run", "sys", "tmp"].map(str::to_owned).into();
        for path in files.keys() {
            for (at, _) in path.match_indices('/') {
                folders.insert(path[..at].to_owned());
            }
        }
        let file = File::create(to).with_context(|| format!("failed to write {}", to.display()))?;
        let mut archive = cpio::Writer::new(BufWriter::new(file));
        for folder in folders {
            archive.folder(&folder)?;
        }
        for (path, (permissions, content)) in &files {
            archive.file(path, *permissions, content)?;
        }
        archive.finish().with_context(|| format!("failed to write {}", to.display()))
    }
}

/// The modules, what they depend on first, each once: file name without compression, content.
fn load_order(kernel: &Kernel, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |name: &str| {
        let path = kernel.modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))
    };
    let dependencies = read("modules.dep")?;
    let built_in: BTreeSet<_> = read("modules.builtin")?.lines().map(module_name).collect();
    let depends: HashMap<&str, Vec<&str>> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, on)| (module, on.split_whitespace().collect()))
        .collect();
    let by_name: HashMap<String, &str> =
        depends.keys().map(|path| (module_name(path), *path)).collect();

    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let name = name.replace('-', "_");
        match by_name.get(&name) {
            // modules.dep lists the whole chain, the deepest one last.
            Some(path) => {
                for path in depends[path].iter().rev().chain([path]) {
                    if !order.contains(path) {
                        order.push(path);
                    }
                }
            }
            None if built_in.contains(&name) => {}
            None => bail!("kernel {} has no module {name}", kernel.release),
        }
    }
    order
        .into_iter()
        .map(|path| Ok((format!("{}.ko", module_name(path)), unpack(&kernel.modules.join(path))?)))
        .collect()
}

/// `virtio_blk` of `kernel/drivers/block/virtio-blk.ko.xz`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn unpack(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => {
            return fs::read(path).with_context(|| format!("failed to read {}", path.display()));
        }
    };
    let out = Command::new(program)
        .args(["-dc"])
        .arg(path)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("failed to start {program}"))?;
    if !out.status.success() {
        bail!("{program} failed to unpack {}: {}", path.display(), out.status);
    }
    Ok(out.stdout)
}

#[cfg(test)]
mod tests {
    use super::{load_order, module_name};
    use crate::vm::kernel::Kernel;

    #[test]
    fn dependencies_are_loaded_first_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("modules.dep", "k/a-b.ko: k/c.ko k/d.ko\nk/c.ko: k/d.ko\nk/d.ko:\nk/e.ko:\n");
        write("modules.builtin", "kernel/fs/ext4/ext4.ko\n");
        for name in ["a-b", "c", "d", "e"] {
            write(&format!("k/{name}.ko"), name);
        }
        let kernel = Kernel {
            release: "1".to_owned(),
            vmlinux: folder.path().join("vmlinux"),
            modules: folder.path().to_owned(),
        };
        let order = load_order(&kernel, &["c", "a_b", "ext4"]).unwrap();
        let names: Vec<_> = order.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["d.ko", "c.ko", "a_b.ko"]);
        assert_eq!(order[2].1, b"a-b");
        let missing = load_order(&kernel, &["nope"]).unwrap_err().to_string();
        assert_eq!(missing, "kernel 1 has no module nope");
    }

    #[test]
    fn module_names_are_as_the_kernel_prints_them() {
        assert_eq!(module_name("kernel/drivers/block/virtio-blk.ko.xz"), "virtio_blk");
    }
}
