//! Classes, and which VM is of which.

use super::ConfigError;
use super::field::{Field, Section, nearest};
use super::glob::matches;
use formtune_core::policy::{Class, Indicator, Priority, Slo};
use formtune_core::units::{ClassName, Nanos, VmId, Weight};
use std::collections::BTreeMap;

/// The class that always exists; the others take from it what they do not say.
pub(super) const BASE_CLASS: &str = "default";

/// Longest window: core keeps one interval per tick of it.
const LONGEST_WINDOW: Nanos = Nanos::from_secs(60);

const CLASS_KEYS: &[&str] =
    &["priority", "pool", "slo", "cpu_weight", "floor_ratio", "ceiling_ratio"];
const SLO_KEYS: &[&str] = &["indicator", "quantile", "threshold", "window", "share", "min_samples"];
const RULE_KEYS: &[&str] = &["vms", "class"];
#[cfg(test)]
pub(super) const KEYS: [&[&str]; 3] = [CLASS_KEYS, SLO_KEYS, RULE_KEYS];

pub(super) const PRIORITIES: &[(&str, Priority)] =
    &[("low", Priority::Low), ("normal", Priority::Normal), ("high", Priority::High)];

/// Assigns VMs to classes by name; the first rule that matches wins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassRules {
    pub(super) rules: Vec<Rule>,
    default: ClassName,
}

/// VMs whose name matches one of the globs are of the class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub vms: Vec<String>,
    pub class: ClassName,
}

impl ClassRules {
    pub(super) fn new(rules: Vec<Rule>, default: ClassName) -> Self {
        Self { rules, default }
    }

    /// The class of a VM.
    pub fn class_of(&self, vm: &VmId) -> &ClassName {
        let rule = self.rules.iter().find(|rule| rule.vms.iter().any(|glob| matches(glob, &vm.0)));
        rule.map_or(&self.default, |rule| &rule.class)
    }
}

/// Applies `[classes.*]` on top of what the guide's file gave.
pub(super) fn read(
    classes: &mut BTreeMap<ClassName, Class>,
    pools: &BTreeMap<String, Priority>,
    field: Field<'_>,
    tick: Nanos,
) -> Result<(), ConfigError> {
    let named: Vec<_> = field.named()?.collect();
    // The class that the others take from comes first, wherever it stands in the file.
    let (base, others): (Vec<_>, Vec<_>) =
        named.into_iter().partition(|(entry, _)| entry.key == BASE_CLASS);
    for (entry, field) in base.into_iter().chain(others) {
        let name = ClassName(entry.key.clone());
        let mut class =
            classes.get(&name).unwrap_or(&classes[&ClassName::from(BASE_CLASS)]).clone();
        class_from(&mut class, pools, field.section(CLASS_KEYS)?, tick)?;
        classes.insert(name, class);
    }
    Ok(())
}

fn class_from(
    class: &mut Class,
    pools: &BTreeMap<String, Priority>,
    section: Section<'_>,
    tick: Nanos,
) -> Result<(), ConfigError> {
    if let Some(field) = section.get("pool") {
        let pool = field.string()?;
        class.priority = *pools.get(pool).ok_or_else(|| {
            match nearest(pool, pools.keys().map(String::as_str)) {
                Some(near) => {
                    field.error(format_args!("unknown pool \"{pool}\", did you mean \"{near}\"?"))
                }
                None => field.error(format_args!(
                    "unknown pool \"{pool}\": the guide's `resource_pools` hold none of that name"
                )),
            }
        })?;
    }
    if let Some(field) = section.get("priority") {
        class.priority = field.one_of(PRIORITIES)?;
    }
    if let Some(field) = section.get("cpu_weight") {
        class.cpu_weight = weight(field)?;
    }
    if let Some(field) = section.get("floor_ratio") {
        class.floor_ratio = field.number_above(0.0, 1.0)?;
    }
    if let Some(field) = section.get("ceiling_ratio") {
        class.ceiling_ratio = field.number(1.0..=100.0)?;
    }
    if let Some(field) = section.get("slo") {
        class.slo = match field.string() {
            Ok("off") => None,
            Ok(other) => {
                return Err(
                    field.error(format_args!("`slo` is \"{other}\", must be a table or \"off\""))
                );
            }
            Err(_) => Some(slo(class.slo.take(), field.section(SLO_KEYS)?, tick)?),
        };
    }
    Ok(())
}

fn slo(slo: Option<Slo>, section: Section<'_>, tick: Nanos) -> Result<Slo, ConfigError> {
    let mut slo = slo.unwrap_or_else(super::base_slo);
    if let Some(field) = section.get("indicator") {
        slo.indicator = field.one_of(&[("runq_latency", Indicator::RunqLatency)])?;
    }
    if let Some(field) = section.get("quantile") {
        slo.quantile = field.number(0.5..=0.9999)?;
    }
    if let Some(field) = section.get("threshold") {
        slo.threshold = field.duration(Nanos::from_micros(1)..=Nanos::from_secs(10))?;
    }
    if let Some(field) = section.get("window") {
        slo.window = field.duration(tick..=LONGEST_WINDOW)?;
        if !slo.window.0.is_multiple_of(tick.0) {
            return Err(
                field.error(format_args!("`window` must be a whole number of ticks of {tick}"))
            );
        }
    }
    if let Some(field) = section.get("share") {
        slo.share = field.number_above(0.0, 1.0)?;
    }
    if let Some(field) = section.get("min_samples") {
        slo.min_samples = field.integer(1..=1_000_000)? as u32;
    }
    Ok(slo)
}

/// A weight, or `"found"`: whatever the VM has when formtune first sees it.
fn weight(field: Field<'_>) -> Result<Option<Weight>, ConfigError> {
    match field.string() {
        Ok("found") => Ok(None),
        Ok(other) => Err(field.error(format_args!(
            "`cpu_weight` is \"{other}\", must be an integer from 1 to 10000 or \"found\""
        ))),
        Err(_) => {
            let weight =
                field.integer(i64::from(Weight::MIN.get())..=i64::from(Weight::MAX.get()))?;
            Ok(Some(Weight::clamped(weight as u64)))
        }
    }
}

/// Reads `[[rules]]`.
pub(super) fn rules(
    field: Field<'_>,
    classes: &BTreeMap<ClassName, Class>,
) -> Result<Vec<Rule>, ConfigError> {
    let mut rules = Vec::new();
    for field in field.list()? {
        let section = field.section(RULE_KEYS)?;
        let vms = section.required("vms")?;
        let mut globs = Vec::new();
        for glob in vms.list()? {
            globs.push(glob.string()?.to_owned());
        }
        if globs.is_empty() {
            return Err(vms.error("`vms` names no VM"));
        }
        rules.push(Rule { vms: globs, class: class_name(section.required("class")?, classes)? });
    }
    Ok(rules)
}

/// The name of a class that exists.
pub(super) fn class_name(
    field: Field<'_>,
    classes: &BTreeMap<ClassName, Class>,
) -> Result<ClassName, ConfigError> {
    let name = field.string()?;
    if let Some((name, _)) = classes.get_key_value(&ClassName::from(name)) {
        return Ok(name.clone());
    }
    let known = || classes.keys().map(|class| class.0.as_str());
    Err(match nearest(name, known()) {
        Some(near) => {
            field.error(format_args!("unknown class \"{name}\", did you mean \"{near}\"?"))
        }
        None => {
            let known: Vec<&str> = known().collect();
            field.error(format_args!(
                "unknown class \"{name}\", known classes: {}",
                known.join(", ")
            ))
        }
    })
}
