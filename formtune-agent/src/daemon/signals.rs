//! Signals: the first asks the loop to restore and stop, a second one ends the process at
//! once, whatever the loop is doing; the next start restores then.

use nix::sys::signal::{SigSet, SigmaskHow, Signal as Nix, pthread_sigmask};
use std::fmt;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// What follows the first signal within this time is the same wish: timeout(1) signals its
/// child and then the whole group, a terminal signals it beside a wrapper that passes it on.
const SAME_WISH: Duration = Duration::from_secs(1);

/// Why the loop stops.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signal(Nix);

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// Blocks the signals in this thread, hence in those it starts, and waits for them in one
/// of its own.
pub(super) fn catch() -> std::io::Result<mpsc::UnboundedReceiver<Signal>> {
    // SIGHUP too: a terminal that is closed must not leave knobs turned.
    let signals: SigSet = [Nix::SIGTERM, Nix::SIGINT, Nix::SIGHUP].into_iter().collect();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)?;
    let (stop, stops) = mpsc::unbounded_channel();
    std::thread::Builder::new().name("formtune-signal".into()).spawn(move || {
        let mut asked: Option<Instant> = None;
        while let Ok(signal) = signals.wait() {
            let Some(asked) = asked else {
                asked = Some(Instant::now());
                let _ = stop.send(Signal(signal));
                continue;
            };
            if asked.elapsed() > SAME_WISH {
                eprintln!(
                    "formtune: {} again: leaving at once; `formtune restore` puts the knobs back",
                    signal.as_str()
                );
                // SAFETY: `_exit` takes no locks and runs no destructors, which is the point.
                unsafe { nix::libc::_exit(2) };
            }
        }
    })?;
    Ok(stops)
}
