//! What members say to each other. Not internal state: see the golden bytes below.
//!
//! Every datagram comes from a sender whose identity the transport has proven; its own incarnation is
//! in the header, so that any datagram is direct contact. Unknown versions are refused whole.

use bincode::{Decode, Encode};

use crate::wire::{DecodeError, decode, encode};

/// One datagram.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Datagram<I, C> {
    pub version: u8,
    /// [`FLAG_UNKNOWN`] or nothing; other bits are ignored.
    pub flags: u8,
    /// Of the sender.
    pub incarnation: u64,
    pub body: Body<I>,
    pub updates: Vec<Update<I, C>>,
}

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Body<I> {
    /// Updates alone, heard as news.
    Gossip,
    Ping {
        probe: u32,
    },
    Ack {
        probe: u32,
    },
    /// Asks the receiver to ping `target`.
    PingRequest {
        probe: u32,
        target: I,
    },
    /// The target answered the receiver's ping request.
    RelayedAck {
        probe: u32,
    },
    /// The target has not answered the sender yet; the sender itself is well.
    Nack {
        probe: u32,
    },
    /// The sender's view in one number, and how many members it holds for alive.
    Sync {
        root: u64,
        members: u32,
    },
    /// 256 hashes of 4 bytes (little-endian), one for each bucket of the sender's view.
    Digest {
        buckets: Vec<u8>,
    },
    /// Asks for the entries of these buckets: a bitmap of 32 bytes.
    Want {
        buckets: [u8; BUCKETS / 8],
    },
    /// Updates alone, as the sender's state: deaths among them are checked, not believed.
    Entries,
}

/// What the sender holds true of a member.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Update<I, C> {
    Alive { id: I, incarnation: u64, version: u32, contact: C },
    Suspect { id: I, incarnation: u64, accusers: Vec<I> },
    Dead { id: I, incarnation: u64 },
    Left { id: I, incarnation: u64 },
}

impl<I: Copy, C> Update<I, C> {
    pub fn id(&self) -> I {
        match self {
            Update::Alive { id, .. }
            | Update::Suspect { id, .. }
            | Update::Dead { id, .. }
            | Update::Left { id, .. } => *id,
        }
    }

    pub fn incarnation(&self) -> u64 {
        match self {
            Update::Alive { incarnation, .. }
            | Update::Suspect { incarnation, .. }
            | Update::Dead { incarnation, .. }
            | Update::Left { incarnation, .. } => *incarnation,
        }
    }
}

/// Why a datagram was not read. Nothing of it was kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DatagramError {
    #[error("{bytes} bytes are more than the {DATAGRAM_BYTES_MAX} of a datagram")]
    TooLong { bytes: usize },
    #[error("version {0} is not spoken here")]
    Version(u8),
    #[error(transparent)]
    Malformed(#[from] DecodeError),
    #[error("{0} is out of bounds")]
    OutOfBounds(&'static str),
}

impl<I: Encode + Decode<()>, C: Encode + Decode<()>> Datagram<I, C> {
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// # Errors
    /// If the bytes are no datagram of this version within the bounds.
    pub fn decode(bytes: &[u8]) -> Result<Self, DatagramError> {
        if bytes.len() > DATAGRAM_BYTES_MAX {
            return Err(DatagramError::TooLong { bytes: bytes.len() });
        }
        match bytes.first() {
            Some(&version) if version != VERSION => return Err(DatagramError::Version(version)),
            _ => {}
        }
        let datagram: Self = decode::<_, DECODE_BYTES_MAX>(bytes)?;
        datagram.check()?;
        Ok(datagram)
    }

    fn check(&self) -> Result<(), DatagramError> {
        let out = |what| Err(DatagramError::OutOfBounds(what));
        if self.incarnation > INCARNATION_MAX {
            return out("the sender's incarnation");
        }
        if matches!(&self.body, Body::Digest { buckets } if buckets.len() != BUCKETS * 4) {
            return out("the number of buckets");
        }
        for update in &self.updates {
            let (Update::Alive { incarnation, .. }
            | Update::Suspect { incarnation, .. }
            | Update::Dead { incarnation, .. }
            | Update::Left { incarnation, .. }) = update;
            if *incarnation > INCARNATION_MAX {
                return out("an incarnation");
            }
            if matches!(update, Update::Suspect { accusers, .. } if accusers.len() > ACCUSERS_MAX) {
                return out("the number of accusers");
            }
        }
        Ok(())
    }
}

pub const VERSION: u8 = 1;
/// The sender does not know the receiver, or only its incarnation, and asks who it is.
pub const FLAG_UNKNOWN: u8 = 1;
/// Fits one QUIC datagram on any path (RFC 9000, section 14).
pub const DATAGRAM_BYTES_MAX: usize = 1200;
/// Buckets of a view: an identity is in the bucket of its digest's last byte.
pub const BUCKETS: usize = 256;
pub const ACCUSERS_MAX: usize = 4;
/// Above it, an incarnation is refused: there must always be a higher one to refute with.
pub const INCARNATION_MAX: u64 = 1 << 62;
/// Memory that a datagram may claim while it is decoded.
const DECODE_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NodeId;
    use crate::membership::Addresses;

    type Real = Datagram<NodeId, Addresses>;

    fn id(byte: u8) -> NodeId {
        NodeId([byte; 32])
    }

    fn datagram(body: Body<NodeId>, updates: Vec<Update<NodeId, Addresses>>) -> Real {
        Datagram { version: VERSION, flags: 0, incarnation: 7, body, updates }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn golden() {
        let (one, two) = ("01".repeat(32), "02".repeat(32));
        let contact = Addresses::new(["192.0.2.1:4001".parse().unwrap()]).unwrap();
        let cases = [
            (datagram(Body::Gossip, vec![]), "0100070000".to_owned()),
            (datagram(Body::Ping { probe: 300 }, vec![]), "01000701fb2c0100".to_owned()),
            (datagram(Body::Ack { probe: 9 }, vec![]), "010007020900".to_owned()),
            (
                datagram(Body::PingRequest { probe: 9, target: id(1) }, vec![]),
                format!("0100070309{one}00"),
            ),
            (datagram(Body::RelayedAck { probe: 9 }, vec![]), "010007040900".to_owned()),
            (datagram(Body::Nack { probe: 9 }, vec![]), "010007050900".to_owned()),
            (
                datagram(Body::Sync { root: 1 << 40, members: 5 }, vec![]),
                "01000706fd00000000000100000500".to_owned(),
            ),
            (
                datagram(Body::Want { buckets: [255; 32] }, vec![]),
                format!("01000708{}00", "ff".repeat(32)),
            ),
            (
                datagram(
                    Body::Entries,
                    vec![
                        Update::Alive { id: id(1), incarnation: 3, version: 4, contact },
                        Update::Suspect { id: id(2), incarnation: 5, accusers: vec![id(1)] },
                        Update::Dead { id: id(1), incarnation: 6 },
                        Update::Left { id: id(2), incarnation: 7 },
                    ],
                ),
                format!(
                    "0100070904{}{}{}{}",
                    format_args!("00{one}0304{}", "0100c0000201fba10f"),
                    format_args!("01{two}0501{one}"),
                    format_args!("02{one}06"),
                    format_args!("03{two}07"),
                ),
            ),
        ];
        for (datagram, expect) in cases {
            let bytes = datagram.encode();
            assert_eq!(hex(&bytes), expect, "{datagram:?}");
            assert_eq!(Real::decode(&bytes), Ok(datagram));
        }
        let digest = datagram(Body::Digest { buckets: vec![1; BUCKETS * 4] }, vec![]).encode();
        assert_eq!(hex(&digest[..9]), "01000707fb00040101");
        assert!(digest.len() < DATAGRAM_BYTES_MAX);
    }

    #[test]
    fn refuses() {
        let refused = |bytes: &[u8]| Real::decode(bytes).unwrap_err().to_string();
        assert!(refused(&[1; 1201]).contains("1201 bytes"));
        assert_eq!(refused(&[2, 0, 0]), "version 2 is not spoken here");
        let dead = Update::Dead { id: id(1), incarnation: INCARNATION_MAX + 1 };
        let suspect = Update::Suspect { id: id(1), incarnation: 0, accusers: vec![id(2); 5] };
        for (bad, why) in [
            (datagram(Body::Gossip, vec![dead]), "an incarnation is out of bounds"),
            (datagram(Body::Gossip, vec![suspect]), "the number of accusers is out of bounds"),
            (
                datagram(Body::Digest { buckets: vec![1; 5] }, vec![]),
                "the number of buckets is out of bounds",
            ),
        ] {
            assert_eq!(refused(&bad.encode()), why);
        }
        for end in 0..5 {
            assert!(Real::decode(&datagram(Body::Gossip, vec![]).encode()[..end]).is_err());
        }
    }
}
