//! Frames as a guest may send them, each behind a byte with its length, and what the detector
//! of retransmissions makes of those that are TCP.
#![no_main]

use formtune_common::tcp::flow::Flow;
use formtune_common::tcp::frame::{Frame, read_slice};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut flow = Flow::default();
    let (mut rest, mut now) = (data, 0_u32);
    while let [length, after @ ..] = rest {
        let (frame, after) = after.split_at(after.len().min(usize::from(*length)));
        rest = after;
        now = now.wrapping_add(u32::from(*length));
        let Frame::Tcp { key, segment } = read_slice(frame) else { continue };
        assert_ne!(key, 0, "0 is no flow");
        if segment.space() == 0 {
            continue;
        }
        if flow.key == 0 {
            flow.key = key;
            flow.begin(&segment);
            continue;
        }
        let seen = flow.observe(&segment, || now);
        assert!(seen.retransmitted <= segment.count(), "{seen:?} of {segment:?}");
        assert!(seen.retransmitted_bytes <= segment.space(), "{seen:?} of {segment:?}");
    }
});
