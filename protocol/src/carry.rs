//! Packets that one member carries for two others which cannot reach each other.
//!
//! Both ends are connected to the carrier. A packet of QUIC between them travels to it and on in a
//! datagram of each of these connections:
//!
//! | bytes | what |
//! |---|---|
//! | 1 | [`Way`]: 0xC1 towards the node that is named, 0xC2 from it |
//! | 32 | the node |
//! | 1 | number of the packet (six bits), and which piece of it this is (two) |
//! | … | the packet, or that piece |
//!
//! The carrier writes the sender's name itself: it is that of the connection the datagram came by. It cannot
//! read what it carries, since the two ends speak TLS. Membership's datagrams begin with their version, so
//! that the two kinds are told apart by the first byte.
//!
//! Owns: the datagram, and for how many and how much a member carries ([`Carrying`]). Refuses: who is asked
//! to carry, and reliability.

use std::collections::BTreeMap;

use crate::{Duration, Instant, NodeId};

/// The method by which a member is asked to carry: the body is the other end's id.
pub const METHOD: &str = "carry";

/// Bytes before the packet.
pub const HEADER_BYTES: usize = 34;

/// A packet up to this size is cut in two where it does not fit into one datagram: QUIC needs paths
/// that take it (RFC 9000, section 14). Larger ones are lost there, and QUIC finds out that they are.
pub const CUT_BYTES_MAX: usize = 1200;

/// Where a carried datagram is going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the carrier; the name is the receiver's.
    To,
    /// From the carrier; the name is the sender's.
    From,
}

/// How much of a packet a datagram holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    Whole,
    First,
    Second,
}

/// One datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parcel<'a> {
    pub way: Way,
    pub node: NodeId,
    /// Tells the pieces of one packet from those of the next ones; 0 to 63.
    pub number: u8,
    pub piece: Piece,
    pub bytes: &'a [u8],
}

impl<'a> Parcel<'a> {
    /// Whether a datagram is one, or at least does not belong to membership.
    pub fn is_one(datagram: &[u8]) -> bool {
        matches!(datagram.first(), Some(&(TO | FROM)))
    }

    /// Reads one; `None` of what is none.
    pub fn decode(datagram: &'a [u8]) -> Option<Parcel<'a>> {
        let (header, bytes) = datagram.split_at_checked(HEADER_BYTES)?;
        let way = match header[0] {
            TO => Way::To,
            FROM => Way::From,
            _ => return None,
        };
        let piece = match header[33] & 3 {
            0 => Piece::Whole,
            1 => Piece::First,
            2 => Piece::Second,
            _ => return None,
        };
        let node = NodeId(header[1..33].try_into().ok()?);
        Some(Parcel { way, node, number: header[33] >> 2, piece, bytes })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut datagram = Vec::with_capacity(HEADER_BYTES + self.bytes.len());
        datagram.push(match self.way {
            Way::To => TO,
            Way::From => FROM,
        });
        datagram.extend_from_slice(&self.node.0);
        let piece = match self.piece {
            Piece::Whole => 0,
            Piece::First => 1,
            Piece::Second => 2,
        };
        datagram.push(self.number << 2 | piece);
        datagram.extend_from_slice(self.bytes);
        datagram
    }

    /// The datagrams that this one takes where at most `room` bytes fit into one: none, one or two.
    pub fn fit(&self, room: usize) -> Vec<Vec<u8>> {
        if HEADER_BYTES + self.bytes.len() <= room {
            return vec![self.encode()];
        }
        let half = self.bytes.len().div_ceil(2);
        let fits = self.bytes.len() <= CUT_BYTES_MAX && HEADER_BYTES + half <= room;
        if self.piece != Piece::Whole || !fits {
            return Vec::new();
        }
        let (first, second) = self.bytes.split_at(half);
        let piece = |piece, bytes| Parcel { piece, bytes, ..*self }.encode();
        vec![piece(Piece::First, first), piece(Piece::Second, second)]
    }
}

/// Puts the packets of one sender together. Keeps one piece; the next packet in pieces takes its place.
#[derive(Clone, Debug, Default)]
pub struct Pieces {
    waiting: Option<(u8, Piece, Vec<u8>)>,
}

impl Pieces {
    /// The packet that is whole with this parcel.
    pub fn take(&mut self, parcel: &Parcel<'_>) -> Option<Vec<u8>> {
        if parcel.piece == Piece::Whole {
            return Some(parcel.bytes.to_vec());
        }
        match self.waiting.take() {
            Some((number, piece, other)) if number == parcel.number && piece != parcel.piece => {
                Some(match piece {
                    Piece::First => [&other[..], parcel.bytes].concat(),
                    _ => [parcel.bytes, &other[..]].concat(),
                })
            }
            _ => {
                self.waiting = Some((parcel.number, parcel.piece, parcel.bytes.to_vec()));
                None
            }
        }
    }
}

/// What a member carries at most.
#[derive(Clone, Copy, Debug)]
pub struct CarryConfig {
    /// Unit: pairs of nodes at once; more are refused and ask another member. Too small: nodes stay apart
    /// where few can be reached by all. Too large: their packets crowd out this node's own.
    pub pairs_max: usize,
    /// Unit: pairs that one node may be part of. Too small: it reaches few of its kind by this node. Too
    /// large: one node takes all places.
    pub pairs_per_node_max: usize,
    /// Unit: bytes per second of one pair, both ways together, in bursts of `burst`; more are lost, which
    /// QUIC takes for a full link. Too small: KV blocks are slower to fetch than to compute. Too large: one
    /// pair fills this node's link.
    pub pair_bytes_per_s: u64,
    /// Unit: bytes per second of all pairs; as above.
    pub bytes_per_s: u64,
    /// Unit: time's worth of bytes that may come at once. Too small: a full window is cut off. Too
    /// large: calls wait behind bulk.
    pub burst: Duration,
    /// Silence after which a pair has lost its place. Must be longer than the interval of keep-alives.
    pub idle: Duration,
}

impl Default for CarryConfig {
    fn default() -> Self {
        CarryConfig {
            pairs_max: 64,
            pairs_per_node_max: 16,
            pair_bytes_per_s: 8 << 20,
            bytes_per_s: 32 << 20,
            burst: Duration::from_millis(250),
            idle: Duration::from_secs(60),
        }
    }
}

/// Why a packet is not carried, or a pair not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotCarried {
    #[error("this node carries for as many pairs as it may")]
    NoPlace,
    #[error("nobody has asked this node to carry between the two")]
    Unasked,
    #[error("more than this node carries in a second")]
    TooMuch,
}

/// For whom a member carries, and how much.
#[derive(Clone, Debug)]
pub struct Carrying {
    config: CarryConfig,
    pairs: BTreeMap<(NodeId, NodeId), Pair>,
    all: Budget,
}

#[derive(Clone, Copy, Debug)]
struct Pair {
    heard: Instant,
    budget: Budget,
}

/// A bucket of bytes: when it will be full again.
#[derive(Clone, Copy, Debug, Default)]
struct Budget {
    full_at: Instant,
}

impl Carrying {
    pub fn new(config: CarryConfig) -> Self {
        Carrying { config, pairs: BTreeMap::new(), all: Budget::default() }
    }

    /// Takes a pair on; one that is known keeps its place.
    ///
    /// # Errors
    /// [`NotCarried::NoPlace`]
    pub fn begin(&mut self, now: Instant, one: NodeId, other: NodeId) -> Result<(), NotCarried> {
        let CarryConfig { pairs_max, pairs_per_node_max, idle, .. } = self.config;
        self.pairs.retain(|_, pair| now - pair.heard < idle);
        let key = key(one, other);
        if let Some(pair) = self.pairs.get_mut(&key) {
            pair.heard = now;
            return Ok(());
        }
        let of = |node| self.pairs.keys().filter(|&&(a, b)| a == node || b == node).count();
        let is_full = self.pairs.len() >= pairs_max
            || of(one) >= pairs_per_node_max
            || of(other) >= pairs_per_node_max;
        if is_full {
            return Err(NotCarried::NoPlace);
        }
        self.pairs.insert(key, Pair { heard: now, budget: Budget::default() });
        Ok(())
    }

    /// Counts a datagram from one end to the other.
    ///
    /// # Errors
    /// If it is not to be carried; then it counts for nothing.
    pub fn carry(
        &mut self,
        now: Instant,
        from: NodeId,
        to: NodeId,
        bytes: usize,
    ) -> Result<(), NotCarried> {
        let CarryConfig { pair_bytes_per_s, bytes_per_s, burst, idle, .. } = self.config;
        let pair = self.pairs.get_mut(&key(from, to)).ok_or(NotCarried::Unasked)?;
        if now - pair.heard >= idle {
            return Err(NotCarried::Unasked);
        }
        let of_pair = pair.budget.with(now, bytes, pair_bytes_per_s, burst);
        let of_all = self.all.with(now, bytes, bytes_per_s, burst);
        let (Some(of_pair), Some(of_all)) = (of_pair, of_all) else {
            return Err(NotCarried::TooMuch);
        };
        *pair = Pair { heard: now, budget: of_pair };
        self.all = of_all;
        Ok(())
    }

    /// Ends what a node is part of.
    pub fn gone(&mut self, node: NodeId) {
        self.pairs.retain(|&(a, b), _| a != node && b != node);
    }

    /// Pairs that have a place.
    pub fn pairs(&self) -> usize {
        self.pairs.len()
    }
}

impl Budget {
    /// The bucket after so many bytes; `None` if they are too many.
    fn with(self, now: Instant, bytes: usize, per_second: u64, burst: Duration) -> Option<Budget> {
        let cost = Duration::from_nanos((bytes as u64).saturating_mul(1_000_000_000) / per_second);
        let full_at = self.full_at.max(now) + cost;
        (full_at <= now + burst).then_some(Budget { full_at })
    }
}

fn key(one: NodeId, other: NodeId) -> (NodeId, NodeId) {
    (one.min(other), one.max(other))
}

const TO: u8 = 0xC1;
const FROM: u8 = 0xC2;

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId([1; 32]);
    const B: NodeId = NodeId([2; 32]);
    const C: NodeId = NodeId([3; 32]);

    fn parcel(number: u8, piece: Piece, bytes: &[u8]) -> Parcel<'_> {
        Parcel { way: Way::To, node: B, number, piece, bytes }
    }

    #[test]
    fn golden_bytes() {
        let name = "02".repeat(32);
        for (parcel, expected) in [
            (parcel(0, Piece::Whole, b"ab"), format!("c1{name}006162")),
            (parcel(63, Piece::Second, b""), format!("c1{name}fe")),
            (Parcel { way: Way::From, ..parcel(5, Piece::First, b"z") }, format!("c2{name}157a")),
        ] {
            let bytes = parcel.encode();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, expected);
            assert!(Parcel::is_one(&bytes));
            assert_eq!(Parcel::decode(&bytes), Some(parcel));
        }
        assert!(Parcel::decode(&[TO; HEADER_BYTES - 1]).is_none(), "cut");
        let mut none = parcel(0, Piece::Whole, b"").encode();
        none[33] = 3;
        assert!(Parcel::decode(&none).is_none(), "no such piece");
        assert!(!Parcel::is_one(&[1, 0, 0]), "membership's");
        assert!(!Parcel::is_one(&[]));
    }

    #[test]
    fn a_packet_passes_narrow_ways_in_two_pieces() {
        let packet: Vec<u8> = (0..CUT_BYTES_MAX).map(|i| i as u8).collect();
        for (bytes, room, datagrams) in [
            (1200, 1234, 1),
            (1200, 1233, 2),
            (1199, 1200, 2),
            (1200, 634, 2),
            // Not even in two.
            (1200, 633, 0),
            (0, 34, 1),
            (0, 33, 0),
        ] {
            let whole = parcel(9, Piece::Whole, &packet[..bytes]);
            let fit = whole.fit(room);
            assert_eq!(fit.len(), datagrams, "{bytes} bytes through {room}");
            for order in [[0, 1], [1, 0]] {
                let mut pieces = Pieces::default();
                let sent = order.iter().filter_map(|&at| fit.get(at));
                let came: Vec<_> =
                    sent.filter_map(|d| pieces.take(&Parcel::decode(d).unwrap())).collect();
                assert_eq!(came.len(), datagrams.min(1), "{bytes} bytes through {room}");
                assert!(came.iter().all(|packet| *packet == whole.bytes));
            }
        }
        // Whoever probes for larger packets learns that they do not pass.
        let large = vec![0; CUT_BYTES_MAX + 1];
        assert!(parcel(0, Piece::Whole, &large).fit(1234).is_empty());
        // A piece is not cut again.
        assert!(parcel(0, Piece::First, &packet[..600]).fit(600).is_empty());
    }

    #[test]
    fn pieces_of_different_packets_are_not_put_together() {
        let mut pieces = Pieces::default();
        for (number, piece, bytes, expected) in [
            (1, Piece::First, "ab", None),
            // The second of 1 is lost.
            (2, Piece::Second, "d", None),
            (2, Piece::First, "c", Some("cd")),
            // The same piece twice is no packet.
            (3, Piece::First, "e", None),
            (3, Piece::First, "e", None),
            // What is whole waits for nothing.
            (4, Piece::Whole, "f", Some("f")),
            (3, Piece::Second, "g", Some("eg")),
        ] {
            let came = pieces.take(&parcel(number, piece, bytes.as_bytes()));
            assert_eq!(came.as_deref(), expected.map(str::as_bytes), "{number} {piece:?}");
        }
    }

    #[test]
    fn places_are_few_and_are_lost_in_silence() {
        let config = CarryConfig {
            pairs_max: 2,
            pairs_per_node_max: 2,
            idle: Duration::from_secs(10),
            ..CarryConfig::default()
        };
        let mut carrying = Carrying::new(config);
        let at = |second: u64| Instant::from_millis(second * 1000);
        assert_eq!(carrying.carry(at(0), A, B, 1), Err(NotCarried::Unasked));
        assert_eq!(carrying.begin(at(0), A, B), Ok(()));
        assert_eq!(carrying.begin(at(0), B, A), Ok(()), "it is the same pair");
        assert_eq!(carrying.begin(at(5), A, C), Ok(()));
        assert_eq!(carrying.begin(at(5), B, C), Err(NotCarried::NoPlace));
        assert_eq!(carrying.carry(at(9), B, A, 1), Ok(()), "both ways");
        assert_eq!(carrying.carry(at(15), A, C, 1), Err(NotCarried::Unasked), "silent for 10 s");
        assert_eq!(carrying.begin(at(15), B, C), Ok(()), "there is a place again");
        carrying.gone(B);
        assert_eq!(carrying.pairs(), 0);
    }

    #[test]
    fn a_node_has_a_share_of_the_places() {
        let config = CarryConfig { pairs_max: 9, pairs_per_node_max: 1, ..CarryConfig::default() };
        let mut carrying = Carrying::new(config);
        let now = Instant::ORIGIN;
        assert_eq!(carrying.begin(now, A, B), Ok(()));
        assert_eq!(carrying.begin(now, C, B), Err(NotCarried::NoPlace));
        assert_eq!(carrying.begin(now, C, NodeId([4; 32])), Ok(()));
    }

    #[test]
    fn bytes_have_bounds_for_each_pair_and_for_all() {
        let config = CarryConfig {
            pair_bytes_per_s: 1000,
            bytes_per_s: 1500,
            burst: Duration::from_secs(1),
            ..CarryConfig::default()
        };
        let mut carrying = Carrying::new(config);
        let at = Instant::from_millis;
        for pair in [(A, B), (A, C)] {
            carrying.begin(at(0), pair.0, pair.1).unwrap();
        }
        for (ms, to, bytes, expected) in [
            (0, B, 600, Ok(())),
            (0, B, 401, Err(NotCarried::TooMuch)),
            (0, B, 400, Ok(())),
            (0, B, 1, Err(NotCarried::TooMuch)),
            // 500 of all are left.
            (0, C, 501, Err(NotCarried::TooMuch)),
            (0, C, 500, Ok(())),
            (100, B, 101, Err(NotCarried::TooMuch)),
            (100, B, 100, Ok(())),
            (5000, B, 1000, Ok(())),
        ] {
            assert_eq!(carrying.carry(at(ms), A, to, bytes), expected, "{bytes} at {ms} ms");
        }
    }
}
