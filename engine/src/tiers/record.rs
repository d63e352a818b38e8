//! One block on disk: a header that says what it is, and the payload.
//!
//! ```text
//! offset  bytes
//!      0  8    "GVKVBLK1": magic and version
//!      8  8    payload bytes, little-endian
//!     16  8    number of the write: of two records of one name the higher one is kept
//!     24  32   format: numerical identity, tokens in a block, payload bytes, digested
//!     56  32   the block's name
//!     88  32   digest of the payload, keyed with the name
//!    120  32   digest of bytes 0 to 119
//!    152  …    zero, to 512
//!    512  …    payload
//! ```
//!
//! Nothing is synced: a record that was not written wholly does not verify, and is then no block. The
//! digest of the payload is the one that transfers between nodes use.

use cache::BlockHash;
use cache::transfer::BlockDigest;
use thiserror::Error;

/// What all records of one store have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordFormat {
    /// Bytes of a payload.
    pub block_bytes: usize,
    /// See [`RecordFormat::new`].
    pub digest: [u8; 32],
}

/// A header that belongs to the store's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub name: BlockHash,
    pub write: u64,
    payload: BlockDigest,
}

/// What lies in a place that holds no block. The place is as good as empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Damage {
    #[error("the record is cut short")]
    Short,
    #[error("there is no record")]
    Magic,
    #[error("its header is damaged")]
    Header,
    #[error("it is a block of another format")]
    Format,
    #[error("it is another block")]
    Name,
    #[error("its payload is damaged")]
    Payload,
    #[error("it cannot be read")]
    Unreadable,
}

impl RecordFormat {
    /// `identity` is everything that decides a block's bytes besides its tokens.
    pub fn new(identity: &[u8; 32], block_tokens: usize, block_bytes: usize) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(FORMAT_CONTEXT);
        hasher.update(identity);
        hasher.update(&(block_tokens as u64).to_le_bytes());
        hasher.update(&(block_bytes as u64).to_le_bytes());
        RecordFormat { block_bytes, digest: *hasher.finalize().as_bytes() }
    }

    /// Bytes from one record to the next.
    pub fn record_bytes(&self) -> usize {
        HEADER_BYTES + self.block_bytes.next_multiple_of(HEADER_BYTES)
    }

    /// Name of the folder for records of this format.
    pub fn folder(&self) -> String {
        self.digest[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The record of a block, whole.
    pub fn encode(&self, name: &BlockHash, write: u64, payload: &[u8], record: &mut Vec<u8>) {
        assert_eq!(payload.len(), self.block_bytes, "payloads of one store have one size");
        record.clear();
        record.extend_from_slice(MAGIC);
        record.extend_from_slice(&(self.block_bytes as u64).to_le_bytes());
        record.extend_from_slice(&write.to_le_bytes());
        record.extend_from_slice(&self.digest);
        record.extend_from_slice(&name.0);
        record.extend_from_slice(&BlockDigest::of(name, payload).0);
        let check = blake3::hash(record);
        record.extend_from_slice(check.as_bytes());
        record.resize(HEADER_BYTES, 0);
        record.extend_from_slice(payload);
    }

    /// What a header says; `bytes` are the first of a record, as many as there are.
    pub fn header(&self, bytes: &[u8]) -> Result<Header, Damage> {
        let Some(bytes) = bytes.first_chunk::<HEADER_USED>() else { return Err(Damage::Short) };
        if &bytes[..8] != MAGIC {
            return Err(Damage::Magic);
        }
        if blake3::hash(&bytes[..CHECK_AT]).as_bytes() != &bytes[CHECK_AT..] {
            return Err(Damage::Header);
        }
        if bytes[8..16] != (self.block_bytes as u64).to_le_bytes() || bytes[24..56] != self.digest {
            return Err(Damage::Format);
        }
        let digest = |at: usize| -> [u8; 32] { std::array::from_fn(|i| bytes[at + i]) };
        Ok(Header {
            name: BlockHash(digest(56)),
            write: u64::from_le_bytes(std::array::from_fn(|i| bytes[16 + i])),
            payload: BlockDigest(digest(88)),
        })
    }

    /// Whether these are header and payload of `name`, whole; both may be shorter than they should.
    pub fn verify(&self, name: &BlockHash, header: &[u8], payload: &[u8]) -> Result<(), Damage> {
        let header = self.header(header)?;
        if header.name != *name {
            return Err(Damage::Name);
        }
        if payload.len() != self.block_bytes {
            return Err(Damage::Short);
        }
        if BlockDigest::of(name, payload) != header.payload {
            return Err(Damage::Payload);
        }
        Ok(())
    }
}

/// Where the payload begins, and what records are rounded up to: a sector of a disk.
pub const HEADER_BYTES: usize = 512;
const HEADER_USED: usize = 152;
const CHECK_AT: usize = 120;
const MAGIC: &[u8; 8] = b"GVKVBLK1";
const FORMAT_CONTEXT: &str = "grapevine 2026-11-21 format of kv blocks on disk v1";

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: [u8; 32] = [7; 32];

    fn record() -> (RecordFormat, BlockHash, Vec<u8>) {
        let format = RecordFormat::new(&FORMAT, 16, 96);
        let name = BlockHash([9; 32]);
        let payload: Vec<u8> = (0..96).collect();
        let mut record = Vec::new();
        format.encode(&name, 42, &payload, &mut record);
        (format, name, record)
    }

    fn verify(format: &RecordFormat, name: &BlockHash, record: &[u8]) -> Result<(), Damage> {
        let (header, payload) = record.split_at(record.len().min(HEADER_BYTES));
        format.verify(name, header, payload)
    }

    #[test]
    fn a_record_comes_back() {
        let (format, name, record) = record();
        assert_eq!(verify(&format, &name, &record), Ok(()));
        let header = format.header(&record[..HEADER_BYTES]).unwrap();
        assert_eq!((header.name, header.write), (name, 42));
        assert_eq!(format.record_bytes(), 1024);
    }

    /// A flip of any bit that means something is seen, and so is a record cut at any length.
    #[test]
    fn damage_is_seen() {
        let (format, name, record) = record();
        for bit in 0..record.len() * 8 {
            let mut damaged = record.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let means_nothing = (HEADER_USED..HEADER_BYTES).contains(&(bit / 8));
            assert_eq!(verify(&format, &name, &damaged).is_ok(), means_nothing, "bit {bit}");
        }
        for length in 0..record.len() {
            assert_eq!(verify(&format, &name, &record[..length]), Err(Damage::Short), "{length}");
        }
        assert_eq!(verify(&format, &BlockHash([8; 32]), &record), Err(Damage::Name));
        let other = RecordFormat::new(&FORMAT, 8, 96);
        assert_eq!(verify(&other, &name, &record), Err(Damage::Format));
        assert_eq!(verify(&format, &name, &[0; 608]), Err(Damage::Magic));
    }

    /// On disk for ever: a change needs a new version.
    #[test]
    fn golden() {
        let (.., record) = record();
        let digest = blake3::hash(&record).to_hex();
        assert_eq!(
            digest.as_str(),
            "b0c5b1572e912173e01834e85784c4d376e14013396fb0586535cee835fa6acf"
        );
        assert_eq!(&record[..24], b"GVKVBLK1\x60\0\0\0\0\0\0\0\x2a\0\0\0\0\0\0\0");
    }
}
