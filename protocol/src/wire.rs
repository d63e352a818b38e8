//! The one codec of everything that travels between nodes or lies on their disks as bytes.
//!
//! bincode with variable-length integers, little-endian (docs/adr/0001-wire-codec.md). Decoding is
//! bounded: a length that claims more than the limit is refused before anything is allocated for it,
//! and bytes behind the value are an error, so that a value has one encoding only. Wire types are
//! types of their own, never internal state; the golden bytes of each are a test beside it.

use bincode::config::{Configuration, LittleEndian, NoLimit, Varint};
use bincode::{Decode, Encode};

/// Encodes a value. Cannot fail: wire types are made of plain values and bounded collections.
pub fn encode<T: Encode>(value: &T) -> Vec<u8> {
    bincode::encode_to_vec(value, CONFIG).expect("wire types hold nothing that cannot be encoded")
}

/// Decodes a value from exactly `bytes`, of which it may claim at most `LIMIT` bytes of memory.
///
/// # Errors
/// If the bytes are more than `LIMIT`, end early, are followed by others, or are no such value.
pub fn decode<T: Decode<()>, const LIMIT: usize>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > LIMIT {
        return Err(DecodeError::TooLong { bytes: bytes.len(), limit: LIMIT });
    }
    let config = CONFIG.with_limit::<LIMIT>();
    let (value, read) = bincode::decode_from_slice(bytes, config)
        .map_err(|e| DecodeError::Malformed { why: e.to_string() })?;
    if read != bytes.len() {
        return Err(DecodeError::Trailing { bytes: bytes.len() - read });
    }
    Ok(value)
}

/// Why bytes are not a value. The peer that sent them is at fault; nothing was kept of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("{bytes} bytes are more than the {limit} allowed")]
    TooLong { bytes: usize, limit: usize },
    #[error("{why}")]
    Malformed { why: String },
    #[error("{bytes} bytes follow the value")]
    Trailing { bytes: usize },
}

const CONFIG: Configuration<LittleEndian, Varint, NoLimit> = bincode::config::standard();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        assert_eq!(encode(&(1u8, 300u32, "ab")), [1, 251, 44, 1, 2, b'a', b'b']);
    }

    #[test]
    fn bounded() {
        let decode = |bytes: &[u8]| decode::<Vec<u64>, 64>(bytes);
        assert_eq!(decode(&encode(&vec![1u64, 2])), Ok(vec![1, 2]));
        assert_eq!(decode(&[0; 65]), Err(DecodeError::TooLong { bytes: 65, limit: 64 }));
        assert_eq!(decode(&[1, 5, 9]), Err(DecodeError::Trailing { bytes: 1 }));
        // Claims 2^60 elements.
        let claims = [253, 0, 0, 0, 0, 0, 0, 0, 16];
        for bytes in [&claims[..], &[], &[2, 1], &[40]] {
            assert!(matches!(decode(bytes), Err(DecodeError::Malformed { .. })), "{bytes:?}");
        }
    }
}
