//! Every trace in `traces/` is a test: its samples must lead to the plans beside it, byte for
//! byte. `cargo xtask bless-traces` accepts a change; the diff is the change of behaviour.

use formtune_core::plan::Reason;
use formtune_core::sample::HeldInterval;
use formtune_core::trace::{Header, VERSION};
use formtune_core::{Sample, replay};
use std::fs;
use std::path::{Path, PathBuf};

fn traces() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("traces");
    let mut found: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "jsonl"))
        .filter(|path| !path.to_string_lossy().ends_with(".plans.jsonl"))
        .collect();
    found.sort();
    found
}

fn plans(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let mut lines = text.lines();
    let header: Header = serde_json::from_str(lines.next().expect("a header")).unwrap();
    assert_eq!(header.version, VERSION, "{}", path.display());
    let samples = lines.enumerate().map(|(n, line)| {
        serde_json::from_str::<Sample>(line)
            .unwrap_or_else(|error| panic!("{}:{}: {error}", path.display(), n + 2))
    });
    replay(&header, samples).map(|plan| serde_json::to_string(&plan).unwrap() + "\n").collect()
}

/// A VM that waits for a CPU that is idle waits for no neighbour, however much they use.
#[test]
fn nobody_is_lowered_for_a_cpu_that_was_idle() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("traces/contention.jsonl");
    let text = fs::read_to_string(path).unwrap();
    let mut lines = text.lines();
    let header: Header = serde_json::from_str(lines.next().unwrap()).unwrap();
    let samples: Vec<Sample> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
    let changes = |samples: &[Sample]| {
        replay(&header, samples).map(|plan| plan.setpoints.len()).sum::<usize>()
    };
    assert!(changes(&samples) > 0, "in the trace itself somebody is to blame");
    let mut idle = samples;
    for vm in idle.iter_mut().flat_map(|sample| sample.vms.values_mut()) {
        vm.held = vm
            .held
            .as_ref()
            .map(|held| HeldInterval { idle_ns: held.total_ns(), ..HeldInterval::default() });
    }
    assert_eq!(changes(&idle), 0);
    let said = replay(&header, &idle)
        .flat_map(|plan| plan.decisions)
        .any(|decision| matches!(decision.reason, Reason::IdleCpu { share } if share == 1.0));
    assert!(said, "no decision says why");
}

#[test]
fn traces_lead_to_their_plans() {
    let traces = traces();
    assert!(!traces.is_empty());
    for path in traces {
        let found = plans(&path);
        let expected = path.with_extension("plans.jsonl");
        let expected = fs::read_to_string(&expected)
            .unwrap_or_else(|error| panic!("{}: {error}", expected.display()));
        for (n, (found, expected)) in found.lines().zip(expected.lines()).enumerate() {
            let name = path.display();
            assert_eq!(found, expected, "{name}: plan {}; cargo xtask bless-traces", n + 1);
        }
        assert_eq!(found.len(), expected.len(), "{}: number of plans", path.display());
        assert_eq!(found, plans(&path), "{}: not the same twice", path.display());
    }
}
