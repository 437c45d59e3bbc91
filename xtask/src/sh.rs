//! Running other programs, with errors that name the command; where the project's folders are.

use crate::demo::interrupt;
use crate::progress;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The workspace's root folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_owned()
}

/// The target folder: `CARGO_TARGET_DIR`, else `target` in the workspace.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root().join(folder),
        None => root().join("target"),
    }
}

/// The cache folder: `FORMTUNE_CACHE`, else `.cache` in the workspace. Tools, packages,
/// kernels and images are kept there; it may be removed at any time.
pub fn cache() -> PathBuf {
    match std::env::var_os("FORMTUNE_CACHE") {
        Some(folder) => root().join(folder),
        None => root().join(".cache"),
    }
}

/// The longest path of a folder for sockets: a socket's has at most 107 bytes (unix(7)), and
/// tests and benchmarks append up to 31, e.g. `/.tmpXXXXXX/run/libvirt-sock-ro`.
const LONGEST_FOR_SOCKETS: usize = 107 - 31;

/// Has this program, and all that it starts, put temporary files below the target folder.
/// Only the package manager is not to see it: the scripts of packages run as other users and
/// below other roots.
///
/// # Errors
/// When the folder cannot be made.
pub fn keep_temporary_files() -> Result<()> {
    // A short name, for the sake of sockets in it.
    let folder = target().join("t");
    if folder.as_os_str().len() > LONGEST_FOR_SOCKETS {
        eprintln!(
            "{} is too long a path for sockets below it: temporary files go to {}",
            folder.display(),
            std::env::temp_dir().display()
        );
        return Ok(());
    }
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("failed to make the folder {}", folder.display()))?;
    // SAFETY: called first of all in `main`, when this is the only thread.
    unsafe { std::env::set_var("TMPDIR", folder) };
    Ok(())
}

/// Keeps other commands from filling the same part of the cache, until it is dropped. Says so
/// when it has to wait for one.
pub fn lock_cache(part: &str) -> Result<Flock<File>> {
    let path = cache().join(format!("{part}.lock"));
    std::fs::create_dir_all(cache())?;
    let mut file =
        File::create(&path).with_context(|| format!("failed to write {}", path.display()))?;
    let mut waiting: Option<progress::Step> = None;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                if let Some(step) = waiting {
                    step.end("it is done");
                }
                return Ok(lock);
            }
            Err((back, Errno::EWOULDBLOCK)) => file = back,
            Err((_, error)) => {
                return Err(error).with_context(|| format!("failed to lock {}", path.display()));
            }
        }
        let step = waiting.get_or_insert_with(|| {
            progress::Step::start(format!("waiting for another xtask, which fills {part}"))
        });
        interrupt::wait(Duration::from_millis(100), || step.tick())?;
    }
}

/// Where a program is: in `PATH` or in the folders that a plain user's `PATH` lacks.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| {
            file.metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

/// The command as one would type it, without its environment.
pub fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Runs to the end, output passed through; an error names command and status.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("failed to start {}", line(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", line(command));
    }
    Ok(())
}

/// Runs to the end and returns standard output; standard error is passed through.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("failed to start {}", line(command)))?;
    if !out.status.success() {
        bail!("{} ended with {}", line(command), out.status);
    }
    String::from_utf8(out.stdout)
        .with_context(|| format!("{} printed bytes that are not text", line(command)))
}
