//! The bounds of the data plane, and what is counted when they are met.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use protocol::carry::CarryConfig;

/// Bounds towards other nodes. Each names what happens at it.
#[derive(Clone, Debug)]
pub struct MeshLimits {
    /// Unit: connections in all, handshakes and the overlay's included; more are refused. Too small: members stay apart.
    /// Too large: each costs some 100 KiB when idle.
    pub connections_max: usize,
    /// Unit: connections of one member; the oldest is closed. Two, because both sides may dial at once.
    pub connections_per_peer: usize,
    /// Unit: handshakes under way at which new addresses must first prove that they are theirs (QUIC
    /// Retry). Too small: a round trip more for honest hosts. Too large: spoofed packets cost more.
    pub handshakes_before_retry: usize,
    /// Unit: streams that one member may have open at once; more wait at the sender. Too small: calls
    /// queue. Too large: times `frame_bytes_max` is what one member can make this node hold.
    pub streams_per_peer: u32,
    /// Unit: bytes of one frame's body; a longer one ends the connection. Too small: large calls must be
    /// cut. Too large: memory for whoever is slow or hostile.
    pub frame_bytes_max: usize,
    /// Unit: frames of one connection per second, in bursts of one second; more end the connection. Too
    /// small: token streams of many requests are cut. Too large: CPU for nothing.
    pub frames_per_second_max: u32,
    /// Time for TLS and for each wait before a peer is admitted.
    pub handshake_timeout: Duration,
    /// Silence after which a connection is over; two thirds of it is the interval of keep-alives, which
    /// QUIC repeats when they are lost. Too
    /// small: stalls end connections. Too large: the dead hold places.
    pub idle_timeout: Duration,
    /// Time for the first frame of a stream, and for a peer to take bytes that are sent to it; then the
    /// stream is reset and that counts as misbehaviour.
    pub stream_timeout: Duration,
    /// Dials under way at once; more wait.
    pub dials_max: usize,
    /// Wait before an address that failed is dialled again: from the first to the second, doubling.
    pub dial_backoff: (Duration, Duration),
    /// Faults of one connection (streams without a frame, readers that stall, unknown methods) after
    /// which it is cut off. Broken frames and floods cut it off at once.
    pub faults_max: u32,
    /// Time for which a peer that was cut off is not let in again.
    pub ban: Duration,
    /// For how many and how much this node carries; see [`CarryConfig`].
    pub carry: CarryConfig,
    /// Attempts to join from one address at once, and the time for one more.
    pub join_burst: u32,
    pub join_refill: Duration,
}

impl Default for MeshLimits {
    fn default() -> Self {
        MeshLimits {
            connections_max: 1024,
            connections_per_peer: 2,
            handshakes_before_retry: 64,
            streams_per_peer: 256,
            frame_bytes_max: 1 << 20,
            frames_per_second_max: 20_000,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            stream_timeout: Duration::from_secs(10),
            dials_max: 16,
            dial_backoff: (Duration::from_millis(500), Duration::from_secs(60)),
            faults_max: 16,
            ban: Duration::from_secs(60),
            carry: CarryConfig::default(),
            join_burst: 16,
            join_refill: Duration::from_secs(6),
        }
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident: $metric:literal,)*) => {
        /// What has happened on the data plane since the start. Shown at `/metrics` under
        /// `grapevine_mesh_*_total`.
        #[derive(Debug, Default)]
        pub struct MeshCounters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        impl MeshCounters {
            /// Every counter: the name of its metric, its value.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((concat!("grapevine_mesh_", $metric, "_total"), self.$name.load(Ordering::Relaxed)),)*]
            }

            pub(crate) fn samples(&self) -> impl Iterator<Item = crate::metrics::Sample> {
                self.all().into_iter().map(|(name, n)| crate::metrics::Sample::new(name, n as f64))
            }
        }
    };
}

counters! {
    /// Connections whose TLS handshake succeeded.
    connections: "connections",
    /// Connections refused at a bound, or from who was cut off.
    refused: "connections_refused",
    /// Handshakes that failed.
    handshakes_failed: "handshakes_failed",
    /// Members admitted.
    admitted: "members_admitted",
    /// Peers whose certificate, or whose lack of one, was refused.
    not_admitted: "members_refused",
    /// Certificates issued to joiners and renewers.
    granted: "certificates_granted",
    /// Join exchanges that ended without a certificate.
    joins_refused: "joins_refused",
    /// Join exchanges refused for coming too often.
    joins_limited: "joins_limited",
    /// Frames read.
    frames: "frames",
    /// Faults that count against a peer.
    faults: "faults",
    /// Peers cut off.
    cut_off: "peers_cut_off",
    /// Dials that did not lead to a member.
    dials_failed: "dials_failed",
    /// Datagrams that were dropped because the peer takes none so large or so fast.
    datagrams_dropped: "datagrams_dropped",
    /// Datagrams that were carried for two other members.
    carried: "datagrams_carried",
    /// Those that were not, and own ones that found no room at their carrier's connection.
    not_carried: "datagrams_not_carried",
}

impl MeshCounters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
