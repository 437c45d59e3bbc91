//! The effective configuration as TOML that reads back to the same one.

use super::field::write_duration;
use super::file::MODES;
use super::{Config, classes};
use formtune_core::policy::{Class, Indicator};
use toml::{Table, Value};

pub(super) fn toml(config: &Config) -> String {
    toml::to_string(&table(config))
        .unwrap_or_else(|error| unreachable!("a table of plain values is TOML: {error}"))
}

pub(super) fn table(config: &Config) -> Table {
    let mut root = Table::new();
    let policy = &config.policy;
    let mut set = |key: &str, value: Value| root.insert(key.to_owned(), value);
    set("tick", write_duration(policy.tick).into());
    set("max_vms", i64::from(config.sense.max_vms).into());
    set("probe_budget", policy.probe_budget.into());
    set("state_dir", path(&config.state_dir));
    set("socket", path(&config.socket));
    set("listen", config.listen.map_or("off".to_owned(), |address| address.to_string()).into());
    set("libvirt", config.libvirt_uri.clone().unwrap_or("off".to_owned()).into());
    set("cgroup_root", path(&config.sense.cgroup_root));
    set(
        "cgroups",
        config
            .sense
            .patterns
            .iter()
            .map(|pattern| pattern.to_string().into())
            .collect::<Vec<Value>>()
            .into(),
    );
    if let Some(record) = &config.record {
        set("record", path(record));
    }
    if let Some(log) = &config.hdr_log {
        set(
            "hdr_log",
            keys([
                ("file", path(&log.file)),
                ("interval", write_duration(log.interval).into()),
                ("max_bytes", (log.max_bytes as i64).into()),
                ("keep", i64::from(log.keep).into()),
            ]),
        );
    }
    set("default_class", policy.default_class.0.clone().into());
    set("mode", keys([("cpu_weight", word(MODES, policy.modes.cpu_weight))]));
    let cpu = &policy.cpu;
    set(
        "cpu",
        keys([
            ("slack_act", cpu.slack_act.into()),
            ("slack_relax", cpu.slack_relax.into()),
            ("slack_severe", cpu.slack_severe.into()),
            ("confirm", i64::from(cpu.confirm).into()),
            ("confirm_of", i64::from(cpu.confirm_of).into()),
            ("raise_ratio", cpu.raise_ratio.into()),
            ("lower_factor", cpu.lower_factor.into()),
            ("relax_ratio", cpu.relax_ratio.into()),
            ("min_change_ratio", cpu.min_change_ratio.into()),
            ("relax_below_busy", cpu.relax_below_busy.into()),
            ("cooldown", write_duration(cpu.cooldown).into()),
            ("verify_windows", i64::from(cpu.verify_windows).into()),
            ("verify_gain", cpu.verify_gain.into()),
            ("bar", write_duration(cpu.bar).into()),
            ("reversals", i64::from(cpu.reversals).into()),
            ("reversal_window", write_duration(cpu.reversal_window).into()),
            ("freeze", write_duration(cpu.freeze).into()),
            ("blind_decay_after", write_duration(cpu.blind_decay_after).into()),
        ]),
    );
    set(
        "classes",
        Value::Table(policy.classes.iter().map(|(name, of)| (name.0.clone(), class(of))).collect()),
    );
    let rules = config.classes_of.rules.iter().map(|rule| {
        let vms: Vec<Value> = rule.vms.iter().map(|glob| glob.clone().into()).collect();
        keys([("vms", vms.into()), ("class", rule.class.0.clone().into())])
    });
    set("rules", rules.collect::<Vec<Value>>().into());
    root
}

fn class(class: &Class) -> Value {
    let mut keys = vec![
        ("priority", word(classes::PRIORITIES, class.priority)),
        ("floor_ratio", class.floor_ratio.into()),
        ("ceiling_ratio", class.ceiling_ratio.into()),
    ];
    keys.push((
        "cpu_weight",
        class.cpu_weight.map_or("found".into(), |weight| i64::from(weight.get()).into()),
    ));
    keys.push((
        "slo",
        match &class.slo {
            None => "off".into(),
            Some(slo) => self::keys([
                (
                    "indicator",
                    match slo.indicator {
                        Indicator::RunqLatency => "runq_latency".into(),
                    },
                ),
                ("quantile", slo.quantile.into()),
                ("threshold", write_duration(slo.threshold).into()),
                ("window", write_duration(slo.window).into()),
                ("share", slo.share.into()),
                ("min_samples", i64::from(slo.min_samples).into()),
            ]),
        },
    ));
    self::keys(keys)
}

fn keys(keys: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    Value::Table(keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

/// The word that stands for a value in the file.
fn word<T: PartialEq>(words: &[(&'static str, T)], value: T) -> Value {
    words.iter().find(|(_, known)| *known == value).map_or("", |(word, _)| word).into()
}

fn path(path: &std::path::Path) -> Value {
    path.display().to_string().into()
}
