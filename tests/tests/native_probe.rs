//! The run-queue probe on the running kernel, against the kernel's own bookkeeping:
//! `/proc/PID/task/TID/schedstat` holds a thread's time on CPU, its `run_delay` (time spent
//! waiting on a run queue) and its `pcount` (times it got a CPU);
//! Documentation/scheduler/sched-stats.rst.

use formtune_agent::sense::{ProbeState, Reading, Sense, SenseConfig};
use formtune_common::histogram::lower_bound;
use formtune_core::sample::{HeldInterval, RunqInterval};
use formtune_core::units::{Nanos, VmId};
use formtune_tests::payload::shown;
use formtune_tests::vm_cgroup::{Member, VmCgroup};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a load is compared, at least, and at most.
const LENGTH: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_secs(60);
/// Fewer are no load.
const SWITCHES: u64 = 1_000;

/// These tests make load and look at what it waits for: one at a time, or each waits for the
/// others' load.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(patterns: &[String]) -> Sense {
    let patterns = patterns.iter().map(|p| p.parse().unwrap()).collect();
    let config = SenseConfig { patterns, max_vms: 64, ..SenseConfig::default() };
    let sense = Sense::open(&config, None).unwrap();
    assert_eq!(sense.health().runq, ProbeState::Loaded);
    sense
}

fn now(start: Instant) -> Nanos {
    Nanos(start.elapsed().as_nanos() as u64)
}

/// Works a little and sleeps a little, until killed.
fn work_and_sleep(work: Duration) {
    loop {
        let begun = Instant::now();
        while begun.elapsed() < work {
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Six of these, with long and short waits, preemptions and sleeps, in two groups of a VM.
fn load(group: &VmCgroup, cpu: Option<usize>) -> Vec<Member> {
    (0..6)
        .map(|i| {
            let leaf = if i % 2 == 0 { "vcpu0" } else { "emulator" };
            let work = Duration::from_micros(300 << (i % 5));
            Member::start(group, leaf, cpu, move || work_and_sleep(work))
        })
        .collect()
}

/// Sum of `run_delay` and of `pcount`.
fn schedstat(members: &[Member]) -> (u64, u64) {
    let all = members.iter().map(Member::schedstat);
    all.fold((0, 0), |(delay, count), (d, c)| (delay + d, count + c))
}

fn total(interval: &RunqInterval) -> u64 {
    interval.counts.iter().map(|&(_, n)| u64::from(n)).sum()
}

/// What the probe and the kernel say of the same threads over the same time: (count, wait)
/// of each.
fn compare(name: &str, cpu: Option<usize>) -> [(u64, u64); 2] {
    let group = VmCgroup::new(name);
    let start = Instant::now();
    let mut sense = open(&[group.pattern()]);
    let id = VmId::from(name);
    assert!(sense.sample(now(start)).appeared.contains(&id));
    let members = load(&group, cpu);
    std::thread::sleep(Duration::from_millis(200));

    // Stopped while both are read, so that both speak of the same switches.
    members.iter().for_each(Member::stop);
    sense.sample(now(start));
    let runq = sense.runq(&id).unwrap();
    let before = (schedstat(&members), runq.count, runq.wait_ns);
    members.iter().for_each(Member::go_on);
    let (mut count, mut wait) = (0, 0);
    let begun = Instant::now();
    let mut stopped = false;
    while !stopped {
        std::thread::sleep(Duration::from_millis(250));
        // Other work may leave this load so little of the CPUs that it takes longer.
        let enough = begun.elapsed() > LENGTH && schedstat(&members).1 - before.0.1 > SWITCHES;
        stopped = enough || begun.elapsed() > LIMIT;
        if stopped {
            members.iter().for_each(Member::stop);
        }
        let reading = sense.sample(now(start));
        assert_eq!(reading.host.blind, None);
        let interval = reading.vms[&id].runq.clone().unwrap();
        count += total(&interval);
        wait += interval.wait_ns;
    }
    let during = schedstat(&members);
    let totals = sense.runq(&id).unwrap();
    assert_eq!((totals.count - before.1, totals.wait_ns - before.2), (count, wait));
    assert_eq!(totals.buckets().iter().sum::<u64>(), totals.count);
    // The histogram itself, at the buckets' lower bounds, has at most 4.43 % less.
    let lower: u64 =
        totals.buckets().iter().zip(0..).map(|(&n, bucket)| n * lower_bound(bucket)).sum();
    assert!(lower <= totals.wait_ns && lower as f64 >= totals.wait_ns as f64 / 1.0443, "{lower}");
    assert_eq!(totals.discarded, 0);
    let (delay, pcount) = (during.0 - before.0.0, during.1 - before.0.1);
    let share = |ours: u64, theirs: u64| ours as f64 / theirs as f64 * 100.0 - 100.0;
    println!(
        "{name}: waits {count} of {pcount} ({:+.2} %), waited {wait} of {delay} ns ({:+.2} %)",
        share(count, pcount),
        share(wait, delay)
    );
    [(count, wait), (pcount, delay)]
}

fn within(ours: u64, theirs: u64, share: f64) -> bool {
    (ours as f64 - theirs as f64).abs() <= theirs as f64 * share
}

#[test]
fn pinned_threads_agree_with_run_delay() {
    let _alone = alone();
    let [(count, wait), (pcount, delay)] = compare("ft-sense-pinned", Some(0));
    assert!(pcount > SWITCHES, "{pcount} switches are no load");
    assert!(within(count, pcount, 0.05), "{count} waits, pcount {pcount}");
    assert!(within(wait, delay, 0.05), "{wait} ns, run_delay {delay} ns");
    shown("loads", None);
    shown("attributes", None);
}

/// A wait split by a migration between CPUs is counted from its second part only:
/// `sched_info_dequeue()` books the first part and starts anew. So never more than the
/// kernel, and how much less is printed (docs/probes.md).
#[test]
fn unpinned_threads_lose_what_they_waited_before_a_migration() {
    let _alone = alone();
    let [(count, wait), (pcount, delay)] = compare("ft-sense-unpinned", None);
    assert!(within(count, pcount, 0.05), "{count} waits, pcount {pcount}");
    // What a migration cuts off is missing (docs/probes.md): 1 to 4 % on two CPUs.
    let share = wait as f64 / delay as f64;
    assert!((0.8..=1.05).contains(&share), "{wait} ns, run_delay {delay} ns");
}

#[test]
fn the_waiter_pays_and_not_the_waker_nor_others() {
    let _alone = alone();
    let (waiter, waker) = (VmCgroup::new("ft-sense-waiter"), VmCgroup::new("ft-sense-waker"));
    let outside = VmCgroup::new("ft-sense-outside");
    let start = Instant::now();
    let mut sense = open(&[waiter.pattern(), waker.pattern()]);
    sense.sample(now(start));

    // The waker spins on one CPU and wakes the waiter, which is pinned to the same one and
    // has to wait for it.
    const WAKES: u64 = 300;
    let (read, write) = nix::unistd::pipe().unwrap();
    let (reader, writer) = (read.as_raw_fd(), write.as_raw_fd());
    let waiting = Member::start(&waiter, "vcpu0", Some(0), || {
        let _ = nix::unistd::close(writer);
        // SAFETY: open in the parent, and so here.
        let read = unsafe { BorrowedFd::borrow_raw(reader) };
        while nix::unistd::read(read, &mut [0]) == Ok(1) {}
    });
    let waking = Member::start(&waker, "vcpu0", Some(0), || {
        // SAFETY: as above.
        let write = unsafe { BorrowedFd::borrow_raw(writer) };
        for _ in 0..WAKES {
            let _ = nix::unistd::write(write, &[0]);
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(3) {
                std::hint::spin_loop();
            }
        }
    });
    drop((read, write));
    let bystanders = load(&outside, Some(0));
    waking.join();
    waiting.join();
    let reading = sense.sample(now(start));
    let (_, bystanders) = schedstat(&bystanders);

    assert!(!reading.vms.contains_key(&outside.id()), "the group outside is no VM");
    let (waited, woke) = (sense.runq(&waiter.id()).unwrap(), sense.runq(&waker.id()).unwrap());
    println!(
        "waiter: {} waits, {} ns; waker: {} waits, {} ns; outside: {bystanders} waits",
        waited.count, waited.wait_ns, woke.count, woke.wait_ns
    );
    // A wake finds the waiter asleep or still waiting for its CPU.
    assert!((WAKES / 4..WAKES * 4).contains(&waited.count), "{} waits", waited.count);
    assert!(woke.count > 0, "the waker is preempted, and waits as well");
    assert!(bystanders > 500, "{bystanders} switches outside are no test");
    assert!(sense.runq(&outside.id()).is_none());
}

/// Spins until killed.
fn spin() {
    loop {
        std::hint::spin_loop();
    }
}

/// What all VMs' long waits were for, over two seconds of a load that has run for a while.
fn held(patterns: &[String], of: &VmId) -> HeldInterval {
    let start = Instant::now();
    let mut sense = open(patterns);
    sense.sample(now(start));
    std::thread::sleep(Duration::from_millis(200));
    sense.sample(now(start));
    let (mut sum, mut long_ns) = (HeldInterval::default(), 0);
    for _ in 0..8 {
        std::thread::sleep(Duration::from_millis(250));
        let reading = sense.sample(now(start));
        let vm = &reading.vms[of];
        sum.add(vm.held.as_ref().unwrap());
        let long = |&&(bucket, _): &&(u16, u32)| lower_bound(bucket.into()) > 100_000;
        let counts = &vm.runq.as_ref().unwrap().counts;
        long_ns += counts
            .iter()
            .filter(long)
            .map(|&(bucket, count)| u64::from(count) * lower_bound(bucket.into()))
            .sum::<u64>();
    }
    println!("{of}: {long_ns} ns of long waits, {sum:?}");
    assert!(long_ns > 100_000_000, "{long_ns} ns of long waits are no test");
    // Each long wait is charged from its beginning to its end; a bucket is 4.43 % wide.
    assert!(within(sum.total_ns(), long_ns, 0.06), "{} of {long_ns} ns", sum.total_ns());
    sum
}

/// Share of what this test's VMs held: other work on the machine is the host's, and none of
/// their business.
fn share(of: &VmId, held: &HeldInterval) -> f64 {
    held.by_vm[of] as f64 / held.by_vm.values().sum::<u64>() as f64
}

#[test]
fn a_wait_is_charged_to_whoever_held_the_cpu() {
    let _alone = alone();
    let (victim, hog) = (VmCgroup::new("ft-blame-victim"), VmCgroup::new("ft-blame-hog"));
    let innocent = VmCgroup::new("ft-blame-innocent");
    let patterns = [victim.pattern(), hog.pattern(), innocent.pattern()];
    let works = || work_and_sleep(Duration::from_millis(2));
    let _victim = Member::start(&victim, "vcpu0", Some(0), works);
    let _innocent = Member::start(&innocent, "vcpu0", Some(1), works);

    // A neighbour, on the same CPU.
    let hogs = Member::start(&hog, "vcpu0", Some(0), spin);
    let by_hog = held(&patterns, &victim.id());
    let blamed = share(&hog.id(), &by_hog);
    assert!(blamed > 0.9, "the hog held the CPU for {blamed} of the waits only");
    assert!(!by_hog.by_vm.contains_key(&innocent.id()), "the innocent ran on another CPU");
    drop(hogs);

    // Two of its own vCPUs.
    let own = Member::start(&victim, "emulator", Some(0), spin);
    let by_itself = held(&patterns, &victim.id());
    let blamed = share(&victim.id(), &by_itself);
    assert!(blamed > 0.9, "it held the CPU itself for {blamed} of the waits only");
    drop(own);

    // A task of the host: in a group that is no VM's.
    let outside = VmCgroup::new("ft-blame-outside");
    let _host = Member::start(&outside, "vcpu0", Some(0), spin);
    let by_host = held(&patterns, &victim.id());
    let blamed = by_host.by_host_ns as f64 / by_host.total_ns() as f64;
    assert!(blamed > 0.8, "the host held the CPU for {blamed} of the waits only");
}

/// Time for which a CPU had nothing to do so far, as `/proc/stat` says, nanoseconds.
fn idle_ns(cpu: usize) -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let line = stat.lines().find_map(|line| line.strip_prefix(&format!("cpu{cpu} "))).unwrap();
    let ticks: Vec<u64> = line.split_whitespace().map(|field| field.parse().unwrap()).collect();
    let [idle, iowait] = [ticks[3], ticks[4]];
    (idle + iowait) * 10_000_000
}

/// A VM that spins on one CPU and is stopped by its own quota: that CPU is idle only while the VM
/// waits, so all its idle time, and no more, is in these waits.
#[test]
fn an_idle_cpu_is_nobodys_doing() {
    let _alone = alone();
    let group = VmCgroup::new("ft-blame-quota");
    group.limit_cpu(20_000, 100_000);
    let start = Instant::now();
    let mut sense = open(&[group.pattern()]);
    let _spinner = Member::start(&group, "vcpu0", Some(0), spin);
    std::thread::sleep(Duration::from_millis(500));
    let throttled = |reading: &Reading| reading.vms[&group.id()].throttled_ns.unwrap();
    let before = (throttled(&sense.sample(now(start))), idle_ns(0));
    let mut sum = HeldInterval::default();
    // Other work on this machine may leave that CPU little time to be idle.
    let (stopped, idle) = loop {
        std::thread::sleep(Duration::from_millis(250));
        let reading = sense.sample(now(start));
        sum.add(reading.vms[&group.id()].held.as_ref().unwrap());
        let idle = idle_ns(0) - before.1;
        // The file that says so is read once per second.
        let stopped = throttled(&reading) - before.0;
        if idle > 500_000_000 && stopped > 0 {
            break (stopped, idle);
        }
        assert!(start.elapsed() < 2 * LIMIT, "CPU 0 was idle for {idle} ns only");
    };
    println!("stopped for {stopped} ns, CPU 0 idle for {idle} ns, {sum:?}");
    // At either end a wait of some 80 ms is cut off.
    let (fewer, more) = (idle / 10 * 8 - 100_000_000, idle / 10 * 12 + 100_000_000);
    assert!(sum.idle_ns < more, "{} of {idle} ns: others were taken for idle", sum.idle_ns);
    let not_others = sum.idle_ns + sum.unknown_ns;
    assert!(not_others > fewer, "{not_others} of {idle} ns: idle was taken for others");
    assert!(sum.idle_ns > fewer / 2, "{} of {idle} ns: the rest is nobody's known", sum.idle_ns);
}

/// A VM for which there is no slot is known as such: what it does to others is nobody's known,
/// not the host's.
#[test]
fn a_vm_without_a_slot_is_not_taken_for_the_host() {
    let _alone = alone();
    let both = [VmCgroup::new("ft-slotless-a"), VmCgroup::new("ft-slotless-b")];
    let start = Instant::now();
    let config = SenseConfig {
        patterns: both.iter().map(|vm| vm.pattern().parse().unwrap()).collect(),
        max_vms: 1,
        ..SenseConfig::default()
    };
    let mut sense = Sense::open(&config, None).unwrap();
    let reading = sense.sample(now(start));
    // Either may have got the slot: the one that has not is the hog.
    let at = usize::from(reading.vms[&both[0].id()].runq.is_none());
    let (victim, hog) = (&both[at], &both[1 - at]);
    let id = victim.id();
    let works = || work_and_sleep(Duration::from_millis(2));
    let _victim = Member::start(victim, "vcpu0", Some(0), works);
    let _hog = Member::start(hog, "vcpu0", Some(0), spin);
    sense.sample(now(start));
    let mut sum = HeldInterval::default();
    while sum.total_ns() < 500_000_000 {
        assert!(start.elapsed() < LIMIT, "{sum:?}");
        std::thread::sleep(Duration::from_millis(100));
        sum.add(sense.sample(now(start)).vms[&id].held.as_ref().unwrap());
    }
    let unknown = sum.unknown_ns as f64 / sum.total_ns() as f64;
    println!("{sum:?}");
    // The rest is what other work on this machine took of that CPU.
    assert!(unknown > 0.3, "of the waits for the hog {unknown} are nobody's known: {sum:?}");
    assert!(sense.runq(&hog.id()).is_none() && sense.health().cgroups_not_measured == 0);
}

/// One switch in eight counts as eight: the counts of a load of thousands of switches agree
/// with the kernel's within what chance allows, and the cost falls.
#[test]
fn sampled_counts_are_unbiased() {
    let _alone = alone();
    let group = VmCgroup::new("ft-sense-sampled");
    let start = Instant::now();
    let mut sense = open(&[group.pattern()]);
    sense.sample(now(start));
    sense.sample_one_in(3);
    let works = || loop {
        std::thread::sleep(Duration::from_micros(30));
    };
    let members: Vec<_> =
        (0..4).map(|cpu| Member::start(&group, "vcpu0", Some(cpu % 2), works)).collect();
    let id = group.id();
    let switches = || -> u64 {
        let stat = std::fs::read_to_string("/proc/stat").unwrap();
        stat.lines().find_map(|line| line.strip_prefix("ctxt ")).unwrap().parse().unwrap()
    };
    let totals = |sense: &mut Sense| {
        members.iter().for_each(Member::stop);
        let reading = sense.sample(now(start));
        assert_eq!((reading.host.sampling_shift, &reading.vms[&id].held), (3, &None));
        let runq = sense.runq(&id).unwrap();
        let counted = (schedstat(&members), runq.count, sense.health().unsampled, switches());
        members.iter().for_each(Member::go_on);
        counted
    };
    std::thread::sleep(Duration::from_millis(200));
    let before = totals(&mut sense);
    std::thread::sleep(Duration::from_secs(3));
    let after = totals(&mut sense);
    let (pcount, count) = (after.0.1 - before.0.1, after.1 - before.1);
    println!("sampled: {count} waits, pcount {pcount}");
    assert!(pcount > 20_000, "{pcount} switches are no load");
    assert_eq!(count % 8, 0);
    // Each switch counts 8 with probability 1/8: a variance of 7 per switch.
    let error = (7.0 * pcount as f64).sqrt();
    assert!((count as f64 - pcount as f64).abs() < 6.0 * error, "{count}, {pcount} ± {error}");
    // Seven of eight switches of the whole node are left out, and counted one by one.
    let (left_out, all) = (after.2 - before.2, after.3 - before.3);
    println!("{left_out} of {all} switches left out");
    assert!(within(left_out, all / 8 * 7, 0.1), "{left_out} of {all} switches");
}

/// The agent knows what its program costs: about what a switch costs times the switches.
#[test]
fn the_programs_cost_is_known() {
    let _alone = alone();
    let group = VmCgroup::new("ft-sense-cost");
    let start = Instant::now();
    let mut sense = open(&[group.pattern()]);
    let works = || loop {
        std::thread::sleep(Duration::from_micros(30));
    };
    let _member = Member::start(&group, "vcpu0", Some(0), works);
    let cost = (0..20).find_map(|_| {
        std::thread::sleep(Duration::from_millis(100));
        sense.sample(now(start)).host.probe_cost
    });
    let measured = sense.health().cost.unwrap();
    println!("{cost:?} CPUs, {measured:?}");
    assert!(measured.runs_per_s > 500.0, "{measured:?}");
    let ns_per_run = measured.cpus * 1e9 / measured.runs_per_s;
    assert!((20.0..5_000.0).contains(&ns_per_run), "{ns_per_run} ns per run");
}

#[test]
fn without_a_slot_a_vm_is_reported_as_not_measured() {
    let _alone = alone();
    let mut groups: Vec<_> =
        (0..3).map(|i| VmCgroup::new(&format!("ft-sense-slots-{i}"))).collect();
    let patterns = groups.iter().map(|group| group.pattern().parse().unwrap()).collect();
    let config = SenseConfig { patterns, max_vms: 2, ..SenseConfig::default() };
    let start = Instant::now();
    let mut sense = Sense::open(&config, None).unwrap();
    let reading = sense.sample(now(start));
    // VMs of somebody else's may run on this machine, and take slots as well.
    let (measured, others): (Vec<_>, Vec<_>) =
        reading.vms.iter().partition(|(_, vm)| vm.runq.is_some());
    assert!(measured.len() == 2 && !others.is_empty(), "{:?}", reading.vms.keys());
    assert_eq!(sense.health().slots_used, 2);
    assert_eq!(sense.health().not_measured as usize, others.len());

    // When those that are measured stop, the rest of ours gets their slots.
    let Some(stopped) = groups.iter().position(|group| sense.runq(&group.id()).is_some()) else {
        panic!("both slots went to VMs that are not this test's; stop them")
    };
    drop(groups.remove(stopped));
    let begun = Instant::now();
    let measured = |sense: &Sense| groups.iter().filter(|g| sense.runq(&g.id()).is_some()).count();
    let before = measured(&sense);
    while measured(&sense) == before {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", sense.health());
        std::thread::sleep(Duration::from_millis(50));
        sense.sample(now(start));
    }
}
