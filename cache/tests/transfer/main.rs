//! The machines of a transfer, each alone: transcripts, refusals, waits, and peers that say anything.
//! Both together, under faults, are in the simulator (tests/sim).

mod lies;
mod receiver;
mod sender;

use cache::transfer::{AttemptId, BlockDigest, HandOff, Prompt, Source, StreamId, TransferConfig};
use cache::{BlockHash, BlockId};
use protocol::frame::{Frame, Kind};
use protocol::transfer::{
    KvChunk, KvCommit, KvDtype, KvEnd, KvFirstToken, KvFormat, KvStream, KvWork,
};
use protocol::{Duration, Instant, NodeId, RequestId, TenantId};

const REQUEST: RequestId = RequestId(7);
const STREAM: StreamId = StreamId(1);
const FIRST: AttemptId = AttemptId(0);

fn at(millis: u64) -> Instant {
    Instant::from_millis(millis)
}

fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn name(n: u8) -> BlockHash {
    BlockHash([n; 32])
}

fn digest(n: u8) -> BlockDigest {
    BlockDigest([n; 32])
}

fn blocks(range: std::ops::Range<u32>) -> Vec<BlockId> {
    range.map(BlockId).collect()
}

fn format() -> KvFormat {
    KvFormat {
        identity: [5; 32],
        layer_first: 0,
        layers: 1,
        block_tokens: 4,
        dtype: KvDtype::F16,
        block_bytes: 32,
    }
}

/// Chunks of two blocks.
fn config() -> TransferConfig {
    TransferConfig {
        transfers_max: 2,
        blocks_max: 8,
        blocks_pinned_max: 10,
        chunk_bytes_max: 64,
        answer_wait: Duration::from_millis(100),
        silence_max: Duration::from_millis(200),
        progress_interval: Duration::from_millis(50),
        send_wait: Duration::from_millis(300),
        serve_max: Duration::from_secs(5),
        ..TransferConfig::new(format(), 40)
    }
}

/// Wants blocks named `0..n` from nodes 1 and 2, within a second.
fn handoff(n: u8) -> HandOff {
    HandOff {
        request: REQUEST,
        first: 3,
        missing: (0..n).map(name).collect(),
        prompt: Prompt {
            tenant: TenantId::local(),
            tokens: vec![1, 2, 3],
            priority: 0,
            first_token: KvFirstToken::Greedy,
        },
        sources: vec![
            Source { peer: node(1), prefill: false, streams: 1 },
            Source { peer: node(2), prefill: true, streams: 3 },
        ],
        deadline: at(1000),
    }
}

fn prefill() -> KvWork {
    KvWork::Prefill {
        tenant: "local".to_owned(),
        tokens: vec![1, 2, 3],
        priority: 0,
        first_token: KvFirstToken::Greedy,
    }
}

fn header(request: RequestId, attempt: u64) -> Frame {
    Frame::new(Kind::KV_STREAM, &KvStream { request: request.0, attempt, parts: 1 })
}

fn chunk(first: u32, blocks: u32) -> Frame {
    Frame::new(Kind::KV_CHUNK, &KvChunk { first, blocks })
}

fn commit(first: u32, digests: std::ops::Range<u8>, end: Option<Option<u32>>) -> Frame {
    let digests = digests.map(|n| digest(n).0).collect();
    let end = end.map(|first_token| KvEnd { first_token, cached: 0 });
    Frame::new(Kind::KV_COMMIT, &KvCommit { first, digests, end })
}
