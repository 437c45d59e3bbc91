//! Debian's package tools with a configuration of our own: other suites than the machine's,
//! from the machine's own mirror, without a change to the machine.

use crate::sh;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The keys that sign every Debian suite; part of every Debian system.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What this system says it is, os-release(5).
pub fn os_release() -> Option<String> {
    fs::read_to_string("/etc/os-release").ok()
}

/// The code name of this Debian release, e.g. `bookworm`; `None` elsewhere.
pub fn codename() -> Option<String> {
    let release = os_release()?;
    let value = |key: &str| {
        release
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .map(|v| v.trim_matches('"').to_owned())
    };
    (value("ID=")? == "debian").then(|| value("VERSION_CODENAME="))?
}

/// Those of the packages that none of this machine's sources has; apt must have its lists.
///
/// # Errors
/// When apt-cache fails.
pub fn without_candidate<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let policy =
        sh::output(Command::new("apt-cache").arg("policy").args(packages).env("LC_ALL", "C"))?;
    let with = candidates(&policy);
    Ok(packages.iter().copied().filter(|package| !with.contains(package)).collect())
}

/// The packages that have a candidate in the output of `apt-cache policy`, which passes over
/// names that it does not know.
fn candidates(policy: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut package = "";
    for line in policy.lines() {
        if !line.starts_with(' ') {
            package = line.trim_end_matches(':');
        } else if line.trim().strip_prefix("Candidate: ").is_some_and(|version| version != "(none)")
        {
            found.push(package);
        }
    }
    found
}

/// The mirror from which this machine gets its own release.
///
/// # Errors
/// When apt knows none, as before the first `apt-get update`.
pub fn site() -> Result<String> {
    let codename = codename().context("this is not Debian")?;
    let targets = sh::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(SITE) $(CODENAME)",
    ]))?;
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(_, suite)| *suite == codename)
        .map(|(site, _)| site.to_owned())
        .with_context(|| {
            format!("apt knows no mirror for {codename} yet; run `apt-get update` as root first")
        })
}

/// A private apt configuration over some suites; its lists are fetched once.
pub struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Makes the configuration in `apt/NAME` of the cache folder and fetches the lists of
    /// `suites` unless they are there.
    ///
    /// # Errors
    /// When there is no mirror, no network, or no room.
    pub fn open(name: &str, suites: &[&str]) -> Result<Self> {
        let apt = Self { folder: sh::cache().join("apt").join(name) };
        let fetched = apt.folder.join("fetched");
        let site = site()?;
        let sources: String = suites
            .iter()
            .map(|suite| format!("deb [signed-by={KEYRING}] {site} {suite} main\n"))
            .collect();
        if fs::read_to_string(&fetched).is_ok_and(|of| of == sources) {
            return Ok(apt);
        }
        for folder in ["lists/partial", "archives/partial", "none"] {
            let folder = apt.folder.join(folder);
            fs::create_dir_all(&folder)
                .with_context(|| format!("failed to make the folder {}", folder.display()))?;
        }
        fs::write(apt.folder.join("sources.list"), &sources)?;
        apt.update()?;
        fs::write(fetched, sources)?;
        Ok(apt)
    }

    /// Fetches the lists anew.
    ///
    /// # Errors
    /// As [`Apt::open`].
    pub fn update(&self) -> Result<()> {
        crate::progress::run(
            "fetching package lists",
            "apt-update",
            self.command("apt-get").args(["update", "-o", "APT::Update::Error-Mode=any"]),
        )
    }

    /// All package names with this beginning.
    ///
    /// # Errors
    /// When apt-cache fails.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let out = sh::output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(out.lines().map(str::to_owned).collect())
    }

    /// The packages that `package` depends on.
    ///
    /// # Errors
    /// When there is no such package.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let out = sh::output(self.command("apt-cache").args(["depends", package]))?;
        Ok(out
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("Depends: "))
            .map(str::to_owned)
            .collect())
    }

    /// Downloads packages into `folder` under one progress line; what is there is not fetched
    /// again. Returns the files.
    ///
    /// # Errors
    /// When one cannot be had.
    pub fn download(&self, packages: &[String], folder: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(folder)
            .with_context(|| format!("failed to make the folder {}", folder.display()))?;
        let mut files = Vec::new();
        for package in packages {
            if debs(folder, package)?.is_empty() {
                crate::progress::run(
                    &format!("downloading {package}"),
                    "apt-download",
                    self.command("apt-get").args(["download", package]).current_dir(folder),
                )?;
            }
            match debs(folder, package)?.pop() {
                Some(file) => files.push(file),
                None => bail!("apt-get download {package} left no package in {}", folder.display()),
            }
        }
        Ok(files)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = |name: &str| self.folder.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::sourcelist={}", path("sources.list")),
            format!("Dir::Etc::sourceparts={}", path("none")),
            format!("Dir::Etc::preferences={}", path("preferences")),
            format!("Dir::Etc::preferencesparts={}", path("none")),
            format!("Dir::State::lists={}", path("lists")),
            format!("Dir::Cache={}", path("")),
            format!("Dir::Cache::archives={}", path("archives")),
            // Container images switch this cache off, and every call then parses all lists.
            "Dir::Cache::pkgcache=pkgcache.bin".to_owned(),
            "Dir::Cache::srcpkgcache=srcpkgcache.bin".to_owned(),
            "Acquire::GzipIndexes=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            // The cache folder may be closed to the user `_apt`.
            "APT::Sandbox::User=root".to_owned(),
            "Debug::NoLocking=1".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

/// The downloaded files of a package, `NAME_VERSION_ARCH.deb`.
fn debs(folder: &Path, package: &str) -> Result<Vec<PathBuf>> {
    let prefix = format!("{package}_");
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&prefix) && name.ends_with(".deb") {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::candidates;

    #[test]
    fn a_package_without_a_version_is_none() {
        let policy = "strace:\n  Installed: (none)\n  Candidate: 6.1-0.1\n  Version table:\n     \
            6.1-0.1 500\n        500 https://example.org stable/main amd64 Packages\n\
            rustc-web:\n  Installed: (none)\n  Candidate: (none)\n  Version table:\n";
        assert_eq!(candidates(policy), ["strace"]);
        assert_eq!(candidates(""), [""; 0]);
    }
}
