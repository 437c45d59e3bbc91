//! Waiting for what the kernel or another process does in its own time.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Asks again and again until there is an answer.
///
/// # Errors
/// When `ask` fails, or there is none within `limit`: the message names `what`.
pub fn eventually<T>(
    limit: Duration,
    what: &str,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if start.elapsed() > limit {
            bail!("no {what} within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// As [`eventually`], for tests.
///
/// # Panics
/// Without an answer within `limit`.
#[track_caller]
pub fn until<T>(limit: Duration, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    match eventually(limit, what, || Ok(ask())) {
        Ok(answer) => answer,
        Err(error) => panic!("{error}"),
    }
}
