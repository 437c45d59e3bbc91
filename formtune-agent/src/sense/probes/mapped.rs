//! An array map of plain rows, mapped into the agent: reading takes no system call.

use super::{ProbeError, take};
use aya::Ebpf;
use aya::maps::{Map, MapData};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

/// All rows of one map.
pub struct Mapped<T> {
    pages: NonNull<c_void>,
    bytes: NonZeroUsize,
    rows: u32,
    of: PhantomData<T>,
    /// Loading a program needs its maps open.
    _map: MapData,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread; what the
// kernel writes there is read with volatile loads.
unsafe impl<T: aya::Pod + Send> Send for Mapped<T> {}
// SAFETY: as above; nobody here writes.
unsafe impl<T: aya::Pod + Sync> Sync for Mapped<T> {}

impl<T: aya::Pod> Mapped<T> {
    /// Maps the map of this name, of `rows` rows, each a multiple of 8 bytes long.
    pub(super) fn of(ebpf: &mut Ebpf, name: &'static str, rows: u32) -> Result<Self, ProbeError> {
        let Map::Array(map) = take(ebpf, name)? else { return Err(ProbeError::Object(name)) };
        let bytes = NonZeroUsize::new(rows as usize * size_of::<T>());
        let bytes = bytes.ok_or(ProbeError::Object(name))?;
        // SAFETY: a new shared mapping, at no address in particular.
        let pages = unsafe {
            mmap(None, bytes, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, map.fd().as_fd(), 0)
        };
        let pages = pages.map_err(|error| ProbeError::Mmap(name, error.into()))?;
        Ok(Self { pages, bytes, rows, of: PhantomData, _map: map })
    }

    /// A row, as it is now.
    pub fn get(&self, index: u32) -> T {
        assert!(index < self.rows);
        // SAFETY: within the mapping, which is aligned to a page; any bits are a valid `T`.
        unsafe { self.pages.cast::<T>().add(index as usize).read_volatile() }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, not used after this.
        let unmapped = unsafe { munmap(self.pages, self.bytes.get()) };
        debug_assert!(unmapped.is_ok());
    }
}
