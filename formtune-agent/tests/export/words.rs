//! What people read: `status` and `explain`, as printed on 80 columns.

use crate::fixture;
use formtune_agent::cli::style::Style;
use formtune_agent::cli::{doctor, explain, status};
use formtune_agent::doctor::{Check, Verdict};
use formtune_agent::export::Snapshot;
use formtune_agent::export::culprits::{Blamed, Held, Holder};
use formtune_agent::export::routes::{NodeAnswer, VmAnswer, VmsAnswer};
use formtune_agent::export::snapshot::{LibvirtState, VmState};
use formtune_core::plan::{Action, Decision, Evidence, Reason};
use formtune_core::policy::Mode;
use formtune_core::units::{Nanos, VmId};

const PLAIN: Style = Style { colour: false, unicode: true, width: 80 };

fn node(snapshot: &Snapshot, not_ready: &[&str]) -> NodeAnswer {
    NodeAnswer {
        at: snapshot.at,
        node: snapshot.node.clone(),
        not_ready: not_ready.iter().map(|&why| why.to_owned()).collect(),
        vms: snapshot.vms.len(),
    }
}

fn vms(snapshot: &Snapshot) -> VmsAnswer {
    VmsAnswer { at: snapshot.at, vms: snapshot.vms.values().cloned().collect() }
}

fn explained(snapshot: &Snapshot, vm: &str) -> String {
    let state: VmState = snapshot.vms[&VmId::from(vm)].clone();
    let concerns: Vec<_> = snapshot
        .decisions
        .iter()
        .filter(|record| {
            record.vm.as_str() == vm || record.victim.as_ref().is_some_and(|v| v.as_str() == vm)
        })
        .cloned()
        .collect();
    explain::render(
        &VmAnswer { at: snapshot.at, vm: state },
        &node(snapshot, &[]),
        &concerns,
        PLAIN,
    )
}

fn assert_fits(text: &str, width: usize) {
    for line in text.lines() {
        assert!(line.chars().count() <= width, "{} columns: {line}", line.chars().count());
        assert_eq!(line, line.trim_end());
    }
}

#[test]
fn status_in_eighty_columns() {
    let snapshot = fixture::snapshot();
    let text = status::render(&node(&snapshot, &[]), &vms(&snapshot), PLAIN);
    assert_fits(&text, 80);
    insta::assert_snapshot!(text);
}

#[test]
fn status_when_something_is_wrong() {
    let mut snapshot = fixture::snapshot();
    snapshot.node.modes.cpu_weight = Mode::Shadow;
    snapshot.node.probe.blind = Some("program sched_switch is not loaded: not permitted".into());
    snapshot.node.libvirt = LibvirtState::Unreachable {
        uri: "qemu:///system".into(),
        why: "failed to connect socket to '/var/run/libvirt/libvirt-sock'".into(),
    };
    let hog = snapshot.vms.get_mut(&VmId::from("hog-1")).unwrap();
    hog.decided(&Decision {
        vm: VmId::from("hog-1"),
        evidence: Evidence::default(),
        action: Action::Hold,
        reason: Reason::Frozen { reversals: 3, left: Nanos::from_secs(480) },
    });
    let why = ["blind: program sched_switch is not loaded: not permitted"];
    let text = status::render(&node(&snapshot, &why), &vms(&snapshot), PLAIN);
    assert_fits(&text, 80);
    insta::assert_snapshot!(text);
}

#[test]
fn status_without_any_vm() {
    let mut snapshot = fixture::snapshot();
    snapshot.vms.clear();
    let text = status::render(&node(&snapshot, &[]), &vms(&snapshot), PLAIN);
    assert_fits(&text, 80);
    insta::assert_snapshot!(text);
}

#[test]
fn narrow_terminals_lose_columns_not_sense() {
    let snapshot = fixture::snapshot();
    let narrow = Style { width: 55, ..PLAIN };
    let text = status::render(&node(&snapshot, &[]), &vms(&snapshot), narrow);
    assert_fits(&text, 55);
    for word in ["web-1", "missed", "4.2 ms", "150/100", "raise 5s"] {
        assert!(text.contains(word), "{word} in\n{text}");
    }
}

#[test]
fn colour_only_adds_to_words() {
    let snapshot = fixture::snapshot();
    let plain = status::render(&node(&snapshot, &[]), &vms(&snapshot), PLAIN);
    let coloured = Style { colour: true, ..PLAIN };
    let coloured = status::render(&node(&snapshot, &[]), &vms(&snapshot), coloured);
    assert_ne!(plain, coloured);
    let mut stripped = String::new();
    let mut rest = coloured.as_str();
    while let Some((before, after)) = rest.split_once("\x1b[") {
        stripped.push_str(before);
        rest = after.split_once('m').unwrap().1;
    }
    stripped.push_str(rest);
    assert_eq!(plain, stripped);
}

#[test]
fn explain_a_victim() {
    let text = explained(&fixture::snapshot(), "web-1");
    assert_fits(&text, 80);
    insta::assert_snapshot!(text);
}

#[test]
fn explain_a_neighbour() {
    let text = explained(&fixture::snapshot(), "hog-1");
    assert_fits(&text, 80);
    insta::assert_snapshot!(text);
}

/// Its quota comes first, then that nobody had the CPU.
#[test]
fn explain_one_that_its_quota_stops() {
    let mut snapshot = fixture::snapshot();
    let vm = snapshot.vms.get_mut(&VmId::from("hog-1")).unwrap();
    let held = |holder, ms| Held { holder, time: Nanos::from_millis(ms) };
    let top = vec![
        held(Holder::Idle, 3_600),
        held(Holder::Host, 300),
        held(Holder::Vm("web-1".into()), 100),
    ];
    vm.held_by = Some(Blamed { total: Nanos::from_secs(4), top });
    vm.throttled_lately = Some(Nanos::from_millis(3_900));
    let text = explained(&snapshot, "hog-1");
    assert_fits(&text, 80);
    insta::assert_snapshot!(text);
}

#[test]
fn explain_an_idle_vm_in_shadow() {
    let mut snapshot = fixture::snapshot();
    snapshot.node.modes.cpu_weight = Mode::Shadow;
    let text = explained(&snapshot, "idle-with-a-rather-long-name-0001");
    assert_fits(&text, 80);
    insta::assert_snapshot!(text);
}

#[test]
fn explain_one_that_is_not_measured_yet() {
    let text = explained(&fixture::snapshot(), "a\"b\\c/d é");
    assert_fits(&text, 80);
    insta::assert_snapshot!(text);
}

#[test]
fn doctor_names_a_remedy_for_each_finding() {
    let check = |name, verdict, found: &str, remedy: Option<&str>| Check {
        name,
        verdict,
        found: found.into(),
        remedy: remedy.map(Into::into),
    };
    let checks = [
        check("kernel", Verdict::Ok, "Linux 6.12.48-amd64 on x86_64", None),
        check(
            "libvirt",
            Verdict::Finding,
            "failed to connect to libvirt at qemu:///system: no such file or directory",
            Some("start it, or set `libvirt = \"off\"`"),
        ),
        check("rival", Verdict::Note, "TuneD runs (pid 7)", Some("keep it")),
    ];
    let text = doctor::render(&checks, PLAIN);
    assert_fits(&text, 80);
    insta::assert_snapshot!(text);
}
