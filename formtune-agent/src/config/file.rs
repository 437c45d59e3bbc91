//! The TOML file: which keys there are, and the range of each.

use super::document::{self, Source};
use super::field::{Field, Section};
use super::{ClassRules, Config, ConfigError, classes, guide};
use crate::export::HdrLogConfig;
use crate::sense::CgroupPattern;
use formtune_core::policy::{CpuLoop, Mode};
use formtune_core::units::{ClassName, Nanos};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub(super) const ROOT_KEYS: &[&str] = &[
    "tick",
    "max_vms",
    "probe_budget",
    "state_dir",
    "socket",
    "listen",
    "libvirt",
    "cgroup_root",
    "cgroups",
    "record",
    "hdr_log",
    "guide",
    "default_class",
    "mode",
    "cpu",
    "classes",
    "rules",
];
const HDR_LOG_KEYS: &[&str] = &["file", "interval", "max_bytes", "keep"];
const MODE_KEYS: &[&str] = &["cpu_weight"];
pub(super) const CPU_KEYS: &[&str] = &[
    "slack_act",
    "slack_relax",
    "slack_severe",
    "confirm",
    "confirm_of",
    "raise_ratio",
    "lower_factor",
    "relax_ratio",
    "min_change_ratio",
    "relax_below_busy",
    "cooldown",
    "verify_windows",
    "verify_gain",
    "bar",
    "reversals",
    "reversal_window",
    "freeze",
    "blind_decay_after",
];

/// The words of `[mode]` and of `--mode`.
pub(super) const MODES: &[(&str, Mode)] =
    &[("observe", Mode::Observe), ("shadow", Mode::Shadow), ("enforce", Mode::Enforce)];

/// Reads a whole configuration, starting from the defaults.
pub(super) fn read(source: &Source) -> Result<Config, ConfigError> {
    let document = document::parse_toml(source)?;
    let root = Section::root(source, &document, ROOT_KEYS)?;
    let mut config = Config::default();

    if let Some(field) = root.get("tick") {
        config.policy.tick = field.duration(Nanos::from_millis(100)..=Nanos::from_secs(10))?;
    }
    let tick = config.policy.tick;
    // A tick longer than the default window, or one that does not divide it, moves the
    // default window; a window that the file itself gives is held to the tick instead.
    for class in config.policy.classes.values_mut() {
        if let Some(slo) = &mut class.slo {
            slo.window = Nanos(slo.window.0.next_multiple_of(tick.0));
        }
    }
    if let Some(field) = root.get("max_vms") {
        config.sense.max_vms = field.integer(1..=10_000)? as u32;
    }
    if let Some(field) = root.get("probe_budget") {
        config.policy.probe_budget = field.number(0.001..=1_000.0)?;
    }
    if let Some(field) = root.get("state_dir") {
        config.state_dir = absolute(field)?;
    }
    if let Some(field) = root.get("socket") {
        config.socket = absolute(field)?;
    }
    if let Some(field) = root.get("cgroup_root") {
        config.sense.cgroup_root = absolute(field)?;
    }
    if let Some(field) = root.get("record") {
        config.record = Some(absolute(field)?);
    }
    if let Some(field) = root.get("hdr_log") {
        config.hdr_log = Some(hdr_log(field.section(HDR_LOG_KEYS)?)?);
    }
    if let Some(field) = root.get("listen") {
        config.listen = listen(field)?;
    }
    if let Some(field) = root.get("libvirt") {
        config.libvirt_uri = match field.string()? {
            "off" => None,
            uri if uri.contains("://") => Some(uri.to_owned()),
            other => {
                return Err(field.error(format_args!(
                    "`libvirt` is \"{other}\", must be a URI such as \"qemu:///system\" or \"off\""
                )));
            }
        };
    }
    if let Some(field) = root.get("cgroups") {
        for field in field.list()? {
            let pattern =
                field.string()?.parse::<CgroupPattern>().map_err(|error| field.error(error))?;
            config.sense.patterns.push(pattern);
        }
    }
    if let Some(field) = root.get("mode") {
        let modes = field.section(MODE_KEYS)?;
        if let Some(field) = modes.get("cpu_weight") {
            config.policy.modes.cpu_weight = field.one_of(MODES)?;
        }
    }
    if let Some(field) = root.get("cpu") {
        cpu(&mut config.policy.cpu, field.section(CPU_KEYS)?)?;
    }

    let base = config.policy.classes[&ClassName::from(classes::BASE_CLASS)].clone();
    let mut pools = std::collections::BTreeMap::new();
    if let Some(field) = root.get("guide") {
        let beside = source.path.parent().unwrap_or(Path::new(""));
        let path = beside.join(field.string()?);
        let text = std::fs::read_to_string(&path).map_err(|error| {
            field.error(format_args!("failed to read the guide's {}: {error}", path.display()))
        })?;
        let read = guide::read(&Source { path, text }, &base)?;
        config.policy.classes.extend(read.classes);
        config.notices.extend(read.notices);
        pools = read.pools;
    }
    if let Some(field) = root.get("classes") {
        classes::read(&mut config.policy.classes, &pools, field, tick)?;
    }
    if let Some(field) = root.get("default_class") {
        config.policy.default_class = classes::class_name(field, &config.policy.classes)?;
    }
    let rules = match root.get("rules") {
        Some(field) => classes::rules(field, &config.policy.classes)?,
        None => Vec::new(),
    };
    config.classes_of = ClassRules::new(rules, config.policy.default_class.clone());
    Ok(config)
}

fn hdr_log(section: Section<'_>) -> Result<HdrLogConfig, ConfigError> {
    let mut log = HdrLogConfig {
        file: absolute(section.required("file")?)?,
        interval: Nanos::from_secs(10),
        max_bytes: 64 << 20,
        keep: 4,
    };
    if let Some(field) = section.get("interval") {
        log.interval = field.duration(Nanos::from_secs(1)..=Nanos::from_secs(86_400))?;
    }
    if let Some(field) = section.get("max_bytes") {
        log.max_bytes = field.integer(1 << 16..=1 << 40)? as u64;
    }
    if let Some(field) = section.get("keep") {
        log.keep = field.integer(0..=1_000)? as u32;
    }
    Ok(log)
}

fn absolute(field: Field<'_>) -> Result<PathBuf, ConfigError> {
    let path = Path::new(field.string()?);
    if !path.is_absolute() {
        let (key, path) = (field.key, path.display());
        return Err(field.error(format_args!("`{key}` is \"{path}\", must be an absolute path")));
    }
    Ok(path.to_owned())
}

fn listen(field: Field<'_>) -> Result<Option<SocketAddr>, ConfigError> {
    let text = field.string()?;
    if text == "off" {
        return Ok(None);
    }
    let Ok(address) = text.parse::<SocketAddr>() else {
        return Err(field.error(format_args!(
            "`listen` is \"{text}\", must be an address and port such as \"127.0.0.1:19752\" or \"off\""
        )));
    };
    // The interface has no authentication of its own: reach it from elsewhere through a
    // proxy that has.
    if !address.ip().is_loopback() {
        return Err(field.error(format_args!(
            "`listen` is \"{text}\", must be a loopback address such as 127.0.0.1 or [::1]"
        )));
    }
    Ok(Some(address))
}

fn cpu(cpu: &mut CpuLoop, section: Section<'_>) -> Result<(), ConfigError> {
    let number = |key, range, target: &mut f64| -> Result<(), ConfigError> {
        if let Some(field) = section.get(key) {
            *target = field.number(range)?;
        }
        Ok(())
    };
    number("slack_act", -1.0..=1.0, &mut cpu.slack_act)?;
    number("slack_relax", -1.0..=1.0, &mut cpu.slack_relax)?;
    number("slack_severe", -100.0..=1.0, &mut cpu.slack_severe)?;
    number("raise_ratio", 0.0..=10.0, &mut cpu.raise_ratio)?;
    number("lower_factor", 0.01..=0.99, &mut cpu.lower_factor)?;
    number("relax_ratio", 0.001..=1.0, &mut cpu.relax_ratio)?;
    number("min_change_ratio", 0.0..=1.0, &mut cpu.min_change_ratio)?;
    number("relax_below_busy", 0.0..=1.0, &mut cpu.relax_below_busy)?;
    number("verify_gain", 0.0..=1.0, &mut cpu.verify_gain)?;

    let count = |key, most, target: &mut u8| -> Result<(), ConfigError> {
        if let Some(field) = section.get(key) {
            *target = field.integer(1..=most)? as u8;
        }
        Ok(())
    };
    count("confirm", 32, &mut cpu.confirm)?;
    count("confirm_of", 32, &mut cpu.confirm_of)?;
    count("verify_windows", 100, &mut cpu.verify_windows)?;
    count("reversals", 100, &mut cpu.reversals)?;

    let time = |key, least, most, target: &mut Nanos| -> Result<(), ConfigError> {
        if let Some(field) = section.get(key) {
            *target = field.duration(least..=most)?;
        }
        Ok(())
    };
    let (hour, day) = (Nanos::from_secs(3600), Nanos::from_secs(86_400));
    time("cooldown", Nanos::from_millis(100), hour, &mut cpu.cooldown)?;
    time("bar", Nanos::from_secs(1), day, &mut cpu.bar)?;
    time("reversal_window", Nanos::from_secs(1), hour, &mut cpu.reversal_window)?;
    time("freeze", Nanos::from_secs(1), day, &mut cpu.freeze)?;
    time("blind_decay_after", Nanos::from_secs(1), hour, &mut cpu.blind_decay_after)?;

    if cpu.confirm > cpu.confirm_of {
        let what =
            format!("`confirm` ({}) is above `confirm_of` ({})", cpu.confirm, cpu.confirm_of);
        return Err(section.error_at(&["confirm", "confirm_of"], what));
    }
    if cpu.slack_act >= cpu.slack_relax {
        let what = format!(
            "`slack_act` ({}) must be below `slack_relax` ({})",
            cpu.slack_act, cpu.slack_relax
        );
        return Err(section.error_at(&["slack_act", "slack_relax"], what));
    }
    if cpu.slack_severe > cpu.slack_act {
        let what = format!(
            "`slack_severe` ({}) is above `slack_act` ({})",
            cpu.slack_severe, cpu.slack_act
        );
        return Err(section.error_at(&["slack_severe", "slack_act"], what));
    }
    Ok(())
}
