//! What one decision of the router costs, by the number of nodes, with a million blocks in the directory.
//!
//! ```sh
//! cargo bench -p grapevine-scheduler --bench decision
//! ```
//!
//! A decision is what the ingress does for a request: ask the directory who has the beginning of the
//! prompt (as where it is the owner; elsewhere the network comes to it), hear its own replicas' load anew,
//! and choose. The directory's owner knows 8,192 sequences of 128 blocks, each on one to eight nodes; each
//! prompt is one of them and 100 tokens more.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration as StdDuration, Instant as StdInstant};

use cache::directory::{Owner, OwnerConfig};
use protocol::directory::{Events, Heard, News, Part, Piece, Query, Report, ShortName};
use protocol::node_record::NodeRole;
use protocol::random::mix;
use protocol::{Duration, Instant, NodeId, RequestId};
use scheduler::router::{
    Ask, NOTHING_BELOW, Outcome, PrefillAsk, ReplicaLoad, Router, RouterConfig,
};

fn main() {
    // Run by `cargo test`, it only shows that it runs.
    let is_bench = std::env::args().any(|a| a == "--bench");
    let (decisions, sequences) = if is_bench { (20_000, SEQUENCES) } else { (20, 64) };
    let only: Option<u64> = std::env::args().find_map(|a| a.parse().ok());
    let all = [10, 100, 1_000, 10_000].into_iter();
    for nodes in all.filter(|nodes| only.is_none_or(|only| only == *nodes)) {
        measure(nodes, decisions, sequences);
    }
}

fn measure(nodes: u64, decisions: u64, sequences: u64) {
    let ids: Vec<NodeId> = (0..nodes).map(id).collect();
    let mut owner = directory(&ids, sequences);
    let mut router = Router::new(ids[0], RouterConfig::default());
    for (n, &node) in ids.iter().enumerate() {
        let now = Instant::from_millis(1);
        router.report(now, node, replicas(n as u64));
        router.rtt(node, Duration::from_micros(200 + mix(n as u64) % 5000));
    }
    let (mut ask_times, mut choose_times, mut plan_times) = (Vec::new(), Vec::new(), Vec::new());
    let mut running = VecDeque::new();
    for n in 0..decisions {
        let now = Instant::from_millis(10 + n);
        let request = RequestId(u128::from(mix(n)) << 64 | u128::from(n));
        let query = Query { part: PART, names: names(mix(n) % sequences), holders_max: HOLDERS };
        let own = replicas(0);
        let began = StdInstant::now();
        let found = owner.query(&query).holders;
        let overlap: BTreeMap<NodeId, u64> =
            found.iter().map(|h| (h.node, u64::from(h.blocks) * BLOCK_TOKENS)).collect();
        ask_times.push(began.elapsed());
        assert!(!overlap.is_empty(), "each sequence is somewhere");
        let ask = Ask {
            request,
            model: "model",
            prompt_tokens: BLOCKS * BLOCK_TOKENS + 100,
            output_tokens: 256,
            overlap_tokens: &overlap,
            below_tokens: &NOTHING_BELOW,
            excluded: &[],
            suspected: &[],
            weights: None,
        };
        let began = StdInstant::now();
        router.report(now, ids[0], own);
        let choice = router.choose(now, &ask).expect("all are ready");
        choose_times.push(began.elapsed());
        running.push_back((choice.node, request));
        if running.len() > RUNNING {
            let (node, over) = running.pop_front().expect("there are some");
            router.settle(now, node, over, Outcome::Ended);
        }
        if n % 16 == 0 {
            let ask = PrefillAsk {
                request,
                model: "model",
                prompt_tokens: ask.prompt_tokens,
                cached_tokens: 100,
                cached_below_tokens: 0,
                block_tokens: BLOCK_TOKENS as u32,
                overlap_tokens: &overlap,
                below_tokens: &NOTHING_BELOW,
                suspected: &[],
            };
            let began = StdInstant::now();
            router.plan_prefill(now, &ask).expect("the replica is here");
            plan_times.push(began.elapsed());
        }
    }
    let whole = ask_times.iter().zip(&choose_times).map(|(a, b)| *a + *b).collect();
    println!(
        "{nodes:6} nodes, {} blocks: directory {}; choose {}; both {}; plan_prefill {}",
        owner.stats().names,
        spread(ask_times),
        spread(choose_times),
        spread(whole),
        spread(plan_times)
    );
}

/// Four replicas of node `n`, one of them of the model that is asked for.
fn replicas(n: u64) -> Vec<(String, ReplicaLoad)> {
    let random = mix(n);
    let load = ReplicaLoad {
        ready: true,
        running: (random % 16) as u32,
        prompt_tokens: random >> 8 & 4095,
        prefill_rate: 500 + (random >> 20 & 1023) as u32,
        weights: 7,
        decode_step_us: 20_000,
        kv_bytes_per_token: 12_288,
        kv_blocks_free: 1000,
        kv_blocks: 4000,
        role: NodeRole::ALL[(random >> 40) as usize % 3],
        ..ReplicaLoad::default()
    };
    ["model", "other-0", "other-1", "other-2"].map(|name| (name.to_owned(), load)).into()
}

/// An owner that every node has told all its blocks.
fn directory(ids: &[NodeId], sequences: u64) -> Owner {
    let ids = &ids[..ids.len().min(FOLLOWED_MAX)];
    let mut owner = Owner::new(OwnerConfig::default(), 1);
    owner.members(Instant::ORIGIN, ids.iter().copied());
    let mut tell = |node, first, names: Vec<ShortName>, piece| {
        let events = Events { removed: vec![0; names.len().div_ceil(8)], names };
        let news = News::Blocks { first, events, piece, sum: None };
        let heard = owner.told(Instant::ORIGIN, node, Report { part: PART, epoch: 1, news });
        assert!(matches!(heard, Heard::Known { missing: None, .. }), "{heard:?}");
    };
    for &node in ids {
        let nothing = Piece { first: ShortName::FIRST, last: ShortName::LAST, names: Vec::new() };
        tell(node, 0, Vec::new(), Some(nothing));
    }
    let mut told = vec![0; ids.len()];
    for sequence in 0..sequences {
        for copy in 0..1 + sequence % u64::from(HOLDERS) {
            let at = mix(sequence + 1).wrapping_add(copy) as usize % ids.len();
            tell(ids[at], told[at], names(sequence), None);
            told[at] += BLOCKS;
        }
    }
    owner
}

fn names(sequence: u64) -> Vec<ShortName> {
    (0..BLOCKS).map(|block| ShortName(mix(sequence * BLOCKS + block + 1).to_le_bytes())).collect()
}

fn spread(mut times: Vec<StdDuration>) -> String {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    format!("p50 {:.1} p99 {:.1} p99.9 {:.1} µs", at(0.5), at(0.99), at(0.999))
}

fn id(n: u64) -> NodeId {
    let mut bytes = [0; 32];
    for (place, eight) in bytes.chunks_exact_mut(8).enumerate() {
        eight.copy_from_slice(&mix(n << 8 | place as u64).to_le_bytes());
    }
    NodeId(bytes)
}

/// Requests under way at one time.
const RUNNING: usize = 500;
const SEQUENCES: u64 = 8192;
/// Of each sequence.
const BLOCKS: u64 = 128;
const BLOCK_TOKENS: u64 = 16;
/// As many as the daemon asks for.
const HOLDERS: u16 = 8;
/// Nodes that an owner follows; of more the rest has nothing cached.
const FOLLOWED_MAX: usize = 1024;
const PART: Part = Part { identity: [7; 32], shard: 0, shards: 1 };
