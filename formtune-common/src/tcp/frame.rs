//! From an Ethernet frame to its TCP segment.
//!
//! IPv4 and IPv6 (with up to [`MAX_EXTENSIONS`] extension headers), up to [`MAX_TAGS`] VLAN
//! tags in the frame. Written over [`Bytes`], so that the kernel side reads packets in place
//! and tests read slices.

use super::flow::Segment;

/// TCP flags.
pub const FIN: u8 = 1;
/// TCP flags.
pub const SYN: u8 = 2;
/// TCP flags.
pub const RST: u8 = 4;

/// Extension headers that are looked behind.
pub const MAX_EXTENSIONS: usize = 4;
/// VLAN tags that are looked behind.
pub const MAX_TAGS: usize = 2;
/// No header is looked for from here on.
pub const MAX_DEPTH: usize = 256;
/// Longest header that is asked for at once, bytes.
pub const MAX_HEADER: usize = 40;

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// 802.1Q and 802.1ad.
const VLAN: [u16; 2] = [0x8100, 0x88a8];
const TCP: u8 = 6;

/// A frame, or the readable beginning of one.
pub trait Bytes {
    /// Part of it.
    type Header: Header;
    /// `len` bytes from `at` on; `None` where it ends before. `at` is less than
    /// [`MAX_DEPTH`], `len` at most [`MAX_HEADER`].
    fn header(&self, at: usize, len: usize) -> Option<Self::Header>;
}

/// Bytes that are there; `at` and what is read from there lie within what was asked for.
pub trait Header: Copy {
    /// One byte.
    fn u8(self, at: usize) -> u8;
    /// Big-endian.
    fn u16(self, at: usize) -> u16;
    /// Big-endian.
    fn u32(self, at: usize) -> u32;
}

impl<'a> Bytes for &'a [u8] {
    type Header = &'a [u8];
    #[inline(always)]
    fn header(&self, at: usize, len: usize) -> Option<&'a [u8]> {
        self.get(at..at.checked_add(len)?)
    }
}

impl Header for &[u8] {
    #[inline(always)]
    fn u8(self, at: usize) -> u8 {
        self[at]
    }
    #[inline(always)]
    fn u16(self, at: usize) -> u16 {
        u16::from_be_bytes([self[at], self[at + 1]])
    }
    #[inline(always)]
    fn u32(self, at: usize) -> u32 {
        u32::from_be_bytes([self[at], self[at + 1], self[at + 2], self[at + 3]])
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A TCP segment.
    Tcp {
        /// Stands for the flow: its addresses, ports and VLAN, mixed with a seed. Never 0.
        key: u64,
        /// The segment.
        segment: Segment,
    },
    /// Not TCP.
    Other,
    /// It ends in the middle of a header.
    Short,
    /// It claims to be TCP, and is a fragment, or false, or has too many headers.
    Unread,
}

/// What is known of a frame besides its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// Its length, of which less may be readable.
    pub len: u32,
    /// Payload of each segment that it is made up of; 0: it is one.
    pub mss: u32,
    /// Its VLAN where the tag is not in the frame, and whatever else tells flows apart.
    pub apart: u32,
    /// Makes keys that nobody can foresee.
    pub seed: u64,
}

/// Reads a frame.
#[inline(always)]
pub fn read<B: Bytes>(frame: &B, about: &About) -> Frame {
    let Some(ethernet) = frame.header(0, ETHERNET) else { return Frame::Short };
    let mut kind = ethernet.u16(12);
    let mut at = ETHERNET;
    let mut key = mix(about.seed, about.apart.into());
    for _ in 0..MAX_TAGS {
        if kind != VLAN[0] && kind != VLAN[1] {
            break;
        }
        let Some(tag) = frame.header(at, 4) else { return Frame::Short };
        key = mix(key, (tag.u16(0) & 0xfff).into());
        kind = tag.u16(2);
        at += 4;
    }
    match kind {
        IPV4 => read_v4(frame, about, at, key),
        IPV6 => read_v6(frame, about, at, key),
        _ => Frame::Other,
    }
}

/// Reads a frame that is all there.
pub fn read_slice(frame: &[u8]) -> Frame {
    read(&frame, &About { len: frame.len() as u32, ..About::default() })
}

#[inline(always)]
fn read_v4<B: Bytes>(frame: &B, about: &About, at: usize, key: u64) -> Frame {
    let Some(ip) = frame.header(at, 20) else { return Frame::Short };
    if ip.u8(9) != TCP {
        return Frame::Other;
    }
    let header = u32::from(ip.u8(0) & 15) * 4;
    // A fragment: the first has more behind it, the others an offset.
    if ip.u8(0) >> 4 != 4 || header < 20 || ip.u16(6) & 0x3fff != 0 {
        return Frame::Unread;
    }
    let key = mix(key, u64::from(ip.u32(12)) << 32 | u64::from(ip.u32(16)));
    let there = about.len.saturating_sub(at as u32);
    // More than fits into 16 bits (BIG TCP) is written as 0.
    let total = match ip.u16(2) {
        0 if about.mss > 0 => there,
        total => total.into(),
    };
    if total > there || total < header {
        return Frame::Unread;
    }
    read_tcp(frame, about, at + header as usize, total - header, key)
}

#[inline(always)]
fn read_v6<B: Bytes>(frame: &B, about: &About, at: usize, key: u64) -> Frame {
    let Some(ip) = frame.header(at, 40) else { return Frame::Short };
    let mut key = key;
    let mut half = 8;
    while half < 40 {
        key = mix(key, u64::from(ip.u32(half)) << 32 | u64::from(ip.u32(half + 4)));
        half += 8;
    }
    let there = about.len.saturating_sub(at as u32 + 40);
    let mut payload = match ip.u16(4) {
        0 if about.mss > 0 => there,
        payload => payload.into(),
    };
    let mut next = ip.u8(6);
    let mut at = at + 40;
    let false_header = ip.u8(0) >> 4 != 6 || payload > there;
    for _ in 0..MAX_EXTENSIONS {
        if next == TCP {
            break;
        }
        // Hop-by-hop, routing, fragment, authentication, destination options (RFC 8200).
        if !matches!(next, 0 | 43 | 44 | 51 | 60) {
            return Frame::Other;
        }
        if at >= MAX_DEPTH {
            return Frame::Unread;
        }
        let Some(extension) = frame.header(at, 8) else { return Frame::Short };
        let length = match next {
            44 if extension.u16(2) & 0xfff9 != 0 => return fragment(extension.u8(0)),
            44 => 8,
            51 => (u32::from(extension.u8(1)) + 2) * 4,
            _ => (u32::from(extension.u8(1)) + 1) * 8,
        };
        next = extension.u8(0);
        if length > payload {
            return if next == TCP { Frame::Unread } else { Frame::Other };
        }
        payload -= length;
        at += length as usize;
    }
    if next != TCP || false_header {
        return Frame::Unread;
    }
    read_tcp(frame, about, at, payload, key)
}

/// One of several pieces, of what is said to be in it.
#[inline(always)]
fn fragment(next: u8) -> Frame {
    if next == TCP { Frame::Unread } else { Frame::Other }
}

#[inline(always)]
fn read_tcp<B: Bytes>(frame: &B, about: &About, at: usize, length: u32, key: u64) -> Frame {
    if at >= MAX_DEPTH {
        return Frame::Unread;
    }
    let Some(tcp) = frame.header(at, 20) else { return Frame::Short };
    let header = u32::from(tcp.u8(12) >> 4) * 4;
    if header < 20 || header > length {
        return Frame::Unread;
    }
    let key = mix(key, tcp.u32(0).into());
    let segment =
        Segment { seq: tcp.u32(4), len: length - header, flags: tcp.u8(13), mss: about.mss };
    // 0 stands for no flow.
    Frame::Tcp { key: if key == 0 { 1 } else { key }, segment }
}

/// Mixes 64 bits into a key: a multiplication and a shift spread each over all higher and
/// lower bits; the constant is that of splitmix64.
#[inline(always)]
const fn mix(key: u64, word: u64) -> u64 {
    let mixed = (key ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ mixed >> 32
}

#[cfg(test)]
mod tests;
