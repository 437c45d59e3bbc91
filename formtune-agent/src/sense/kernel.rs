//! The running kernel's version.

use std::io;

/// Where the kernel says its release.
pub const OSRELEASE: &str = "/proc/sys/kernel/osrelease";

/// The oldest kernel that is tested.
pub const OLDEST: Version = Version(5, 10);

/// The first two numbers of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl Version {
    /// `6.12` of `6.12.48+deb13-amd64`; `None` of what does not begin like that.
    pub fn of(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        Some(Self(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// As `uname -r` prints it.
///
/// # Errors
/// Those of reading [`OSRELEASE`].
pub fn release() -> io::Result<String> {
    Ok(std::fs::read_to_string(OSRELEASE)?.trim().to_owned())
}

/// One clause if a kernel of this release is older than any that is tested.
pub fn too_old(release: &str) -> Option<String> {
    Version::of(release).filter(|version| *version < OLDEST)?;
    // Without what the distribution appends: `5.4.0-42-generic`.
    let numbers = release.split(['-', '+']).next()?;
    Some(format!("Linux {numbers} is older than {OLDEST}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert_eq!(Version::of("6.12.48+deb13-amd64"), Some(Version(6, 12)));
        assert_eq!(Version::of("5.4.0-42-generic"), Some(Version(5, 4)));
        assert!(Version::of("5.9.0").unwrap() < OLDEST);
        assert!(Version::of("5.10.0").unwrap() >= OLDEST);
        assert_eq!(Version::of("unknown"), None);
    }

    #[test]
    fn an_old_kernel_is_named_by_its_numbers() {
        let says = |release| too_old(release).unwrap();
        assert_eq!(says("5.4.0-42-generic"), "Linux 5.4.0 is older than 5.10");
        assert_eq!(says("4.19.0+deb10"), "Linux 4.19.0 is older than 5.10");
        assert_eq!(too_old("5.10.0-32-cloud-amd64"), None);
        assert_eq!(too_old("unknown"), None);
    }
}
