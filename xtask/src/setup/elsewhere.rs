//! The commands that bring what is missing on systems other than Debian: printed, never run.

use super::apt;
use std::fmt::Write;

/// A family of systems with the same package names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    /// Ubuntu and others made of Debian: the same names.
    Debian,
    Fedora,
    Arch,
}

/// Debian's name, Fedora's, and Arch's; empty where there is no such package.
#[rustfmt::skip]
const NAMES: &[(&str, &str, &str)] = &[
    ("gcc", "gcc", "gcc"),
    ("g++", "gcc-c++", "gcc"),
    ("libc6-dev", "glibc-devel", "glibc"),
    ("pkg-config", "pkgconf-pkg-config", "pkgconf"),
    ("libvirt-dev", "libvirt-devel", "libvirt"),
    ("strace", "strace", "strace"),
    ("iproute2", "iproute", "iproute2"),
    ("prometheus", "golang-github-prometheus", "prometheus"),
    ("libvirt-daemon-system", "libvirt-daemon", "libvirt"),
    ("libvirt-daemon-driver-qemu", "libvirt-daemon-driver-qemu", "libvirt"),
    ("libvirt-clients", "libvirt-client", "libvirt"),
    ("qemu-system-x86", "qemu-system-x86", "qemu-system-x86"),
    ("qemu-system-common", "qemu-common", "qemu-common"),
    ("qemu-system-data", "", ""),
    ("qemu-utils", "qemu-img", "qemu-img"),
    ("seabios", "seabios-bin", "seabios"),
    ("busybox-static", "busybox", "busybox"),
    ("kmod", "kmod", "kmod"),
    ("lz4", "lz4", "lz4"),
    ("zstd", "zstd", "zstd"),
    ("xz-utils", "xz", "xz"),
    ("debootstrap", "debootstrap", "debootstrap"),
    ("e2fsprogs", "e2fsprogs", "e2fsprogs"),
    ("linux-perf", "perf", "perf"),
    ("fio", "fio", "fio"),
    ("libbpf-tools", "libbpf-tools", ""),
];

/// What the file /etc/os-release says.
fn family(release: &str) -> Option<Family> {
    let value = |key: &str| {
        let value = release.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("");
        value.trim_matches('"').to_owned()
    };
    let names = format!("{} {}", value("ID="), value("ID_LIKE="));
    names.split_whitespace().find_map(|name| match name {
        "debian" | "ubuntu" => Some(Family::Debian),
        "fedora" | "rhel" | "centos" => Some(Family::Fedora),
        "arch" => Some(Family::Arch),
        _ => None,
    })
}

/// The command that installs `packages` (Debian's names) on this system, and those that it
/// has no package of. `None` where this system's names are not known.
pub fn install(packages: &[&str]) -> Option<String> {
    install_on(family(&apt::os_release()?)?, packages)
}

fn install_on(family: Family, packages: &[&str]) -> Option<String> {
    let mut names = Vec::new();
    let mut none = Vec::new();
    for package in packages {
        let entry = NAMES.iter().find(|(debian, ..)| debian == package);
        let name = match (family, entry) {
            (Family::Debian, Some((debian, ..))) => debian,
            (Family::Fedora, Some((_, fedora, _))) => fedora,
            (Family::Arch, Some((.., arch))) => arch,
            // The compiler and its LLVM, which come from elsewhere.
            (_, None) => continue,
        };
        if name.is_empty() {
            none.push(*package);
        } else {
            names.push(*name);
        }
    }
    names.sort_unstable();
    names.dedup();
    // QEMU's data is part of its other packages there.
    none.retain(|package| *package != "qemu-system-data");
    if names.is_empty() && none.is_empty() {
        return None;
    }
    let command = match family {
        Family::Debian => "sudo apt-get install -y --no-install-recommends",
        Family::Fedora => "sudo dnf install -y",
        Family::Arch => "sudo pacman -S --needed",
    };
    let mut text = String::new();
    if !names.is_empty() {
        let _ = writeln!(text, "  {command} {}", names.join(" "));
    }
    if !none.is_empty() {
        let _ = writeln!(text, "No package here brings {}: build it from source.", none.join(", "));
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::{Family, NAMES, family, install_on};
    use crate::setup::needs;

    #[test]
    fn systems_are_known_by_themselves_or_by_what_they_are_like() {
        let of = |text: &str| family(text);
        assert_eq!(of("NAME=\"Fedora Linux\"\nID=fedora\n"), Some(Family::Fedora));
        assert_eq!(of("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n"), Some(Family::Fedora));
        assert_eq!(of("ID=ubuntu\nID_LIKE=debian\n"), Some(Family::Debian));
        assert_eq!(of("ID=manjaro\nID_LIKE=arch\n"), Some(Family::Arch));
        assert_eq!(of("ID=nixos\n"), None);
    }

    #[test]
    fn commands_name_each_package_once_and_what_is_not_to_be_had() {
        let packages = ["libvirt-dev", "libvirt-clients", "libbpf-tools", "rustc-web"];
        assert_eq!(
            install_on(Family::Arch, &packages).unwrap(),
            "  sudo pacman -S --needed libvirt\nNo package here brings libbpf-tools: build it \
             from source.\n"
        );
        assert_eq!(
            install_on(Family::Fedora, &packages).unwrap(),
            "  sudo dnf install -y libbpf-tools libvirt-client libvirt-devel\n"
        );
        assert_eq!(install_on(Family::Fedora, &["rustc-web"]), None);
    }

    #[test]
    fn every_need_but_the_compiler_has_its_names() {
        for package in needs::all_packages() {
            let compiler = needs::COMPILER_PACKAGES.contains(&package);
            assert_eq!(NAMES.iter().any(|(debian, ..)| *debian == package), !compiler, "{package}");
        }
    }
}
