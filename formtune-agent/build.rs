//! Builds the probes (`formtune-ebpf`) for the BPF target and leaves the object in
//! `OUT_DIR`, from where `sense::probes` embeds it.
//!
//! The BPF target has no prebuilt `core`, so it takes a compiler that may use unstable
//! flags and whose sysroot holds the library source. Three kinds are looked for, in this
//! order: what `FORMTUNE_EBPF_RUSTC` names, a distribution's rustc with its source package
//! (`RUSTC_BOOTSTRAP=1`; the bpf-linker that `cargo xtask setup` builds has its LLVM), a
//! rustup nightly with the component `rust-src`.

use anyhow::{Context, Result, bail};
use std::env;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Oldest distribution rustc that is known to emit what the verifier takes.
const MIN_DISTRIBUTION_RUSTC: (u32, u32) = (1, 96);

const TARGET: &str = "bpfel-unknown-none";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Cargo prefixes each line; one clear message instead of `Error: Any {…}`.
            eprintln!("formtune-ebpf cannot be built: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    let agent = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = agent.parent().context("formtune-agent lies in the workspace")?;
    let cache =
        env::var_os("FORMTUNE_CACHE").map_or_else(|| workspace.join(".cache"), PathBuf::from);
    for name in ["FORMTUNE_EBPF_RUSTC", "FORMTUNE_BPF_LINKER", "FORMTUNE_CACHE"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for path in ["formtune-agent/build.rs", "formtune-ebpf", "formtune-common", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }

    let rustc = find_rustc()?;
    let linker = find_linker(&cache)?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    // aya-log only in debug builds: its ring buffer and checks have no place in a release.
    let debug = env::var("PROFILE")? == "debug";

    let rustflags = [
        "-Cdebuginfo=2".to_owned(),
        format!("-Clinker={}", linker.display()),
        // BTF of the maps and programs themselves.
        "-Clink-arg=--btf".to_owned(),
        // Linux 5.10 refuses what later BPF cpus have (atomics that fetch came with 5.12).
        "-Ctarget-cpu=v2".to_owned(),
        format!("--cfg=bpf_target_arch=\"{arch}\""),
    ];
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(workspace)
        .args(["build", "--package", "formtune-ebpf", "--release", "--target", TARGET])
        .args(["-Z", "build-std=core", "-Z", "unstable-options", "--artifact-dir"])
        .arg(&out_dir)
        // One folder for every profile and feature set of the agent: `core` is compiled once.
        .arg("--target-dir")
        .arg(cache.join("ebpf-target").join(folder_of(workspace)))
        .args(debug.then_some("--features=log"))
        .env("RUSTC", &rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\x1f"))
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2");
    // Meant for the host's compiler (clippy's and coverage's wrappers among them).
    for name in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN"] {
        cargo.env_remove(name);
    }
    let status = cargo.status().with_context(|| format!("failed to start {cargo:?}"))?;
    if !status.success() {
        bail!(
            "{} with {} ended with {status}; if bpf-linker could not read the bitcode, its LLVM \
             is older than rustc's: run `cargo xtask setup`",
            rustc.display(),
            linker.display()
        );
    }
    Ok(())
}

/// One folder per checkout: cargo tells packages apart by their place in the workspace, so in a
/// folder that two checkouts share it would take the object of one for that of the other.
fn folder_of(workspace: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    workspace.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// A rustc that can build `core` for the BPF target.
fn find_rustc() -> Result<PathBuf> {
    if let Some(rustc) = env::var_os("FORMTUNE_EBPF_RUSTC").map(PathBuf::from) {
        return match check_rustc(&rustc) {
            Ok(_) => Ok(rustc),
            Err(error) => bail!("FORMTUNE_EBPF_RUSTC={}: {error:#}", rustc.display()),
        };
    }
    let mut tried = Vec::new();
    for rustc in ["/usr/bin/rustc", "/usr/local/bin/rustc"].map(PathBuf::from) {
        if !rustc.exists() {
            tried.push(format!("{}: not there", rustc.display()));
            continue;
        }
        let (major, minor) = MIN_DISTRIBUTION_RUSTC;
        match check_rustc(&rustc) {
            Ok(version) if version >= MIN_DISTRIBUTION_RUSTC => return Ok(rustc),
            Ok(_) => tried.push(format!("{}: older than {major}.{minor}", rustc.display())),
            Err(error) => tried.push(format!("{}: {error:#}", rustc.display())),
        }
    }
    match rustup_nightly() {
        Ok(rustc) => match check_rustc(&rustc) {
            Ok(_) => return Ok(rustc),
            Err(error) => tried.push(format!("rustup's nightly: {error:#}")),
        },
        Err(error) => tried.push(format!("rustup's nightly: {error:#}")),
    }
    bail!(
        "no suitable compiler ({}); run `cargo xtask setup`, or `rustup toolchain install \
         nightly --component rust-src`, or on Debian 12 `apt-get install rustc-web \
         rust-web-src`, or set FORMTUNE_EBPF_RUSTC",
        tried.join("; ")
    )
}

fn rustup_nightly() -> Result<PathBuf> {
    let out = Command::new("rustup")
        .args(["which", "--toolchain", "nightly", "rustc"])
        .output()
        .context("no rustup")?;
    if !out.status.success() {
        bail!("not installed");
    }
    Ok(String::from_utf8(out.stdout)?.trim().into())
}

/// Version of a rustc whose sysroot holds the library source and that knows the target.
fn check_rustc(rustc: &Path) -> Result<(u32, u32)> {
    let ask = |args: &[&str]| -> Result<String> {
        let out = Command::new(rustc).args(args).output().context("failed to start")?;
        if !out.status.success() {
            bail!("`rustc {}` ended with {}", args.join(" "), out.status);
        }
        Ok(String::from_utf8(out.stdout)?)
    };
    let library =
        Path::new(ask(&["--print", "sysroot"])?.trim()).join("lib/rustlib/src/rust/library");
    if !library.join("core/src/lib.rs").exists() {
        bail!("no library source in its sysroot");
    }
    if !ask(&["--print", "target-list"])?.lines().any(|target| target == TARGET) {
        bail!("does not know the target {TARGET}");
    }
    let version = ask(&["--version"])?;
    parse_version(&version).with_context(|| format!("no version in {version:?}"))
}

/// `rustc 1.96.0 (…)` → (1, 96).
fn parse_version(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split_whitespace().nth(1)?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn find_linker(cache: &Path) -> Result<PathBuf> {
    if let Some(linker) = env::var_os("FORMTUNE_BPF_LINKER").map(PathBuf::from) {
        if !linker.exists() {
            bail!("FORMTUNE_BPF_LINKER={}: not there", linker.display());
        }
        return Ok(linker);
    }
    let cached = cache.join("tools/bin/bpf-linker");
    let on_path = env::var_os("PATH").unwrap_or_default();
    std::iter::once(cached.clone())
        .chain(env::split_paths(&on_path).map(|folder| folder.join("bpf-linker")))
        .find(|candidate| candidate.exists())
        .with_context(|| {
            format!(
                "no bpf-linker, neither {} nor on PATH; run `cargo xtask setup`, or `cargo \
                 install bpf-linker`, or set FORMTUNE_BPF_LINKER",
                cached.display()
            )
        })
}
