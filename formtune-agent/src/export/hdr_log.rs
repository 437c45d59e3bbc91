//! The interval log that the agent itself keeps, in files that rotate.
//!
//! On a thread of its own, so that a slow disk never delays the loop. A log that cannot be
//! written is said once and tried again with every interval; meanwhile nothing is lost, as
//! the next interval that can be written begins where the last one ended.

use super::hdr::{Intervals, head};
use super::series::Histograms;
use super::snapshot::{HdrLogState, Snapshot};
use super::source::Snapshots;
use formtune_core::units::Nanos;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;

/// Where the log goes, and how much of it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HdrLogConfig {
    /// The file that is written; older ones are `FILE.1`, `FILE.2` and so on.
    pub file: PathBuf,
    /// Length of an interval.
    pub interval: Nanos,
    /// A file is not appended to beyond this.
    pub max_bytes: u64,
    /// Older files kept.
    pub keep: u32,
}

/// Why the log cannot be begun.
#[derive(Debug, thiserror::Error)]
#[error("failed to write the interval log {}: {cause}", path.display())]
pub struct HdrLogError {
    path: PathBuf,
    cause: io::Error,
}

/// Writes until it is finished or dropped.
#[derive(Debug)]
pub struct HdrLog {
    finish: Option<oneshot::Sender<Arc<Snapshot>>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    failing: AtomicBool,
    failures: AtomicU64,
}

impl HdrLog {
    /// Begins a new file, the one there becoming `FILE.1`, and starts the thread.
    ///
    /// # Errors
    /// The file cannot be made, or is something else than a file.
    pub fn start(config: HdrLogConfig, snapshots: Snapshots) -> Result<Self, HdrLogError> {
        let interval = Duration::from_nanos(config.interval.0);
        let path = config.file.clone();
        let failed = |cause| HdrLogError { path: path.clone(), cause };
        let mut files = Files { config, current: None };
        files.begin().map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.map_err(failed)?;
        let (finish, finished) = oneshot::channel();
        let shared = Arc::<Shared>::default();
        let mut writer = Writer { files, intervals: Intervals::default(), shared: shared.clone() };
        let thread = std::thread::Builder::new().name("formtune-hdr".into());
        let thread = thread
            .spawn(move || runtime.block_on(writer.run(interval, snapshots, finished)))
            .map_err(failed)?;
        Ok(Self { finish: Some(finish), thread: Some(thread), shared })
    }

    /// Whether it is written now.
    pub fn state(&self) -> HdrLogState {
        HdrLogState {
            failing: self.shared.failing.load(Ordering::Relaxed),
            failures: self.shared.failures.load(Ordering::Relaxed),
        }
    }

    /// Ends it with an interval up to this last snapshot.
    pub fn finish(mut self, last: Arc<Snapshot>) {
        if let Some(finish) = self.finish.take() {
            // A thread that is gone has said why.
            let _ = finish.send(last);
        }
    }
}

impl Drop for HdrLog {
    fn drop(&mut self) {
        drop(self.finish.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Writer {
    files: Files,
    intervals: Intervals,
    shared: Arc<Shared>,
}

impl Writer {
    async fn run(
        &mut self,
        interval: Duration,
        snapshots: Snapshots,
        mut finished: oneshot::Receiver<Arc<Snapshot>>,
    ) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                last = &mut finished => {
                    if let Ok(last) = last {
                        self.note(Histograms::of(&last, None));
                    }
                    return;
                }
                _ = ticks.tick() => {}
            }
            // A loop that does not answer is reported by `/healthz`; the interval gets longer.
            if let Ok(snapshot) = snapshots.get().await {
                self.note(Histograms::of(&snapshot, None));
            }
        }
    }

    fn note(&mut self, now: Histograms) {
        let written =
            self.intervals.lines(&now).and_then(|lines| self.files.append(&lines, || head(&now)));
        match written {
            Ok(()) => {
                self.intervals.begin(now);
                if self.shared.failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("the interval log is written again; no counts were lost");
                }
            }
            Err(error) => {
                self.shared.failures.fetch_add(1, Ordering::Relaxed);
                if !self.shared.failing.swap(true, Ordering::Relaxed) {
                    let file = self.files.config.file.display();
                    tracing::error!(
                        "failed to write the interval log {file}: {error}; trying again with \
                         every interval"
                    );
                }
            }
        }
    }
}

/// The file at hand and its elders.
struct Files {
    config: HdrLogConfig,
    /// With its length, as far as it was written whole.
    current: Option<(File, u64)>,
}

impl Files {
    /// Appends whole lines, to a new file where this one would get too long.
    fn append(
        &mut self,
        lines: &[u8],
        head: impl FnOnce() -> io::Result<Vec<u8>>,
    ) -> io::Result<()> {
        let (_, length) = self.begin()?;
        if *length > 0 && *length + lines.len() as u64 > self.config.max_bytes {
            self.current = None;
        }
        let (file, length) = self.begin()?;
        let mut text = if *length == 0 { head()? } else { Vec::new() };
        text.extend_from_slice(lines);
        match file.write_all(&text) {
            Ok(()) => {
                *length += text.len() as u64;
                Ok(())
            }
            Err(error) => {
                // Half a line would spoil the log for every reader; a cut needs no room.
                if file.set_len(*length).is_err() {
                    self.current = None;
                }
                Err(error)
            }
        }
    }

    /// The file at hand, or else a new one.
    fn begin(&mut self) -> io::Result<&mut (File, u64)> {
        if self.current.is_none() {
            let path = &self.config.file;
            match fs::symlink_metadata(path) {
                Ok(there) if !there.is_file() => {
                    return Err(io::Error::other("there is something else than a file"));
                }
                Ok(there) if there.len() > 0 => self.make_room()?,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            let mut options = OpenOptions::new();
            let file = options.append(true).create(true).mode(0o640).open(&self.config.file)?;
            self.current = Some((file, 0));
        }
        self.current.as_mut().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Moves every file on by one; the eldest is removed.
    fn make_room(&self) -> io::Result<()> {
        let Self { config: HdrLogConfig { file, keep, .. }, .. } = self;
        if *keep == 0 {
            return fs::remove_file(file);
        }
        for age in (1..*keep).rev() {
            match fs::rename(aged(file, age), aged(file, age + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(file, aged(file, 1))
    }
}

fn aged(file: &Path, age: u32) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{age}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path, max_bytes: u64, keep: u32) -> Files {
        let file = folder.join("latency.hlog");
        let interval = Nanos::from_secs(1);
        Files { config: HdrLogConfig { file, interval, max_bytes, keep }, current: None }
    }

    fn head() -> io::Result<Vec<u8>> {
        Ok(b"#head\n".to_vec())
    }

    #[test]
    fn files_rotate_by_size_and_the_eldest_goes() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = files(folder.path(), 20, 2);
        for line in ["one one\n", "two\n", "three three\n", "four four four four\n", "five\n"] {
            files.append(line.as_bytes(), head).unwrap();
        }
        let file = &files.config.file;
        let text = |path: &Path| fs::read_to_string(path).unwrap();
        assert_eq!(text(file), "#head\nfive\n");
        assert_eq!(text(&aged(file, 1)), "#head\nfour four four four\n", "longer than a file");
        assert_eq!(text(&aged(file, 2)), "#head\nthree three\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn the_log_of_an_earlier_agent_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        files(folder.path(), 1_000, 1).append(b"old\n", head).unwrap();
        let mut files = files(folder.path(), 1_000, 1);
        files.append(b"new\n", head).unwrap();
        let file = &files.config.file;
        assert_eq!(fs::read(file).unwrap(), b"#head\nnew\n");
        assert_eq!(fs::read(aged(file, 1)).unwrap(), b"#head\nold\n");
    }

    #[test]
    fn what_is_not_a_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = files(folder.path(), 1_000, 1);
        std::os::unix::fs::symlink("/dev/full", &files.config.file).unwrap();
        assert!(files.append(b"x\n", head).is_err());
        assert!(files.config.file.is_symlink());
    }
}
