//! The names that libvirt and systemd give to a domain's cgroup.
//!
//! With systemd: `machine.slice/machine-qemu\x2d1\x2dweb.scope`; without:
//! `machine/qemu-1-web.libvirt-qemu`. Both hold the machine name `qemu-1-web`, which libvirt
//! makes of driver, domain id and a shortened domain name
//! (`virDomainDriverGenerateMachineName()`, src/hypervisor/domain_driver.c).

/// A machine name, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Whole, e.g. `qemu-1-web`.
    pub name: String,
    /// libvirt's id of the domain: another one for every start.
    pub domain_id: u32,
    /// The domain's name as far as it is in there; see [`short_name`].
    pub short_name: String,
}

/// The machine that a cgroup directory's name stands for, if it is one of libvirt's.
pub fn machine(directory: &str) -> Option<Machine> {
    let name = if let Some(escaped) =
        directory.strip_prefix("machine-").and_then(|rest| rest.strip_suffix(".scope"))
    {
        unescape(escaped)?
    } else {
        directory.strip_suffix(".libvirt-qemu")?.to_owned()
    };
    // A name of which nothing is kept leaves `qemu-1`: trailing dashes are cut off.
    let rest = name.strip_prefix("qemu-")?;
    let (id, short_name) = rest.split_once('-').unwrap_or((rest, ""));
    let domain_id = id.parse().ok()?;
    let short_name = short_name.to_owned();
    Some(Machine { name, domain_id, short_name })
}

/// What libvirt's machine name keeps of a domain's name: only letters, digits, `-` and `.`
/// (no two of these in a row, none at the ends), and nothing once the machine name, `used`
/// characters of which come before, has 64 characters
/// (`virDomainMachineNameAppendValid()`).
pub fn short_name(domain: &str, used: usize) -> String {
    let mut out = String::new();
    let mut skip = true;
    for c in domain.bytes() {
        if used + out.len() >= 64 {
            break;
        }
        if matches!(c, b'.' | b'-') {
            if !skip {
                out.push(c.into());
            }
            skip = true;
            continue;
        }
        skip = false;
        if c.is_ascii_alphanumeric() {
            out.push(c.into());
        }
    }
    out.truncate(out.trim_end_matches(['-', '.']).len());
    out
}

impl Machine {
    /// Whether it is that of the domain with this id and name.
    pub fn is(&self, domain_id: u32, domain: &str) -> bool {
        self.domain_id == domain_id
            && self.short_name == short_name(domain, format!("qemu-{domain_id}-").len())
    }
}

/// systemd's escapes in unit names: `\x2d` for `-` and so on, `-` for `/` (systemd.unit(5)).
/// A name with a plain `-` is a path, which is no machine of libvirt's.
fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        match first {
            b'\\' => {
                let hex = std::str::from_utf8(tail.strip_prefix(b"x")?.get(..2)?).ok()?;
                out.push(u8::from_str_radix(hex, 16).ok()?);
                rest = &tail[3..];
            }
            b'-' => return None,
            other => {
                out.push(other);
                rest = tail;
            }
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `unit_name_escape()` of systemd, src/basic/unit-name.c.
    fn escape(name: &str) -> String {
        let plain = |at: usize, c: u8| {
            c.is_ascii_alphanumeric() || matches!(c, b':' | b'_') || (c == b'.' && at > 0)
        };
        name.bytes()
            .enumerate()
            .map(
                |(at, c)| {
                    if plain(at, c) { char::from(c).to_string() } else { format!("\\x{c:02x}") }
                },
            )
            .collect()
    }

    #[test]
    fn both_layouts() {
        let scope = machine(r"machine-qemu\x2d12\x2dweb\x2d3.example.scope").unwrap();
        assert_eq!((scope.domain_id, scope.short_name.as_str()), (12, "web-3.example"));
        let plain = machine("qemu-12-web-3.example.libvirt-qemu").unwrap();
        assert_eq!(plain, scope);
        assert!(plain.is(12, "web-3.example"));
        assert!(!plain.is(13, "web-3.example"));
    }

    #[test]
    fn others_are_not_taken() {
        for other in [
            "machine-lxc\\x2d1\\x2da.scope",
            "machine-qemu-1-a.scope",
            "machine.slice",
            "qemu-1-a.libvirt-lxc",
            "qemu-x-a.libvirt-qemu",
            "machine-qemu\\x2d1\\x2.scope",
            "machine-a\\x.scope",
            "vcpu0",
        ] {
            assert_eq!(machine(other), None, "{other}");
        }
    }

    #[test]
    fn names_are_shortened_as_libvirt_does() {
        assert_eq!(short_name("web_3 (old)", 7), "web3old");
        assert_eq!(short_name("-a..b--c-", 7), "a.b-c");
        let long = "x".repeat(80);
        assert_eq!(short_name(&long, 7).len(), 57);
        assert_eq!(short_name("grün", 7), "grn");
    }

    proptest! {
        #[test]
        fn a_domain_is_found_again_in_both_layouts(id in 1u32..1_000_000, domain in "\\PC{1,80}") {
            let name = format!("qemu-{id}-{}", short_name(&domain, format!("qemu-{id}-").len()));
            let name = name.trim_end_matches('-');
            let scope = machine(&format!("machine-{}.scope", escape(name))).unwrap();
            prop_assert!(scope.is(id, &domain));
            let plain = machine(&format!("{name}.libvirt-qemu")).unwrap();
            prop_assert!(plain.is(id, &domain));
            prop_assert_eq!(plain, scope);
        }

        #[test]
        fn any_directory_name_is_read_or_left(name in "\\PC{0,60}") {
            let _ = machine(&name);
            let _ = machine(&format!("machine-qemu{name}.scope"));
        }
    }
}
