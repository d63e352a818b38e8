//! What QUIC adds to datagrams of membership: headers, tags and acknowledgements, as quinn sends them.
//!
//! A datagram is acknowledged with whatever is sent back within 25 ms, else by a packet of its own, and
//! at once when a second one comes before that (RFC 9000, section 13.2; quinn-proto 0.11). Real nodes
//! send about a tenth more (docs/membership.md): acknowledgements carry ECN counts and several ranges.

use std::collections::HashMap;

use protocol::random::mix;

use crate::actor::NodeIndex;
use crate::world::HEADERS_BYTES;

/// Counts what each node would send beyond its datagrams.
#[derive(Debug)]
pub struct QuicCosts {
    added: Vec<u64>,
    /// By (who must acknowledge, whom): when it does at the latest. Never walked but at the end.
    owed: HashMap<(NodeIndex, NodeIndex), u64, Mixed>,
}

impl QuicCosts {
    pub fn new(nodes: usize) -> Self {
        QuicCosts { added: vec![0; nodes], owed: HashMap::default() }
    }

    /// A datagram leaves; it takes along what is owed to the receiver.
    pub fn sent(&mut self, now: u64, from: NodeIndex, to: NodeIndex, bytes: usize) {
        let length = if bytes < 64 { 1 } else { 2 };
        self.added[from as usize] += PACKET_BYTES + FRAME_TYPE_BYTES + length;
        if let Some(due) = self.owed.remove(&(from, to)) {
            let bundled = due > now;
            self.added[from as usize] += if bundled { ACK_BYTES } else { ACK_PACKET_BYTES };
        }
    }

    /// A datagram arrives.
    pub fn received(&mut self, now: u64, from: NodeIndex, by: NodeIndex) {
        match self.owed.remove(&(by, from)) {
            // It was acknowledged when its time had come, and this one waits anew.
            Some(due) if due <= now => {
                self.added[by as usize] += ACK_PACKET_BYTES;
                self.owed.insert((by, from), now + ACK_DELAY_NANOS);
            }
            // The second one: both at once.
            Some(_) => self.added[by as usize] += ACK_PACKET_BYTES,
            None => {
                self.owed.insert((by, from), now + ACK_DELAY_NANOS);
            }
        }
    }

    /// Bytes that QUIC added at each node.
    pub fn end(mut self, now: u64) -> Vec<u64> {
        for ((by, _), due) in self.owed.drain() {
            if due <= now {
                self.added[by as usize] += ACK_PACKET_BYTES;
            }
        }
        self.added
    }
}

/// A hash for pairs of nodes.
#[derive(Clone, Copy, Debug, Default)]
struct Mixed(u64);

impl std::hash::BuildHasher for Mixed {
    type Hasher = Mixed;

    fn build_hasher(&self) -> Mixed {
        *self
    }
}

impl std::hash::Hasher for Mixed {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = mix(self.0 ^ u64::from(*byte)));
    }

    fn write_u32(&mut self, word: u32) {
        self.0 = mix(self.0 ^ u64::from(word));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// First byte, connection id, packet number of one byte, tag.
const PACKET_BYTES: u64 = 1 + 8 + 1 + 16;
const FRAME_TYPE_BYTES: u64 = 1;
/// Type, largest packet (two bytes), delay (two bytes), number of ranges, first range.
const ACK_BYTES: u64 = 7;
/// A packet that acknowledges and does nothing else.
const ACK_PACKET_BYTES: u64 = HEADERS_BYTES + PACKET_BYTES + ACK_BYTES;
/// RFC 9000, section 18.2: `max_ack_delay`.
const ACK_DELAY_NANOS: u64 = 25_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgements_ride_where_they_can() {
        const MS: u64 = 1_000_000;
        let packet = PACKET_BYTES + FRAME_TYPE_BYTES + 1;
        // A ping, its answer at once, and the acknowledgement of the answer alone.
        let mut quic = QuicCosts::new(2);
        quic.sent(0, 0, 1, 9);
        quic.received(10 * MS, 0, 1);
        quic.sent(10 * MS, 1, 0, 9);
        quic.received(20 * MS, 1, 0);
        assert_eq!(quic.end(100 * MS), [packet + ACK_PACKET_BYTES, packet + ACK_BYTES]);
        // Too late to ride; and two that come together.
        let mut quic = QuicCosts::new(2);
        quic.received(0, 0, 1);
        quic.sent(30 * MS, 1, 0, 9);
        quic.received(40 * MS, 1, 0);
        quic.received(41 * MS, 1, 0);
        assert_eq!(quic.end(42 * MS), [ACK_PACKET_BYTES, packet + ACK_PACKET_BYTES]);
    }
}
