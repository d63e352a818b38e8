//! What the data plane's connections with members put on the wire.

use std::ops::AddAssign;

use super::quic::Link;
use crate::metrics::Sample;

/// UDP packets and the bytes in them, without headers of UDP and IP. What is carried by another
/// connection counts on both.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Traffic {
    sent: (u64, u64),
    received: (u64, u64),
}

impl Traffic {
    pub fn of(link: &Link) -> Traffic {
        let stats = link.stats();
        let figures = |of: quinn::UdpStats| (of.datagrams, of.bytes);
        Traffic { sent: figures(stats.udp_tx), received: figures(stats.udp_rx) }
    }

    pub fn samples(&self) -> impl Iterator<Item = Sample> {
        [("out", self.sent), ("in", self.received)].into_iter().flat_map(
            |(direction, (packets, bytes))| {
                let sample =
                    |name, n: u64| Sample::labelled(name, "direction", direction, n as f64);
                [
                    sample("grapevine_mesh_udp_packets_total", packets),
                    sample("grapevine_mesh_udp_bytes_total", bytes),
                ]
            },
        )
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Traffic) {
        let add = |(a, b): &mut (u64, u64), (c, d): (u64, u64)| (*a, *b) = (*a + c, *b + d);
        add(&mut self.sent, other.sent);
        add(&mut self.received, other.received);
    }
}
