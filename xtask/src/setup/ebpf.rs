//! The two tools that the probes are built with: a rustc that can build `core` for the BPF
//! target, and bpf-linker, whose LLVM must be at least that rustc's.

use crate::{progress, sh};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian's llvm-22-dev lies.
pub const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// The LLVM that our own bpf-linker is built with.
const LLVM: u32 = 22;

/// The bpf-linker to build.
const LINKER_VERSION: &str = "0.13.0";

/// Oldest distribution rustc that is known to emit what the verifier takes.
const MIN_DISTRIBUTION_RUSTC: (u32, u32) = (1, 96);

/// A compiler that formtune-agent's build script will take and our bpf-linker can follow.
pub fn compiler() -> Option<PathBuf> {
    if let Some(rustc) = std::env::var_os("FORMTUNE_EBPF_RUSTC") {
        return Some(rustc.into());
    }
    let distribution = ["/usr/bin/rustc", "/usr/local/bin/rustc"].map(PathBuf::from);
    distribution
        .into_iter()
        .find(|rustc| {
            inspect(rustc)
                .is_some_and(|found| found.version >= MIN_DISTRIBUTION_RUSTC && found.llvm <= LLVM)
        })
        .or_else(|| {
            let nightly = rustup_nightly()?;
            // With a bpf-linker of the user's own, its LLVM is the user's affair.
            let limit = if foreign_linker().is_some() { u32::MAX } else { LLVM };
            (inspect(&nightly)?.llvm <= limit).then_some(nightly)
        })
}

struct Rustc {
    version: (u32, u32),
    llvm: u32,
}

/// What a rustc is, if it has the library's source.
fn inspect(rustc: &Path) -> Option<Rustc> {
    let ask = |arguments: &[&str]| {
        let out = Command::new(rustc).args(arguments).output().ok()?;
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let sysroot = ask(&["--print", "sysroot"])?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !core.exists() {
        return None;
    }
    parse_version(&ask(&["-vV"])?)
}

/// From the output of `rustc -vV`.
fn parse_version(text: &str) -> Option<Rustc> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let mut release = field("release: ")?.split('.').map_while(|n| n.parse().ok());
    let version = (release.next()?, release.next()?);
    let llvm = field("LLVM version: ")?.split('.').next()?.parse().ok()?;
    Some(Rustc { version, llvm })
}

fn rustup_nightly() -> Option<PathBuf> {
    let out =
        Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]).output().ok()?;
    out.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()))
}

fn cached_linker() -> PathBuf {
    sh::cache().join("tools/bin/bpf-linker")
}

fn foreign_linker() -> Option<PathBuf> {
    std::env::var_os("FORMTUNE_BPF_LINKER")
        .map(PathBuf::from)
        .or_else(|| sh::find_program("bpf-linker"))
}

/// The bpf-linker to be used: the cache's, else the user's.
pub fn linker() -> Option<PathBuf> {
    Some(cached_linker()).filter(|path| path.exists()).or_else(foreign_linker)
}

/// Builds bpf-linker into the cache unless there is one.
///
/// # Errors
/// When it cannot be fetched or built.
pub fn ensure_linker() -> Result<()> {
    if linker().is_some() {
        return Ok(());
    }
    let _lock = sh::lock_cache("tools")?;
    if linker().is_some() {
        return Ok(());
    }
    let prefix = Path::new(LLVM_PREFIX);
    if !prefix.join("bin/llvm-config").exists() {
        bail!("no bpf-linker, and none can be built without {LLVM_PREFIX}");
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path =
        std::env::join_paths([prefix.join("bin")].into_iter().chain(std::env::split_paths(&path)))
            .context("PATH cannot be extended")?;
    progress::run(
        &format!("building bpf-linker {LINKER_VERSION} (some two minutes, once)"),
        "bpf-linker",
        Command::new("cargo")
            .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"])
            .args(["--no-default-features", "--features", &format!("llvm-{LLVM}")])
            .arg("--root")
            .arg(sh::cache().join("tools"))
            // Interrupted, it goes on from here.
            .arg("--target-dir")
            .arg(sh::target().join("bpf-linker"))
            .env("LLVM_PREFIX", prefix)
            .env("LIBRARY_PATH", prefix.join("lib"))
            .env("PATH", path),
    )
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn verbose_versions_are_understood() {
        let text = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nhost: x86_64\n\
                    release: 1.96.0\nLLVM version: 22.1.8\n";
        let rustc = parse_version(text).unwrap();
        assert_eq!((rustc.version, rustc.llvm), ((1, 96), 22));
        let nightly = text.replace("1.96.0\n", "1.99.0-nightly\n");
        assert_eq!(parse_version(&nightly).unwrap().version, (1, 99));
        assert!(parse_version("no rustc").is_none());
    }
}
