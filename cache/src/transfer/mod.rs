//! KV blocks from one node to another: a prefill's hand-off to the node that decodes, and a cached
//! prefix fetched from a peer. Two machines, [`Receiver`] (decodes, leads) and [`Sender`]; their
//! messages are in [`protocol::transfer`], the whole story in docs/kv-transfer.md.
//!
//! Neither touches bytes nor the pool. The shell, which owns both, does as the outputs say and answers:
//!
//! ```text
//! receiver                                            sender
//!   Reserve ─► pool.reserve ─► Reserved                 Serve ─► pool.match_prefix, prefill ─► Ready …
//!   Ask ─► control stream                               SendChunk ─► pages to stream ─► Sent
//!   Write ─► stream to pages ─► Written                 Unpin ─► pool.release
//!   Attach ─► pool.attach                               Close
//!   Free ─► pool.release
//!   Close, Stop
//! ```
//!
//! What must never happen, and why it cannot:
//!
//! - *A page is written while it may be read.* Pages under a [`Write`](ReceiverOutput::Write) belong to
//!   the writer until the shell has said `Written` or `WriteStopped`; only then are they attached, freed
//!   or written by another attempt. Attached pages are never written.
//! - *A page is read before it is whole.* Only a commit whose digests all fit attaches.
//! - *A sender's page is reused while it is being sent.* It stays pinned until `Sent` or `SendStopped`.
//! - *Bytes of a past attempt are taken.* A data stream names its attempt, and no number comes twice; any
//!   other stream is stopped unread.
//! - *A wait without end.* Every wait for a peer has a deadline; [`next_deadline`] says the nearest. The
//!   shell's own answers have none: they cannot be given up without giving up the first rule.
//!
//! There are no credits: the receiver has room for all that it asks for before it asks, so that only
//! the path itself can be too slow, and QUIC's flow control says so by not taking bytes. The sender then
//! gets no `Sent`, and has at most one chunk with the shell.
//!
//! [`next_deadline`]: protocol::Machine::next_deadline

mod receiver;
mod sender;

use protocol::Duration;
use protocol::transfer::{KV_BLOCKS_MAX, KV_CHUNK_BLOCKS_MAX, KvFormat};

use crate::BlockHash;

pub use receiver::{
    AttemptError, AttemptId, HandOff, HandOffOutcome, Prompt, Receiver, ReceiverInput,
    ReceiverOutput, Rejection, Source, StreamId, Violation,
};
pub use sender::{Sender, SenderInput, SenderOutcome, SenderOutput, Served, TransferId};

/// Bounds and waits of both sides.
#[derive(Clone, Debug)]
pub struct TransferConfig {
    /// What this node's blocks are. Asks for anything else are refused before a byte flows.
    pub format: KvFormat,
    /// Whether this node prefills for others.
    pub prefills: bool,
    /// Hand-offs received at once, and transfers sent at once; more are refused. Too small: peers
    /// compute what could be sent. Too large: each is slow.
    pub transfers_max: usize,
    /// Transfers sent to one peer at once; more are refused as busy, and it goes to the next that has the
    /// blocks or computes them. Too small: a peer with many new prompts computes what could be sent. Too
    /// large: one peer takes all that there are from the others.
    pub transfers_per_peer_max: usize,
    /// Blocks of one request, at most [`KV_BLOCKS_MAX`].
    pub blocks_max: usize,
    /// Blocks that all transfers together may pin at the sender; more are refused. Too small: as above.
    /// Too large: peers leave this node's own requests without room. A quarter of the pool is a good
    /// beginning.
    pub blocks_pinned_max: usize,
    /// Bytes of a chunk, rounded down to whole blocks, but at least one. Too small: a commit record and
    /// a wake-up for few bytes. Too large: the receiver attaches late and loses more with a bad chunk;
    /// the transfer lags behind the prefill.
    pub chunk_bytes_max: usize,
    /// Time for the answer to an ask. A round trip and a look into the sender's tables. Too small: slow
    /// paths are never used. Too large: a dead sender costs that much of the time to first token.
    pub answer_wait: Duration,
    /// Time without a sign of life from the sender. Must be some times `progress_interval` and a round
    /// trip. Too small: a stutter of the path costs a prefill. Too large: as above.
    pub silence_max: Duration,
    /// Between two signs of life of the sender.
    pub progress_interval: Duration,
    /// Time in which the path must take one chunk. Too small: slow paths are given up. Too large: a
    /// stuck receiver pins blocks for that long.
    pub send_wait: Duration,
    /// No transfer is served for longer, whatever the ask says.
    pub serve_max: Duration,
}

impl TransferConfig {
    /// The bounds for blocks of `format` in a pool of `capacity` blocks.
    pub fn new(format: KvFormat, capacity: usize) -> Self {
        TransferConfig {
            format,
            prefills: true,
            transfers_max: 64,
            transfers_per_peer_max: 16,
            blocks_max: KV_BLOCKS_MAX,
            blocks_pinned_max: capacity / 4,
            chunk_bytes_max: CHUNK_BYTES_MAX,
            answer_wait: Duration::from_millis(1_000),
            silence_max: Duration::from_millis(1_500),
            progress_interval: Duration::from_millis(250),
            send_wait: Duration::from_secs(5),
            serve_max: Duration::from_secs(120),
        }
    }

    fn chunk_blocks_max(&self) -> usize {
        let block_bytes = self.format.block_bytes.max(1) as usize;
        (self.chunk_bytes_max / block_bytes).clamp(1, KV_CHUNK_BLOCKS_MAX)
    }
}

/// As [`TransferConfig::chunk_bytes_max`], unless it is told otherwise.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

/// What a block's payload must be: BLAKE3 over it, keyed with the block's name, so that the right bytes
/// in the wrong place do not fit either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDigest(pub [u8; 32]);

/// Computes a [`BlockDigest`] from a payload in pieces, as they come or go.
#[derive(Clone, Debug)]
pub struct Digester(blake3::Hasher);

impl BlockDigest {
    pub fn of(name: &BlockHash, payload: &[u8]) -> Self {
        let mut digester = Digester::new(name);
        digester.update(payload);
        digester.finish()
    }
}

impl Digester {
    pub fn new(name: &BlockHash) -> Self {
        Digester(blake3::Hasher::new_keyed(&name.0))
    }

    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    pub fn finish(&self) -> BlockDigest {
        BlockDigest(*self.0.finalize().as_bytes())
    }
}
