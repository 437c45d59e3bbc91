//! The journal's file: appended to durably, compacted by rename, given up at the first
//! failure.

use super::record::{Entry, Record, encode};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const NAME: &str = "journal";
const NEW: &str = "journal.new";
const DAMAGED: &str = "journal.damaged-";
const LOCK: &str = "lock";
/// A file longer than this and than four times its open entries is compacted.
const COMPACT_ABOVE: u64 = 256 * 1024;
/// A journal longer than this is none.
const READ_LIMIT: u64 = 64 * 1024 * 1024;

/// The open journal. After any error of [`Journal::append`] or [`Journal::compact`] it must
/// be dropped: whether the failed lines are on disk is not known, and a second fsync of the
/// same descriptor would succeed without them.
#[derive(Debug)]
pub(super) struct Journal {
    folder: PathBuf,
    boot: String,
    file: File,
    next: u64,
    length: u64,
    compact_at: u64,
}

impl Journal {
    /// Replaces whatever journal is in `folder` by one that holds `entries`.
    pub(super) fn create<'a>(
        folder: &Path,
        boot: &str,
        entries: impl Iterator<Item = &'a Entry>,
    ) -> io::Result<Self> {
        let mut lines = encode(0, boot, Record::HEADER)?;
        let mut next = 1;
        for entry in entries {
            lines += &encode(next, boot, Record::Intent { entry: entry.clone() })?;
            next += 1;
        }
        let new = folder.join(NEW);
        // A crash may have left one: it never was the journal.
        match fs::remove_file(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(lines.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, folder.join(NAME))?;
        File::open(folder)?.sync_all()?;
        let length = lines.len() as u64;
        let compact_at = COMPACT_ABOVE.max(length * 4);
        Ok(Self { folder: folder.into(), boot: boot.into(), file, next, length, compact_at })
    }

    /// Appends the records and returns when they are durable.
    pub(super) fn append(&mut self, records: impl IntoIterator<Item = Record>) -> io::Result<()> {
        let mut lines = String::new();
        for record in records {
            lines += &encode(self.next, &self.boot, record)?;
            self.next += 1;
        }
        if lines.is_empty() {
            return Ok(());
        }
        self.file.write_all(lines.as_bytes())?;
        self.file.sync_data()?;
        self.length += lines.len() as u64;
        Ok(())
    }

    /// Whether it is time to compact.
    pub(super) fn is_long(&self) -> bool {
        self.length > self.compact_at
    }

    /// Leaves only `entries`.
    pub(super) fn compact<'a>(
        &mut self,
        entries: impl Iterator<Item = &'a Entry>,
    ) -> io::Result<()> {
        *self = Self::create(&self.folder, &self.boot, entries)?;
        Ok(())
    }
}

/// The journal's bytes; `None` where there is none.
pub(super) fn read(folder: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(folder.join(NAME)) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    file.take(READ_LIMIT).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Gives a damaged journal a name under which it is kept, and returns that.
pub(super) fn set_aside(folder: &Path) -> io::Result<PathBuf> {
    let mut n = 1;
    let kept = loop {
        let name = folder.join(format!("{DAMAGED}{n}"));
        if !name.try_exists()? {
            break name;
        }
        n += 1;
    };
    fs::rename(folder.join(NAME), &kept)?;
    File::open(folder)?.sync_all()?;
    Ok(kept)
}

/// A damaged journal that was kept and that nobody has looked after yet.
pub(super) fn kept_aside(folder: &Path) -> io::Result<Option<PathBuf>> {
    let mut kept: Vec<PathBuf> = Vec::new();
    for file in fs::read_dir(folder)? {
        let file = file?;
        if file.file_name().to_string_lossy().starts_with(DAMAGED) {
            kept.push(file.path());
        }
    }
    Ok(kept.into_iter().min())
}

/// Makes the state folder, for root only.
pub(super) fn make_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// The right to write in a state folder, held until dropped or until the process ends.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "held for its Drop")] Flock<File>);

/// Why the lock was not had.
#[derive(Debug)]
pub(super) enum NotLocked {
    /// Another process has it; its id, if it could be read.
    Held(Option<u32>),
    /// The file could not be opened or locked.
    Failed(io::Error),
}

impl Lock {
    /// Where the lock's file is.
    pub(super) fn path(folder: &Path) -> PathBuf {
        folder.join(LOCK)
    }

    /// Takes the lock without waiting.
    pub(super) fn take(folder: &Path) -> Result<Self, NotLocked> {
        let path = Self::path(folder);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            // A folder that became read-only can still be locked, to restore from it.
            .or_else(|error| File::open(&path).map_err(|_| error))
            .map_err(NotLocked::Failed)?;
        match Flock::lock(
            file.try_clone().map_err(NotLocked::Failed)?,
            FlockArg::LockExclusiveNonblock,
        ) {
            Ok(mut lock) => {
                // For whoever finds it held; nothing depends on it.
                let _ = lock.set_len(0);
                let _ = lock.write_all(format!("{}\n", std::process::id()).as_bytes());
                Ok(Self(lock))
            }
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut text = String::new();
                let _ = file.read_to_string(&mut text);
                Err(NotLocked::Held(text.trim().parse().ok()))
            }
            Err((_, e)) => Err(NotLocked::Failed(e.into())),
        }
    }
}
