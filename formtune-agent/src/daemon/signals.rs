//! Signals: the first asks the loop to restore and stop, the second ends the process at
//! once, whatever the loop is doing; the next start restores then.

use nix::sys::signal::{SigSet, SigmaskHow, Signal as Nix, pthread_sigmask};
use std::fmt;
use tokio::sync::mpsc;

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
        let mut asked = false;
        while let Ok(signal) = signals.wait() {
            if std::mem::replace(&mut asked, true) {
                eprintln!(
                    "formtune: {} again: leaving at once; `formtune restore` puts the knobs back",
                    signal.as_str()
                );
                // SAFETY: `_exit` takes no locks and runs no destructors, which is the point.
                unsafe { nix::libc::_exit(2) };
            }
            let _ = stop.send(Signal(signal));
        }
    })?;
    Ok(stops)
}
