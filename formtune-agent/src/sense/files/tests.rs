use super::*;
use crate::vm::CgroupVersion;
use std::fs;

const PRESSURE: &str = "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n";

/// Hierarchies in a folder, with a VM `machine/a` in each that is named.
struct Fake {
    folder: tempfile::TempDir,
    hierarchies: Hierarchies,
}

impl Fake {
    fn new(version: CgroupVersion) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = |name: &str| folder.path().join(name);
        let hierarchies = match version {
            CgroupVersion::V2 => Hierarchies {
                cpu: root("unified"),
                version,
                cpuacct: None,
                unified: Some(root("unified")),
                memory: None,
                block: None,
            },
            CgroupVersion::V1 => Hierarchies {
                cpu: root("cpu"),
                version,
                cpuacct: None,
                unified: Some(root("unified")),
                memory: Some(root("memory")),
                block: None,
            },
        };
        Self { folder, hierarchies }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn cgroup(&self) -> PathBuf {
        self.hierarchies.cpu.join("machine/a")
    }

    fn read(&self, reader: &mut VmReader, now: Nanos) -> VmFiles {
        reader.read(&self.hierarchies, &self.cgroup(), now);
        *reader.values()
    }
}

#[test]
fn v2_reads_its_own_group() {
    let fake = Fake::new(CgroupVersion::V2);
    fake.write("unified/machine/a/cpu.pressure", PRESSURE);
    fake.write("unified/machine/a/memory.events", "low 0\nhigh 7\nmax 0\noom 0\noom_kill 0\n");
    let values = fake.read(&mut VmReader::default(), Nanos(1));
    assert_eq!(values.pressure.cpu.unwrap().some.unwrap().total_us, 5);
    assert_eq!((values.pressure.io, values.pressure.memory), (None, None), "absent, not zero");
    assert_eq!((values.memory_events.low, values.memory_events.high), (Some(0), Some(7)));
}

#[test]
fn a_hybrid_host_has_pressure_in_one_hierarchy_and_memory_in_another() {
    let fake = Fake::new(CgroupVersion::V1);
    fake.write("cpu/machine/a/cpu.pressure", "some avg10=0.00 total=99\n");
    fake.write("unified/machine/a/memory.pressure", PRESSURE);
    fake.write("memory/machine/a/memory.failcnt", "3\n");
    fake.write("memory/machine/a/memory.oom_control", "oom_kill_disable 0\noom_kill 1\n");
    let values = fake.read(&mut VmReader::default(), Nanos(1));
    assert_eq!(values.pressure.cpu, None, "that of v1 is none");
    assert!(values.pressure.memory.is_some());
    assert_eq!((values.memory_events.max, values.memory_events.oom_kill), (Some(3), Some(1)));
    assert_eq!(values.memory_events.high, None);
}

#[test]
fn without_a_group_there_the_root_does_not_stand_in() {
    let fake = Fake::new(CgroupVersion::V1);
    for file in ["unified/cpu.pressure", "unified/machine/cpu.pressure"] {
        fake.write(file, PRESSURE);
    }
    fake.write("memory/memory.failcnt", "3\n");
    assert_eq!(fake.read(&mut VmReader::default(), Nanos(1)), VmFiles::default());
    let mut reader = VmReader::default();
    reader.read(&fake.hierarchies, Path::new("/elsewhere/machine/a"), Nanos(1));
    reader.read(&fake.hierarchies, &fake.hierarchies.cpu, Nanos(2));
    assert_eq!(*reader.values(), VmFiles::default());
}

#[test]
fn those_that_sleep_are_read_rarely_and_hold_nothing_open() {
    let fake = Fake::new(CgroupVersion::V2);
    fake.write("unified/machine/a/cpu.pressure", PRESSURE);
    let mut reader = VmReader::default();
    let seconds = Nanos::from_secs;
    assert!(reader.is_due(seconds(0)));
    fake.read(&mut reader, seconds(0));
    assert!(reader.open.is_none());
    assert!(!reader.is_due(seconds(59)) && reader.is_due(seconds(60)));
    reader.ran();
    assert!(!reader.is_due(Nanos::from_millis(999)) && reader.is_due(seconds(1)));
    fake.write("unified/machine/a/cpu.pressure", "some avg10=2.00 total=6\n");
    fake.read(&mut reader, seconds(1));
    assert!(reader.open.is_some(), "it may run on");
    // Until its averages are zero again.
    assert!(!reader.is_due(seconds(10)) && reader.is_due(seconds(11)));
    fake.write("unified/machine/a/cpu.pressure", "some avg10=0.00 total=6\n");
    fake.read(&mut reader, seconds(11));
    assert!(!reader.is_due(seconds(70)) && reader.is_due(seconds(71)));
}

#[test]
fn all_come_to_their_turn_however_few_there_are_per_round() {
    let mut vms: BTreeMap<OsString, u32> =
        (0..10).map(|n| (OsString::from(format!("/{n}")), 0)).collect();
    let mut last = OsString::new();
    for _ in 0..7 {
        let mut left = 3;
        round(&mut vms, &mut last, |_, turns| {
            *turns += 1;
            left -= 1;
            if left == 0 { Turn::Stop } else { Turn::Taken }
        });
    }
    // 21 turns for ten: two each, and one more for the first.
    assert_eq!(vms.values().copied().collect::<Vec<_>>(), [3, 2, 2, 2, 2, 2, 2, 2, 2, 2]);
    // The one with the last turn may be gone.
    vms.remove(&last);
    let mut seen = Vec::new();
    round(&mut vms, &mut last, |path, _| {
        seen.push(path.display().to_string());
        Turn::Pass
    });
    assert_eq!((seen.len(), seen[0].as_str()), (9, "/1"));
}
