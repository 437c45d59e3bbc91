//! What the kernel's files say of a VM, on the running kernel: throttled by its own quota,
//! stalled, at its memory limit, and the probe's waits against `run_delay`.

use formtune_agent::sense::cgroup::Hierarchies;
use formtune_agent::sense::{ProbeState, Sense, SenseConfig, VmFiles};
use formtune_agent::vm::CgroupVersion;
use formtune_core::units::Nanos;
use formtune_tests::payload;
use formtune_tests::vm_cgroup::{Member, VmCgroup};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn open(group: &VmCgroup) -> Sense {
    let patterns = vec![group.pattern().parse().unwrap()];
    let config = SenseConfig { patterns, max_vms: 64, ..SenseConfig::default() };
    let sense = Sense::open(&config, None).unwrap();
    assert_eq!(sense.health().runq, ProbeState::Loaded);
    sense
}

fn hierarchies() -> Hierarchies {
    Hierarchies::find(Path::new("/sys/fs/cgroup")).unwrap()
}

fn spin() {
    loop {
        std::hint::spin_loop();
    }
}

fn work_and_sleep() {
    loop {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(2) {
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Samples four times per second, as the agent does, until `done` has an answer.
fn sample_until<T>(sense: &mut Sense, limit: u64, mut done: impl FnMut(&Sense) -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        sense.sample(Nanos(begun.elapsed().as_nanos() as u64));
        if let Some(answer) = done(sense) {
            return answer;
        }
        assert!(begun.elapsed() < Duration::from_secs(limit), "nothing within {limit} s");
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// A VM's group in another hierarchy than that of `cpu`; removed when dropped.
struct Twin(PathBuf);

impl Twin {
    fn new(root: &Path, group: &VmCgroup) -> Self {
        let path = root.join(group.path().strip_prefix(hierarchies().cpu).unwrap());
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn join(&self, member: &Member) {
        fs::write(self.0.join("cgroup.procs"), member.pid().to_string()).unwrap();
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        for path in self.0.ancestors().take(2) {
            // A process that has just ended leaves its cgroup a moment later.
            for _ in 0..100 {
                if fs::remove_dir(path).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[test]
fn a_vm_is_throttled_by_its_own_quota() {
    let group = VmCgroup::new("ft-files-quota");
    group.limit_cpu(4_000, 20_000);
    let mut sense = open(&group);
    let _spinner = Member::start(&group, "vcpu0", None, spin);
    let start = Instant::now();
    let mut read = || {
        let reading = sense.sample(Nanos(start.elapsed().as_nanos() as u64));
        let vm = &reading.vms[&group.id()];
        (vm.quota_periods.unwrap(), vm.throttled_ns.unwrap())
    };
    let before = read();
    std::thread::sleep(Duration::from_secs(2));
    let after = read();
    let (all, throttled) = (after.0.all - before.0.all, after.0.throttled - before.0.throttled);
    let stopped = Duration::from_nanos(after.1 - before.1);
    println!("throttled in {throttled} of {all} periods, for {stopped:?}");
    // 100 periods in 2 s; a spinner uses up every one, and a busy machine takes some away.
    assert!((20..=110).contains(&all) && throttled >= all / 2 && throttled <= all);
    assert!(stopped > Duration::from_millis(200), "{stopped:?}");
}

#[test]
fn the_probe_agrees_with_run_delay() {
    let group = VmCgroup::new("ft-files-check");
    let mut sense = open(&group);
    let _members: Vec<_> = ["vcpu0", "emulator", "vcpu0"]
        .map(|leaf| Member::start(&group, leaf, Some(0), work_and_sleep))
        .into();
    let check = sample_until(&mut sense, 40, |sense| sense.files(&group.id())?.runq_check);
    println!("{check:?}");
    assert_eq!(check.threads, 3);
    assert!(check.span >= Nanos::from_secs(10));
    assert!(check.kernel_ns > 1_000_000_000, "{} ns of waits are no test", check.kernel_ns);
    assert!(check.divergence_ratio.abs() < 0.05, "{}", check.divergence_ratio);
}

#[test]
fn pressure_is_that_of_the_vms_group() {
    let group = VmCgroup::new("ft-files-pressure");
    let hierarchies = hierarchies();
    let unified = hierarchies.unified.expect("a v2 hierarchy is mounted");
    let twin = (hierarchies.version == CgroupVersion::V1).then(|| Twin::new(&unified, &group));
    let members = [0, 1].map(|_| Member::start(&group, "vcpu0", Some(0), spin));
    if let Some(twin) = &twin {
        members.iter().for_each(|member| twin.join(member));
    }
    let mut sense = open(&group);
    let shown = Path::new("/proc/pressure/cpu").exists();
    if !shown {
        // `psi=0`, or built without it.
        sample_until(&mut sense, 5, |sense| sense.files(&group.id()).copied());
        assert_eq!(sense.files(&group.id()), Some(&VmFiles::default()));
        assert_eq!(sense.pressure().cpu, None);
        return;
    }
    let total =
        |sense: &Sense| sense.files(&group.id())?.pressure.cpu?.some.map(|stall| stall.total_us);
    let stalled = sample_until(&mut sense, 20, |sense| total(sense).filter(|us| *us > 500_000));
    let files = sense.files(&group.id()).unwrap();
    println!("stalled {stalled} µs: {:?}; node: {:?}", files.pressure, sense.pressure());
    let node = sense.pressure().cpu.unwrap().some.unwrap();
    assert!(node.total_us >= stalled, "the node stalls whenever one of its VMs does");
    payload::shown("pressure", None);
}

#[test]
fn a_memory_limit_is_met() {
    let group = VmCgroup::new("ft-files-memory");
    let hierarchies = hierarchies();
    let twin = hierarchies.memory.as_ref().map(|memory| Twin::new(memory, &group));
    let limit = match &twin {
        Some(twin) => twin.0.join("memory.limit_in_bytes"),
        None => {
            for group in group.path().ancestors().skip(1).take(2) {
                fs::write(group.join("cgroup.subtree_control"), "+memory").unwrap();
            }
            group.path().join("memory.max")
        }
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    // Pages of a file can be reclaimed: the limit is met again and again, and nobody is ended.
    file.as_file().set_len(64 << 20).unwrap();
    fs::write(limit, (4 << 20).to_string()).unwrap();
    let reader = file.reopen().unwrap();
    let member = Member::start(&group, "vcpu0", None, || {
        use std::os::unix::fs::FileExt;
        let mut buffer = [0; 1 << 16];
        // Until it has been moved to the memory hierarchy as well.
        std::thread::sleep(Duration::from_millis(300));
        for at in (0..64 << 20).step_by(1 << 16) {
            let _ = reader.read_at(&mut buffer, at);
        }
        spin();
    });
    if let Some(twin) = &twin {
        twin.join(&member);
    }
    let mut sense = open(&group);
    let events = sample_until(&mut sense, 20, |sense| {
        let events = sense.files(&group.id())?.memory_events;
        (events.max? > 0).then_some(events)
    });
    println!("{events:?}");
    assert_eq!(events.oom_kill, Some(0));
    drop(member);
}
