//! The operator guide's JSON (`form-config.json`) as policy input. Every key of the guide
//! is known; what has no effect is reported with its reason, never dropped silently.

use super::classes::PRIORITIES;
use super::document::{Entry, Node, Source, Value, parse_json};
use super::field::{Field, unknown_key};
use super::{ConfigError, Notice};
use formtune_core::policy::{Class, Priority};
use formtune_core::units::{ClassName, Weight};
use std::collections::BTreeMap;

/// What the guide's file says.
#[derive(Debug)]
pub(super) struct Guide {
    /// From `instance_types`, and from `resource_pools` (by the pool's name, so that a rule
    /// can name it).
    pub classes: BTreeMap<ClassName, Class>,
    /// Priorities of `resource_pools`.
    pub pools: BTreeMap<String, Priority>,
    /// Keys without effect.
    pub notices: Vec<Notice>,
}

/// What becomes of a key.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Read as policy.
    Honoured,
    /// A description: nothing is asked for.
    Remark,
    /// A table; its keys are listed with their full names.
    Table,
    /// A list of tables; as above.
    List,
    /// A knob that this version does not turn.
    OtherKnob,
    /// Decided when a VM is defined.
    AtDefinition,
    /// Static tuning of the host.
    HostTuning,
    /// Where VMs run is not formtune's to decide.
    Placement,
    /// Belongs to the node's own services.
    NodeService,
    /// The guide's exporters.
    Exporter,
    /// Set under another name.
    Interval,
}

impl Fate {
    fn why(self) -> &'static str {
        match self {
            Self::Honoured | Self::Remark | Self::Table | Self::List => "",
            Self::OtherKnob => "this version moves CPU weight only",
            Self::AtDefinition => "decided when the VM is defined, which formtune does not do",
            Self::HostTuning => "static tuning of the host, which this version does not apply",
            Self::Placement => {
                "formtune does not place or migrate VMs, and gives no advice on it in this version"
            }
            Self::NodeService => "a setting of the node's own services, not of formtune",
            Self::Exporter => "formtune serves /metrics itself, see `listen` in its own file",
            Self::Interval => {
                "formtune measures every `tick` of its own file; set the scrape interval in Prometheus"
            }
        }
    }
}

use Fate::{
    AtDefinition, Exporter, Honoured, HostTuning, Interval, List, NodeService, OtherKnob,
    Placement, Remark, Table,
};

/// Every key of the performance guide and of the security guide beside it.
const KEYS: &[(&str, Fate)] = &[
    ("vm", Table),
    ("vm.cpu_pinning_enabled", AtDefinition),
    ("vm.cpu_dedicated_set", AtDefinition),
    ("vm.numa_aware", AtDefinition),
    ("vm.use_hugepages", AtDefinition),
    ("vm.hugepages_size_mb", HostTuning),
    ("vm.hugepages_percentage", HostTuning),
    ("vm.default_memory_ballooning", OtherKnob),
    ("vm.memory_ballooning_statistics_period", OtherKnob),
    ("vm.default_disk_format", AtDefinition),
    ("vm.disk_cache_mode", AtDefinition),
    ("vm.disk_io_mode", AtDefinition),
    ("vm.vm_image_cache_size_gb", NodeService),
    ("vm.default_cpu_model", AtDefinition),
    ("vm.enable_nested_virtualization", HostTuning),
    ("vm.emulator_thread_policy", AtDefinition),
    ("vm.default_network_model", AtDefinition),
    ("vm.network_multi_queue", AtDefinition),
    ("vm.network_queue_size", AtDefinition),
    ("vm.cpu_overcommit_ratio", Placement),
    ("vm.memory_overcommit_ratio", Placement),
    ("vm.dynamic_resource_allocation", OtherKnob),
    ("vm.gpu_driver_vfio", AtDefinition),
    ("vm.gpu_performance_mode", HostTuning),
    ("vm.max_concurrent_operations", NodeService),
    ("vm.max_queued_operations", NodeService),
    ("vm.vm_start_timeout_seconds", NodeService),
    ("vm.concurrent_io_operations", NodeService),
    ("vm.device_passthrough", Table),
    ("vm.device_passthrough.usb", AtDefinition),
    ("vm.device_passthrough.pci", AtDefinition),
    ("vm.device_passthrough.audio", AtDefinition),
    ("performance", Table),
    ("performance.io_scheduler", HostTuning),
    ("performance.network_tuning", Table),
    ("performance.network_tuning.enabled", HostTuning),
    ("performance.network_tuning.tcp_bbr", HostTuning),
    ("performance.network_tuning.tcp_window_scaling", HostTuning),
    ("network", Table),
    ("network.wireguard_mtu", HostTuning),
    ("network.wireguard_fwmark", NodeService),
    ("network.wireguard_tx_queue_length", HostTuning),
    ("network.wireguard_port", NodeService),
    ("network.formnet_enabled", NodeService),
    ("network.formnet_port", NodeService),
    ("network.public_address", NodeService),
    ("network.allowed_networks", NodeService),
    ("network.bandwidth_limit_mbps", OtherKnob),
    ("network.firewall_enabled", NodeService),
    ("resource_pools", List),
    ("resource_pools.name", Honoured),
    ("resource_pools.description", Remark),
    ("resource_pools.priority", Honoured),
    ("resource_pools.cpus", Placement),
    ("resource_pools.memory_mb", Placement),
    ("resource_pools.disk_gb", Placement),
    ("resource_pools.allow_overcommit", Placement),
    ("resource_pools.allow_overcommit_ratio", Placement),
    ("resource_pools.cpu_pinning_enabled", AtDefinition),
    ("resource_pools.max_instances", Placement),
    ("instance_types", List),
    ("instance_types.name", Honoured),
    ("instance_types.description", Remark),
    ("instance_types.cpu_shares", Honoured),
    ("instance_types.vcpu_range", AtDefinition),
    ("instance_types.memory_range_mb", AtDefinition),
    ("instance_types.disk_range_gb", AtDefinition),
    ("instance_types.default_vcpus", AtDefinition),
    ("instance_types.default_memory_mb", AtDefinition),
    ("instance_types.default_disk_gb", AtDefinition),
    ("instance_types.io_weight", OtherKnob),
    ("instance_types.network_priority", OtherKnob),
    ("instance_types.cpu_pinning_enabled", AtDefinition),
    ("instance_types.memory_dedicated", AtDefinition),
    ("instance_types.numa_aware", AtDefinition),
    ("hardware", Table),
    ("hardware.overcommit_ratio", Placement),
    ("hardware.gpu_enabled", AtDefinition),
    ("hardware.gpu_devices", AtDefinition),
    ("monitoring", Table),
    ("monitoring.prometheus_enabled", Exporter),
    ("monitoring.prometheus_port", Exporter),
    ("monitoring.node_exporter_enabled", NodeService),
    ("monitoring.libvirt_exporter_enabled", NodeService),
    ("monitoring.performance_metrics_collection_interval", Interval),
    ("monitoring.detailed_vm_metrics", Exporter),
    ("monitoring.alerting_enabled", NodeService),
    ("monitoring.alert_thresholds", NodeService),
    ("monitoring.alert_channels", NodeService),
    ("monitoring.log_retention_days", NodeService),
    ("security", Table),
    ("security.secure_boot_required", NodeService),
    ("security.audit_logging", NodeService),
    ("advanced", Table),
    ("advanced.load_balancing", Table),
    ("advanced.load_balancing.enabled", Placement),
    ("advanced.load_balancing.strategy", Placement),
    ("advanced.load_balancing.check_interval_seconds", Placement),
    ("advanced.load_balancing.migration_threshold_cpu_percent", Placement),
    ("advanced.load_balancing.migration_threshold_memory_percent", Placement),
    ("advanced.backup_enabled", NodeService),
    ("advanced.backup_before_update", NodeService),
    ("advanced.backup_schedule", NodeService),
    ("advanced.backup_retention_count", NodeService),
    ("advanced.update_strategy", NodeService),
    ("advanced.maintenance_window", NodeService),
];

/// Reads the guide's file; classes start from `base`.
pub(super) fn read(source: &Source, base: &Class) -> Result<Guide, ConfigError> {
    let document = parse_json(source)?;
    let mut guide = Guide { classes: BTreeMap::new(), pools: BTreeMap::new(), notices: Vec::new() };
    let Value::Table(top) = &document.value else {
        return Err(source.error(
            document.offset,
            format_args!("expected a table, found {}", document.value.kind()),
        ));
    };
    check(source, "", top, &mut guide.notices)?;
    for pool in tables(top, "resource_pools") {
        let name = named(source, pool, "resource_pools", &guide.classes)?;
        let priority = match value(source, pool, "priority") {
            Some(field) => field.one_of(PRIORITIES)?,
            None => Priority::default(),
        };
        guide.classes.insert(ClassName::from(name), Class { priority, ..base.clone() });
        guide.pools.insert(name.to_owned(), priority);
    }
    for instance in tables(top, "instance_types") {
        let name = named(source, instance, "instance_types", &guide.classes)?;
        let mut class = base.clone();
        if let Some(field) = value(source, instance, "cpu_shares") {
            class.cpu_weight = Some(weight_of_shares(field)?);
        }
        guide.classes.insert(ClassName::from(name), class);
    }
    Ok(guide)
}

/// Walks the tables: unknown keys are errors, keys without effect become notices.
fn check(
    source: &Source,
    within: &str,
    entries: &[Entry],
    notices: &mut Vec<Notice>,
) -> Result<(), ConfigError> {
    for entry in entries {
        let full =
            if within.is_empty() { entry.key.clone() } else { format!("{within}.{}", entry.key) };
        let Some((_, fate)) = KEYS.iter().find(|(key, _)| *key == full) else {
            return Err(unknown_key(source, entry, within, &siblings(within)));
        };
        match (fate, &entry.node.value) {
            (Honoured | Remark, _) => {}
            (Table, Value::Table(entries)) => check(source, &full, entries, notices)?,
            (List, Value::Array(nodes)) => {
                for node in nodes {
                    let Value::Table(entries) = &node.value else {
                        return Err(expected(source, node, &full, "a list of tables"));
                    };
                    check(source, &full, entries, notices)?;
                }
            }
            (Table, _) => return Err(expected(source, &entry.node, &full, "a table")),
            (List, _) => return Err(expected(source, &entry.node, &full, "a list of tables")),
            (fate, _) => notices.push(notice(source, entry, full, fate.why())),
        }
    }
    Ok(())
}

fn expected(source: &Source, node: &Node, key: &str, what: &str) -> ConfigError {
    source.error(node.offset, format_args!("`{key}` must be {what}, not {}", node.value.kind()))
}

fn siblings(within: &str) -> Vec<&'static str> {
    let parent = |key: &'static str| key.rsplit_once('.').unwrap_or(("", key));
    KEYS.iter()
        .map(|(key, _)| parent(key))
        .filter(|(table, _)| *table == within)
        .map(|(_, key)| key)
        .collect()
}

fn notice(source: &Source, entry: &Entry, key: String, why: &str) -> Notice {
    let (line, column) = source.line_column(entry.key_offset);
    Notice { file: source.path.clone(), line, column, key, why: why.to_owned() }
}

/// The tables of a top-level list; [`check`] has seen that they are tables.
fn tables<'a>(top: &'a [Entry], key: &str) -> Vec<&'a Node> {
    match top.iter().find(|entry| entry.key == key).map(|entry| &entry.node.value) {
        Some(Value::Array(nodes)) => nodes.iter().collect(),
        _ => Vec::new(),
    }
}

fn value<'a>(source: &'a Source, table: &'a Node, key: &'a str) -> Option<Field<'a>> {
    let Value::Table(entries) = &table.value else { return None };
    let entry = entries.iter().find(|entry| entry.key == key)?;
    Some(Field { source, key, node: &entry.node })
}

/// The name of an instance type or pool, which both become classes and so share one space.
fn named<'a>(
    source: &'a Source,
    table: &'a Node,
    list: &str,
    taken: &BTreeMap<ClassName, Class>,
) -> Result<&'a str, ConfigError> {
    let field = value(source, table, "name").ok_or_else(|| {
        source.error(table.offset, format_args!("missing key `name` in `{list}`"))
    })?;
    let name = field.string()?;
    if taken.contains_key(&ClassName::from(name)) {
        return Err(field.error(format_args!(
            "\"{name}\" is named twice in `resource_pools` and `instance_types`"
        )));
    }
    Ok(name)
}

/// weight = shares × 100 / 1024, systemd's rule, which keeps ratios; at least 1.
fn weight_of_shares(field: Field<'_>) -> Result<Weight, ConfigError> {
    // The least shares that the kernel takes, and the greatest whose weight it takes.
    let shares = field.integer(2..=102_400)? as u64;
    Ok(Weight::clamped((shares * 100 + 512) / 1024))
}
