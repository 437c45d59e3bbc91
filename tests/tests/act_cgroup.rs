//! Writing, yielding and restoring on real cgroups. Needs root.

use formtune_agent::act::{Act, ActError, RestoreResult, restore};
use formtune_core::plan::{OutcomeResult, Setpoint};
use formtune_core::policy::Mode;
use formtune_core::units::Weight;
use formtune_tests::knob::{KnobCgroup, setpoint};
use formtune_tests::payload::shown;
use std::fs;
use std::path::Path;

fn knob(name: &str) -> KnobCgroup {
    KnobCgroup::make(&format!("ft-act-{name}-{}", std::process::id())).unwrap()
}

fn open(state: &Path) -> Act {
    Act::open(state, None).unwrap().0
}

fn applied(value: u32) -> OutcomeResult {
    OutcomeResult::Applied { value: Weight::new(value).unwrap() }
}

/// One setpoint based on what is there.
fn set(act: &mut Act, knob: &KnobCgroup, to: u32, plan_seq: u64) -> OutcomeResult {
    let vm = knob.vm();
    act.execute(&vm, &setpoint(&vm, knob.weight(), to), plan_seq).result
}

#[test]
fn applies_and_restores_the_raw_original() {
    let state = tempfile::tempdir().unwrap();
    let knob = knob("raw");
    // On v1 no weight converts to 1000 shares: only the raw value can bring it back.
    knob.set_raw(1000);
    let original = knob.weight();
    let mut act = open(state.path());
    assert_eq!(set(&mut act, &knob, 200, 1), applied(200));
    assert_eq!(knob.weight().get(), 200);
    assert_eq!(act.original(&knob.vm().id), Some(original));
    assert_eq!(set(&mut act, &knob, 200, 2), OutcomeResult::Unchanged);
    // Back to the original weight means back to the raw original.
    assert_eq!(set(&mut act, &knob, original.get(), 3), applied(original.get()));
    assert_eq!(knob.raw(), 1000);
    assert_eq!(set(&mut act, &knob, 50, 4), applied(50));

    let report = act.restore_all();
    assert!(report.is_complete() && report.journal.is_none());
    assert_eq!(report.knobs.len(), 1);
    assert!(matches!(report.knobs[0].result, RestoreResult::Restored { .. }), "{report:?}");
    assert_eq!(knob.raw(), 1000);
    assert_eq!(act.original(&knob.vm().id), None);
    assert_eq!(act.restore_all().knobs, []);
    shown("acts", None);
}

#[test]
fn a_dead_agents_changes_come_back_at_the_next_start_and_by_restore() {
    let state = tempfile::tempdir().unwrap();
    let knob = knob("dead");
    knob.set_raw(1000);
    for by_hand in [false, true] {
        let mut act = open(state.path());
        assert_eq!(set(&mut act, &knob, 300, 1), applied(300));
        // Dropping it writes nothing: what a SIGKILL leaves.
        drop(act);
        assert_eq!(knob.weight().get(), 300);
        let report = if by_hand {
            restore(state.path(), || panic!("no vm of libvirt's in the journal")).unwrap()
        } else {
            Act::open(state.path(), None).unwrap().1
        };
        assert!(report.restored.is_complete());
        assert_eq!(report.restored.knobs.len(), 1);
        assert_eq!(knob.raw(), 1000);
        assert_eq!(restore(state.path(), || None).unwrap().restored.knobs, []);
    }
}

#[test]
fn a_foreign_value_is_left_alone_for_good() {
    let state = tempfile::tempdir().unwrap();
    let knob = knob("foreign");
    let original = knob.weight();
    let mut act = open(state.path());
    assert_eq!(set(&mut act, &knob, 200, 1), applied(200));
    knob.set_raw(777);
    let found = knob.weight();
    let yielded = OutcomeResult::Yielded { found };
    assert_eq!(set(&mut act, &knob, 300, 2), yielded);
    // Also with a decision that knows of the value, and also if it looks like ours again.
    assert_eq!(set(&mut act, &knob, 300, 3), yielded);
    let vm = knob.vm();
    assert_eq!(act.execute(&vm, &setpoint(&vm, original, 300), 4).result, yielded);
    assert_eq!(act.restore_all().knobs, []);
    assert_eq!(knob.raw(), 777);

    // A VM that came back under the same name is a new one.
    act.forget(&knob.vm().id);
    assert_eq!(set(&mut act, &knob, 300, 5), applied(300));

    // One that is only out of sight gets its original back.
    act.forget(&knob.vm().id);
    assert_eq!(knob.raw(), 777);
}

#[test]
fn a_foreign_value_before_the_first_write_or_after_the_last_is_theirs() {
    let state = tempfile::tempdir().unwrap();
    let knob = knob("early");
    let decided_on = knob.weight();
    knob.set_raw(777);
    let mut act = open(state.path());
    let vm = knob.vm();
    let outcome = act.execute(&vm, &setpoint(&vm, decided_on, 300), 1);
    assert_eq!(outcome.result, OutcomeResult::Yielded { found: knob.weight() });
    assert_eq!(knob.raw(), 777);

    act.forget(&vm.id);
    assert_eq!(set(&mut act, &knob, 300, 2), applied(300));
    knob.set_raw(555);
    let report = act.restore_all();
    assert_eq!(report.knobs[0].result, RestoreResult::Theirs { found: 555 });
    assert_eq!(knob.raw(), 555);
}

#[test]
fn a_cgroup_that_is_gone_or_remade_is_refused_and_forgotten() {
    let state = tempfile::tempdir().unwrap();
    let knob = knob("gone");
    let (vm, from) = (knob.vm(), knob.weight());
    let mut act = open(state.path());
    assert_eq!(set(&mut act, &knob, 200, 1), applied(200));
    knob.remake();
    let (fresh, refused) = (knob.raw(), act.execute(&vm, &setpoint(&vm, from, 300), 2).result);
    let why = format!("cgroup {} of vm {} is gone", knob.path().display(), vm.id);
    assert_eq!(refused, OutcomeResult::Refused { why });
    assert_eq!(act.original(&vm.id), None);
    assert_eq!(knob.raw(), fresh);
    // The new one can be changed, and the old one's entry does not come back.
    assert_eq!(set(&mut act, &knob, 400, 3), applied(400));
    drop(act);
    knob.remake();
    let report = Act::open(state.path(), None).unwrap().1;
    assert_eq!(report.restored.knobs[0].result, RestoreResult::Gone);
    assert_eq!(knob.raw(), fresh);
    fs::remove_dir(knob.path()).unwrap();
    assert_eq!(restore(state.path(), || None).unwrap().restored.knobs, []);
}

#[test]
fn refuses_old_plans_other_modes_and_decisions_out_of_date() {
    let state = tempfile::tempdir().unwrap();
    let knob = knob("refuse");
    let (vm, original) = (knob.vm(), knob.weight());
    let mut act = open(state.path());
    let why = |outcome: OutcomeResult| match outcome {
        OutcomeResult::Refused { why } => why,
        other => panic!("not refused: {other:?}"),
    };
    let shadow = Setpoint { mode: Mode::Shadow, ..setpoint(&vm, original, 200) };
    assert!(why(act.execute(&vm, &shadow, 1).result).contains("mode is not enforce"));
    assert_eq!(set(&mut act, &knob, 200, 7), applied(200));
    let old = act.execute(&vm, &setpoint(&vm, knob.weight(), 300), 6).result;
    assert_eq!(why(old), "plan 6 is older than plan 7, which was carried out");
    let late = act.execute(&vm, &setpoint(&vm, original, 300), 8).result;
    assert!(why(late).ends_with("the decision is out of date"));
    assert_eq!(knob.weight().get(), 200);
    act.restore_all();
}

#[test]
fn one_agent_per_state_folder() {
    let state = tempfile::tempdir().unwrap();
    let act = open(state.path());
    let error = Act::open(state.path(), None).unwrap_err();
    assert!(
        matches!(&error, ActError::Locked { pid: Some(pid), .. } if *pid == std::process::id())
    );
    assert!(matches!(restore(state.path(), || None), Err(ActError::Locked { .. })));
    drop(act);
    open(state.path());
}

#[test]
fn a_damaged_journal_is_kept_and_bars_enforcement_until_it_is_removed() {
    let state = tempfile::tempdir().unwrap();
    let (first, second) = (knob("damage1"), knob("damage2"));
    let original = first.raw();
    let mut act = open(state.path());
    assert_eq!(set(&mut act, &first, 200, 1), applied(200));
    assert_eq!(set(&mut act, &second, 300, 1), applied(300));
    assert_eq!(set(&mut act, &second, 400, 2), applied(400));
    drop(act);
    // The last change of the second knob cannot be read any more.
    let file = state.path().join("journal");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 20;
    bytes[last] ^= 1;
    fs::write(&file, &bytes).unwrap();

    let (mut act, report) = Act::open(state.path(), None).unwrap();
    assert!(!act.enforce_allowed());
    assert!(report.damaged.unwrap().contains("journal.damaged-1"));
    assert!(!report.restored.is_complete());
    assert_eq!(first.raw(), original, "what can be read is restored");
    assert_eq!(second.weight().get(), 400, "what may be anybody's is left, and named");
    assert_eq!(fs::read(state.path().join("journal.damaged-1")).unwrap(), bytes);
    assert!(matches!(set(&mut act, &first, 200, 9), OutcomeResult::Refused { .. }));
    drop(act);

    let (act, _) = Act::open(state.path(), None).unwrap();
    assert!(!act.enforce_allowed(), "a restart does not make it good");
    drop(act);
    fs::remove_file(state.path().join("journal.damaged-1")).unwrap();
    let mut act = open(state.path());
    assert!(act.enforce_allowed());
    assert_eq!(set(&mut act, &first, 200, 1), applied(200));
    act.restore_all();
}

#[test]
fn changes_of_an_earlier_boot_are_dropped_without_writing() {
    let state = tempfile::tempdir().unwrap();
    let knob = knob("boot");
    let mut act = open(state.path());
    assert_eq!(set(&mut act, &knob, 200, 1), applied(200));
    drop(act);
    let file = state.path().join("journal");
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let other = "00000000-0000-4000-8000-000000000000";
    let text = fs::read_to_string(&file).unwrap();
    let lines = text.lines().map(|line| {
        let json = line[9..].replace(boot.trim(), other);
        format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()))
    });
    fs::write(&file, lines.collect::<String>()).unwrap();
    let report = Act::open(state.path(), None).unwrap().1;
    assert_eq!((report.earlier_boot, report.restored.knobs, report.damaged), (1, vec![], None));
    assert_eq!(knob.weight().get(), 200);
}

#[test]
fn a_state_folder_that_cannot_be_used_is_one_clear_line() {
    let error = Act::open(Path::new("/proc/formtune"), None).unwrap_err().to_string();
    assert!(error.starts_with("failed to use state folder /proc/formtune: "), "{error}");
    assert_eq!(error.lines().count(), 1);
    // `restore` has nothing to do there, and makes nothing.
    assert_eq!(restore(Path::new("/proc/formtune"), || None).unwrap().restored.knobs, []);
}
