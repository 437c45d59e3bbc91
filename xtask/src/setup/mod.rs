//! `cargo xtask setup`: finds or gets what the project needs on this machine.
//!
//! Every other command calls [`ensure`] for its own purposes first, so nobody has to run
//! this one. As root on Debian, missing packages are installed; elsewhere the commands that
//! would do it are printed and nothing is changed. All else lies in the cache folder.

pub mod apt;
mod ebpf;
mod elsewhere;
mod needs;

use crate::sh;
use crate::vm::{kernel, root};
use anyhow::{Context, Result, bail};
pub use needs::Purpose;
use needs::{Need, QEMU_PACKAGES};
use std::process::{Command, ExitCode};

/// The last Debian release whose own QEMU crashes emulated guests (7.2).
pub const OLD_QEMU_RELEASE: &str = "bookworm";

/// The compiler for the probes where Debian has none.
const RUSTUP_ROUTE: [&str; 2] =
    ["rustup toolchain install nightly --component rust-src", "cargo install bpf-linker"];

/// Arguments of `setup`.
#[derive(clap::Args)]
pub struct Args {
    /// Only for these purposes; all of them by default
    #[arg(long = "for", value_name = "PURPOSE", value_enum)]
    purposes: Vec<Purpose>,
}

/// Gets everything, test kernels and the root image included.
pub fn run(args: Args) -> Result<ExitCode> {
    let purposes = if args.purposes.is_empty() { Purpose::ALL.to_vec() } else { args.purposes };
    ensure(&purposes)?;
    if purposes.contains(&Purpose::Vm) {
        for series in kernel::TESTED {
            kernel::get(*series)?;
        }
    }
    if purposes.contains(&Purpose::Demo) {
        kernel::newest()?;
    }
    if purposes.contains(&Purpose::E2e) {
        root::image()?;
    }
    println!("Everything is there.");
    Ok(ExitCode::SUCCESS)
}

/// Makes sure that this machine has what these purposes need; quick and silent when it does.
///
/// # Errors
/// When something is missing and cannot be installed from here: not root, not Debian, no
/// network. The commands to run are printed before.
pub fn ensure(purposes: &[Purpose]) -> Result<()> {
    let missing = needs::missing(purposes);
    if !missing.is_empty() {
        let _lock = sh::lock_cache("setup")?;
        let missing = needs::missing(purposes);
        if !missing.is_empty() {
            install(&missing)?;
            let still = self::missing(purposes);
            if !still.is_empty() {
                bail!(
                    "still missing or too old after the installation: {}; {}",
                    still.join(", "),
                    remedy(&still)
                );
            }
        }
    }
    if purposes.contains(&Purpose::Build) {
        ebpf::ensure_linker()?;
    }
    if purposes.contains(&Purpose::Lint) {
        ensure_components()?;
    }
    Ok(())
}

/// Names of what is needed for `purposes` and is not there, as Debian calls it.
pub fn missing(purposes: &[Purpose]) -> Vec<&'static str> {
    needs::missing(purposes).iter().map(|need| need.package).collect()
}

/// Whether this process may install packages: root on Debian.
pub fn can_install() -> bool {
    is_root() && apt::codename().is_some()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn install(missing: &[&Need]) -> Result<()> {
    let mut packages: Vec<&str> = missing.iter().flat_map(|need| need.packages()).collect();
    packages.sort_unstable();
    packages.dedup();
    let codename = apt::codename();
    let Some(codename) = codename.filter(|_| is_root()) else {
        print_commands(missing, &packages);
        let why = if is_root() { "this is not Debian" } else { "not root" };
        bail!("{why}, so nothing was installed; run the commands above, then this one again");
    };

    eprintln!("Missing on this machine, about to be installed:");
    eprintln!("{}", wrapped(&packages));
    progress_update()?;
    let absent = apt::without_candidate(&packages)?;
    if !absent.is_empty() {
        bail!("{}", not_to_be_had(&absent, &codename));
    }
    // QEMU 7.2 would remove a newer qemu-utils and crashes guests: all of QEMU comes from the
    // backports, as files, in one transaction with the rest.
    let mut arguments: Vec<String> = Vec::new();
    let (qemu, rest): (Vec<_>, Vec<_>) =
        packages.iter().map(|p| (*p).to_owned()).partition(|p| QEMU_PACKAGES.contains(&p.as_str()));
    if codename == OLD_QEMU_RELEASE && !qemu.is_empty() {
        for file in qemu_backport()? {
            arguments.push(file.display().to_string());
        }
    } else {
        arguments.extend(qemu);
    }
    arguments.extend(rest);
    crate::progress::run(
        "installing packages",
        "apt-install",
        Command::new("apt-get")
            // What is on the machine stays there: apt then stops and says what is in the way.
            .args(["install", "-y", "--no-install-recommends", "--no-remove"])
            .args(arguments)
            .env_remove("TMPDIR")
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// What to do about packages that no source of this machine has.
fn not_to_be_had(absent: &[&str], codename: &str) -> String {
    format!(
        "apt has no candidate for {} on {codename}, so nothing was installed; {}",
        absent.join(", "),
        remedy(absent)
    )
}

/// How to get what apt did not bring: the compiler for the probes by rustup, the rest by
/// better sources.
fn remedy(packages: &[&str]) -> String {
    let of_compiler = |package: &&str| needs::COMPILER_PACKAGES.contains(package);
    let mut text = Vec::new();
    if !packages.iter().all(of_compiler) {
        text.push("are Debian's security updates among apt's sources?".to_owned());
    }
    if packages.iter().any(of_compiler) {
        let commands = RUSTUP_ROUTE.join("\n  ");
        text.push(format!("the compiler for the probes can be had from rustup too:\n  {commands}"));
    }
    text.join(" ")
}

fn progress_update() -> Result<()> {
    crate::progress::run(
        "fetching this machine's package lists",
        "apt-update",
        Command::new("apt-get").arg("update").env_remove("TMPDIR"),
    )
}

/// QEMU 10 for Debian 12 as package files in the cache; fetched on first use.
///
/// # Errors
/// When they cannot be fetched.
pub fn qemu_backport() -> Result<Vec<std::path::PathBuf>> {
    let suite = format!("{OLD_QEMU_RELEASE}-backports");
    let apt = apt::Apt::open("backports", &[&suite])?;
    let packages: Vec<String> = QEMU_PACKAGES.iter().map(|p| (*p).to_owned()).collect();
    apt.download(&packages, &sh::cache().join("debs")).context("failed to get QEMU 10")
}

/// Prints what the user is to run.
fn print_commands(missing: &[&Need], packages: &[&str]) {
    let Some(codename) = apt::codename() else {
        eprintln!("Missing on this machine (names of the Debian packages in brackets):");
        for need in missing {
            eprintln!("  {} ({})", need.what, need.package);
        }
        let of_compiler = |package: &&&str| needs::COMPILER_PACKAGES.contains(package);
        let compiler = packages.iter().any(|package| of_compiler(&package));
        match elsewhere::install(packages) {
            Some(commands) => eprint!("To install it, run:\n{commands}"),
            None if packages.iter().all(|package| of_compiler(&package)) => {
                eprintln!("To install it, run:");
            }
            None => eprintln!("Install it by this system's own means."),
        }
        if compiler {
            for command in RUSTUP_ROUTE {
                eprintln!("  {command}");
            }
        }
        return;
    };
    // Where apt has no lists yet, nothing has a candidate, and nothing is known.
    let absent = apt::without_candidate(packages).unwrap_or_default();
    let absent = if absent.len() < packages.len() { absent } else { Vec::new() };
    eprintln!("Missing on this machine. To install it, run:");
    let qemu = packages.iter().any(|package| QEMU_PACKAGES.contains(package));
    let mut from = String::new();
    if codename == OLD_QEMU_RELEASE && qemu {
        let suite = format!("{codename}-backports");
        let site = apt::site().unwrap_or_else(|_| "MIRROR".to_owned());
        eprintln!(
            "  echo 'deb {site} {suite} main' | sudo tee /etc/apt/sources.list.d/{suite}.list"
        );
        // `PACKAGE/SUITE` takes just that package from there.
        from = format!("/{suite}");
    }
    let list: Vec<String> = packages
        .iter()
        .filter(|package| !absent.contains(package))
        .map(|package| {
            let suffix = if QEMU_PACKAGES.contains(package) { from.as_str() } else { "" };
            format!("{package}{suffix}")
        })
        .collect();
    eprintln!("  sudo apt-get update");
    eprintln!("  sudo apt-get install -y --no-install-recommends {}", list.join(" "));
    if !absent.is_empty() {
        eprintln!("apt has no candidate for {}; {}", absent.join(", "), remedy(&absent));
    }
}

/// rustfmt and clippy, which a minimal toolchain lacks.
fn ensure_components() -> Result<()> {
    let there = |name: &str| {
        Command::new("cargo")
            .args([name, "--version"])
            .output()
            .is_ok_and(|output| output.status.success())
    };
    if there("fmt") && there("clippy") {
        return Ok(());
    }
    crate::progress::run(
        "adding rustfmt and clippy to the toolchain",
        "rustup",
        Command::new("rustup").args(["component", "add", "rustfmt", "clippy"]),
    )
}

/// Words in lines of at most 80 columns, indented.
fn wrapped(words: &[&str]) -> String {
    let mut lines = vec![String::from(" ")];
    for word in words {
        let line = lines.last_mut().expect("there is always a line");
        if line.len() + word.len() + 1 > 80 {
            lines.push(format!("  {word}"));
        } else {
            line.push(' ');
            line.push_str(word);
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::{not_to_be_had, wrapped};

    #[test]
    fn lists_fit_eighty_columns() {
        let words = ["qemu-system-x86"; 12];
        let text = wrapped(&words);
        assert!(text.lines().all(|line| line.len() <= 80 && line.starts_with("  q")), "{text}");
        assert_eq!(text.split_whitespace().count(), 12);
    }

    #[test]
    fn what_cannot_be_had_comes_with_another_way() {
        let text = not_to_be_had(&["rustc-web", "llvm-22-dev"], "trixie");
        assert_eq!(
            text,
            "apt has no candidate for rustc-web, llvm-22-dev on trixie, so nothing was \
             installed; the compiler for the probes can be had from rustup too:\n  rustup \
             toolchain install nightly --component rust-src\n  cargo install bpf-linker"
        );
        let text = not_to_be_had(&["libbpf-tools"], "trixie");
        assert!(text.ends_with("are Debian's security updates among apt's sources?"), "{text}");
    }
}
