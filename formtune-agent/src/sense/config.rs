//! Where VMs are looked for.

use super::probes::TapMethod;
use crate::config::glob::{matches, matching_prefixes};
use formtune_core::units::VmId;
use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

/// What `sense` needs to know from the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SenseConfig {
    /// Where cgroup file systems are mounted, `/sys/fs/cgroup` by default.
    pub cgroup_root: PathBuf,
    /// Cgroups that are VMs besides those of libvirt's layouts.
    pub patterns: Vec<CgroupPattern>,
    /// VMs measured at once; more are left out and reported.
    pub max_vms: u32,
    /// How programs get onto tap devices; `None`: in the best way that the kernel has.
    pub tap_method: Option<TapMethod>,
}

impl Default for SenseConfig {
    fn default() -> Self {
        Self {
            cgroup_root: PathBuf::from("/sys/fs/cgroup"),
            patterns: Vec::new(),
            max_vms: 1024,
            tap_method: None,
        }
    }
}

/// A path pattern such as `vms.slice/vm-{name}.scope`, relative to the root of the hierarchy
/// that carries the `cpu` controller. `{name}` stands for the VM's name (one or more
/// characters, exactly once), `*` for any characters and `?` for one, within one component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupPattern {
    components: Vec<String>,
}

const VM: &str = "{name}";

/// Why a pattern is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CgroupPatternError {
    /// No `{name}`, or more than one.
    #[error("cgroup pattern \"{0}\" must hold {{name}} exactly once")]
    Vm(String),
    /// It leaves the hierarchy or is not relative.
    #[error("cgroup pattern \"{0}\" must be relative to the cgroup root, without \".\" and \"..\"")]
    NotRelative(String),
}

impl FromStr for CgroupPattern {
    type Err = CgroupPatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let not_relative = || CgroupPatternError::NotRelative(text.to_owned());
        let mut components = Vec::new();
        for component in Path::new(text).components() {
            match component {
                Component::Normal(name) => {
                    components.push(name.to_str().ok_or_else(not_relative)?.to_owned())
                }
                _ => return Err(not_relative()),
            }
        }
        if text.matches(VM).count() != 1 {
            return Err(CgroupPatternError::Vm(text.to_owned()));
        }
        Ok(Self { components })
    }
}

impl fmt::Display for CgroupPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.components.join("/"))
    }
}

impl CgroupPattern {
    /// Components of the pattern; a cgroup it matches has as many.
    pub fn depth(&self) -> usize {
        self.components.len()
    }

    /// The VM that a cgroup is, by its path relative to the root of the hierarchy.
    pub fn vm(&self, cgroup: &Path) -> Option<VmId> {
        let mut names = cgroup.components();
        let mut vm = None;
        for pattern in &self.components {
            let Some(Component::Normal(name)) = names.next() else { return None };
            let name = name.to_str()?;
            match pattern.split_once(VM) {
                Some((before, after)) => vm = Some(capture(before, after, name)?),
                None if matches(pattern, name) => {}
                None => return None,
            }
        }
        names.next().is_none().then_some(VmId::from(vm?))
    }

    /// Whether a cgroup could lead to a match further down, so that a walk need not enter
    /// the others.
    pub fn may_hold(&self, cgroup: &Path) -> bool {
        let mut patterns = self.components.iter();
        cgroup.components().all(|name| match (patterns.next(), name.as_os_str().to_str()) {
            (Some(pattern), Some(name)) => match pattern.split_once(VM) {
                Some((before, after)) => capture(before, after, name).is_some(),
                None => matches(pattern, name),
            },
            _ => false,
        })
    }
}

/// The longest piece of `name`, not empty, between text that matches `before` and `after`.
fn capture(before: &str, after: &str, name: &str) -> Option<String> {
    let starts = matching_prefixes(before.chars(), name.chars());
    let tails = matching_prefixes(after.chars().rev(), name.chars().rev());
    let end = name.chars().count() - tails.iter().position(|matching| *matching)?;
    let start = starts.iter().position(|matching| *matching).filter(|start| *start < end)?;
    Some(name.chars().skip(start).take(end - start).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(pattern: &str, cgroup: &str) -> Option<String> {
        pattern.parse::<CgroupPattern>().unwrap().vm(Path::new(cgroup)).map(|vm| vm.to_string())
    }

    #[test]
    fn the_name_is_what_stands_for_vm() {
        assert_eq!(vm("vms/{name}", "vms/web-1").as_deref(), Some("web-1"));
        assert_eq!(vm("vms/vm-{name}.scope", "vms/vm-a.b.scope").as_deref(), Some("a.b"));
        assert_eq!(vm("pool-*/{name}", "pool-3/db").as_deref(), Some("db"));
        assert_eq!(vm("qemu-*-{name}", "qemu-12-web").as_deref(), Some("web"));
        assert_eq!(vm("vms/{name}/*", "vms/web/cell").as_deref(), Some("web"));
    }

    #[test]
    fn other_cgroups_are_no_vms() {
        for cgroup in ["", "vms", "vms/a/b", "other/a", "vms/vm-.scope", "vms/vm-a.slice"] {
            assert_eq!(vm("vms/vm-{name}.scope", cgroup), None, "{cgroup}");
        }
    }

    #[test]
    fn a_walk_enters_only_what_may_hold_a_vm() {
        let pattern: CgroupPattern = "pool-*/{name}/cell".parse().unwrap();
        for cgroup in ["", "pool-1", "pool-1/web", "pool-1/web/cell"] {
            assert!(pattern.may_hold(Path::new(cgroup)), "{cgroup}");
        }
        for cgroup in ["other", "pool-1/web/x", "pool-1/web/cell/below"] {
            assert!(!pattern.may_hold(Path::new(cgroup)), "{cgroup}");
        }
    }

    #[test]
    fn a_pattern_without_a_name_is_refused() {
        assert!("vms/*".parse::<CgroupPattern>().is_err());
        assert!("{name}/{name}".parse::<CgroupPattern>().is_err());
        assert!("/sys/{name}".parse::<CgroupPattern>().is_err());
        assert!("../{name}".parse::<CgroupPattern>().is_err());
    }
}
