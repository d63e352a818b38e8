//! What a node tells the mesh about itself: only its owner writes it and passes it on.
//!
//! Class **local**: the newest version of each owner wins, and it is dropped with the owner's
//! membership.

use core::net::SocketAddr;

use bincode::{Decode, Encode};

use crate::wire::{self, DecodeError};

/// A node and what it offers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct NodeRecord {
    /// For people: the host's name unless the operator gave another.
    pub name: String,
    /// Of the program.
    pub version: String,
    /// Where the overlay listens; the data plane's addresses belong to membership.
    pub overlay: Vec<SocketAddr>,
    /// Where the API is, the likeliest address first. Loopback addresses are of use on its host only.
    pub api: Vec<SocketAddr>,
    /// Memory bandwidth, bytes per second; 0 if not measured.
    pub memory_bytes_per_s: u64,
    /// Eight-bit integer operations per second; 0 if not measured.
    pub int8_ops_per_s: u64,
    /// No new requests are taken.
    pub draining: bool,
    pub role: NodeRole,
    pub replicas: Vec<ReplicaRecord>,
}

/// One model on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct ReplicaRecord {
    /// As clients ask for it.
    pub model: String,
    /// Names weights and numerics; replicas of one model have the same.
    pub fingerprint: String,
    pub state: ReplicaState,
    /// Seconds since 1970 at which the model appeared here.
    pub created_s: u64,
    /// Prompt and answer together; 0 while it loads.
    pub context_tokens_max: u32,
    /// Sequences that have blocks, and those that wait for them.
    pub running: u32,
    pub waiting: u32,
    /// Prompt tokens not yet computed.
    pub prompt_tokens: u64,
    /// Prompt tokens per second; 0 if not measured.
    pub prefill_rate: u32,
    pub kv_blocks_free: u32,
    pub kv_blocks: u32,
    /// Microseconds of a step that only decodes, of late; 0 if not measured.
    pub decode_step_us: u32,
    /// Bytes of keys and values that one token takes; 0 while it loads.
    pub kv_bytes_per_token: u32,
    /// Nanoseconds that a token's keys and values take to come up from below the pool, of late; 0 if none
    /// did. `None`: nothing lies below it.
    pub below_ns_per_token: Option<u32>,
}

/// What a node's operator wants it to do. A preference of routers, not a permission: what a node may do
/// is in its certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum NodeRole {
    /// Whatever is needed.
    #[default]
    Both,
    /// Compute prompts for others. Asked for whole answers only where nobody else can give them.
    Prefill,
    /// Generate. Computes its own prompts, or has others do it, and never those of others.
    Decode,
}

impl NodeRole {
    pub const ALL: [NodeRole; 3] = [NodeRole::Both, NodeRole::Prefill, NodeRole::Decode];

    pub const fn as_str(self) -> &'static str {
        match self {
            NodeRole::Both => "both",
            NodeRole::Prefill => "prefill",
            NodeRole::Decode => "decode",
        }
    }
}

/// How far a replica is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum ReplicaState {
    #[default]
    Loading,
    Ready,
    Failed,
}

impl NodeRecord {
    /// The record's bytes, at most [`RECORD_BYTES_MAX`]: texts are cut, and replicas beyond what fits
    /// are left out, the last ones first. Says how many replicas were left out.
    pub fn to_bytes(&self) -> (Vec<u8>, usize) {
        let mut record = self.clone();
        cut(&mut record.name, NAME_BYTES_MAX);
        cut(&mut record.version, VERSION_BYTES_MAX);
        record.overlay.truncate(OVERLAY_ADDRESSES_MAX);
        record.api.truncate(API_ADDRESSES_MAX);
        for replica in &mut record.replicas {
            cut(&mut replica.fingerprint, FINGERPRINT_BYTES_MAX);
        }
        // A name that was cut would name another model.
        record.replicas.retain(|replica| replica.model.len() <= MODEL_BYTES_MAX);
        record.replicas.truncate(REPLICAS_MAX);
        loop {
            let bytes = wire::encode(&record);
            if bytes.len() <= RECORD_BYTES_MAX {
                return (bytes, self.replicas.len() - record.replicas.len());
            }
            record.replicas.pop().expect("a record without replicas is small");
        }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// If the bytes are no record, or it breaks a bound that no honest node breaks.
    pub fn from_bytes(bytes: &[u8]) -> Result<NodeRecord, RecordError> {
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(RecordError::TooLong { bytes: bytes.len() });
        }
        let record: NodeRecord = wire::decode::<_, DECODED_BYTES_MAX>(bytes)?;
        let replicas = &record.replicas;
        for (what, len, max) in [
            ("name", record.name.len(), NAME_BYTES_MAX),
            ("version", record.version.len(), VERSION_BYTES_MAX),
            ("overlay", record.overlay.len(), OVERLAY_ADDRESSES_MAX),
            ("api", record.api.len(), API_ADDRESSES_MAX),
            ("replicas", replicas.len(), REPLICAS_MAX),
            ("model", longest(replicas, |r| &r.model), MODEL_BYTES_MAX),
            ("fingerprint", longest(replicas, |r| &r.fingerprint), FINGERPRINT_BYTES_MAX),
        ] {
            if len > max {
                return Err(RecordError::Field { what, len, max });
            }
        }
        Ok(record)
    }
}

fn longest(replicas: &[ReplicaRecord], text: impl Fn(&ReplicaRecord) -> &String) -> usize {
    replicas.iter().map(|replica| text(replica).len()).max().unwrap_or(0)
}

/// Cuts a text to at most `max` bytes, between characters.
fn cut(text: &mut String, max: usize) {
    text.truncate(text.floor_char_boundary(max));
}

/// Why bytes are no record. Nothing was kept of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("a node record of {bytes} bytes is more than {RECORD_BYTES_MAX}")]
    TooLong { bytes: usize },
    #[error("not a node record: {0}")]
    Malformed(#[from] DecodeError),
    #[error("{what} of a node record is {len} long, more than {max}")]
    Field { what: &'static str, len: usize, max: usize },
}

/// Bytes of a record on the wire.
pub const RECORD_BYTES_MAX: usize = 2048;
/// Replicas of a record.
pub const REPLICAS_MAX: usize = 32;
pub const NAME_BYTES_MAX: usize = 64;
pub const VERSION_BYTES_MAX: usize = 32;
pub const OVERLAY_ADDRESSES_MAX: usize = 8;
pub const API_ADDRESSES_MAX: usize = 8;
/// Replicas with a longer model name are known only to their own node.
pub const MODEL_BYTES_MAX: usize = 128;
pub const FINGERPRINT_BYTES_MAX: usize = 64;

/// Memory that a record may claim while it is decoded.
const DECODED_BYTES_MAX: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(model: &str) -> ReplicaRecord {
        ReplicaRecord {
            model: model.to_owned(),
            fingerprint: "f".to_owned(),
            state: ReplicaState::Ready,
            created_s: 1_700_000_000,
            context_tokens_max: 1024,
            running: 1,
            waiting: 2,
            prompt_tokens: 3,
            prefill_rate: 4,
            kv_blocks_free: 5,
            kv_blocks: 6,
            decode_step_us: 7,
            kv_bytes_per_token: 8,
            below_ns_per_token: Some(9),
        }
    }

    #[test]
    fn golden() {
        let record = NodeRecord {
            name: "ada".to_owned(),
            version: "0.1.0".to_owned(),
            overlay: vec!["127.0.0.1:8422".parse().unwrap()],
            api: vec!["10.0.0.1:8420".parse().unwrap()],
            memory_bytes_per_s: 30_000_000_000,
            int8_ops_per_s: 0,
            draining: false,
            role: NodeRole::Decode,
            replicas: vec![replica("demo")],
        };
        let (bytes, left_out) = record.to_bytes();
        let expect = "03616461 05302e312e30 0100 7f000001 fbe620 0100 0a000001 fbe420 \
                      fd00ac23fc06000000 00 00 \
                      02 01 0464656d6f 0166 01 fc00f15365 fb0004 01 02 03 04 05 06 07 08 01 09";
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!((hex, left_out), (expect.split_whitespace().collect(), 0));
        assert_eq!(NodeRecord::from_bytes(&bytes), Ok(record));
    }

    #[test]
    fn what_is_too_much_is_left_out_by_its_writer() {
        let long = "é".repeat(200);
        let mut record = NodeRecord { name: long.clone(), ..NodeRecord::default() };
        record.replicas = (0..100).map(|n| replica(&format!("{n}-{}", "m".repeat(90)))).collect();
        record.replicas.insert(0, replica(&long));
        let (bytes, left_out) = record.to_bytes();
        let read = NodeRecord::from_bytes(&bytes).unwrap();
        assert_eq!(read.name, "é".repeat(32));
        assert_eq!(read.replicas.len() + left_out, 101);
        assert!(read.replicas.len() > 10 && read.replicas[0].model.starts_with("0-"));
    }

    #[test]
    fn what_is_too_much_is_refused_by_its_reader() {
        let (good, _) = NodeRecord::default().to_bytes();
        for end in 0..good.len() {
            assert!(NodeRecord::from_bytes(&good[..end]).is_err(), "{end}");
        }
        let long = NodeRecord { name: "n".repeat(65), ..NodeRecord::default() };
        let error = NodeRecord::from_bytes(&wire::encode(&long)).unwrap_err();
        assert_eq!(error, RecordError::Field { what: "name", len: 65, max: 64 });
        let api = vec!["10.0.0.1:1".parse().unwrap(); 9];
        let many = NodeRecord { api, ..NodeRecord::default() };
        let error = NodeRecord::from_bytes(&wire::encode(&many)).unwrap_err();
        assert_eq!(error, RecordError::Field { what: "api", len: 9, max: 8 });
        assert_eq!(NodeRecord::from_bytes(&many.to_bytes().0).unwrap().api.len(), 8);
        let error = NodeRecord::from_bytes(&[0; RECORD_BYTES_MAX + 1]).unwrap_err();
        assert_eq!(error, RecordError::TooLong { bytes: RECORD_BYTES_MAX + 1 });
        // Every change of a byte is a record or an error.
        let record = NodeRecord { replicas: vec![replica("demo")], ..NodeRecord::default() };
        let (bytes, _) = record.to_bytes();
        for i in 0..bytes.len() {
            for value in 0..=255 {
                let mut bytes = bytes.clone();
                bytes[i] = value;
                let _ = NodeRecord::from_bytes(&bytes);
            }
        }
    }
}
