//! Every trace in `traces/` is a test: its samples must lead to the plans beside it, byte for
//! byte. `cargo xtask bless-traces` accepts a change; the diff is the change of behaviour.

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
