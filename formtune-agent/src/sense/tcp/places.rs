//! Rows of the probe for tap devices: which of them nobody counts in.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// A freed place rests this long, as a packet under way may still count there.
pub const REST: Duration = Duration::from_secs(1);

/// Why a device is not looked at; one line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// More devices than places.
    #[error(
        "there is room for {0} (`max_vms`), and none for others either, until one goes; \
         `formtune_tcp_unmeasured_taps` counts them"
    )]
    NoRoom(u32),
    /// Its state, or the kernel's answer.
    #[error("{0}")]
    Other(String),
}

impl From<String> for Refused {
    fn from(why: String) -> Self {
        Self::Other(why)
    }
}

/// Places that are free or soon will be.
#[derive(Debug)]
pub struct Places {
    free: BTreeSet<u32>,
    resting: VecDeque<(Instant, u32)>,
    total: u32,
}

impl Places {
    /// So many, all free.
    pub fn new(total: u32) -> Self {
        Self { free: (0..total).collect(), resting: VecDeque::new(), total }
    }

    /// One in which nobody counts.
    ///
    /// # Errors
    /// [`Refused::NoRoom`].
    pub fn take(&mut self, now: Instant) -> Result<u32, Refused> {
        let rested = |at: &Instant| now.saturating_duration_since(*at) >= REST;
        while let Some((_, place)) = self.resting.pop_front_if(|(at, _)| rested(at)) {
            self.free.insert(place);
        }
        self.free.pop_first().ok_or(Refused::NoRoom(self.total))
    }

    /// Whether one will be free within [`REST`].
    pub fn expects(&self) -> bool {
        !self.resting.is_empty()
    }

    /// Gives back one that was looked at until now.
    pub fn free(&mut self, place: u32, now: Instant) {
        self.resting.push_back((now, place));
    }

    /// Gives back one in which nobody has counted.
    pub fn put_back(&mut self, place: u32) {
        self.free.insert(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_place_rests() {
        let mut places = Places::new(2);
        let now = Instant::now();
        assert_eq!((places.take(now), places.take(now)), (Ok(0), Ok(1)));
        assert_eq!(places.take(now), Err(Refused::NoRoom(2)));
        assert!(!places.expects());
        places.free(1, now);
        assert_eq!(places.take(now + REST / 2), Err(Refused::NoRoom(2)));
        assert!(places.expects());
        assert_eq!(places.take(now + REST), Ok(1));
        assert!(!places.expects());
        places.put_back(0);
        assert_eq!(places.take(now), Ok(0));
    }
}
