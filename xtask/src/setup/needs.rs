//! What the project needs on a machine, for which purpose, and how to see whether it is there.

use super::ebpf;
use crate::sh;
use std::path::Path;
use std::process::Command;

/// QEMU's packages; they must be of one version.
pub const QEMU_PACKAGES: &[&str] =
    &["qemu-system-x86", "qemu-system-common", "qemu-system-data", "qemu-utils", "seabios"];

/// What brings the compiler for the probes; only some releases of Debian have them.
pub const COMPILER_PACKAGES: &[&str] = &["rustc-web", "rust-web-src", "llvm-22-dev"];

/// The oldest QEMU whose emulation is known to be sound: 7.2 crashes one guest in ten.
const MIN_QEMU: u32 = 10;

/// What something is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Purpose {
    /// Compiling formtune
    Build,
    /// Formatting and clippy
    Lint,
    /// Tests on this machine's kernel
    Native,
    /// Tests in machines with other kernels
    Vm,
    /// The end-to-end test in a machine with systemd and libvirt
    E2e,
    /// The demo
    Demo,
    /// Benchmarks and their peers
    Bench,
}

impl Purpose {
    /// All of them.
    pub const ALL: &[Self] =
        &[Self::Build, Self::Lint, Self::Native, Self::Vm, Self::E2e, Self::Demo, Self::Bench];
}

/// One thing that must be there.
pub struct Need {
    /// For people, on systems where the package has another name.
    pub what: &'static str,
    /// The Debian package that brings it.
    pub package: &'static str,
    purposes: &'static [Purpose],
    found: Found,
}

enum Found {
    /// A program of this name.
    Program(&'static str),
    /// A file below `/usr`.
    File(&'static str),
    /// A file in the folder of shared libraries of this architecture.
    Library(&'static str),
    /// Anything else.
    Check(fn() -> bool),
}

impl Need {
    /// The packages to install for it.
    pub fn packages(&self) -> Vec<&'static str> {
        match self.package {
            "qemu-system-x86" => QEMU_PACKAGES.to_vec(),
            "rustc-web" => vec!["rustc-web", "rust-web-src"],
            package => vec![package],
        }
    }

    fn is_there(&self) -> bool {
        match self.found {
            Found::Program(name) => sh::find_program(name).is_some(),
            Found::File(path) => Path::new("/usr").join(path).exists(),
            Found::Library(path) => ["lib/x86_64-linux-gnu", "lib64", "lib"]
                .iter()
                .any(|folder| Path::new("/usr").join(folder).join(path).exists()),
            Found::Check(check) => check(),
        }
    }
}

/// What is needed for `purposes` and is not there.
pub fn missing(purposes: &[Purpose]) -> Vec<&'static Need> {
    NEEDS
        .iter()
        .filter(|need| need.purposes.iter().any(|purpose| purposes.contains(purpose)))
        .filter(|need| !need.is_there())
        .collect()
}

/// Every package that something may bring.
#[cfg(test)]
pub fn all_packages() -> Vec<&'static str> {
    NEEDS.iter().flat_map(Need::packages).collect()
}

fn qemu_is_sound() -> bool {
    let Ok(out) = Command::new("qemu-system-x86_64").arg("--version").output() else {
        return false;
    };
    qemu_major(&String::from_utf8_lossy(&out.stdout)).is_some_and(|major| major >= MIN_QEMU)
}

/// `QEMU emulator version 10.0.2 (Debian …)` → 10.
fn qemu_major(text: &str) -> Option<u32> {
    text.split("version ").nth(1)?.split('.').next()?.parse().ok()
}

fn linker_can_be_built() -> bool {
    ebpf::linker().is_some() || Path::new(ebpf::LLVM_PREFIX).join("bin/llvm-config").exists()
}

use Purpose::{Bench, Build, Demo, E2e, Native, Vm};

/// Everything. New needs go here.
#[rustfmt::skip]
const NEEDS: &[Need] = &[
    Need { what: "a C compiler", package: "gcc", purposes: &[Build], found: Found::Program("cc") },
    Need { what: "a C++ compiler", package: "g++", purposes: &[Build], found: Found::Program("c++") },
    Need { what: "the C library's headers", package: "libc6-dev", purposes: &[Build], found: Found::File("include/stdlib.h") },
    Need { what: "pkg-config", package: "pkg-config", purposes: &[Build], found: Found::Program("pkg-config") },
    Need { what: "libvirt's headers", package: "libvirt-dev", purposes: &[Build], found: Found::File("include/libvirt/libvirt.h") },
    Need { what: "a compiler for eBPF: rustc 1.96 or a nightly, with library source", package: "rustc-web", purposes: &[Build], found: Found::Check(|| ebpf::compiler().is_some()) },
    Need { what: "LLVM 22 with headers, to build bpf-linker", package: "llvm-22-dev", purposes: &[Build], found: Found::Check(linker_can_be_built) },
    Need { what: "strace", package: "strace", purposes: &[Native], found: Found::Program("strace") },
    Need { what: "ip", package: "iproute2", purposes: &[Native, Demo], found: Found::Program("ip") },
    Need { what: "Prometheus and promtool", package: "prometheus", purposes: &[Native], found: Found::Check(|| sh::find_program("prometheus").is_some() && sh::find_program("promtool").is_some()) },
    Need { what: "libvirtd", package: "libvirt-daemon-system", purposes: &[Native, Demo, Bench], found: Found::Program("libvirtd") },
    Need { what: "libvirt's QEMU driver", package: "libvirt-daemon-driver-qemu", purposes: &[Native, Demo, Bench], found: Found::Library("libvirt/connection-driver/libvirt_driver_qemu.so") },
    Need { what: "virsh", package: "libvirt-clients", purposes: &[Native, Demo, Bench], found: Found::Program("virsh") },
    Need { what: "QEMU 10 or newer", package: "qemu-system-x86", purposes: &[Native, Vm, E2e, Demo, Bench], found: Found::Check(qemu_is_sound) },
    Need { what: "a static busybox", package: "busybox-static", purposes: &[Vm, E2e, Demo, Bench], found: Found::Program("busybox") },
    Need { what: "depmod", package: "kmod", purposes: &[Vm, E2e, Demo, Bench], found: Found::Program("depmod") },
    Need { what: "lz4", package: "lz4", purposes: &[Vm, E2e, Demo, Bench], found: Found::Program("lz4") },
    Need { what: "zstd", package: "zstd", purposes: &[Vm, E2e, Demo, Bench], found: Found::Program("zstd") },
    Need { what: "xz", package: "xz-utils", purposes: &[Vm, E2e, Demo, Bench], found: Found::Program("xz") },
    Need { what: "debootstrap", package: "debootstrap", purposes: &[E2e], found: Found::Program("debootstrap") },
    Need { what: "mke2fs", package: "e2fsprogs", purposes: &[E2e], found: Found::Program("mke2fs") },
    Need { what: "perf", package: "linux-perf", purposes: &[Bench], found: Found::Program("perf") },
    Need { what: "fio", package: "fio", purposes: &[Native, Bench], found: Found::Program("fio") },
    Need { what: "runqlat of libbpf-tools", package: "libbpf-tools", purposes: &[Bench], found: Found::Program("runqlat") },
];

#[cfg(test)]
mod tests {
    use super::{NEEDS, Purpose, qemu_major};
    use std::collections::BTreeSet;

    #[test]
    fn qemu_versions_are_understood() {
        let text = "QEMU emulator version 7.2.17 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(qemu_major(text), Some(7));
        assert_eq!(qemu_major("QEMU emulator version 10.0.2"), Some(10));
        assert_eq!(qemu_major(""), None);
    }

    #[test]
    fn each_package_is_listed_once_and_each_purpose_needs_something() {
        let packages: BTreeSet<_> = NEEDS.iter().map(|need| need.package).collect();
        assert_eq!(packages.len(), NEEDS.len());
        for purpose in Purpose::ALL.iter().filter(|purpose| **purpose != Purpose::Lint) {
            assert!(NEEDS.iter().any(|need| need.purposes.contains(purpose)), "{purpose:?}");
        }
    }
}
