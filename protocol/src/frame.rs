//! Frames: what every stream between two nodes consists of.
//!
//! Seven bytes of header, then the body (docs/protocol.md):
//!
//! ```text
//! bytes of the body   u32, little-endian
//! version             u8
//! kind                u16, little-endian
//! ```
//!
//! The length comes first, so that a node which does not know a kind can skip it. Kinds with the bit
//! [`Kind::OPTIONAL`] may be skipped; any other kind that is not known ends the stream with an error,
//! because its sender relies on being understood.

use bincode::{Decode, Encode};

use crate::wire::{self, DecodeError};

/// Bytes of a frame before its body.
pub const HEADER_BYTES: usize = 7;

/// The version that this node writes.
pub const VERSION: u8 = 1;

/// The oldest version that this node reads.
pub const VERSION_MIN: u8 = 1;

/// What a frame is. The number is on the wire and never given to something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind(pub u16);

impl Kind {
    /// Set in kinds that whoever does not know them may skip.
    pub const OPTIONAL: u16 = 0x8000;

    pub const JOIN_HELLO: Kind = Kind(1);
    pub const JOIN_PROOF: Kind = Kind(2);
    pub const JOIN_CLAIM: Kind = Kind(3);
    pub const JOIN_GRANT: Kind = Kind(4);
    pub const JOIN_REFUSAL: Kind = Kind(5);
    pub const JOIN_ELSEWHERE: Kind = Kind(6);

    pub const PEER_HELLO: Kind = Kind(16);
    pub const PEER_CHAIN: Kind = Kind(17);
    pub const PEER_REVOCATIONS: Kind = Kind(18);
    pub const PEER_WELCOME: Kind = Kind(19);
    pub const PEER_REFUSAL: Kind = Kind(20);

    /// The first frame of a stream that asks for something; the body names the method.
    pub const RPC_REQUEST: Kind = Kind(32);
    pub const RPC_REPLY: Kind = Kind(33);
    pub const RPC_ERROR: Kind = Kind(34);
    /// Further parts of a request or of a reply.
    pub const RPC_PART: Kind = Kind(35);

    /// The first frame of a stream that asks for KV blocks ([`crate::transfer`]).
    pub const KV_ASK: Kind = Kind(48);
    pub const KV_ACCEPT: Kind = Kind(49);
    pub const KV_REFUSAL: Kind = Kind(50);
    pub const KV_PROGRESS: Kind = Kind(51);
    /// The first frame of the stream that brings them.
    pub const KV_STREAM: Kind = Kind(56);
    /// Payloads that are no frames follow.
    pub const KV_CHUNK: Kind = Kind(57);
    pub const KV_COMMIT: Kind = Kind(58);
    /// The first frame of a further stream that brings them; only payloads follow.
    pub const KV_PART: Kind = Kind(59);

    /// Whether a node that does not know this kind may skip it.
    pub const fn is_optional(self) -> bool {
        self.0 & Self::OPTIONAL != 0
    }
}

/// What stands before a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the body.
    pub bytes: usize,
    pub version: u8,
    pub kind: Kind,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// If the body would be longer than `bytes_max`, or the version is not one that this node reads.
    /// Nothing may be allocated for the body before this has passed.
    pub fn decode(bytes: [u8; HEADER_BYTES], bytes_max: usize) -> Result<Header, FrameError> {
        let [a, b, c, d, version, low, high] = bytes;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        if length > bytes_max {
            return Err(FrameError::TooLong { bytes: length, limit: bytes_max });
        }
        if !(VERSION_MIN..=VERSION).contains(&version) {
            return Err(FrameError::Version { theirs: version });
        }
        Ok(Header { bytes: length, version, kind: Kind(u16::from_le_bytes([low, high])) })
    }
}

/// A frame: header and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub body: Vec<u8>,
}

impl Frame {
    /// A frame of a wire value.
    pub fn new<T: Encode>(kind: Kind, value: &T) -> Frame {
        Frame { kind, body: wire::encode(value) }
    }

    /// Header and body as they travel.
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.body.len()).expect("no body comes near four gigabytes");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.body.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.kind.0.to_le_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// Decodes exactly one frame.
    ///
    /// # Errors
    /// As [`Header::decode`], and if `bytes` are not just this frame.
    pub fn decode(bytes: &[u8], bytes_max: usize) -> Result<Frame, FrameError> {
        let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(FrameError::Cut)?;
        let header = Header::decode(*header, bytes_max)?;
        match body.len() == header.bytes {
            true => Ok(Frame { kind: header.kind, body: body.to_vec() }),
            false => Err(FrameError::Cut),
        }
    }

    /// The body as a value of at most `LIMIT` bytes of memory.
    pub fn value<T: Decode<()>, const LIMIT: usize>(&self) -> Result<T, DecodeError> {
        wire::decode::<T, LIMIT>(&self.body)
    }
}

/// Why bytes are no frame. The stream cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {bytes} bytes is more than the {limit} allowed here")]
    TooLong { bytes: usize, limit: usize },
    #[error("frame version {theirs} is not among those spoken here ({VERSION_MIN} to {VERSION})")]
    Version { theirs: u8 },
    #[error("the bytes are not one whole frame")]
    Cut,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let frame = Frame::new(Kind::PEER_HELLO, &(7u8, 300u32));
        let bytes = [4, 0, 0, 0, 1, 16, 0, 7, 251, 44, 1];
        assert_eq!(frame.encode(), bytes);
        assert_eq!(Frame::decode(&bytes, 4), Ok(frame));
    }

    #[test]
    fn refused() {
        let whole = [1, 0, 0, 0, 1, 16, 0, 7];
        for (change, error) in [
            ((0, 2), FrameError::Cut),
            ((0, 9), FrameError::TooLong { bytes: 9, limit: 8 }),
            ((3, 1), FrameError::TooLong { bytes: (1 << 24) + 1, limit: 8 }),
            ((4, 0), FrameError::Version { theirs: 0 }),
            ((4, 2), FrameError::Version { theirs: 2 }),
        ] {
            let mut bytes = whole;
            bytes[change.0] = change.1;
            assert_eq!(Frame::decode(&bytes, 8), Err(error), "{change:?}");
        }
        for cut in 0..whole.len() {
            assert_eq!(Frame::decode(&whole[..cut], 8), Err(FrameError::Cut), "{cut}");
        }
        assert!(!Kind::JOIN_HELLO.is_optional() && Kind(0x8001).is_optional());
    }
}
