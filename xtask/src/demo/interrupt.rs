//! Ctrl-C and SIGTERM as an ordinary error, so that guards run on the way out and nothing
//! stays behind.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often a wait looks at the flag and renews its progress line.
const POLL: Duration = Duration::from_millis(50);

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: nix::libc::c_int) {
    ASKED.store(true, Ordering::SeqCst);
}

/// From now on SIGINT, SIGTERM and SIGHUP only set the flag that [`check`] and [`until`] read.
///
/// # Errors
/// When the kernel refuses the handler.
pub fn catch() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }
            .with_context(|| format!("failed to catch {signal}"))?;
    }
    Ok(())
}

/// An error once somebody asked to stop.
///
/// # Errors
/// See above.
pub fn check() -> Result<()> {
    if ASKED.load(Ordering::SeqCst) {
        bail!("interrupted");
    }
    Ok(())
}

/// Waits, calling `tick` now and then.
///
/// # Errors
/// When interrupted.
pub fn wait(length: Duration, mut tick: impl FnMut()) -> Result<()> {
    let end = Instant::now() + length;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        check()?;
        tick();
        std::thread::sleep(left.min(POLL));
    }
    check()
}

/// Asks `question` every 50 ms until it answers or the time is over.
///
/// # Errors
/// When it is over (the error says for `what` it waited), when interrupted, and what
/// `question` fails with.
pub fn until<T>(
    limit: Duration,
    what: &str,
    mut question: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        check()?;
        if let Some(answer) = question()? {
            return Ok(answer);
        }
        if Instant::now() >= end {
            bail!("{what} did not happen within {} s", limit.as_secs());
        }
        std::thread::sleep(POLL);
    }
}
