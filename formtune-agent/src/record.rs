//! Traces on disk: `run --record` writes one, `replay` reads it back.
//!
//! The types are core's ([`formtune_core::trace`]): one header, then one sample per line,
//! each a JSON object.

use formtune_common::histogram;
use formtune_core::trace::{Header, VERSION};
use formtune_core::{Plan, Sample, State, step};
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};
use serde::Serialize;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// Written out in whole lines once so much has gathered, or on [`Writer::flush`].
const BUFFER_BYTES: usize = 64 * 1024;
/// Longest line that is read: 10,000 VMs that all waited in 50 buckets stay below it.
const LINE_BYTES: u64 = 64 << 20;

/// Whether a trace can be begun at `path`, as far as that shows without a trace of the
/// question. A folder below `made_later` need not be there yet.
///
/// # Errors
/// What the system would answer to [`Writer::create`].
pub fn may_begin(path: &Path, made_later: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder.starts_with(made_later) => return Ok(()),
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        // A pipe or a device.
        Ok(found) if !found.is_file() => return may(path, AccessFlags::W_OK),
        _ => {}
    }
    if !fs::metadata(folder)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    may(folder, AccessFlags::W_OK | AccessFlags::X_OK)
}

/// Asked with the rights that the process has, not with those of who started it.
fn may(path: &Path, what: AccessFlags) -> io::Result<()> {
    Ok(faccessat(AT_FDCWD, path, what, AtFlags::AT_EACCESS)?)
}

/// Writes a trace.
#[derive(Debug)]
pub struct Writer {
    file: File,
    buffer: Vec<u8>,
}

impl Writer {
    /// Begins a trace. One that is already there is kept as `FILE.old`, replacing an older
    /// one: a restart must not cost the night that led to it.
    ///
    /// # Errors
    /// The file cannot be made or written.
    pub fn create(path: &Path, header: &Header) -> io::Result<Self> {
        if path.is_file() {
            let mut old = path.as_os_str().to_owned();
            old.push(".old");
            fs::rename(path, PathBuf::from(old))?;
        }
        let mut writer = Self { file: File::create(path)?, buffer: Vec::new() };
        writer.line(header)?;
        writer.flush()?;
        Ok(writer)
    }

    /// Adds a sample.
    ///
    /// # Errors
    /// The file cannot be written; what was written so far may end within a line.
    pub fn sample(&mut self, sample: &Sample) -> io::Result<()> {
        self.line(sample)?;
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Writes out what has gathered.
    ///
    /// # Errors
    /// As [`Writer::sample`].
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    fn line(&mut self, record: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.buffer, record)?;
        self.buffer.push(b'\n');
        Ok(())
    }
}

/// Why a trace cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("failed to read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not begin like a trace.
    #[error("{} is not a trace of formtune (`formtune run --record FILE` writes one): {why}", path.display())]
    Foreign {
        /// Which.
        path: PathBuf,
        /// What is wrong with its first line.
        why: String,
    },
    /// It was written by another version.
    #[error("{} is a trace of format {found}; this formtune reads format {VERSION}", path.display())]
    Version {
        /// Which.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// One of its lines is no sample.
    #[error("{}:{line}: damaged trace: {why}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong.
        why: String,
    },
}

/// Reads a trace and gives the plan for each of its samples, the same each time.
#[derive(Debug)]
pub struct Replay {
    path: PathBuf,
    lines: BufReader<File>,
    line: u64,
    header: Header,
    state: State,
}

impl Replay {
    /// Opens a trace and reads its header.
    ///
    /// # Errors
    /// The file cannot be read, or is no trace.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let read = |source| TraceError::Read { path: path.into(), source };
        let foreign = |why: String| TraceError::Foreign { path: path.into(), why };
        let mut lines = BufReader::new(File::open(path).map_err(read)?);
        let Some(first) = next_line(&mut lines).map_err(read)? else {
            return Err(foreign("it is empty".into()));
        };
        let value: serde_json::Value = serde_json::from_slice(&first)
            .map_err(|_| foreign("its first line is no JSON object".into()))?;
        match value.get("formtune_trace").and_then(serde_json::Value::as_u64) {
            None => return Err(foreign("its first line has no `formtune_trace`".into())),
            Some(version) if version != u64::from(VERSION) => {
                return Err(TraceError::Version { path: path.into(), found: version });
            }
            Some(_) => {}
        }
        let header: Header = serde_json::from_value(value).map_err(|error| {
            TraceError::Damaged { path: path.into(), line: 1, why: error.to_string() }
        })?;
        Ok(Self { path: path.into(), lines, line: 1, header, state: State::default() })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn next_plan(&mut self) -> Result<Option<Plan>, TraceError> {
        let path = &self.path;
        let line = next_line(&mut self.lines)
            .map_err(|source| TraceError::Read { path: path.into(), source })?;
        let Some(line) = line else { return Ok(None) };
        self.line += 1;
        let damaged = |why: String| TraceError::Damaged { path: path.into(), line: self.line, why };
        if line.last() != Some(&b'\n') {
            return Err(damaged("the last line is cut off".into()));
        }
        let sample: Sample = serde_json::from_slice(&line).map_err(|error| {
            // "… at line 1 column N": the line is always 1 here, the column is of use.
            damaged(error.to_string().replace("at line 1 column", "at column"))
        })?;
        check(&sample).map_err(damaged)?;
        Ok(Some(step(&mut self.state, &self.header.policy, &sample)))
    }
}

impl Iterator for Replay {
    type Item = Result<Plan, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_plan().transpose()
    }
}

/// What types alone do not say of a sample.
fn check(sample: &Sample) -> Result<(), String> {
    for (id, vm) in &sample.vms {
        let counts = vm.runq.iter().flat_map(|runq| &runq.counts);
        let mut last = None;
        for &(bucket, _) in counts {
            if usize::from(bucket) >= histogram::BUCKETS || last.is_some_and(|last| last >= bucket)
            {
                return Err(format!(
                    "the waits of {id} are not in ascending buckets below {}",
                    histogram::BUCKETS
                ));
            }
            last = Some(bucket);
        }
    }
    Ok(())
}

fn next_line(lines: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    io::Read::take(lines, LINE_BYTES).read_until(b'\n', &mut line)?;
    Ok((!line.is_empty()).then_some(line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use formtune_core::sample::HostSample;
    use formtune_core::trace::HostFacts;
    use formtune_core::units::Nanos;

    fn header() -> Header {
        Header::new(HostFacts::default(), Config::default().policy)
    }

    fn sample(seq: u64) -> Sample {
        Sample {
            seq,
            at: Nanos::from_millis(250 * seq),
            host: HostSample {
                cpus: 2,
                cpu_busy_ns: Some(seq),
                blind: None,
                ..HostSample::default()
            },
            vms: Default::default(),
            outcomes: Vec::new(),
        }
    }

    #[test]
    fn what_was_written_is_read_back_and_the_old_trace_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        for samples in [3, 5] {
            let mut writer = Writer::create(&path, &header()).unwrap();
            (1..=samples).for_each(|seq| writer.sample(&sample(seq)).unwrap());
            writer.flush().unwrap();
        }
        let replay = Replay::open(&path).unwrap();
        assert_eq!(replay.header(), &header());
        let plans: Vec<Plan> = replay.map(Result::unwrap).collect();
        assert_eq!(plans.iter().map(|plan| plan.seq).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert_eq!(Replay::open(&dir.path().join("trace.old")).unwrap().count(), 3);
    }

    #[test]
    fn where_a_trace_could_not_be_begun_is_told_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        let (here, state) = (dir.path(), dir.path().join("state"));
        for good in ["trace", "state/trace"].map(|name| here.join(name)) {
            may_begin(&good, &state).unwrap();
        }
        may_begin(Path::new("/dev/null"), &state).unwrap();
        fs::write(here.join("file"), "").unwrap();
        may_begin(&here.join("file"), &state).unwrap();
        for bad in ["none/trace", "file/trace", "."].map(|name| here.join(name)) {
            may_begin(&bad, &state).expect_err(&bad.display().to_string());
        }
        assert_eq!(fs::read_dir(here).unwrap().count(), 1, "something was made");
    }

    #[test]
    fn a_file_that_is_no_trace_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        let good = serde_json::to_string(&header()).unwrap();
        let a_sample = serde_json::to_string(&sample(1)).unwrap();
        let mut lines = Vec::new();
        for text in [
            String::new(),
            "#!/bin/sh\n".into(),
            "{\"a\": 1}\n".into(),
            good.replacen(":2,", ":7,", 1),
            "{\"formtune_trace\":2}\n".into(),
            format!("{good}\nnonsense\n"),
            format!("{good}\n{a_sample}\n{}", &a_sample[..20]),
            format!("{good}\n{}\n", a_sample.replace("\"vms\":{}", "\"vms\":{\"a\":{\"class\":\"c\",\"vcpus\":1,\"runq\":{\"counts\":[[60000,1]],\"wait_ns\":1}}}")),
        ] {
            std::fs::write(&path, &text).unwrap();
            let error = match Replay::open(&path) {
                Err(error) => error,
                Ok(replay) => replay.filter_map(Result::err).next().expect(&text),
            };
            lines.push(error.to_string().replace(&dir.path().display().to_string(), ""));
        }
        std::fs::write(&path, b"\xff\xfe\n").unwrap();
        lines.push(
            Replay::open(&path)
                .unwrap_err()
                .to_string()
                .replace(&dir.path().display().to_string(), ""),
        );
        insta::assert_snapshot!(lines.join("\n"));
    }
}
