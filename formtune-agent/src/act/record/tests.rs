//! Every history, cut anywhere and with any byte changed.

use super::*;
use crate::vm::CgroupVersion;
use proptest::prelude::*;

const BOOT: &str = "11111111-2222-4333-8444-555555555555";

fn entry(vm: u8, cgroup_id: u64, original: u64, from: u64, to: u64) -> Entry {
    Entry {
        place: Place {
            vm: VmId::from(format!("vm-{vm}")),
            cgroup: format!("/sys/fs/cgroup/cpu/vm-{vm}").into(),
            cgroup_id,
            cgroup_version: CgroupVersion::V1,
        },
        knob: Knob::CpuWeight,
        domain: (vm == 0).then(|| "domain".into()),
        uuid: None,
        original,
        before: vec![from],
        to,
        plan_seq: 1,
    }
}

fn lines(records: &[Record]) -> Vec<String> {
    (0..).zip(records).map(|(n, record)| encode(n, BOOT, record.clone()).unwrap()).collect()
}

/// What happens to three VMs. Somebody else's values are odd, formtune's are even.
#[derive(Clone, Debug)]
enum Step {
    Set { vm: u8, to: u64 },
    Foreign { vm: u8, value: u64 },
    Restore { vm: u8 },
    Restart { vm: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    let vm = 0u8..3;
    prop_oneof![
        4 => (vm.clone(), 5u64..50).prop_map(|(vm, to)| Step::Set { vm, to: to * 2 }),
        1 => (vm.clone(), 5u64..50).prop_map(|(vm, v)| Step::Foreign { vm, value: v * 2 + 1 }),
        1 => vm.clone().prop_map(|vm| Step::Restore { vm }),
        1 => vm.prop_map(|vm| Step::Restart { vm }),
    ]
}

/// A knob of the model: what is there and what may be brought back.
#[derive(Clone, Debug)]
struct Knobs {
    value: u64,
    cgroup_id: u64,
    open: Option<Entry>,
}

/// Plays the steps; returns the records, and the knobs after each of them.
fn history(steps: &[Step]) -> (Vec<Record>, Vec<[Knobs; 3]>) {
    let fresh = |vm: u64| Knobs { value: 1001 + 2 * vm, cgroup_id: 10 + vm, open: None };
    let mut knobs = [fresh(0), fresh(1), fresh(2)];
    let mut records = vec![Record::HEADER];
    let mut after = vec![knobs.clone()];
    for step in steps {
        let (Step::Set { vm, .. }
        | Step::Foreign { vm, .. }
        | Step::Restore { vm }
        | Step::Restart { vm }) = *step;
        let knob = &mut knobs[usize::from(vm)];
        let record = match *step {
            Step::Set { to, .. } => {
                let original = knob.open.as_ref().map_or(knob.value, |entry| entry.original);
                let next = entry(vm, knob.cgroup_id, original, knob.value, to);
                knob.value = to;
                knob.open = Some(next.clone());
                Some(Record::Intent { entry: next })
            }
            Step::Foreign { value, .. } => {
                knob.value = value;
                knob.open.take().map(|entry| Record::closed(&entry, Closed::Yielded))
            }
            Step::Restore { .. } => knob.open.take().map(|entry| {
                knob.value = entry.original;
                Record::closed(&entry, Closed::Restored)
            }),
            Step::Restart { .. } => {
                *knob = Knobs { value: 1001, cgroup_id: knob.cgroup_id + 10, open: None };
                None
            }
        };
        if let Some(record) = record {
            records.push(record);
            after.push(knobs.clone());
        } else if let Some(last) = after.last_mut() {
            *last = knobs.clone();
        }
    }
    (records, after)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 0..24)
}

/// Entries whose cgroup still is the one they were made for.
fn live(replay: &Replay, knobs: &[Knobs; 3]) -> Vec<(usize, Entry)> {
    let of = |entry: &&Entry| {
        let vm: usize = entry.place.vm.0.trim_start_matches("vm-").parse().unwrap();
        (knobs[vm].cgroup_id == entry.place.cgroup_id).then(|| (vm, (*entry).clone()))
    };
    replay.entries.values().filter_map(|entry| of(&entry)).collect()
}

proptest! {
    #[test]
    fn a_whole_journal_gives_back_every_knob_that_is_changed(steps in steps()) {
        let (records, after) = history(&steps);
        let knobs = after.last().unwrap();
        let replay = replay(lines(&records).concat().as_bytes(), BOOT);
        prop_assert_eq!(&replay.damage, &None);
        let live = live(&replay, knobs);
        for (vm, entry) in &live {
            prop_assert_eq!(Some(entry), knobs[*vm].open.as_ref());
        }
        prop_assert_eq!(live.len(), knobs.iter().filter(|knob| knob.open.is_some()).count());
    }

    #[test]
    fn a_cut_journal_is_that_of_an_earlier_moment(steps in steps(), cut: prop::sample::Index) {
        let (records, after) = history(&steps);
        let lines = lines(&records);
        let text = lines.concat();
        let cut = cut.index(text.len() + 1);
        let replay = replay(&text.as_bytes()[..cut], BOOT);
        // A line is there once all of it but its newline is.
        let mut end = 0;
        let whole = lines.iter().take_while(|line| { end += line.len(); end <= cut + 1 }).count();
        prop_assert_eq!(replay.damage.is_some(), whole == 0, "only a file without a header is damaged");
        let knobs = &after[whole.saturating_sub(1)];
        for (vm, entry) in live(&replay, knobs) {
            prop_assert_eq!(Some(&entry), knobs[vm].open.as_ref());
        }
    }

    #[test]
    fn a_changed_byte_is_noticed_and_never_restores_a_wrong_value(
        steps in steps(),
        at: prop::sample::Index,
        flip in 1u8..,
    ) {
        let (records, after) = history(&steps);
        let knobs = after.last().unwrap();
        let mut bytes = lines(&records).concat().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let replay = replay(&bytes, BOOT);
        prop_assert!(replay.damage.is_some());
        for (vm, entry) in live(&replay, knobs) {
            if entry.verdict(knobs[vm].value, true) == Verdict::Restore {
                let original = knobs[vm].open.as_ref().map(|entry| entry.original);
                prop_assert_eq!(Some(entry.original), original);
            }
        }
    }

    #[test]
    fn anything_can_be_read(bytes: Vec<u8>, steps in steps(), at: prop::sample::Index) {
        replay(&bytes, BOOT);
        let mut text = lines(&history(&steps).0).concat().into_bytes();
        let at = at.index(text.len());
        text.splice(at..at, bytes);
        replay(&text, BOOT);
    }
}

#[test]
fn a_missing_line_is_damage() {
    let set = |to| Record::Intent { entry: entry(1, 11, 1024, 1024, to) };
    let mut lines = lines(&[Record::HEADER, set(200), set(300)]);
    lines.remove(1);
    let replay = replay(lines.concat().as_bytes(), BOOT);
    assert_eq!(replay.damage.unwrap(), "line 2 is number 2, not 1");
    assert_eq!(replay.entries.len(), 1);
}

#[test]
fn another_version_is_not_taken_for_ours() {
    let text = lines(&[Record::Header { version: 2 }]).concat();
    assert_eq!(
        replay(text.as_bytes(), BOOT).damage.unwrap(),
        "line 1 begins a journal of version 2"
    );
}

#[test]
fn an_earlier_boot_is_set_apart() {
    let text = lines(&[Record::HEADER, Record::Intent { entry: entry(1, 11, 1024, 1024, 200) }]);
    let replay = replay(text.concat().as_bytes(), "another boot");
    assert_eq!((replay.entries.len(), replay.earlier_boot.len(), replay.damage), (0, 1, None));
}

#[test]
fn a_value_that_the_kernel_made_of_ours_is_ours() {
    let changed = entry(1, 11, 1024, 1024, 200);
    let (vm, knob) = changed.key();
    let observed = Record::Observed { vm, knob, cgroup_id: 11, value: 190 };
    let text = lines(&[Record::HEADER, Record::Intent { entry: changed }, observed]).concat();
    let entry = replay(text.as_bytes(), BOOT).entries.into_values().next().unwrap();
    assert_eq!(entry.verdict(190, false), Verdict::Restore);
    assert_eq!(entry.verdict(1024, false), Verdict::AlreadyOriginal);
    assert_eq!(entry.verdict(200, false), Verdict::Theirs);
    assert_eq!(entry.verdict(200, true), Verdict::Unknown);
}

#[test]
fn the_format_stays_as_it_is() {
    let line = encode(1, BOOT, Record::Intent { entry: entry(0, 11, 1000, 1000, 2048) }).unwrap();
    assert_eq!(
        line,
        concat!(
            "64bb5ce5 {\"n\":1,\"boot\":\"11111111-2222-4333-8444-555555555555\",\"is\":\"intent\",",
            "\"entry\":{\"place\":{\"vm\":\"vm-0\",\"cgroup\":\"/sys/fs/cgroup/cpu/vm-0\",",
            "\"cgroup_id\":11,\"cgroup_version\":1},\"knob\":\"cpu_weight\",\"domain\":\"domain\",",
            "\"original\":1000,\"before\":[1000],\"to\":2048,\"plan_seq\":1}}\n"
        )
    );
}
