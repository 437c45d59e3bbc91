//! Ethernet frames with TCP segments, byte by byte.

/// A segment to be put into a frame. Ports are 4,000 and 5,000.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    /// Tells flows apart: the last byte of the sender's address.
    pub flow: u16,
    /// Sequence number.
    pub seq: u32,
    /// Payload, bytes.
    pub len: u16,
    /// TCP flags.
    pub flags: u8,
}

impl Wire {
    /// Data of a flow.
    pub fn data(flow: u16, seq: u32, len: u16) -> Self {
        Self { flow, seq, len, flags: 0x10 }
    }

    fn tcp(&self) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(4_000_u16.to_be_bytes());
        tcp.extend(5_000_u16.to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.resize(20 + usize::from(self.len), 0xaa);
        tcp
    }

    /// In IPv4.
    pub fn v4(&self) -> Vec<u8> {
        let mut frame = ethernet(&[]);
        frame.extend(0x0800_u16.to_be_bytes());
        frame.extend(self.packet_v4());
        frame
    }

    /// In IPv4 behind VLAN tags.
    pub fn v4_tagged(&self, tags: &[u16]) -> Vec<u8> {
        let mut frame = ethernet(tags);
        frame.extend(0x0800_u16.to_be_bytes());
        frame.extend(self.packet_v4());
        frame
    }

    fn packet_v4(&self) -> Vec<u8> {
        let tcp = self.tcp();
        let [high, low] = self.flow.to_be_bytes();
        let mut ip = vec![0x45, 0];
        ip.extend((20 + tcp.len() as u16).to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 9, high, low, 10, 8, 0, 1]);
        ip.extend(tcp);
        ip
    }

    /// In IPv6, behind extension headers of 8 bytes each: 0 (hop by hop), 43, 60.
    pub fn v6(&self, extensions: &[u8]) -> Vec<u8> {
        let tcp = self.tcp();
        let mut frame = ethernet(&[]);
        frame.extend(0x86dd_u16.to_be_bytes());
        frame.extend([0x60, 0, 0, 0]);
        frame.extend((8 * extensions.len() as u16 + tcp.len() as u16).to_be_bytes());
        let chain: Vec<u8> = extensions.iter().copied().chain([6]).collect();
        frame.extend([chain[0], 64]);
        let [high, low] = self.flow.to_be_bytes();
        frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, high, low]);
        frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        for next in &chain[1..] {
            frame.extend([*next, 0, 1, 4, 0, 0, 0, 0]);
        }
        frame.extend(tcp);
        frame
    }
}

/// Addresses (to all, so that nobody forwards it) and VLAN tags.
fn ethernet(tags: &[u16]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    for tag in tags {
        frame.extend(0x8100_u16.to_be_bytes());
        frame.extend(tag.to_be_bytes());
    }
    frame
}
