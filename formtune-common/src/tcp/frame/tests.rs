use super::super::TapControl;
use super::*;
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

/// A TCP header of 20 bytes, with payload.
fn tcp(len: usize) -> Vec<u8> {
    let mut tcp = vec![0x0f, 0xa0, 0x13, 0x88, 1, 2, 3, 4, 0, 0, 0, 0, 0x50, 0x18];
    tcp.resize(20 + len, 0);
    tcp
}

fn ethernet(tags: &[u16], kind: u16) -> Vec<u8> {
    let mut frame = vec![0; 12];
    for tag in tags {
        frame.extend([0x81, 0]);
        frame.extend(tag.to_be_bytes());
    }
    frame.extend(kind.to_be_bytes());
    frame
}

fn v4(tags: &[u16], options: usize, payload: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(tags, 0x0800);
    frame.extend([0x45 + options as u8, 0]);
    frame.extend(((20 + 4 * options + payload.len()) as u16).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(vec![1; 4 * options]);
    frame.extend(payload);
    frame
}

/// `chain`: extension headers, each with its bytes behind the first one.
fn v6(chain: &[(u8, &[u8])], payload: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(&[], 0x86dd);
    let length: usize = chain.iter().map(|(_, rest)| 1 + rest.len()).sum();
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(((length + payload.len()) as u16).to_be_bytes());
    frame.extend([chain.first().map_or(6, |(kind, _)| *kind), 64]);
    frame.extend([0xfd; 16]);
    frame.extend([0xfe; 16]);
    for (at, (_, rest)) in chain.iter().enumerate() {
        frame.push(chain.get(at + 1).map_or(6, |(kind, _)| *kind));
        frame.extend(*rest);
    }
    frame.extend(payload);
    frame
}

fn segment(frame: &[u8]) -> Segment {
    match read_slice(frame) {
        Frame::Tcp { segment, .. } => segment,
        other => panic!("{other:?}"),
    }
}

fn key(frame: &[u8], about: About) -> u64 {
    match read(&frame, &About { len: frame.len() as u32, ..about }) {
        Frame::Tcp { key, .. } => key,
        other => panic!("{other:?}"),
    }
}

const EXPECTED: Segment = Segment { seq: 0x0102_0304, len: 33, flags: 0x18, mss: 0 };

#[test]
fn a_segment_is_found_in_every_wrapping() {
    let options: [u8; 15] = [1; 15];
    let long = &[&[1], &options[..14]].concat()[..];
    let extension: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    for frame in [
        v4(&[], 0, &tcp(33)),
        v4(&[7], 0, &tcp(33)),
        v4(&[7, 9], 10, &tcp(33)),
        v6(&[], &tcp(33)),
        v6(&[(0, extension), (43, long), (60, extension)], &tcp(33)),
        // Authentication counts in words of four.
        v6(&[(51, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])], &tcp(33)),
        // A packet that was made a fragment of, with nothing behind it.
        v6(&[(44, &[0, 0, 0, 9, 9, 9, 9])], &tcp(33)),
    ] {
        assert_eq!(segment(&frame), EXPECTED);
        // What fills a short frame up is no payload.
        assert_eq!(segment(&[frame, vec![0; 20]].concat()), EXPECTED);
    }
}

#[test]
fn what_cannot_be_read_is_told_from_what_is_no_tcp() {
    let udp = |mut frame: Vec<u8>, at: usize| {
        frame[at] = 17;
        read_slice(&frame)
    };
    assert_eq!(udp(v4(&[], 0, &tcp(0)), 14 + 9), Frame::Other);
    assert_eq!(udp(v6(&[], &tcp(0)), 14 + 6), Frame::Other);
    assert_eq!(read_slice(&ethernet(&[], 0x0806)), Frame::Other);
    assert_eq!(read_slice(&ethernet(&[1, 2, 3], 0x0800)), Frame::Other, "three tags");

    let with = |at: usize, value: u8| {
        let mut frame = v4(&[], 0, &tcp(33));
        frame[at] = value;
        read_slice(&frame)
    };
    assert_eq!(with(14 + 6, 0x20), Frame::Unread, "the first fragment");
    assert_eq!(with(14 + 7, 8), Frame::Unread, "another fragment");
    assert_eq!(with(14, 0x44), Frame::Unread, "an IP header of 16 bytes");
    assert_eq!(with(14, 0x55), Frame::Unread, "version 5");
    assert_eq!(with(14 + 2, 9), Frame::Unread, "longer than the frame");
    assert_eq!(with(14 + 3, 30), Frame::Unread, "too short for both headers");
    assert_eq!(with(14 + 20 + 12, 0x40), Frame::Unread, "a TCP header of 16 bytes");
    assert_eq!(with(14 + 20 + 12, 0xf0), Frame::Unread, "a TCP header of 60 bytes");

    let extension: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    let deep = v6(&[(0, extension), (60, extension), (43, extension), (60, extension)], &tcp(1));
    assert!(matches!(read_slice(&deep), Frame::Tcp { .. }));
    let deeper = v6(&[(60, extension); 5], &tcp(1));
    assert_eq!(read_slice(&deeper), Frame::Unread);
    assert_eq!(read_slice(&v6(&[(44, &[0, 0, 1, 0, 0, 0, 0])], &tcp(1))), Frame::Unread);
    assert_eq!(read_slice(&v6(&[(0, &[200, 1, 4, 0, 0, 0, 0])], &tcp(1))), Frame::Unread);
}

#[test]
fn a_large_packet_without_a_length_has_that_of_its_frame() {
    for (mut frame, at) in [(v4(&[], 0, &tcp(300)), 14 + 2), (v6(&[], &tcp(300)), 14 + 4)] {
        frame[at..at + 2].fill(0);
        let about = About { len: frame.len() as u32, mss: 100, ..About::default() };
        let Frame::Tcp { segment, .. } = read(&&frame[..], &about) else { panic!("no TCP") };
        assert_eq!((segment.len, segment.count()), (300, 3));
        assert_eq!(read_slice(&frame), Frame::Unread, "one that is not large");
    }
}

#[test]
fn keys_tell_flows_apart() {
    let base = v4(&[], 0, &tcp(1));
    let mut keys = vec![key(&base, About::default())];
    // Addresses and ports.
    for at in [14 + 12, 14 + 19, 34, 37] {
        let mut frame = base.clone();
        frame[at] ^= 1;
        keys.push(key(&frame, About::default()));
    }
    keys.push(key(&v4(&[5], 0, &tcp(1)), About::default()));
    keys.push(key(&base, About { apart: 1, ..About::default() }));
    keys.push(key(&base, About { seed: 1 << 40, ..About::default() }));
    keys.push(key(&v6(&[], &tcp(1)), About::default()));
    for (at, key) in keys.iter().enumerate() {
        assert!(!keys[..at].contains(key), "{at}");
    }
    let mut other_segment = base.clone();
    other_segment[38..50].fill(9);
    other_segment[46] = 0x50;
    assert_eq!(key(&other_segment, About::default()), keys[0]);
}

/// One flow in 2^k is followed, whichever they are: what they send again, times 2^k, is what
/// all of them do.
#[test]
fn sampling_is_without_bias() {
    const FLOWS: u32 = 1 << 16;
    for (seed, sampling_shift) in [(1, 1), (2, 3), (3, 5), (4, 5)] {
        let control = TapControl { sampling_shift, epoch: 0 };
        let (mut truth, mut counted) = (0_u64, 0_u64);
        let mut frame = v4(&[], 0, &tcp(1));
        for flow in 0..FLOWS {
            frame[14 + 12..14 + 16].copy_from_slice(&flow.to_be_bytes());
            // Some flows lose more than others.
            let again = u64::from(flow % 7);
            truth += again;
            if control.follows(key(&frame, About { seed, ..About::default() })) {
                counted += again << sampling_shift;
            }
        }
        // Three standard deviations of a sum over a random one in 2^k of the flows.
        let squares: f64 = (0..FLOWS).map(|flow| f64::from(flow % 7).powi(2)).sum();
        let deviation = (squares * f64::from((1 << sampling_shift) - 1)).sqrt();
        let error = counted as f64 - truth as f64;
        assert!(error.abs() < 3.0 * deviation, "{counted} for {truth} at shift {sampling_shift}");
    }
}

proptest! {
    /// Whatever the bytes, an answer and no panic; and never a segment that is not there.
    #[test]
    fn any_bytes_are_read(
        flips in proptest::collection::vec((0_usize..120, any::<u8>()), 0..6),
        six in any::<bool>(),
        cut in 0_usize..140,
        mss in prop_oneof![Just(0_u32), 1..2_000_u32],
    ) {
        let extension: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
        let mut frame =
            if six { v6(&[(0, extension), (60, extension)], &tcp(20)) } else { v4(&[7], 2, &tcp(20)) };
        for (at, value) in flips {
            let at = at % frame.len();
            frame[at] = value;
        }
        let len = frame.len() as u32;
        let about = About { len, mss, ..About::default() };
        let whole = read(&&frame[..], &about);
        if let Frame::Tcp { segment, key } = whole {
            prop_assert!(key != 0 && segment.len <= len);
        }
        // With less of it readable the same, or that it is too short to tell.
        frame.truncate(cut);
        let part = read(&&frame[..], &about);
        prop_assert!(part == whole || part == Frame::Short, "{:?} {:?}", part, whole);
    }

    #[test]
    fn no_bytes_at_all_make_sense_of(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_slice(&bytes);
    }
}
