//! KV blocks between two nodes: the wire types of a hand-off, and of fetching a cached prefix.
//!
//! ```text
//! receiver (decodes, leads)                sender (has prefilled, or prefills)
//!   control stream, both ways
//!     KV_ASK                          ──►
//!                                     ◄──  KV_ACCEPT | KV_REFUSAL
//!                                     ◄──  KV_PROGRESS, again and again
//!   data stream, one way
//!                                     ◄──  KV_STREAM; on further data streams KV_PART, and then bytes only
//!                                     ◄──  KV_CHUNK, the payloads of its blocks, KV_COMMIT
//!                                     ◄──  … the last KV_COMMIT says that it is the last
//!     (ends the control stream)       ──►
//! ```
//!
//! Everything is a frame but the payloads: these follow their `KV_CHUNK` as they lie in memory,
//! `blocks * block_bytes` bytes, because a block of a large model is longer than a frame may be and
//! must not be copied to be framed (docs/adr/0012-kv-transfer.md). Where the sender has opened several
//! data streams, payloads are dealt out to them ([`KV_STRIPE_BYTES`], docs/adr/0018-kv-windows.md).
//! The machines are in `cache`.

use bincode::{Decode, Encode};

use crate::frame::{Frame, Kind};
use crate::wire::DecodeError;
use crate::{RequestId, TenantId, TokenId};

/// What the receiver wants. The first frame of a control stream.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KvAsk {
    /// As [`RequestId`].
    pub request: u128,
    /// Never twice from one process: the data stream repeats it, and one with another number is not
    /// listened to.
    pub attempt: u64,
    pub format: KvFormat,
    /// Position in its sequence of the first block wanted.
    pub first: u32,
    /// Names of the blocks wanted, in order; 1 to [`KV_BLOCKS_MAX`].
    pub wanted: Vec<[u8; 32]>,
    /// Time left, milliseconds. Relative, because clocks do not agree.
    pub deadline_ms: u32,
    /// Data streams that the path is worth, 1 to [`KV_STREAMS_MAX`]; the sender may open fewer.
    pub streams: u8,
    pub work: KvWork,
}

/// What the sender shall do for it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum KvWork {
    /// Send what it has cached.
    Cached,
    /// Prefill what it has not.
    Prefill {
        tenant: String,
        /// The whole prompt, at most [`KV_TOKENS_MAX`]: beyond the last full block, too, because the
        /// first token needs it.
        tokens: Vec<TokenId>,
        priority: i8,
        first_token: KvFirstToken,
    },
}

/// Who chooses the first token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum KvFirstToken {
    /// The receiver, from logits of its own.
    Receiver,
    /// The sender, the likeliest.
    Greedy,
}

/// Everything that decides whether two nodes mean the same by a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KvFormat {
    /// The model's numerical identity: weights, architecture, rope, adapter, dtype.
    pub identity: [u8; 32],
    /// Layers whose keys and values are in a block: from this one …
    pub layer_first: u16,
    /// … so many.
    pub layers: u16,
    pub block_tokens: u16,
    pub dtype: KvDtype,
    /// Bytes of one block's payload.
    pub block_bytes: u32,
}

/// Element type of keys and values. The number is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum KvDtype {
    F32,
    F16,
    Bf16,
}

/// The sender lives and is at it; nothing but that keeps the receiver waiting. (The body of
/// `KV_ACCEPT` is empty.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KvProgress {
    /// Of the wanted blocks, those that the sender has so far.
    pub ready: u32,
}

/// Why the sender does not send, or sends no more. What was committed before stays good. The text is
/// shown to people, so it consists of words of ours only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum KvRefusal {
    #[error("the other node has another model, adapter or KV type under this name")]
    OtherModel,
    #[error("the other node holds layers {first} to {end} in its blocks", end = first + layers)]
    OtherLayers { first: u16, layers: u16 },
    #[error("blocks of the other node hold {theirs} tokens")]
    OtherBlockTokens { theirs: u16 },
    #[error("keys and values of the other node are {theirs:?}")]
    OtherDtype { theirs: KvDtype },
    #[error("blocks of the other node have {theirs} bytes")]
    OtherBlockBytes { theirs: u32 },
    /// The two derive a tenant's salt from different secrets, or disagree on tokens.
    #[error("the other node has other names for these blocks")]
    OtherNames,
    #[error("the other node has none of these blocks any more")]
    Absent,
    #[error("the other node does not prefill for others")]
    NoPrefill,
    #[error("the other node has no room or too many transfers")]
    Busy,
    #[error("at most {max} blocks can be asked for at once")]
    TooMany { max: u32 },
    #[error("the time was over")]
    Late,
    #[error("the prefill was given up")]
    Aborted,
    #[error("the other node is shutting down")]
    Leaving,
    #[error("what was sent is not the protocol that the other node speaks")]
    Protocol,
}

/// The first frame of a data stream: whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KvStream {
    pub request: u128,
    pub attempt: u64,
    /// Data streams that the payloads are dealt out to: this one, which is number 0 and has all frames,
    /// and so many less one that begin with a [`KvPart`]. At most as many as were asked for.
    pub parts: u8,
}

/// The first and only frame of a further data stream. What follows is payloads' bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KvPart {
    pub request: u128,
    pub attempt: u64,
    /// 1 and up; each once.
    pub part: u8,
}

/// Announces the payloads of `blocks` blocks, the first of which is the wanted one number `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KvChunk {
    pub first: u32,
    pub blocks: u32,
}

/// Ends a chunk: what its blocks must be. Without blocks only as the last.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KvCommit {
    pub first: u32,
    /// Of each block of the chunk, over its name and its payload; at most [`KV_CHUNK_BLOCKS_MAX`].
    pub digests: Vec<[u8; 32]>,
    /// Nothing follows.
    pub end: Option<KvEnd>,
}

/// The end of what the sender has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KvEnd {
    pub first_token: Option<TokenId>,
    /// Of the blocks sent, from the first on, those that the sender had before it was asked.
    pub cached: u32,
}

impl KvFormat {
    /// Whether blocks of `theirs` can be used here.
    ///
    /// # Errors
    /// The first difference, as one who holds `self` says it to the other.
    pub fn check(&self, theirs: &KvFormat) -> Result<(), KvRefusal> {
        let KvFormat { identity, layer_first, layers, block_tokens, dtype, block_bytes } = *self;
        // What people can see and change comes first: a different dtype is a different identity, too.
        if theirs.block_tokens != block_tokens {
            return Err(KvRefusal::OtherBlockTokens { theirs: block_tokens });
        }
        if theirs.dtype != dtype {
            return Err(KvRefusal::OtherDtype { theirs: dtype });
        }
        if theirs.identity != identity {
            return Err(KvRefusal::OtherModel);
        }
        if (theirs.layer_first, theirs.layers) != (layer_first, layers) {
            return Err(KvRefusal::OtherLayers { first: layer_first, layers });
        }
        if theirs.block_bytes != block_bytes {
            return Err(KvRefusal::OtherBlockBytes { theirs: block_bytes });
        }
        Ok(())
    }
}

impl KvAsk {
    pub fn request(&self) -> RequestId {
        RequestId(self.request)
    }

    /// # Errors
    /// If the frame holds no such value, or one beyond its bounds.
    pub fn from_frame(frame: &Frame) -> Result<KvAsk, KvFrameError> {
        let ask: KvAsk = value(frame, Kind::KV_ASK)?;
        bounded("blocks", ask.wanted.len(), 1, KV_BLOCKS_MAX)?;
        bounded("streams", ask.streams.into(), 1, KV_STREAMS_MAX)?;
        if let KvWork::Prefill { tenant, tokens, .. } = &ask.work {
            bounded("tokens", tokens.len(), 1, KV_TOKENS_MAX)?;
            TenantId::new(tenant).ok_or(KvFrameError::Tenant)?;
        }
        Ok(ask)
    }
}

impl KvStream {
    /// # Errors
    /// If the frame holds no such value, or one beyond its bounds.
    pub fn from_frame(frame: &Frame) -> Result<KvStream, KvFrameError> {
        let stream: KvStream = value(frame, Kind::KV_STREAM)?;
        bounded("streams", stream.parts.into(), 1, KV_STREAMS_MAX)?;
        Ok(stream)
    }
}

impl KvPart {
    /// # Errors
    /// If the frame holds no such value, or one beyond its bounds.
    pub fn from_frame(frame: &Frame) -> Result<KvPart, KvFrameError> {
        let part: KvPart = value(frame, Kind::KV_PART)?;
        bounded("part", part.part.into(), 1, KV_STREAMS_MAX - 1)?;
        Ok(part)
    }
}

impl KvChunk {
    /// # Errors
    /// If the frame holds no such value, or one beyond its bounds.
    pub fn from_frame(frame: &Frame) -> Result<KvChunk, KvFrameError> {
        let chunk: KvChunk = value(frame, Kind::KV_CHUNK)?;
        bounded("blocks", chunk.blocks as usize, 1, KV_CHUNK_BLOCKS_MAX)?;
        Ok(chunk)
    }
}

impl KvCommit {
    /// # Errors
    /// If the frame holds no such value, or one beyond its bounds.
    pub fn from_frame(frame: &Frame) -> Result<KvCommit, KvFrameError> {
        let commit: KvCommit = value(frame, Kind::KV_COMMIT)?;
        let least = usize::from(commit.end.is_none());
        bounded("digests", commit.digests.len(), least, KV_CHUNK_BLOCKS_MAX)?;
        Ok(commit)
    }
}

/// Decodes the body of a frame that must be of `kind`, for the types without bounds of their own.
///
/// # Errors
/// If it is of another kind or holds no such value.
pub fn value<T: Decode<()>>(frame: &Frame, kind: Kind) -> Result<T, KvFrameError> {
    if frame.kind != kind {
        return Err(KvFrameError::Kind { expected: kind.0, got: frame.kind.0 });
    }
    let malformed = |source| KvFrameError::Malformed { kind: kind.0, source };
    frame.value::<T, KV_FRAME_BYTES_MAX>().map_err(malformed)
}

fn bounded(what: &'static str, n: usize, min: usize, max: usize) -> Result<(), KvFrameError> {
    match (min..=max).contains(&n) {
        true => Ok(()),
        false => Err(KvFrameError::Count { what, n, min, max }),
    }
}

/// Why a frame does not belong to a transfer. Its sender is at fault; nothing was kept of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvFrameError {
    #[error("a frame of kind {got} instead of {expected}")]
    Kind { expected: u16, got: u16 },
    #[error("a frame of kind {kind} cannot be decoded")]
    Malformed { kind: u16, source: DecodeError },
    #[error("{n} {what}, {min} to {max} are allowed")]
    Count { what: &'static str, n: usize, min: usize, max: usize },
    #[error("the tenant's name is none")]
    Tenant,
}

/// Blocks of one request: 131,072 tokens of 16 a block, 256 KiB of names.
pub const KV_BLOCKS_MAX: usize = 8192;
/// Tokens of one prompt.
pub const KV_TOKENS_MAX: usize = 131_072;
/// Blocks of one chunk: what is lost when its digests do not fit.
pub const KV_CHUNK_BLOCKS_MAX: usize = 1024;
/// Data streams of one attempt.
pub const KV_STREAMS_MAX: usize = 8;
/// Each payload is cut into pieces of so many bytes, the last one shorter. Piece number n of the attempt,
/// counted over all its payloads, goes to stream number n modulo the number of its streams.
pub const KV_STRIPE_BYTES: usize = 128 << 10;
/// Longest frame of a transfer. The longest ask, with five bytes to a token, fits.
pub const KV_FRAME_BYTES_MAX: usize = 1 << 20;

const _: () = assert!(KV_BLOCKS_MAX * 32 + KV_TOKENS_MAX * 5 + 1024 <= KV_FRAME_BYTES_MAX);

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use super::*;

    fn format() -> KvFormat {
        KvFormat {
            identity: [7; 32],
            layer_first: 0,
            layers: 24,
            block_tokens: 16,
            dtype: KvDtype::F16,
            block_bytes: 196_608,
        }
    }

    fn ask(work: KvWork) -> KvAsk {
        KvAsk {
            request: 0x0102,
            attempt: 3,
            format: format(),
            first: 2,
            wanted: vec![[9; 32]],
            deadline_ms: 5000,
            streams: 2,
            work,
        }
    }

    fn prefill(tokens: Vec<u32>) -> KvWork {
        let (tenant, first_token) = ("acme".to_owned(), KvFirstToken::Greedy);
        KvWork::Prefill { tenant, tokens, priority: -1, first_token }
    }

    #[track_caller]
    fn golden<T: Encode + Decode<()> + PartialEq + Debug>(kind: Kind, value: T, bytes: &[&[u8]]) {
        let frame = Frame::new(kind, &value);
        assert_eq!(frame.body, bytes.concat(), "{value:?}");
        assert_eq!(super::value::<T>(&frame, kind), Ok(value));
    }

    #[test]
    fn golden_bytes() {
        let format: &[u8] = &[&[7; 32][..], &[0, 24, 16, 1, 252, 0, 0, 3, 0]].concat();
        let head: &[u8] = &[251, 2, 1, 3];
        let wanted: &[u8] = &[&[2, 1][..], &[9; 32], &[251, 136, 19, 2]].concat();
        golden(Kind::KV_ASK, ask(KvWork::Cached), &[head, format, wanted, &[0]]);
        let work = [1, 4, b'a', b'c', b'm', b'e', 2, 5, 251, 44, 1, 255, 1];
        golden(Kind::KV_ASK, ask(prefill(vec![5, 300])), &[head, format, wanted, &work]);
        golden(Kind::KV_ACCEPT, (), &[]);
        golden(Kind::KV_PROGRESS, KvProgress { ready: 300 }, &[&[251, 44, 1]]);
        golden(Kind::KV_STREAM, KvStream { request: 0x0102, attempt: 3, parts: 2 }, &[head, &[2]]);
        golden(Kind::KV_PART, KvPart { request: 0x0102, attempt: 3, part: 1 }, &[head, &[1]]);
        golden(Kind::KV_CHUNK, KvChunk { first: 4, blocks: 2 }, &[&[4, 2]]);
        let commit = KvCommit { first: 4, digests: vec![[8; 32]], end: None };
        golden(Kind::KV_COMMIT, commit, &[&[4, 1], &[8; 32], &[0]]);
        let end = Some(KvEnd { first_token: Some(6), cached: 3 });
        golden(
            Kind::KV_COMMIT,
            KvCommit { first: 4, digests: vec![], end },
            &[&[4, 0, 1, 1, 6, 3]],
        );
    }

    #[test]
    fn golden_refusals() {
        let all: [(KvRefusal, &[u8]); 14] = [
            (KvRefusal::OtherModel, &[0]),
            (KvRefusal::OtherLayers { first: 2, layers: 3 }, &[1, 2, 3]),
            (KvRefusal::OtherBlockTokens { theirs: 16 }, &[2, 16]),
            (KvRefusal::OtherDtype { theirs: KvDtype::Bf16 }, &[3, 2]),
            (KvRefusal::OtherBlockBytes { theirs: 1 }, &[4, 1]),
            (KvRefusal::OtherNames, &[5]),
            (KvRefusal::Absent, &[6]),
            (KvRefusal::NoPrefill, &[7]),
            (KvRefusal::Busy, &[8]),
            (KvRefusal::TooMany { max: 5 }, &[9, 5]),
            (KvRefusal::Late, &[10]),
            (KvRefusal::Aborted, &[11]),
            (KvRefusal::Leaving, &[12]),
            (KvRefusal::Protocol, &[13]),
        ];
        for (refusal, bytes) in all {
            golden(Kind::KV_REFUSAL, refusal, &[bytes]);
        }
    }

    #[test]
    fn the_first_difference_is_named() {
        let ours = format();
        assert_eq!(ours.check(&ours), Ok(()));
        for (theirs, refusal) in [
            (KvFormat { identity: [1; 32], ..ours }, KvRefusal::OtherModel),
            (KvFormat { layers: 12, ..ours }, KvRefusal::OtherLayers { first: 0, layers: 24 }),
            (KvFormat { layer_first: 1, ..ours }, KvRefusal::OtherLayers { first: 0, layers: 24 }),
            (
                KvFormat { block_tokens: 32, block_bytes: 393_216, ..ours },
                KvRefusal::OtherBlockTokens { theirs: 16 },
            ),
            (
                KvFormat { dtype: KvDtype::F32, identity: [2; 32], ..ours },
                KvRefusal::OtherDtype { theirs: KvDtype::F16 },
            ),
            (KvFormat { block_bytes: 1, ..ours }, KvRefusal::OtherBlockBytes { theirs: 196_608 }),
        ] {
            assert_eq!(ours.check(&theirs), Err(refusal), "{theirs:?}");
        }
    }

    #[test]
    fn bounds() {
        let count = |ask: &KvAsk| match KvAsk::from_frame(&Frame::new(Kind::KV_ASK, ask)) {
            Err(KvFrameError::Count { what, n, .. }) => Some((what, n)),
            _ => None,
        };
        let wanted = |n| KvAsk { wanted: vec![[0; 32]; n], ..ask(KvWork::Cached) };
        assert_eq!(count(&wanted(0)), Some(("blocks", 0)));
        assert_eq!(count(&wanted(KV_BLOCKS_MAX + 1)), Some(("blocks", KV_BLOCKS_MAX + 1)));
        assert_eq!(count(&ask(prefill(vec![]))), Some(("tokens", 0)));
        assert_eq!(count(&ask(prefill(vec![1; KV_TOKENS_MAX + 1]))).map(|c| c.0), Some("tokens"));
        for (streams, ok) in [(0, false), (1, true), (8, true), (9, false)] {
            let of = |found: Result<(), KvFrameError>| found.is_ok();
            let asked = KvAsk { streams, ..ask(KvWork::Cached) };
            let asked = KvAsk::from_frame(&Frame::new(Kind::KV_ASK, &asked));
            assert_eq!(of(asked.map(drop)), ok, "{streams}");
            let stream = KvStream { request: 1, attempt: 1, parts: streams };
            let stream = KvStream::from_frame(&Frame::new(Kind::KV_STREAM, &stream));
            assert_eq!(of(stream.map(drop)), ok, "{streams}");
            let part = KvPart { request: 1, attempt: 1, part: streams };
            let part = KvPart::from_frame(&Frame::new(Kind::KV_PART, &part));
            assert_eq!(of(part.map(drop)), ok && streams < 8, "{streams}");
        }
        // The longest one is a frame that can be read.
        let longest = KvAsk {
            wanted: vec![[0; 32]; KV_BLOCKS_MAX],
            ..ask(prefill(vec![u32::MAX; KV_TOKENS_MAX]))
        };
        let frame = Frame::new(Kind::KV_ASK, &longest);
        assert!(frame.body.len() <= KV_FRAME_BYTES_MAX);
        assert_eq!(KvAsk::from_frame(&frame), Ok(longest));
        let nobody = KvWork::Prefill {
            tenant: "no body".to_owned(),
            tokens: vec![1],
            priority: 0,
            first_token: KvFirstToken::Receiver,
        };
        let frame = Frame::new(Kind::KV_ASK, &ask(nobody));
        assert_eq!(KvAsk::from_frame(&frame), Err(KvFrameError::Tenant));

        for (blocks, ok) in [(0, false), (1, true), (1024, true), (1025, false), (u32::MAX, false)]
        {
            let frame = Frame::new(Kind::KV_CHUNK, &KvChunk { first: u32::MAX, blocks });
            assert_eq!(KvChunk::from_frame(&frame).is_ok(), ok, "{blocks}");
        }
        let end = Some(KvEnd { first_token: None, cached: 0 });
        for (n, end, ok) in [
            (0, None, false),
            (0, end, true),
            (1, None, true),
            (1024, end, true),
            (1025, end, false),
        ] {
            let commit = KvCommit { first: 0, digests: vec![[0; 32]; n], end };
            let frame = Frame::new(Kind::KV_COMMIT, &commit);
            assert_eq!(KvCommit::from_frame(&frame).is_ok(), ok, "{n} {end:?}");
        }
    }

    #[test]
    fn damaged_frames_are_errors() {
        let frame = Frame::new(Kind::KV_ASK, &ask(prefill(vec![5, 300])));
        for end in 0..frame.body.len() {
            let cut = Frame { kind: frame.kind, body: frame.body[..end].to_vec() };
            assert!(KvAsk::from_frame(&cut).is_err(), "{end}");
        }
        for i in 0..frame.body.len() {
            for byte in 0..=255 {
                let mut damaged = frame.clone();
                damaged.body[i] = byte;
                if let Ok(ask) = KvAsk::from_frame(&damaged) {
                    let again = Frame::new(Kind::KV_ASK, &ask);
                    assert_eq!(KvAsk::from_frame(&again), Ok(ask));
                }
            }
        }
        let other = Frame::new(Kind::KV_CHUNK, &KvChunk { first: 0, blocks: 1 });
        assert_eq!(KvAsk::from_frame(&other), Err(KvFrameError::Kind { expected: 48, got: 57 }));
    }
}
