//! What the kernel itself holds in the maps of a running agent.

use crate::net::bpf;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Key and value, as bytes.
pub type Entry = (Vec<u8>, Vec<u8>);

/// `BPF_MAP_TYPE_HASH` and `BPF_MAP_TYPE_ARRAY` (include/uapi/linux/bpf.h).
const HASH: u32 = 1;
const ARRAY: u32 = 2;

/// The maps with this name that a process has open, and what is in each: all entries of a hash
/// map, and of an array those that are not all zeroes.
///
/// # Errors
/// Those of `/proc` and of `bpf`.
pub fn named(process: u32, name: &str) -> io::Result<Vec<Vec<Entry>>> {
    let mut found = BTreeMap::new();
    for file in fs::read_dir(format!("/proc/{process}/fdinfo"))? {
        // Closed meanwhile is fine.
        let info = fs::read_to_string(file?.path()).unwrap_or_default();
        let id = info.lines().find_map(|line| line.strip_prefix("map_id:"));
        let Some(id) = id.and_then(|id| id.trim().parse().ok()) else { continue };
        let map = Map::open(id)?;
        if map.name == name {
            found.insert(id, map.entries()?);
        }
    }
    Ok(found.into_values().collect())
}

struct Map {
    fd: OwnedFd,
    kind: u32,
    key: usize,
    value: usize,
    length: u32,
    name: String,
}

impl Map {
    fn open(id: u32) -> io::Result<Self> {
        // BPF_MAP_GET_FD_BY_ID
        let fd = bpf(14, &mut [id, 0, 0])?;
        // SAFETY: a new descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        /// `struct bpf_map_info` up to its name.
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
            key: u32,
            value: u32,
            length: u32,
            flags: u32,
            name: [u8; 16],
        }
        /// `BPF_OBJ_GET_INFO_BY_FD` and its part of `union bpf_attr`.
        #[repr(C)]
        struct Ask {
            fd: i32,
            length: u32,
            info: *mut Info,
        }
        let mut info = Info::default();
        let length = size_of::<Info>() as u32;
        bpf(15, &mut Ask { fd: fd.as_raw_fd(), length, info: &raw mut info })?;
        let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Self {
            kind: info.kind,
            key: info.key as usize,
            value: info.value as usize,
            length: info.length,
            name: String::from_utf8_lossy(name).into_owned(),
            fd,
        })
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        let keys = match self.kind {
            ARRAY => (0..self.length).map(|at| at.to_ne_bytes().to_vec()).collect(),
            HASH => self.keys()?,
            other => return Err(io::Error::other(format!("a map of type {other}"))),
        };
        let mut entries = Vec::new();
        for key in keys {
            // One that is gone meanwhile was there.
            let value = self.value(&key)?;
            if self.kind == HASH || value.iter().any(|byte| *byte != 0) {
                entries.push((key, value));
            }
        }
        Ok(entries)
    }

    fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut next = vec![0; self.key];
            let before = keys.last().map_or(std::ptr::null(), |key| key.as_ptr());
            // BPF_MAP_GET_NEXT_KEY
            match self.element(4, before, next.as_mut_ptr()) {
                Ok(()) => keys.push(next),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(keys),
                Err(error) => return Err(error),
            }
        }
    }

    fn value(&self, key: &[u8]) -> io::Result<Vec<u8>> {
        let mut value = vec![0; self.value];
        // BPF_MAP_LOOKUP_ELEM
        match self.element(1, key.as_ptr(), value.as_mut_ptr()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(value),
        }
    }

    fn element(&self, command: i32, key: *const u8, to: *mut u8) -> io::Result<()> {
        /// Part of `union bpf_attr` for commands on elements.
        #[repr(C)]
        struct Element {
            fd: u32,
            key: *const u8,
            to: *mut u8,
            flags: u64,
        }
        let fd = self.fd.as_raw_fd().cast_unsigned();
        bpf(command, &mut Element { fd, key, to, flags: 0 })?;
        Ok(())
    }
}
