use super::document::Source;
use super::*;
use formtune_core::units::{VmId, Weight};

fn source(path: &str, text: &str) -> Source {
    Source { path: path.into(), text: text.to_owned() }
}

fn read(text: &str) -> Result<Config, ConfigError> {
    file::read(&source("formtune.toml", text))
}

fn read_guide(text: &str) -> Result<guide::Guide, ConfigError> {
    guide::read(&source("form-config.json", text), &base_class())
}

const EXAMPLE: &str = include_str!("../../formtune.example.toml");

#[test]
fn the_example_holds_the_defaults() {
    assert_eq!(read(EXAMPLE).unwrap(), Config::default());
    assert_eq!(read("").unwrap(), Config::default());
}

#[test]
fn the_example_names_every_key() {
    let lines: Vec<&str> = EXAMPLE.lines().map(|line| line.trim_start_matches("# ")).collect();
    for key in
        file::ROOT_KEYS.iter().chain(file::CPU_KEYS).chain(classes::KEYS.iter().copied().flatten())
    {
        let named = lines.iter().any(|line| {
            line.starts_with(&format!("{key} ="))
                || line.trim_matches(['[', ']']).split('.').any(|part| part == *key)
        });
        assert!(named, "`{key}` is missing in the example");
    }
}

#[test]
fn what_is_shown_reads_back() {
    let text = r#"
        tick = "500ms"
        listen = "off"
        libvirt = "off"
        cgroups = ["vms/{name}"]
        hdr_log = { file = "/var/log/l.hlog", interval = "1min", max_bytes = 65536, keep = 0 }
        default_class = "batch"
        mode.cpu_weight = "enforce"
        cpu.cooldown = "1500ms"
        [classes.default]
        cpu_weight = 300
        [classes.batch]
        slo = "off"
        priority = "low"
        cpu_weight = "found"
        [classes.web.slo]
        threshold = "1.5ms"
        [[rules]]
        vms = ["web-*"]
        class = "web"
    "#;
    let config = read(text).unwrap();
    assert_eq!(read(&show(&config)).unwrap(), config);
    assert_eq!(read(&show(&Config::default())).unwrap(), Config::default());
}

#[test]
fn a_class_takes_what_it_does_not_say_from_the_default_one() {
    // The order in the file does not matter.
    let config = read(
        "[classes.web]\npriority = \"high\"\nslo.quantile = 0.9\n\
         [classes.default]\nfloor_ratio = 0.5\nslo.threshold = \"5ms\"\n",
    )
    .unwrap();
    let web = &config.policy.classes[&ClassName::from("web")];
    assert_eq!(web.priority, Priority::High);
    assert_eq!(web.floor_ratio, 0.5);
    let slo = web.slo.as_ref().unwrap();
    assert_eq!((slo.quantile, slo.threshold), (0.9, Nanos::from_millis(5)));
}

#[test]
fn the_first_rule_that_matches_gives_the_class() {
    let config = read(
        "[classes.a]\n[classes.b]\n\
         [[rules]]\nvms = [\"web-?\", \"db\"]\nclass = \"a\"\n\
         [[rules]]\nvms = [\"web-*\"]\nclass = \"b\"\n",
    )
    .unwrap();
    for (vm, class) in [("web-1", "a"), ("db", "a"), ("web-10", "b"), ("db-1", "default")] {
        assert_eq!(config.classes_of.class_of(&VmId::from(vm)).0, class, "{vm}");
    }
}

#[test]
fn a_long_tick_stretches_the_default_window() {
    let config = read("tick = \"3s\"").unwrap();
    let slo = config.policy.classes[&config.policy.default_class].slo.clone().unwrap();
    assert_eq!(slo.window, Nanos::from_secs(3));
}

#[test]
fn the_guide_gives_classes_that_keep_their_ratios() {
    let guide = read_guide(
        r#"{"instance_types": [
              {"name": "web-server", "cpu_shares": 1024, "io_weight": 500},
              {"name": "database", "cpu_shares": 2048},
              {"name": "compute", "cpu_shares": 4096}],
            "resource_pools": [
              {"name": "compute-optimized", "priority": "high", "description": "fast"},
              {"name": "balanced", "priority": "normal"}]}"#,
    )
    .unwrap();
    let weight = |name| guide.classes[&ClassName::from(name)].cpu_weight;
    assert_eq!(weight("web-server"), Weight::new(100));
    assert_eq!(weight("database"), Weight::new(200));
    assert_eq!(weight("compute"), Weight::new(400));
    assert_eq!(weight("balanced"), None);
    let pool = &guide.classes[&ClassName::from("compute-optimized")];
    assert_eq!(pool.priority, Priority::High);
}

#[test]
fn the_least_shares_of_the_guide_are_the_least_weight() {
    for (shares, weight) in [(2, 1), (10, 1), (11, 1), (16, 2), (102_400, 10_000)] {
        let text = format!(r#"{{"instance_types": [{{"name": "a", "cpu_shares": {shares}}}]}}"#);
        let guide = read_guide(&text).unwrap();
        let found = guide.classes[&ClassName::from("a")].cpu_weight;
        assert_eq!(found, Weight::new(weight), "{shares} shares");
    }
}

#[test]
fn a_class_of_the_guide_can_be_refined() {
    let dir = tempfile::tempdir().unwrap();
    let json = r#"{"instance_types": [{"name": "database", "cpu_shares": 2048}],
                   "resource_pools": [{"name": "gold", "priority": "high"}]}"#;
    std::fs::write(dir.path().join("form-config.json"), json).unwrap();
    let toml = "guide = \"form-config.json\"\n[classes.database]\npool = \"gold\"\n";
    std::fs::write(dir.path().join("formtune.toml"), toml).unwrap();
    let config = load(Some(&dir.path().join("formtune.toml"))).unwrap();
    let database = &config.policy.classes[&ClassName::from("database")];
    assert_eq!((database.cpu_weight, database.priority), (Weight::new(200), Priority::High));
}

/// Every JSON example of the guide, put together.
const GUIDE: &str = r#"{
  "vm": {
    "cpu_pinning_enabled": true, "cpu_dedicated_set": "2-5", "numa_aware": true,
    "use_hugepages": true, "hugepages_size_mb": 2, "hugepages_percentage": 80,
    "default_memory_ballooning": true, "memory_ballooning_statistics_period": 10,
    "default_disk_format": "qcow2", "disk_cache_mode": "writeback", "disk_io_mode": "native",
    "vm_image_cache_size_gb": 50, "default_cpu_model": "host",
    "enable_nested_virtualization": false, "emulator_thread_policy": "isolate",
    "default_network_model": "virtio", "network_multi_queue": true, "network_queue_size": 1024,
    "cpu_overcommit_ratio": 2.0, "memory_overcommit_ratio": 1.2,
    "dynamic_resource_allocation": true, "gpu_driver_vfio": true,
    "gpu_performance_mode": "max_performance", "max_concurrent_operations": 10,
    "max_queued_operations": 50, "vm_start_timeout_seconds": 300, "concurrent_io_operations": 32
  },
  "performance": {
    "io_scheduler": "mq-deadline",
    "network_tuning": {"enabled": true, "tcp_bbr": true, "tcp_window_scaling": true}
  },
  "network": {"wireguard_mtu": 1420, "wireguard_fwmark": 51820, "wireguard_tx_queue_length": 2000},
  "resource_pools": [
    {"name": "compute-optimized", "description": "High CPU performance pool", "cpus": 16,
     "memory_mb": 32768, "disk_gb": 500, "priority": "high", "allow_overcommit": false,
     "cpu_pinning_enabled": true},
    {"name": "balanced", "description": "Balanced resource pool", "cpus": 16,
     "memory_mb": 65536, "disk_gb": 1000, "priority": "normal", "allow_overcommit": true,
     "allow_overcommit_ratio": 1.5}
  ],
  "hardware": {"overcommit_ratio": 1.5, "gpu_enabled": true, "gpu_devices": [
    {"id": "GPU-1234567890abcdef", "name": "NVIDIA GeForce RTX 3080", "pass_through_mode": "vfio"}]},
  "monitoring": {
    "prometheus_enabled": true, "prometheus_port": 9100, "node_exporter_enabled": true,
    "libvirt_exporter_enabled": true, "performance_metrics_collection_interval": 15,
    "detailed_vm_metrics": true
  },
  "instance_types": [
    {"name": "web-server", "vcpu_range": [2, 8], "memory_range_mb": [2048, 8192],
     "disk_range_gb": [10, 100], "default_vcpus": 2, "default_memory_mb": 4096,
     "default_disk_gb": 20, "cpu_shares": 1024, "io_weight": 500, "network_priority": "high"},
    {"name": "database", "cpu_shares": 2048, "io_weight": 800, "cpu_pinning_enabled": true,
     "memory_dedicated": true},
    {"name": "compute", "cpu_shares": 4096, "io_weight": 400, "numa_aware": true}
  ],
  "advanced": {"load_balancing": {
    "enabled": true, "strategy": "least_loaded", "check_interval_seconds": 60,
    "migration_threshold_cpu_percent": 80, "migration_threshold_memory_percent": 85}}
}"#;

#[test]
fn every_key_of_the_guide_is_honoured_or_reported() {
    let guide = read_guide(GUIDE).unwrap();
    let notices: Vec<String> = guide.notices.iter().map(Notice::to_string).collect();
    insta::assert_snapshot!(notices.join("\n"));
}

/// A mistake and the one line it gives.
#[test]
fn every_mistake_is_one_line_that_says_where_and_what() {
    let mut lines = Vec::new();
    for text in [
        "tick = ",
        "tick = \"250ms\"\ntick = \"1s\"",
        "[cpu\n",
        "tik = \"250ms\"",
        "wibble = 1",
        "hdr_log = { interval = \"10s\" }",
        "hdr_log = { file = \"l.hlog\" }",
        "hdr_log = { file = \"/l.hlog\", every = \"10s\" }",
        "hdr_log = { file = \"/l.hlog\", interval = \"1ms\" }",
        "hdr_log = { file = \"/l.hlog\", max_bytes = 1 }",
        "tick = 250",
        "tick = \"fast\"",
        "tick = \"50ms\"",
        "tick = true",
        "max_vms = 0",
        "max_vms = 99999999999999999999",
        "state_dir = \"var\"",
        "socket = \"\"",
        "listen = \"localhost\"",
        "listen = \"0.0.0.0:19752\"",
        "libvirt = \"yes\"",
        "cgroups = [\"vms/*\"]",
        "cgroups = \"vms/{name}\"",
        "cgroups = [\"../{name}\"]",
        "[mode]\ncpu_wieght = \"enforce\"",
        "mode.cpu_weight = \"enforced\"",
        "[cpu]\ncool_down = \"3s\"",
        "cpu.confirm = 33",
        "cpu.confirm = 6",
        "cpu.confirm_of = 2",
        "cpu.slack_act = 0.4",
        "cpu.slack_relax = 2",
        "cpu.lower_factor = 1.0",
        "[classes.web]\ncpu_weigth = 200",
        "[classes.web]\ncpu_weight = 0",
        "[classes.web]\ncpu_weight = 10001",
        "[classes.web]\ncpu_weight = \"lots\"",
        "[classes.web]\nfloor_ratio = 0",
        "[classes.web]\nceiling_ratio = 0.5",
        "[classes.web]\npriority = \"urgent\"",
        "[classes.web]\npool = \"gold\"",
        "[classes.web]\nslo = \"none\"",
        "[classes.web]\nslo = 5",
        "[classes.web.slo]\nthreshold = 2",
        "[classes.web.slo]\nthreshold = \"1h\"",
        "[classes.web.slo]\nquantile = 99",
        "[classes.web.slo]\nquantile = nan",
        "[classes.web.slo]\nwindow = \"100ms\"",
        "[classes.web.slo]\nwindow = \"1.1s\"",
        "[classes.web.slo]\nindicator = \"runqlatency\"",
        "[classes.web.slo]\nmin_samples = -1",
        "[classes.web.slo]\nshare = 0",
        "classes = 3",
        "classes.web = 3",
        "[[rules]]\nvms = [\"a\"]",
        "[[rules]]\nvms = []\nclass = \"default\"",
        "[[rules]]\nvms = [1]\nclass = \"default\"",
        "[[rules]]\nvms = [\"a\"]\nclass = \"defualt\"",
        "[[rules]]\nvms = [\"a\"]\nclass = \"zz\"",
        "[[rules]]\nvm = [\"a\"]\nclass = \"default\"",
        "default_class = \"web\"",
        "# ✓ columns count characters\n'tïck' = 1",
    ] {
        let error = read(text).expect_err(text);
        lines.push(format!("{text:?}\n    {error}"));
    }
    for text in [
        "",
        "{\"vm\": {\"numa_aware\": true}",
        "{\n  \"vm\": {\"numa_aware\": tru}\n}",
        "[]",
        "{\n  \"vm\": {\"numa_awere\": true}\n}",
        "{\"virtual_machines\": {}}",
        "{\"vm\": 1}",
        "{\"vm\": {}, \"vm\": {}}",
        "{\"resource_pools\": {}}",
        "{\"resource_pools\": [1]}",
        "{\"resource_pools\": [{\"priority\": \"high\"}]}",
        "{\"resource_pools\": [{\"name\": \"a\", \"priority\": \"top\"}]}",
        "{\"instance_types\": [{\"name\": \"a\", \"cpu_share\": 1}]}",
        "{\"instance_types\": [{\"name\": \"a\", \"cpu_shares\": 1}]}",
        "{\"instance_types\": [\n  {\"name\": \"a\", \"cpu_shares\": 262144}]}",
        "{\"instance_types\": [{\"name\": \"a\", \"cpu_shares\": \"1024\"}]}",
        "{\"instance_types\": [{\"name\": \"a\"}, {\"name\": \"a\"}]}",
    ] {
        let error = read_guide(text).expect_err(text);
        lines.push(format!("{text:?}\n    {error}"));
    }
    for line in &lines {
        assert_eq!(line.matches('\n').count(), 1, "more than one line: {line}");
    }
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn a_named_file_must_exist() {
    let error = load(Some(Path::new("/nonexistent/formtune.toml"))).unwrap_err();
    assert!(
        error.to_string().starts_with("failed to read /nonexistent/formtune.toml ("),
        "{error}"
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("formtune.toml");
    std::fs::write(&file, "\nguide = \"none.json\"").unwrap();
    let error = load(Some(&file)).unwrap_err().to_string();
    assert!(error.contains("formtune.toml:2:9: failed to read the guide's "), "{error}");
    assert!(error.contains("none.json: No such file"), "{error}");
}
