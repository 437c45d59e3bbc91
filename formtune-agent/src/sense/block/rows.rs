//! The rows of the block I/O probe, mapped: what was counted is taken out, so that a row holds
//! what came since the last reading.
//!
//! Mapped in chunks, as rows are first used: a mapped page counts as memory of the agent's.

use super::super::prefetch::prefetch;
use formtune_common::block::{Key, LINE, Row};
use formtune_common::histogram::BUCKETS;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Rows mapped at once, some 150 KB.
const CHUNK: u32 = 32;

/// All rows of the map.
pub struct Rows {
    /// By number / [`CHUNK`].
    chunks: Vec<Option<Chunk>>,
    length: u32,
}

struct Chunk {
    pages: NonNull<c_void>,
    length: usize,
    first: NonNull<Row>,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread; what others
// write there (the kernel) is read with atomic loads.
unsafe impl Send for Chunk {}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: mapped by `Chunk::map`, not used after this.
        let unmapped = unsafe { munmap(self.pages, self.length) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Chunk {
    fn map(rows: BorrowedFd<'_>, first: u32, count: u32) -> io::Result<Self> {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .and_then(|size| usize::try_from(size).ok())
            .unwrap_or(4096);
        let start = first as usize * size_of::<Row>();
        let end = start + count as usize * size_of::<Row>();
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
        Ok(Self { pages, length, first })
    }
}

/// What a row held.
pub struct Drained<'a> {
    /// Requests done.
    pub count: u32,
    /// From queued to done: sum in nanoseconds, and bucket by bucket.
    pub total: (u64, &'a [(u16, u32)]),
    /// From given to the device to done, likewise.
    pub device: (u64, &'a [(u16, u32)]),
}

/// Room for what a row held, kept between readings.
#[derive(Default)]
pub struct Scratch {
    total: Vec<(u16, u32)>,
    device: Vec<(u16, u32)>,
}

impl Rows {
    /// For a map of this many rows; maps nothing yet.
    pub fn new(length: u32) -> Self {
        let chunks = (0..length.div_ceil(CHUNK)).map(|_| None).collect();
        Self { chunks, length }
    }

    /// Makes a row accessible.
    ///
    /// # Errors
    /// Those of `mmap`.
    pub fn ensure(&mut self, rows: BorrowedFd<'_>, number: u32) -> io::Result<()> {
        let Some(chunk) = self.chunks.get_mut((number / CHUNK) as usize) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if chunk.is_none() {
            let first = number / CHUNK * CHUNK;
            *chunk = Some(Chunk::map(rows, first, CHUNK.min(self.length - first))?);
        }
        Ok(())
    }

    /// A row; `None` if it is not mapped.
    fn row(&self, number: u32) -> Option<*mut Row> {
        let chunk = self.chunks.get((number / CHUNK) as usize)?.as_ref()?;
        // SAFETY: within the mapping.
        (number < self.length)
            .then(|| unsafe { chunk.first.as_ptr().add((number % CHUNK) as usize) })
    }

    /// Whose a row is; a key of zeroes is one of a row that nobody took, or is about to take
    /// (the device 0:0 is none). `None` if it is not mapped.
    pub fn key(&self, number: u32) -> Option<Key> {
        let row = self.row(number)?;
        // SAFETY: within the mapping; the kernel may write, hence volatile.
        unsafe {
            if (&raw const (*row).key.device).read_volatile() == 0 {
                return Some(Key::default());
            }
            // Written last.
            fence(Ordering::Acquire);
            Some((&raw const (*row).key).read_volatile())
        }
    }

    /// Asks for the head of a row.
    pub fn prefetch(&self, number: u32) {
        if let Some(row) = self.row(number) {
            prefetch(row);
        }
    }

    /// Takes out what a row holds; `None` if it is nothing. `thorough`: without heed of the
    /// hints. One may be lost while another CPU's request, counted a moment later, makes up for
    /// the one it was of; so this is due now and then.
    pub fn drain<'s>(
        &self,
        number: u32,
        thorough: bool,
        scratch: &'s mut Scratch,
    ) -> Option<Drained<'s>> {
        let row = self.row(number)?;
        // SAFETY: a row of the mapping; everybody accesses the field atomically.
        let count = unsafe { AtomicU32::from_ptr(&raw mut (*row).count) };
        if count.load(Ordering::Acquire) == 0 {
            return None;
        }
        // The probe adds to `count` last: what belongs to it is there, and what comes
        // meanwhile is taken by this reading or, as it raises `count`, by the next.
        let count = count.swap(0, Ordering::AcqRel);
        // SAFETY: only addresses are taken.
        let (total, device) = unsafe {
            let (total, device) = (&raw mut (*row).total, &raw mut (*row).device);
            (
                Times {
                    sum_ns: &raw mut (*row).total_ns,
                    lines: &raw mut (*row).total_lines,
                    buckets: total.cast(),
                },
                Times {
                    sum_ns: &raw mut (*row).device_ns,
                    lines: &raw mut (*row).device_lines,
                    buckets: device.cast(),
                },
            )
        };
        let total_ns = total.take(count, thorough, &mut scratch.total);
        let device_ns = device.take(count, thorough, &mut scratch.device);
        Some(Drained {
            count,
            total: (total_ns, &scratch.total),
            device: (device_ns, &scratch.device),
        })
    }

    /// Sets all of a row to zero. Only for rows that no key leads to any more.
    pub fn zero(&mut self, number: u32) {
        if let Some(row) = self.row(number) {
            // SAFETY: within the mapping; `Row` is plain numbers.
            unsafe { row.write_bytes(0, 1) };
        }
    }
}

/// One of the two histograms of a row of the mapping.
struct Times {
    sum_ns: *mut u64,
    lines: *mut u64,
    buckets: *mut u32,
}

impl Times {
    /// Takes out their sum, nanoseconds, and the buckets, sorted: as many as `count` at least, or
    /// all there are.
    fn take(&self, count: u32, thorough: bool, into: &mut Vec<(u16, u32)>) -> u64 {
        into.clear();
        // SAFETY: fields of a row of the mapping, aligned; everybody accesses them atomically.
        let [sum_ns, lines] =
            [self.sum_ns, self.lines].map(|field| unsafe { AtomicU64::from_ptr(field) });
        // The probe adds to it after the bucket. Requests may have no times, as a flush has none
        // of the device.
        let sum_ns = sum_ns.swap(0, Ordering::AcqRel);
        if sum_ns == 0 && !thorough {
            return 0;
        }
        let mut left = count;
        let mut lines = lines.swap(0, Ordering::AcqRel);
        while lines != 0 {
            let first = lines.trailing_zeros() as usize * LINE;
            lines &= lines - 1;
            self.drain(first..(first + LINE).min(BUCKETS), &mut left, into);
        }
        // A hint was lost, or some requests have no times.
        if left > 0 || thorough {
            self.drain(0..BUCKETS, &mut left, into);
            into.sort_unstable();
        }
        sum_ns
    }

    fn drain(&self, buckets: Range<usize>, left: &mut u32, into: &mut Vec<(u16, u32)>) {
        for at in buckets {
            // SAFETY: `at` is less than BUCKETS; as above.
            let bucket = unsafe { AtomicU32::from_ptr(self.buckets.add(at)) };
            if bucket.load(Ordering::Relaxed) != 0 {
                let taken = bucket.swap(0, Ordering::AcqRel);
                into.push((at as u16, taken));
                *left = left.saturating_sub(taken);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::totals::OpTotals;
    use super::*;
    use formtune_common::block::{READ, device};
    use formtune_common::histogram::bucket;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    const LENGTH: u32 = CHUNK + 3;

    /// Rows in a file stand for the map.
    fn rows() -> (std::fs::File, Rows) {
        let file = tempfile::tempfile().unwrap();
        let bytes = (LENGTH as usize * size_of::<Row>()).next_multiple_of(4096);
        file.set_len(bytes as u64).unwrap();
        (file, Rows::new(LENGTH))
    }

    /// What the probe does.
    fn count(rows: &Rows, number: u32, ns: u64) {
        count_told(rows, number, ns, true);
    }

    /// The same; where the time was counted may be lost.
    fn count_told(rows: &Rows, number: u32, ns: u64, told: bool) {
        let row = rows.row(number).unwrap();
        // SAFETY: within the mapping; nobody else writes.
        unsafe {
            let hint = |ns, told| u64::from(told) << (bucket(ns) as usize / LINE);
            (*row).total[bucket(ns) as usize] += 1;
            (*row).total_ns += ns;
            (*row).total_lines |= hint(ns, told);
            (*row).device[bucket(ns / 2) as usize] += 1;
            (*row).device_ns += ns / 2;
            (*row).device_lines |= hint(ns / 2, told);
            (*row).count += 1;
        }
    }

    #[test]
    fn rows_at_both_ends_of_the_map_are_apart() {
        let (file, mut rows) = rows();
        let mut scratch = Scratch::default();
        assert!(rows.key(0).is_none() && rows.drain(0, false, &mut scratch).is_none());
        for number in [0, CHUNK - 1, CHUNK, LENGTH - 1] {
            rows.ensure(file.as_fd(), number).unwrap();
        }
        assert!(rows.ensure(file.as_fd(), LENGTH + CHUNK).is_err());
        let key = Key { who: 3, device: device(259, 1), op: READ };
        // SAFETY: as above.
        unsafe { (*rows.row(LENGTH - 1).unwrap()).key = key };
        count(&rows, LENGTH - 1, 70_000);
        count(&rows, CHUNK - 1, 10);
        assert_eq!((rows.key(LENGTH - 1), rows.key(CHUNK)), (Some(key), Some(Key::default())));
        assert!(rows.drain(CHUNK, false, &mut scratch).is_none());
        let drained = rows.drain(LENGTH - 1, false, &mut scratch).unwrap();
        assert_eq!(drained.total, (70_000, &[(bucket(70_000) as u16, 1)][..]));
        assert_eq!(drained.device, (35_000, &[(bucket(35_000) as u16, 1)][..]));
        count(&rows, LENGTH - 1, 1);
        rows.zero(LENGTH - 1);
        assert!(rows.drain(LENGTH - 1, false, &mut scratch).is_none());
        assert_eq!(rows.key(LENGTH - 1), Some(Key::default()));
        assert_eq!(rows.drain(CHUNK - 1, false, &mut scratch).unwrap().count, 1);
    }

    /// Two CPUs: the hint of one is undone by the other, whose request is not yet in the count.
    #[test]
    fn what_a_lost_hint_hides_is_found_by_a_thorough_reading() {
        let (file, mut rows) = rows();
        rows.ensure(file.as_fd(), 0).unwrap();
        let mut scratch = Scratch::default();
        count_told(&rows, 0, 1_000, false);
        count_told(&rows, 0, 90_000_000, true);
        // SAFETY: as above.
        unsafe { (*rows.row(0).unwrap()).count -= 1 };
        let (at, later) = (bucket(1_000) as u16, bucket(90_000_000) as u16);
        assert_eq!(rows.drain(0, false, &mut scratch).unwrap().total.1, [(later, 1)]);
        // SAFETY: as above.
        unsafe { (*rows.row(0).unwrap()).count += 1 };
        assert_eq!(rows.drain(0, false, &mut scratch).unwrap().total.1, []);
        count(&rows, 0, 90_000_000);
        let drained = rows.drain(0, true, &mut scratch).unwrap();
        assert_eq!(drained.total.1, [(at, 1), (later, 1)]);
    }

    proptest! {
        /// What is drained adds up to what was counted, whenever it is drained.
        #[test]
        fn nothing_is_lost_between_readings(
            times in proptest::collection::vec((2u64..1 << 38, any::<bool>(), any::<bool>()), 1..100),
        ) {
            let (file, mut rows) = rows();
            rows.ensure(file.as_fd(), 1).unwrap();
            let (mut requests, mut sum, mut buckets) = (0, 0, vec![0; BUCKETS]);
            let mut expected = vec![0; BUCKETS];
            let (mut scratch, mut totals) = (Scratch::default(), OpTotals::default());
            for (i, &(ns, told, drain)) in times.iter().enumerate() {
                count_told(&rows, 1, ns, told);
                expected[bucket(ns) as usize] += 1;
                if drain || i + 1 == times.len() {
                    let drained = rows.drain(1, false, &mut scratch).unwrap();
                    requests += drained.count as usize;
                    totals.total.add(drained.total.0, drained.total.1);
                    totals.device.add(drained.device.0, drained.device.1);
                    sum += drained.total.0;
                    drained.total.1.iter().for_each(|&(at, n)| buckets[usize::from(at)] += n);
                }
            }
            prop_assert_eq!(requests, times.len());
            prop_assert_eq!(sum, times.iter().map(|time| time.0).sum::<u64>());
            prop_assert_eq!(&totals.total.dense()[..], &buckets.iter().map(|&n: &u32| u64::from(n)).collect::<Vec<_>>()[..]);
            prop_assert_eq!(totals.device.count(), times.len() as u64);
            prop_assert_eq!(buckets, expected);
        }
    }
}
