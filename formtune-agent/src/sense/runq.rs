//! Run-queue latency as counted by the probe: mapped rows, differences, totals.
//!
//! The probe's map is mapped into the agent, so reading takes no system call, and a row
//! of a CPU on which the VM did not run is not looked at.

use super::prefetch::{LINE, prefetch};
use formtune_common::histogram::BUCKETS;
use formtune_common::runq::{HOLDERS, Held, NOBODY, RECENT, Row, recent_bucket, vm};
use formtune_core::sample::RunqInterval;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

/// Waits of one VM since it was first seen.
#[derive(Clone, Debug, Default)]
pub struct RunqTotals {
    /// Waits counted.
    pub count: u64,
    /// Sum of the waits, nanoseconds.
    pub wait_ns: u64,
    /// Switches without a usable time stamp; not in `count`.
    pub discarded: u64,
    /// Allocated with the first wait: most VMs of a large node are idle.
    buckets: Option<Box<[u64; BUCKETS]>>,
    /// Buckets that may hold something.
    range: Range<usize>,
}

impl RunqTotals {
    /// Waits per bucket; bounds are those of `formtune_common::histogram`.
    pub fn buckets(&self) -> &[u64; BUCKETS] {
        static NONE: [u64; BUCKETS] = [0; BUCKETS];
        self.buckets.as_deref().unwrap_or(&NONE)
    }

    /// From the first bucket that holds something to behind the last.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }
}

/// The rows of one slot, mapped.
pub struct SlotRows {
    pages: NonNull<c_void>,
    length: usize,
    first: NonNull<Row>,
    cpus: usize,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread; what others
// write there (the kernel) is read with volatile loads.
unsafe impl Send for SlotRows {}

impl SlotRows {
    /// Maps the rows of `slot` in the map `rows`, which holds `cpus` rows per slot.
    ///
    /// # Errors
    /// Those of `mmap`.
    pub fn map(rows: BorrowedFd<'_>, slot: u32, cpus: usize) -> io::Result<Self> {
        let page = page_size();
        let start = slot as usize * cpus * size_of::<Row>();
        let end = start + cpus * size_of::<Row>();
        let offset = start / page * page;
        let length = end.next_multiple_of(page) - offset;
        // SAFETY: a new shared mapping, at no address in particular.
        let pages = unsafe {
            mmap(
                None,
                NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                rows,
                offset as i64,
            )
        }?;
        // SAFETY: `start - offset` is less than a page, and the mapping reaches past `end`.
        let first = unsafe { pages.byte_add(start - offset) }.cast();
        Ok(Self { pages, length, first, cpus })
    }

    /// Sets all counters to zero. Only for slots that no cgroup leads to any more.
    pub fn zero(&mut self) {
        // SAFETY: within the mapping; `Row` is plain numbers.
        unsafe { self.first.write_bytes(0, self.cpus) };
    }

    fn row(&self, cpu: usize) -> *const Row {
        assert!(cpu < self.cpus);
        // SAFETY: within the mapping.
        unsafe { self.first.as_ptr().add(cpu) }
    }
}

impl Drop for SlotRows {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, not used after this.
        let unmapped = unsafe { munmap(self.pages, self.length) };
        debug_assert!(unmapped.is_ok());
    }
}

fn page_size() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(4096)
}

/// Differences between what a VM's rows hold and what they held at the last reading.
pub struct RunqReader {
    rows: SlotRows,
    last: Vec<LastRow>,
}

#[derive(Clone, Default)]
struct LastRow {
    /// `None` before the first reading.
    seen: Option<u64>,
    count: u32,
    discarded: u32,
    wait_ns: u64,
    unblamed_ns: u64,
    held_ns: u64,
    held: [Held; HOLDERS],
    /// Readings since each of `held` was last charged.
    quiet: [u32; HOLDERS],
    /// Sum of `buckets`.
    taken: u32,
    /// `buckets` hold the waits that `count` tells of, and no other. (A reading may come upon one
    /// that is not in `count` yet.)
    exact: bool,
    /// No wait was in a bucket below, so far.
    lowest: usize,
    /// Allocated when the VM first runs on that CPU.
    buckets: Option<Box<[u32; BUCKETS]>>,
}

impl LastRow {
    /// Adds who held the CPU since the last reading.
    fn blame(&mut self, row: *const Row, to: &mut HeldBy) {
        // SAFETY: a row of the mapping; the kernel writes there, hence volatile.
        let (unblamed_ns, held_ns) = unsafe {
            (
                (&raw const (*row).unblamed_ns).read_volatile(),
                (&raw const (*row).held_ns).read_volatile(),
            )
        };
        let unknown_ns = unblamed_ns.wrapping_sub(self.unblamed_ns);
        to.unknown_ns += unknown_ns;
        self.unblamed_ns = unblamed_ns;
        if held_ns == self.held_ns && unknown_ns == 0 {
            return;
        }
        self.held_ns = held_ns;
        let mut full = true;
        for (at, last) in self.held.iter_mut().enumerate() {
            // SAFETY: as above; the holder of an entry is written before its time.
            let now = unsafe { (&raw const (*row).held[at]).read_volatile() };
            full &= now.holder != NOBODY;
            self.quiet[at] = self.quiet[at].saturating_add(1);
            // An entry that is another's now was made free here; its time went on from there.
            if now.holder != NOBODY && now.ns != last.ns {
                to.add(now.holder, now.ns.wrapping_sub(last.ns));
                self.quiet[at] = 0;
                *last = now;
            }
        }
        // Somebody found no room, perhaps.
        let longest = (0..HOLDERS).max_by_key(|&at| self.quiet[at]);
        if let Some(at) = longest.filter(|&at| full && unknown_ns > 0 && self.quiet[at] > 0) {
            // SAFETY: as above. The probe may be charging that holder right now, and take the
            // entry again.
            unsafe { (&raw mut (*row.cast_mut()).held[at].holder).write_volatile(NOBODY) };
        }
    }
}

/// Buckets of the last `waits` waits of a row, whose count was `count` then; `None` if the row
/// does not tell them one by one (any longer).
fn recent_waits(row: *const Row, count: u32, waits: u32) -> Option<[u16; RECENT]> {
    let mut all = [0; RECENT];
    for (at, wait) in all.get_mut(..waits as usize)?.iter_mut().enumerate() {
        let number = count.wrapping_sub(at as u32);
        // SAFETY: a row of the mapping; the kernel writes there, hence volatile.
        let entry = unsafe { (&raw const (*row).recent[number as usize % RECENT]).read_volatile() };
        let bucket = recent_bucket(entry, number)?;
        *wait = u16::try_from(bucket).ok().filter(|&bucket| usize::from(bucket) < BUCKETS)?;
    }
    Some(all)
}

/// Who held the CPUs during one VM's long waits, as the probe names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldBy {
    /// Holder and nanoseconds.
    pub by: Vec<(u32, u64)>,
    /// Nobody knows who, nanoseconds.
    pub unknown_ns: u64,
}

impl HeldBy {
    fn add(&mut self, holder: u32, ns: u64) {
        match self.by.iter_mut().find(|(known, _)| *known == holder) {
            Some((_, sum)) => *sum += ns,
            None => self.by.push((holder, ns)),
        }
    }
}

/// Room for one VM's interval, kept between readings.
pub struct Scratch([u32; BUCKETS]);

impl Default for Scratch {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

impl RunqReader {
    /// Counts from now on; the rows must hold zeroes.
    pub fn new(rows: SlotRows) -> Self {
        let last = vec![LastRow::default(); rows.cpus];
        Self { rows, last }
    }

    /// Asks for the heads of the rows that [`Self::read`] will look at.
    pub fn prefetch(&self, seen: impl Fn(usize) -> u64) {
        for (cpu, last) in self.last.iter().enumerate() {
            if last.seen != Some(seen(cpu)) {
                let head = self.rows.row(cpu).cast::<u8>();
                prefetch(head);
                prefetch(head.wrapping_add(LINE));
            }
        }
    }

    /// What was counted since the last reading, also added to `totals`. Rows of CPUs for which
    /// `seen` says the same as then are as they were. Who held the CPUs is added to `held`.
    pub fn read(
        &mut self,
        seen: impl Fn(usize) -> u64,
        totals: &mut RunqTotals,
        held: &mut HeldBy,
        scratch: &mut Scratch,
    ) -> RunqInterval {
        let mut interval = RunqInterval::default();
        let (mut first, mut end) = (BUCKETS, 0);
        for cpu in 0..self.last.len() {
            let seen = Some(seen(cpu));
            let (row, last) = (self.rows.row(cpu), &mut self.last[cpu]);
            if std::mem::replace(&mut last.seen, seen) == seen {
                continue;
            }
            fence(Ordering::Acquire);
            // SAFETY: a row of the mapping; the kernel writes there, hence volatile.
            let read = |field: *const u32| unsafe { field.read_volatile() };
            // SAFETY: only addresses are taken.
            let (count, discarded, wait_ns, buckets) = unsafe {
                (&raw const (*row).count, &raw const (*row).discarded, &raw const (*row).wait_ns, {
                    (&raw const (*row).buckets).cast::<u32>()
                })
            };
            let discarded = read(discarded);
            totals.discarded += u64::from(discarded.wrapping_sub(last.discarded));
            last.discarded = discarded;
            let count = read(count);
            if count == last.count {
                continue;
            }
            // The probe writes `count` last: what belongs to it is there, and what comes
            // meanwhile is found by the next reading at the latest, as it raises `count`.
            fence(Ordering::Acquire);
            let new = count.wrapping_sub(last.count);
            totals.count += u64::from(new);
            last.count = count;
            // SAFETY: as above; 64-bit loads of aligned fields are not torn.
            let wait_ns = unsafe { wait_ns.read_volatile() };
            let waited = wait_ns.wrapping_sub(last.wait_ns);
            interval.wait_ns += waited;
            totals.wait_ns += waited;
            last.wait_ns = wait_ns;
            last.blame(row, held);
            let old = last.buckets.get_or_insert_with(|| {
                (last.lowest, last.exact) = (BUCKETS, true);
                Box::new([0; BUCKETS])
            });
            let lowest = last.lowest;
            let mut found = |at: usize, counted: u32| {
                scratch.0[at] = scratch.0[at].saturating_add(counted);
                (first, end) = (first.min(at), end.max(at + 1));
                last.lowest = last.lowest.min(at);
            };
            if let Some(recent) = recent_waits(row, count, new).filter(|_| last.exact) {
                for &at in &recent[..new as usize] {
                    old[usize::from(at)] = old[usize::from(at)].wrapping_add(1);
                    found(at.into(), 1);
                }
                last.taken = last.taken.wrapping_add(new);
                continue;
            }
            // As many waits as `count` says are looked for, first where waits were before: a
            // row is longer than what it holds, and memory is what reading costs. One that
            // comes meanwhile may stand in for one that is then found by the next reading. When
            // there are few, all are looked for, so that the next can be told one by one.
            let thorough = new as usize <= RECENT;
            let mut left = count.wrapping_sub(last.taken).cast_signed().max(0).cast_unsigned();
            for at in (lowest..BUCKETS).chain(0..lowest) {
                if left == 0 && !thorough {
                    break;
                }
                // SAFETY: `at` is less than BUCKETS.
                let new = read(unsafe { buckets.add(at) });
                let counted = new.wrapping_sub(old[at]);
                // Less than before where a wait was seen in `recent` first.
                if counted.cast_signed() > 0 {
                    old[at] = new;
                    last.taken = last.taken.wrapping_add(counted);
                    left = left.saturating_sub(counted);
                    found(at, counted);
                }
            }
            last.exact = thorough && last.taken == count;
        }
        if first < end {
            let all = totals.buckets.get_or_insert_with(|| Box::new([0; BUCKETS]));
            let before = &totals.range;
            let low = if before.is_empty() { first } else { first.min(before.start) };
            totals.range = low..end.max(before.end);
            // Most intervals hold no more: one allocation for each.
            interval.counts.reserve(16);
            for at in first..end {
                let counted = std::mem::take(&mut scratch.0[at]);
                if counted != 0 {
                    all[at] += u64::from(counted);
                    interval.counts.push((at as u16, counted));
                }
            }
        }
        interval
    }

    /// Frees the entries of a holder whose slot is about to be somebody else's. The probe no
    /// longer writes them.
    pub fn forget_holder(&mut self, slot: u32) {
        for (cpu, last) in self.last.iter_mut().enumerate() {
            let row = self.rows.row(cpu).cast_mut();
            for (at, last) in last.held.iter_mut().enumerate() {
                // SAFETY: a row of the mapping; see above for who else writes it.
                unsafe {
                    let held = &raw mut (*row).held[at];
                    if (&raw const (*held).holder).read_volatile() == vm(slot) {
                        held.write_volatile(Held::default());
                        *last = Held::default();
                    }
                }
            }
        }
    }

    /// Gives the rows back, to be zeroed and used again.
    pub fn into_rows(self) -> SlotRows {
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::latency::LatencyCounts;
    use formtune_common::histogram::bucket;
    use formtune_common::runq::{HOST, recent};
    use proptest::prelude::*;
    use std::os::fd::AsFd;
    use std::sync::atomic::AtomicU64;

    const CPUS: usize = 3;

    /// Rows in a file stand for the map.
    fn rows(slots: u32, slot: u32) -> (std::fs::File, SlotRows) {
        let file = tempfile::tempfile().unwrap();
        file.set_len((slots as usize * CPUS * size_of::<Row>()).next_multiple_of(4096) as u64)
            .unwrap();
        let rows = SlotRows::map(file.as_fd(), slot, CPUS).unwrap();
        (file, rows)
    }

    /// As if there were something new in every row.
    fn news(_: usize) -> u64 {
        static SEEN: AtomicU64 = AtomicU64::new(0);
        SEEN.fetch_add(1, Ordering::Relaxed)
    }

    /// What the probe does.
    fn count(rows: &SlotRows, cpu: usize, wait: u64) {
        count_as(rows, cpu, wait, 1);
    }

    /// What it does with a wait that counts for several.
    fn count_as(rows: &SlotRows, cpu: usize, wait: u64, weight: u32) {
        // SAFETY: nobody else writes, the row lies in the mapping.
        let row = unsafe { &mut *rows.row(cpu).cast_mut() };
        let bucket = bucket(wait);
        let counter = &mut row.buckets[bucket as usize];
        *counter = counter.wrapping_add(weight);
        row.wait_ns = row.wait_ns.wrapping_add(wait * u64::from(weight));
        row.count = row.count.wrapping_add(weight);
        row.recent[row.count as usize % RECENT] =
            recent(if weight == 1 { row.count } else { !row.count }, bucket);
    }

    #[test]
    fn counters_that_wrap_around_are_counted_right() {
        let (_file, rows) = rows(7, 5);
        let mut reader = RunqReader::new(rows);
        let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
        for waits in [i32::MAX.cast_unsigned(), u32::MAX - 1] {
            // SAFETY: as above.
            let row = unsafe { &mut *reader.rows.row(1).cast_mut() };
            (row.count, row.wait_ns) = (waits, u64::MAX - 5_000);
            row.buckets[bucket(3_000) as usize] = waits;
            reader.read(news, &mut RunqTotals::default(), &mut HeldBy::default(), &mut scratch);
        }
        for _ in 0..4 {
            count(&reader.rows, 1, 3_000);
        }
        let interval = reader.read(news, &mut totals, &mut HeldBy::default(), &mut scratch);
        assert_eq!(interval.counts, [(bucket(3_000) as u16, 4)]);
        assert_eq!(interval.wait_ns, 12_000);
        assert_eq!((totals.count, totals.wait_ns), (4, 12_000));
        assert_eq!(totals.buckets()[bucket(3_000) as usize], 4);
    }

    #[test]
    fn rows_of_cpus_that_saw_nothing_are_not_looked_at() {
        let (_file, rows) = rows(1, 0);
        let mut reader = RunqReader::new(rows);
        let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
        let mut read = |reader: &mut RunqReader, seen: [u64; CPUS]| {
            reader.read(|cpu| seen[cpu], &mut totals, &mut HeldBy::default(), &mut scratch).wait_ns
        };
        count(&reader.rows, 0, 5);
        assert_eq!(read(&mut reader, [1, 0, 0]), 5);
        count(&reader.rows, 0, 7);
        count(&reader.rows, 2, 9);
        assert_eq!(read(&mut reader, [1, 0, 1]), 9);
        assert_eq!(read(&mut reader, [2, 0, 1]), 7);
    }

    #[test]
    fn slots_do_not_touch_each_other_and_zero_is_zero() {
        let (file, mut ours) = rows(4, 1);
        let theirs = SlotRows::map(file.as_fd(), 2, CPUS).unwrap();
        count(&ours, CPUS - 1, 1);
        count(&theirs, 0, 2);
        ours.zero();
        let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
        let interval =
            RunqReader::new(ours).read(news, &mut totals, &mut HeldBy::default(), &mut scratch);
        assert_eq!((interval, totals.count), (RunqInterval::default(), 0));
        let interval =
            RunqReader::new(theirs).read(news, &mut totals, &mut HeldBy::default(), &mut scratch);
        assert_eq!(interval.counts, [(bucket(2) as u16, 1)]);
    }

    #[test]
    fn discarded_switches_are_reported_without_waits() {
        let (_file, rows) = rows(1, 0);
        // SAFETY: as above.
        unsafe { (*rows.row(0).cast_mut()).discarded = 3 };
        let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
        let interval =
            RunqReader::new(rows).read(news, &mut totals, &mut HeldBy::default(), &mut scratch);
        assert_eq!((interval, totals.discarded), (RunqInterval::default(), 3));
    }

    #[test]
    fn holders_are_told_apart_and_forgotten() {
        let (_file, rows) = rows(1, 0);
        let mut reader = RunqReader::new(rows);
        let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
        let charge = |reader: &RunqReader, cpu: usize, at: usize, holder, ns| {
            // SAFETY: as above.
            let row = unsafe { &mut *reader.rows.row(cpu).cast_mut() };
            row.held[at] = Held { holder, padding: 0, ns };
            row.held_ns += 1;
            count(&reader.rows, cpu, 200_000);
        };
        let mut read = |reader: &mut RunqReader| {
            let mut held = HeldBy::default();
            reader.read(news, &mut totals, &mut held, &mut scratch);
            held.by
        };
        charge(&reader, 0, 0, HOST, 10);
        charge(&reader, 0, 1, vm(7), 100);
        charge(&reader, 2, 0, vm(7), 1_000);
        assert_eq!(read(&mut reader), [(HOST, 10), (vm(7), 1_100)]);
        charge(&reader, 0, 1, vm(7), 130);
        assert_eq!(read(&mut reader), [(vm(7), 30)]);
        reader.forget_holder(7);
        charge(&reader, 0, 1, vm(8), 5);
        charge(&reader, 0, 0, HOST, 11);
        assert_eq!(read(&mut reader), [(HOST, 1), (vm(8), 5)]);
    }

    #[test]
    fn more_holders_than_there_is_room_for_take_turns() {
        let (_file, rows) = rows(1, 0);
        let mut reader = RunqReader::new(rows);
        let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
        // What the probe does.
        let charge = |reader: &RunqReader, holder, ns| {
            // SAFETY: as above.
            let row = unsafe { &mut *reader.rows.row(0).cast_mut() };
            let free = |held: &&mut Held| [holder, NOBODY].contains(&held.holder);
            match row.held.iter_mut().find(free) {
                Some(held) => {
                    held.holder = holder;
                    held.ns += ns;
                    row.held_ns += ns;
                }
                None => row.unblamed_ns += ns,
            }
            count(&reader.rows, 0, 200_000);
        };
        let mut read = |reader: &mut RunqReader| {
            let mut held = HeldBy::default();
            reader.read(news, &mut totals, &mut held, &mut scratch);
            held
        };
        for other in 0..HOLDERS as u32 {
            charge(&reader, vm(other), 100);
        }
        assert_eq!(read(&mut reader).by.len(), HOLDERS);
        // All but the third go on, and somebody new comes.
        let known = (0..HOLDERS as u32).filter(|&other| other != 2);
        known.clone().for_each(|other| charge(&reader, vm(other), 10));
        charge(&reader, vm(99), 7);
        let held = read(&mut reader);
        assert_eq!((held.by.len(), held.unknown_ns), (HOLDERS - 1, 7));
        charge(&reader, vm(99), 5);
        known.for_each(|other| charge(&reader, vm(other), 1));
        let held = read(&mut reader);
        assert_eq!((held.by.len(), held.unknown_ns), (HOLDERS, 0));
        assert!(held.by.contains(&(vm(99), 5)), "{held:?}");
    }

    /// A reading comes upon a wait that is in its bucket and not in the count yet.
    #[test]
    fn a_wait_that_was_counted_too_early_is_not_counted_twice() {
        let (_file, rows) = rows(1, 0);
        let mut reader = RunqReader::new(rows);
        let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
        let mut read = |reader: &mut RunqReader| {
            reader.read(news, &mut totals, &mut HeldBy::default(), &mut scratch);
            totals.buckets().to_vec()
        };
        let (early, late) = (bucket(1_000) as usize, bucket(90_000) as usize);
        for wait in [1_000; 20].into_iter().chain([90_000]) {
            count(&reader.rows, 0, wait);
        }
        // SAFETY: as above.
        unsafe { (*reader.rows.row(0).cast_mut()).buckets[early] += 1 };
        let told = read(&mut reader);
        assert_eq!((told[early], told[late]), (21, 0), "one stands in for the other");
        // SAFETY: as above.
        unsafe { (*reader.rows.row(0).cast_mut()).buckets[early] -= 1 };
        count(&reader.rows, 0, 1_000);
        let told = read(&mut reader);
        assert_eq!((told[early], told[late]), (21, 1));
        count(&reader.rows, 0, 90_000);
        let told = read(&mut reader);
        assert_eq!((told[early], told[late]), (21, 2));
    }

    /// The probe goes on while a row is read.
    #[test]
    fn every_bucket_is_right_although_the_probe_goes_on_meanwhile() {
        const WAITS: u64 = 300_000;
        let (file, rows) = rows(1, 0);
        let theirs = SlotRows::map(file.as_fd(), 0, CPUS).unwrap();
        let mut reader = RunqReader::new(rows);
        let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
        // Few and many at once.
        let wait = |n: u64| 100 << (n * n % 11);
        let done = std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                // SAFETY: nobody else writes.
                let row = theirs.row(0).cast_mut();
                for n in 0..WAITS {
                    let bucket = bucket(wait(n));
                    // SAFETY: as above; in the order in which the probe writes.
                    unsafe {
                        let counter = (&raw mut (*row).buckets).cast::<u32>().add(bucket as usize);
                        counter.write_volatile(counter.read_volatile() + 1);
                        let sum = &raw mut (*row).wait_ns;
                        sum.write_volatile(sum.read_volatile() + wait(n));
                        let count = (&raw const (*row).count).read_volatile() + 1;
                        let entry = &raw mut (*row).recent[count as usize % RECENT];
                        fence(Ordering::Release);
                        entry.write_volatile(recent(count, bucket));
                        fence(Ordering::Release);
                        (&raw mut (*row).count).write_volatile(count);
                    }
                    if n % 4096 < 64 {
                        std::thread::yield_now();
                    }
                }
            });
            while !writer.is_finished() {
                reader.read(news, &mut totals, &mut HeldBy::default(), &mut scratch);
                let told: u64 = totals.buckets().iter().sum();
                // Those that came since the count was read may be among them.
                assert!(told >= totals.count, "{told} of {}", totals.count);
            }
            writer.join().is_ok()
        });
        assert!(done);
        reader.read(news, &mut totals, &mut HeldBy::default(), &mut scratch);
        let mut expected = [0; BUCKETS];
        (0..WAITS).for_each(|n| expected[bucket(wait(n)) as usize] += 1);
        assert_eq!((totals.count, totals.buckets()), (WAITS, &expected));
    }

    /// The probe that is attached anew counts into new rows, from zero.
    #[test]
    fn totals_only_grow_when_the_probe_is_attached_anew() {
        let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
        let mut before = LatencyCounts::default();
        for round in 1..=3 {
            let (_file, rows) = rows(1, 0);
            let mut reader = RunqReader::new(rows);
            for reading in 1..=2 {
                count(&reader.rows, 0, 1_000 * round * reading);
                count(&reader.rows, 1, 5_000);
                reader.read(news, &mut totals, &mut HeldBy::default(), &mut scratch);
                let now = LatencyCounts::from_dense(totals.buckets(), totals.wait_ns);
                let counted = now.since(&before).expect("no bucket fell");
                assert_eq!(counted.sum_ns, 1_000 * round * reading + 5_000);
                assert_eq!((counted.count(), now.count()), (2, totals.count));
                before = now;
            }
        }
        assert_eq!((before.count(), before.sum_ns), (12, 48_000));
    }

    /// The probe goes on while a row is read: what it told one by one is overwritten.
    #[test]
    fn waits_that_are_no_longer_told_one_by_one_are_found_in_the_buckets() {
        let (_file, rows) = rows(1, 0);
        for n in 0..20 {
            count(&rows, 0, 1_000 << n);
        }
        // SAFETY: as above.
        let row = rows.row(0);
        assert!(recent_waits(row, 20, 16).is_some());
        assert_eq!(recent_waits(row, 20, 17), None);
        assert_eq!(recent_waits(row, 18, 16), None);
        let newest = recent_waits(row, 20, 1).unwrap();
        assert_eq!(u32::from(newest[0]), bucket(1_000 << 19));
        count_as(&rows, 0, 1_000, 2);
        assert_eq!(recent_waits(row, 22, 2), None);
    }

    proptest! {
        /// Intervals add up to the totals, whatever is counted where and read when.
        #[test]
        fn nothing_is_lost_between_readings(
            waits in proptest::collection::vec(
                (0..CPUS, 0u64..1 << 38, 0u32..3, proptest::bool::weighted(0.1)),
                0..300,
            ),
        ) {
            let (_file, rows) = rows(1, 0);
            let mut reader = RunqReader::new(rows);
            let (mut totals, mut scratch) = (RunqTotals::default(), Scratch::default());
            let mut sum = vec![0u64; BUCKETS];
            let mut expected = vec![0u64; BUCKETS];
            let mut wait_ns = 0;
            let mut add = |interval: RunqInterval| {
                interval.counts.iter().for_each(|&(at, n)| sum[at as usize] += u64::from(n));
                wait_ns += interval.wait_ns;
            };
            for &(cpu, wait, shift, read) in &waits {
                count_as(&reader.rows, cpu, wait, 1 << shift);
                expected[bucket(wait) as usize] += 1 << shift;
                if read {
                    add(reader.read(news, &mut totals, &mut HeldBy::default(), &mut scratch));
                }
            }
            add(reader.read(news, &mut totals, &mut HeldBy::default(), &mut scratch));
            prop_assert_eq!(&sum, &expected);
            prop_assert_eq!(&totals.buckets()[..], &expected[..]);
            prop_assert_eq!(wait_ns, waits.iter().map(|w| w.1 << w.2).sum::<u64>());
            prop_assert_eq!(totals.count, waits.iter().map(|w| 1 << w.2).sum::<u64>());
        }
    }
}
