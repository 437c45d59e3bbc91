//! The block I/O probe on the running kernel, against what fio says of its own requests on a
//! loop device.
//!
//! Some kernels of virtual machines run no program at all on top of certain tasks of their own,
//! and a request is done on top of whatever ran. So counts are compared in short runs: never
//! more than there were, nearly all in sum, and all in some of them. That nothing at all is lost
//! is the tier `vm`'s to show (`tests/src/bin/vm_payload.rs`).

use formtune_agent::sense::block::{Occupant, OpTotals};
use formtune_agent::sense::{ProbeState, Sense, SenseConfig};
use formtune_common::block::{FLUSH, READ, WRITE};
use formtune_common::histogram::upper_bound;
use formtune_core::units::Nanos;
use formtune_tests::block::{BlockVm, LoopDevice, fio, times};
use formtune_tests::payload::shown;
use formtune_tests::vm_cgroup::VmCgroup;
use std::path::Path;
use std::time::{Duration, Instant};

/// Small random reads, sixteen at a time.
const READS: &[&str] = &[
    "--bs=4k",
    "--rw=randread",
    "--ioengine=io_uring",
    "--iodepth=16",
    "--number_ios=2000",
    "--io_size=1g",
];
/// The same, so many that chance evens out.
const MANY: &[&str] = &[
    "--bs=4k",
    "--rw=randread",
    "--ioengine=io_uring",
    "--iodepth=16",
    "--number_ios=50000",
    "--io_size=10g",
];
/// Reads in one request of [`FOURS`].
const FOUR: u64 = 4;
/// Always four side by side at once (of fewer the kernel makes no batch), and nothing else before
/// all are done.
const FOURS: &[&str] = &[
    "--bs=4k",
    "--rw=read",
    "--ioengine=io_uring",
    "--iodepth=4",
    "--iodepth_batch_submit=4",
    "--iodepth_batch_complete_min=4",
    "--iodepth_batch_complete_max=4",
    "--number_ios=2000",
    "--io_size=1g",
];
/// Large ones, one after the other, so that what they take is the device's time.
const LARGE: &[&str] =
    &["--bs=256k", "--rw=randread", "--ioengine=psync", "--number_ios=200", "--io_size=10g"];
/// One write after the other, each made durable.
const WRITES: &[&str] = &[
    "--bs=4k",
    "--rw=randwrite",
    "--ioengine=psync",
    "--fsync=1",
    "--number_ios=200",
    "--io_size=1g",
];

struct Bed {
    sense: Sense,
    start: Instant,
}

impl Bed {
    fn new(vms: &[&BlockVm]) -> Self {
        let patterns = vms.iter().map(|vm| vm.group.pattern().parse().unwrap()).collect();
        let config = SenseConfig { patterns, max_vms: 64, ..SenseConfig::default() };
        let mut bed = Self { sense: Sense::open(&config, None).unwrap(), start: Instant::now() };
        assert_eq!(bed.sense.block().health().probe, ProbeState::Loaded);
        bed.sample();
        for vm in vms {
            assert!(bed.sense.block().totals(vm.group.path()).is_some());
        }
        bed
    }

    fn now(&self) -> Nanos {
        Nanos(1_000_000_000_000 + self.start.elapsed().as_nanos() as u64)
    }

    fn sample(&mut self) {
        let now = self.now();
        self.sense.sample(now);
    }

    /// A VM's, or the host's, on a device.
    fn totals(&self, vm: Option<&Path>, device: &LoopDevice, op: u32) -> OpTotals {
        let block = self.sense.block();
        let all = match vm {
            Some(vm) => block.totals(vm),
            None => block.totals_of_host(),
        };
        all.unwrap()
            .into_iter()
            .find(|((number, of), _)| *of == op && block.device(*number) == device.name())
            .map_or_else(OpTotals::default, |(_, totals)| totals.clone())
    }
}

/// Counts of the same runs, ours and theirs.
#[derive(Default)]
struct Runs(Vec<(u64, u64)>);

impl Runs {
    const MOST: usize = 10;

    /// Whether another run is needed.
    fn open(&self) -> bool {
        self.0.len() < 3 || (self.0.len() < Self::MOST && !self.0.iter().any(|(a, b)| a == b))
    }

    fn add(&mut self, ours: u64, theirs: u64) {
        self.0.push((ours, theirs));
    }

    fn check(&self) {
        let runs = &self.0;
        let sum = runs.iter().fold((0, 0), |sum, run| (sum.0 + run.0, sum.1 + run.1));
        assert!(runs.iter().all(|(ours, theirs)| ours <= theirs), "{runs:?}");
        assert!(runs.iter().any(|(ours, theirs)| ours == theirs), "{runs:?}");
        assert!(sum.0 as f64 > sum.1 as f64 * 0.9, "{runs:?}");
    }
}

#[test]
fn reads_are_counted_and_timed_as_the_kernel_does() {
    let (ours, other) = (BlockVm::new("ft-block-reads"), BlockVm::new("ft-block-other"));
    let device = LoopDevice::new();
    let mut bed = Bed::new(&[&ours, &other]);
    let counters = bed.sense.block().health().counters;
    let path = ours.group.path();
    let mut last = OpTotals::default();
    let mut runs = Runs::default();
    while runs.open() {
        let before = device.reads();
        let job = fio(&device, Some(ours.procs()), READS);
        let after = device.reads();
        bed.sample();
        let totals = bed.totals(Some(path), &device, READ);
        let requests = totals.requests - last.requests;
        let total_ns = (totals.total.sum_ns - last.total.sum_ns) as f64;
        let device_ns = (totals.device.sum_ns - last.device.sum_ns) as f64;
        let kernel_ns = (after.1 - before.1) as f64 * 1e6;
        println!(
            "fio: {} reads, {:.0} ns each; kernel: {} reads, {:.0} ms; counted: {requests} reads, \
             {:.1} ms, {:.1} ms in the device",
            job.read.total_ios,
            job.read.clat_ns.mean,
            after.0 - before.0,
            kernel_ns / 1e6,
            total_ns / 1e6,
            device_ns / 1e6,
        );
        assert_eq!(after.0 - before.0, job.read.total_ios);
        assert_eq!(totals.total.count(), totals.requests);
        assert_eq!(totals.device.count(), totals.requests);
        assert!(device_ns <= total_ns && device_ns > 0.0);
        if requests == job.read.total_ios {
            // The kernel sums up after the tracepoint, a little later, and rounds.
            let least = kernel_ns * 0.95 - 2e6;
            assert!((least..=kernel_ns + 2e6).contains(&total_ns), "{total_ns} of {kernel_ns} ns");
        }
        runs.add(requests, job.read.total_ios);
        last = totals;
    }
    runs.check();
    assert_eq!(bed.totals(Some(other.group.path()), &device, READ), OpTotals::default());
    assert_eq!(bed.totals(Some(path), &device, WRITE), OpTotals::default());
    let times = times(&counters, &bed.sense.block().health().counters);
    shown("block", Some(&format!("yes, loop {times}")));
}

/// Reads that lie side by side and are submitted together are one request.
#[test]
fn what_the_kernel_merges_counts_once() {
    let vm = BlockVm::new("ft-block-merged");
    let device = LoopDevice::new();
    device.set("nomerges", "0");
    let mut bed = Bed::new(&[&vm]);
    let mut runs = Runs::default();
    let counted = |bed: &Bed| {
        let requests = bed.totals(Some(vm.group.path()), &device, READ).requests;
        (requests, bed.sense.block().health().counters.merged)
    };
    while runs.open() {
        let (before, kernel) = (counted(&bed), (device.reads().0, device.merged_reads()));
        let job = fio(&device, Some(vm.procs()), FOURS);
        bed.sample();
        let (after, all) = (counted(&bed), job.read.total_ios);
        let kernel = (device.reads().0 - kernel.0, device.merged_reads() - kernel.1);
        println!("fio: {all} reads; kernel: {kernel:?}, counted: {after:?} after {before:?}");
        assert_eq!(kernel, (all / FOUR, all - all / FOUR), "requests, and reads merged");
        runs.add(after.0 - before.0, kernel.0);
        // Those of other devices are among them.
        assert!(after.1 - before.1 >= after.0 - before.0, "not all of the requests were merged");
    }
    runs.check();
}

/// fio's time holds ours, and what it takes fio to get a CPU again: on a machine with other
/// work, not every run tells.
#[test]
fn large_reads_take_what_fio_says() {
    let vm = BlockVm::new("ft-block-large");
    let device = LoopDevice::new();
    let mut bed = Bed::new(&[&vm]);
    let mut before = OpTotals::default();
    let (mut shares, mut runs) = (Vec::new(), Runs::default());
    let tells = |share: &f64| (0.7..=1.05).contains(share);
    while shares.len() < 3 || (shares.len() < 30 && !shares.iter().any(tells)) {
        let job = fio(&device, Some(vm.procs()), LARGE);
        bed.sample();
        let totals = bed.totals(Some(vm.group.path()), &device, READ);
        let requests = totals.requests - before.requests;
        runs.add(requests, job.read.total_ios);
        let ours = (totals.total.sum_ns - before.total.sum_ns) as f64 / requests as f64;
        shares.push(ours / job.read.clat_ns.mean);
        println!("fio: {:.0} ns, counted: {ours:.0} ns", job.read.clat_ns.mean);
        before = totals;
    }
    runs.check();
    assert!(shares.iter().all(|share| *share <= 1.05), "{shares:?}");
    assert!(shares.iter().any(tells), "{shares:?}");
}

#[test]
fn writes_and_flushes_are_told_apart() {
    let vm = BlockVm::new("ft-block-writes");
    let device = LoopDevice::new();
    let mut bed = Bed::new(&[&vm]);
    let path = vm.group.path();
    let (mut writes, mut flushes) = (Runs::default(), Runs::default());
    let mut last = [0, 0];
    while writes.open() || flushes.open() {
        let job = fio(&device, Some(vm.procs()), WRITES);
        bed.sample();
        let now = [WRITE, FLUSH].map(|op| bed.totals(Some(path), &device, op));
        assert!(now.iter().all(|totals| totals.total.count() == totals.requests));
        let [written, flushed] = [0, 1].map(|at| now[at].requests - last[at]);
        println!("fio: {job:?}; counted: {written} writes, {flushed} flushes");
        writes.add(written, job.write.total_ios);
        flushes.add(flushed, job.sync.total_ios);
        last = now.map(|totals| totals.requests);
    }
    writes.check();
    flushes.check();
    // The block layer's own flushes are not the host's.
    assert_eq!(bed.totals(None, &device, FLUSH), OpTotals::default());
    assert_eq!(bed.totals(Some(path), &device, READ), OpTotals::default());
}

#[test]
fn what_is_no_vms_is_the_hosts() {
    let (vm, outside) = (BlockVm::new("ft-block-idle"), BlockVm::new("ft-block-outside"));
    let device = LoopDevice::new();
    let mut bed = Bed::new(&[&vm]);
    let mut runs = Runs::default();
    while runs.open() {
        let before = bed.totals(None, &device, READ).requests;
        let job = fio(&device, Some(outside.procs()), READS);
        bed.sample();
        runs.add(bed.totals(None, &device, READ).requests - before, job.read.total_ios);
    }
    runs.check();
    let none = bed.sense.block().totals(vm.group.path()).unwrap();
    assert!(none.is_empty(), "{none:?}");
}

/// Without statistics the kernel notes no times: the agent does, from the next reading on.
#[test]
fn times_are_noted_where_requests_carry_none() {
    let vm = BlockVm::new("ft-block-notes");
    let device = LoopDevice::without_times();
    let mut bed = Bed::new(&[&vm]);
    let counters = bed.sense.block().health().counters;
    fio(&device, Some(vm.procs()), READS);
    bed.sample();
    let path = vm.group.path();
    let mut last = bed.totals(Some(path), &device, READ);
    let health = bed.sense.block().health();
    assert!(last.requests > 0 && last.total.count() == 0, "{last:?}");
    assert!(health.notes && health.counters.no_queued >= last.requests, "{health:?}");

    let mut runs = Runs::default();
    while runs.open() {
        let job = fio(&device, Some(vm.procs()), READS);
        bed.sample();
        let now = bed.totals(Some(path), &device, READ);
        let [requests, timed, in_device] = [
            now.requests - last.requests,
            now.total.count() - last.total.count(),
            now.device.count() - last.device.count(),
        ];
        let average = (now.total.sum_ns - last.total.sum_ns) as f64 / timed as f64;
        println!("fio: {:.0} ns, counted: {timed} reads, {average:.0} ns", job.read.clat_ns.mean);
        assert!(average > 1_000.0 && average < job.read.clat_ns.mean * 1.1);
        assert!(timed <= requests && in_device <= requests);
        runs.add(timed, job.read.total_ios);
        last = now;
    }
    runs.check();
    assert_eq!(bed.sense.block().health().counters.not_noted, 0);
    let times = times(&counters, &health.counters);
    shown("block without times", Some(&format!("without `iostats` {times}")));
}

/// The standard error of a sum of `x` when one in 2^shift is looked at: each counts as much as
/// it does with that probability, which is a variance of (2^shift − 1) x².
fn standard_error(squares: f64, shift: u8) -> f64 {
    (squares * (f64::exp2(shift.into()) - 1.0)).sqrt()
}

/// Upper estimate of the sum of the squares of the times that were counted.
fn squares(totals: &OpTotals) -> f64 {
    let times = totals.total.dense();
    times
        .iter()
        .enumerate()
        .map(|(at, n)| *n as f64 * (upper_bound(at as u32) as f64).powi(2))
        .sum()
}

/// One request in eight counts as eight, in count and time; those that are left out are
/// counted. Nothing is left in the map of noted times.
#[test]
fn sampled_requests_are_unbiased_in_count_and_time() {
    const SHIFT: u8 = 3;
    let vm = BlockVm::new("ft-block-sampled");
    let device = LoopDevice::new();
    let mut bed = Bed::new(&[&vm]);
    bed.sense.sample_one_in(SHIFT);
    let path = vm.group.path();
    let (mut last, mut left_out) = (OpTotals::default(), 0);
    let (mut runs, mut told) = (Vec::new(), false);
    while runs.len() < 2 || (runs.len() < 8 && !told) {
        let before = device.reads();
        let job = fio(&device, Some(vm.procs()), MANY);
        let kernel_ns = (device.reads().1 - before.1) as f64 * 1e6;
        bed.sample();
        let totals = bed.totals(Some(path), &device, READ);
        let counters = bed.sense.block().health().counters;
        let (requests, all) = (totals.requests - last.requests, job.read.total_ios);
        let ns = (totals.total.sum_ns - last.total.sum_ns) as f64;
        assert_eq!((requests % 8, totals.total.count()), (0, totals.requests));
        let error = standard_error(all as f64, SHIFT);
        let error_ns = standard_error(squares(&totals) - squares(&last), SHIFT);
        // Those of other devices are among them.
        let seen = requests / 8 + counters.unsampled - left_out;
        println!(
            "fio: {all} reads, kernel: {:.0} ms; counted: {requests} ± {error:.0} reads, {:.0} ± \
             {:.0} ms; {} left out",
            kernel_ns / 1e6,
            ns / 1e6,
            error_ns / 1e6,
            counters.unsampled - left_out
        );
        assert!(requests as f64 <= all as f64 + 6.0 * error, "{requests} of {all} ± {error}");
        assert!(seen as f64 > all as f64 * 0.9, "{seen} of {all} were looked at or left out");
        let off = (requests as f64 - all as f64).abs();
        // As in `reads_are_counted_and_timed_as_the_kernel_does`, and chance on top.
        let times = (kernel_ns * 0.95 - 2e6 - 6.0 * error_ns)..=(kernel_ns + 2e6 + 6.0 * error_ns);
        told |= off <= 6.0 * error && times.contains(&ns);
        runs.push((requests, all));
        (last, left_out) = (totals, counters.unsampled);
    }
    assert!(told, "{runs:?}");
    let sum = runs.iter().fold((0, 0), |sum, run| (sum.0 + run.0, sum.1 + run.1));
    assert!(sum.0 as f64 > sum.1 as f64 * 0.9, "{runs:?}");
}

/// Also where times are noted in a map: a request that is left out leaves nothing behind.
#[test]
fn noted_times_go_with_requests_that_are_left_out() {
    let vm = BlockVm::new("ft-block-forgets");
    let device = LoopDevice::without_times();
    let mut bed = Bed::new(&[&vm]);
    fio(&device, Some(vm.procs()), READS);
    bed.sample();
    assert!(bed.sense.block().health().notes);
    bed.sense.sample_one_in(6);
    let of = |bed: &Bed| bed.totals(Some(vm.group.path()), &device, READ);
    let (before, mut all) = (of(&bed), 0);
    for _ in 0..3 {
        all += fio(&device, Some(vm.procs()), MANY).read.total_ios;
    }
    bed.sample();
    let after = of(&bed);
    let timed = (after.total.count() - before.total.count()) as f64;
    let error = standard_error(all as f64, 6);
    let (noted, left) = (bed.sense.block().noted(), bed.sense.block().health().counters);
    println!("{timed} ± {error:.0} of {all} reads have times; {noted} still noted, {left:?}");
    assert!((all as f64 * 0.9 - 6.0 * error..all as f64 + 6.0 * error).contains(&timed));
    // One per request of the device at most, whose end was not seen.
    assert!(noted <= 256, "{noted} of {all}");
}

#[test]
fn neighbours_on_a_device_are_named_with_their_shares() {
    let (victim, hog) = (BlockVm::new("ft-block-victim"), BlockVm::new("ft-block-hog"));
    let device = LoopDevice::new();
    let mut bed = Bed::new(&[&victim, &hog]);
    let hogs = std::thread::scope(|scope| {
        let hogs = scope.spawn(|| fio(&device, Some(hog.procs()), READS));
        fio(&device, Some(victim.procs()), LARGE);
        hogs.join().unwrap()
    });
    bed.sample();
    let block = bed.sense.block();
    let (number, _) = *block
        .totals(victim.group.path())
        .unwrap()
        .keys()
        .find(|(number, _)| block.device(*number) == device.name())
        .unwrap();
    let occupants = &block.occupants(bed.now())[&number];
    println!("{occupants:?} after {} reads of the hog's", hogs.read.total_ios);
    let ns = |of: &VmCgroup| {
        occupants.iter().find(|(who, _)| *who == Occupant::Vm(of.path())).map(|(_, ns)| *ns)
    };
    let expected = |vm: &BlockVm| bed.totals(Some(vm.group.path()), &device, READ).device.sum_ns;
    assert_eq!(ns(&victim.group), Some(expected(&victim)));
    assert_eq!(ns(&hog.group), Some(expected(&hog)));
}

/// Rows of VMs that are gone are used again, and nothing of them is left in the maps.
#[test]
fn rows_come_back_when_a_vm_is_gone() {
    let device = LoopDevice::new();
    let outside = VmCgroup::new("ft-block-keeper");
    let config = SenseConfig {
        patterns: vec!["formtune-test-*/{name}".parse().unwrap()],
        max_vms: 2,
        ..SenseConfig::default()
    };
    let mut bed = Bed { sense: Sense::open(&config, None).unwrap(), start: Instant::now() };
    bed.sample();
    let rows = |bed: &Bed| bed.sense.block().health().rows_taken;
    let reads = &["--bs=4k", "--rw=randread", "--ioengine=psync", "--number_ios=10"];
    let mut all = 0;
    for round in 0..20 {
        let vm = BlockVm::new(&format!("ft-block-churn-{round}"));
        let found = |bed: &mut Bed| {
            bed.sample();
            bed.sense.block().totals(vm.group.path()).is_some()
        };
        eventually(&mut bed, found);
        let job = fio(&device, Some(vm.procs()), reads);
        bed.sample();
        let counted = bed.totals(Some(vm.group.path()), &device, READ).requests;
        assert!(counted <= job.read.total_ios, "{counted} in round {round}");
        all += counted;
        let path = vm.group.path().to_owned();
        drop(vm);
        eventually(&mut bed, |bed| {
            bed.sample();
            bed.sense.block().totals(&path).is_none()
        });
    }
    bed.start -= Duration::from_secs(2);
    bed.sample();
    assert!((150..=200).contains(&all), "{all} reads of 200");
    let left = bed.sense.block().totals_of_host().unwrap().len();
    assert_eq!(rows(&bed) as usize, left, "only the host's are left");
    drop(outside);
}

fn eventually(bed: &mut Bed, mut true_at_last: impl FnMut(&mut Bed) -> bool) {
    let start = Instant::now();
    while !true_at_last(bed) {
        assert!(start.elapsed() < Duration::from_secs(5), "not within 5 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}
