//! Which segments of a flow were sent before.
//!
//! A flow here is one direction of a connection, as it passes one point. All sequence
//! numbers below the highest one seen are known, but for *holes*: what was skipped when a
//! segment came from further ahead. The rule:
//!
//! - what was seen before is a retransmission;
//! - what fills a hole is merely late (reordered) if fewer than [`DUP_THRESH`] segments came
//!   since the one that left the hole, and within [`REORDER`]. Otherwise it is a
//!   retransmission: the receiver has sent three duplicate ACKs by then, and the sender
//!   takes the segment for lost (RFC 5681, section 3.2; RFC 6675, section 2);
//! - a byte just below the highest one is a keep-alive probe (RFC 9293, section 3.8.4);
//! - a SYN with another sequence number begins a new connection.
//!
//! So a hole need not be remembered once it is old: what fills it then is a retransmission
//! whether it was seen before or not. Each segment leaves or splits at most one hole, and
//! after three more it is old: there are never more than three young ones, and this bounded
//! state gives the answers of an unbounded one (see the tests).
//!
//! Not to be known at a single point: a loss before it behind which nothing followed (a
//! lost tail), as what fills it looks new; a probe of one byte that is in fact the last
//! byte of data sent again.

use super::frame::{FIN, RST, SYN};

/// Segments after which what is missing counts as lost.
pub const DUP_THRESH: u32 = 3;
/// Time after which what is missing counts as lost, in [`Flow::observe`]'s unit: 3.07 ms,
/// which is what Wireshark takes where it does not know the round trip.
pub const REORDER: u32 = 3_000;
/// A jump this far, either way, is no TCP window (RFC 7323, section 2.2): another connection.
const WINDOW_MAX: u32 = 1 << 30;
/// How far behind the highest sequence number a SYN may be that is the same SYN once more:
/// itself and the data sent with it (TCP Fast Open).
const SYN_BEHIND_MAX: u32 = 1 << 14;

/// A segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Sequence number.
    pub seq: u32,
    /// Payload, bytes.
    pub len: u32,
    /// [`FIN`], [`SYN`], [`RST`] and others.
    pub flags: u8,
    /// Payload of each of the segments of which this is made up (segmentation offload);
    /// 0: it is one.
    pub mss: u32,
}

impl Segment {
    /// Sequence numbers it takes up: payload, SYN and FIN. A RST's payload is text.
    #[inline(always)]
    pub fn space(&self) -> u32 {
        if self.flags & RST != 0 {
            return 0;
        }
        let one = |flag| u32::from(self.flags & flag != 0);
        self.len + one(SYN) + one(FIN)
    }

    /// Segments on the wire.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        if self.mss == 0 || self.len <= self.mss { 1 } else { self.len.div_ceil(self.mss) }
    }

    /// Of these, how many it takes for so much of its sequence space, at most `max`.
    #[inline(always)]
    fn share(&self, space: u32, max: u32) -> u32 {
        let needed = match (space, self.mss) {
            (0, _) => 0,
            (_, 0) => 1,
            (space, mss) => space.div_ceil(mss),
        };
        if needed < max { needed } else { max }
    }
}

/// What a segment is besides new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Segments sent again.
    pub retransmitted: u32,
    /// Their part of the sequence space that had been sent before.
    pub retransmitted_bytes: u32,
    /// Segments that came late.
    pub reordered: u32,
    /// It is a keep-alive probe.
    pub keep_alive: bool,
}

/// What was skipped. Empty where `start` is `end`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hole {
    /// First sequence number that is missing.
    pub start: u32,
    /// First one after it that is not.
    pub end: u32,
    /// When it was left.
    pub since: u32,
    /// Segments since.
    pub later: u32,
}

/// One flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Which one; 0: none.
    pub key: u64,
    /// When its last segment came; not used here.
    pub used: u32,
    /// The sequence number after the highest one seen.
    pub next: u32,
    /// The young holes, in no order.
    pub holes: [Hole; DUP_THRESH as usize],
}

impl Flow {
    /// Begins with its first segment: what lies before that counts as seen.
    #[inline(always)]
    pub fn begin(&mut self, first: &Segment) {
        self.next = first.seq.wrapping_add(first.space());
        self.forget_holes();
    }

    /// What the next segment is; it must take up sequence numbers. `now` is in units of
    /// 1,024 ns, may wrap around, and is asked for only out of sequence.
    #[inline(always)]
    pub fn observe(&mut self, segment: &Segment, now: impl FnOnce() -> u32) -> Seen {
        let space = segment.space();
        let ahead = segment.seq.wrapping_sub(self.next);
        if ahead == 0 && self.is_whole() {
            self.next = self.next.wrapping_add(space);
            return Seen::default();
        }
        self.observe_other(segment, space, now)
    }

    /// All but the next segment in sequence of a flow without holes.
    #[inline(always)]
    fn observe_other(&mut self, segment: &Segment, space: u32, now: impl FnOnce() -> u32) -> Seen {
        let ahead = segment.seq.wrapping_sub(self.next);
        let behind = self.next.wrapping_sub(segment.seq);
        let mut seen = Seen::default();
        if segment.flags & SYN != 0 {
            if behind.wrapping_sub(1) < SYN_BEHIND_MAX {
                seen.retransmitted = 1;
                seen.retransmitted_bytes = if space < behind { space } else { behind };
            } else {
                self.begin(segment);
            }
            return seen;
        }
        if ahead > WINDOW_MAX && behind > WINDOW_MAX {
            self.begin(segment);
            return seen;
        }
        if behind == 1 && space == 1 && segment.len == 1 {
            seen.keep_alive = true;
            return seen;
        }
        if ahead <= WINDOW_MAX {
            self.age(segment.count());
            if ahead > 0 {
                self.add(Hole { start: self.next, end: segment.seq, since: now(), later: 0 });
            }
            self.next = segment.seq.wrapping_add(space);
            return seen;
        }
        let old = if space < behind { space } else { behind };
        let (filled, mut rest) = self.fill(behind, behind - old, now());
        self.age(segment.count());
        rest.later = rest.later.saturating_add(segment.count());
        if rest.start != rest.end && rest.later < DUP_THRESH {
            self.add(rest);
        }
        if space > behind {
            self.next = segment.seq.wrapping_add(space);
        }
        let all = segment.count();
        seen.retransmitted_bytes = old - filled;
        seen.retransmitted = segment.share(seen.retransmitted_bytes, all);
        seen.reordered = segment.share(filled, all - seen.retransmitted);
        seen
    }

    /// Takes the sequence numbers from `from` to `to`, counted from `next` downwards, out of
    /// the young holes. Returns how many there were, and the second part of a hole that was
    /// split (at most one is, as a segment is of one piece).
    #[inline(always)]
    fn fill(&mut self, from: u32, to: u32, now: u32) -> (u32, Hole) {
        let (mut filled, mut rest) = (0, Hole::default());
        let next = self.next;
        for hole in &mut self.holes {
            // Counted downwards nothing wraps around.
            let (top, bottom) = (next.wrapping_sub(hole.start), next.wrapping_sub(hole.end));
            let begin = if from < top { from } else { top };
            let end = if to > bottom { to } else { bottom };
            if begin <= end || now.wrapping_sub(hole.since) >= REORDER {
                continue;
            }
            filled += begin - end;
            if begin == top {
                hole.start = next.wrapping_sub(end);
            } else {
                if end != bottom {
                    rest = Hole { start: next.wrapping_sub(end), ..*hole };
                }
                hole.end = next.wrapping_sub(begin);
            }
        }
        (filled, rest)
    }

    /// Notes that so many segments came, and forgets the holes that are old now.
    #[inline(always)]
    fn age(&mut self, count: u32) {
        for hole in &mut self.holes {
            if hole.start != hole.end {
                hole.later = hole.later.saturating_add(count);
                if hole.later >= DUP_THRESH {
                    hole.end = hole.start;
                }
            }
        }
    }

    /// Adds a hole. There is always room (see the module), which the tests check.
    #[inline(always)]
    fn add(&mut self, new: Hole) {
        for hole in &mut self.holes {
            if hole.start == hole.end {
                *hole = new;
                return;
            }
        }
        debug_assert!(false, "no room for a hole");
    }

    /// Whether there is no young hole.
    #[inline(always)]
    fn is_whole(&self) -> bool {
        let [a, b, c] = &self.holes;
        (a.start ^ a.end) | (b.start ^ b.end) | (c.start ^ c.end) == 0
    }

    #[inline(always)]
    fn forget_holes(&mut self) {
        for hole in &mut self.holes {
            hole.end = hole.start;
        }
    }
}

#[cfg(test)]
mod tests;
