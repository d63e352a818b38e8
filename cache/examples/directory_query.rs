//! How long an owner takes for a query: `cargo run --release -p grapevine-cache --example directory_query`.
//!
//! A thousand nodes, a million different blocks: conversations of 128 blocks, the first 32 of which a
//! family has in common. Every family's beginning is on all nodes, every conversation on three.

use std::time::{Duration, Instant};

use cache::directory::{Owner, OwnerConfig};
use protocol::NodeId;
use protocol::directory::{
    Events, HOLDERS_MAX, Heard, NAMES_MAX, News, Part, Piece, Query, Report, ShortName,
};
use protocol::random::{Random, mix};

const NODES: usize = 1000;
const FAMILIES: u64 = 64;
const CONVERSATIONS: u64 = 10_400;
const SHARED: u64 = 32;
const BLOCKS: u64 = 128;
const QUERIES: usize = 20_000;

fn main() {
    let mut random = Random::new(1);
    let mut nodes: Vec<Vec<ShortName>> = (0..NODES).map(|_| family_names()).collect();
    for conversation in 0..CONVERSATIONS {
        for _ in 0..3 {
            let own = (SHARED..BLOCKS).map(|block| name(conversation, block));
            nodes[random.below(NODES)].extend(own);
        }
    }
    let mut owner = Owner::new(OwnerConfig::default(), random.next_u64());
    let now = protocol::Instant::ORIGIN;
    owner.members(now, (0..NODES).map(id));
    let begun = Instant::now();
    let mut told = 0;
    for (node, names) in nodes.iter_mut().enumerate() {
        told += tell(&mut owner, node, names);
    }
    let stats = owner.stats();
    println!(
        "{} nodes, {} names, {told} told in {:.2} s ({:.0} ns each)",
        stats.nodes,
        stats.names,
        begun.elapsed().as_secs_f64(),
        begun.elapsed().as_nanos() as f64 / told as f64
    );
    ask("a conversation of 128 blocks", &mut owner, |random| {
        let conversation = random.next_u64() % CONVERSATIONS;
        (0..BLOCKS).map(|block| name(conversation, block)).collect()
    });
    ask("a new one: 32 blocks on all nodes", &mut owner, |random| {
        let conversation = random.next_u64() % CONVERSATIONS;
        let new = |block| name(conversation + CONVERSATIONS, block);
        let shared = |block| name(conversation, block);
        (0..BLOCKS).map(|block| if block < SHARED { shared(block) } else { new(block) }).collect()
    });
    ask("blocks that nobody has", &mut owner, |random| {
        (0..BLOCKS).map(|_| ShortName::from_number(random.next_u64())).collect()
    });
    leave(&mut owner);
}

fn id(node: usize) -> NodeId {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&(node as u64).to_le_bytes());
    NodeId(id)
}

fn part() -> Part {
    Part { identity: [7; 32], shard: 0, shards: 1 }
}

fn name(conversation: u64, block: u64) -> ShortName {
    let who = if block < SHARED { conversation % FAMILIES } else { FAMILIES + conversation };
    ShortName::from_number(mix(who << 10 | block))
}

fn family_names() -> Vec<ShortName> {
    (0..FAMILIES).flat_map(|family| (0..SHARED).map(move |block| name(family, block))).collect()
}

/// All names of a node, piece by piece.
fn tell(owner: &mut Owner, node: usize, names: &mut Vec<ShortName>) -> usize {
    names.sort_unstable();
    names.dedup();
    let mut first = ShortName::FIRST;
    for piece in names.chunks(NAMES_MAX) {
        let is_end = piece.last() == names.last();
        let last = if is_end { ShortName::LAST } else { *piece.last().expect("not empty") };
        let piece = Some(Piece { first, last, names: piece.to_vec() });
        let news = News::Blocks { first: 0, events: Events::default(), piece, sum: None };
        let report = Report { part: part(), epoch: 1, news };
        let heard = owner.told(protocol::Instant::ORIGIN, id(node), report);
        assert!(matches!(heard, Heard::Known { .. }), "{heard:?}");
        first = last.successor().unwrap_or(first);
    }
    names.len()
}

fn ask(what: &str, owner: &mut Owner, names: impl Fn(&mut Random) -> Vec<ShortName>) {
    let mut random = Random::new(2);
    let (mut times, mut holders): (Vec<Duration>, usize) = (Vec::with_capacity(QUERIES), 0);
    for _ in 0..QUERIES {
        let names = names(&mut random);
        let query = Query { part: part(), names, holders_max: HOLDERS_MAX as u16 };
        let begun = Instant::now();
        let found = owner.query(&query);
        times.push(begun.elapsed());
        holders += found.holders.len();
    }
    times.sort_unstable();
    let at = |share: f64| times[((QUERIES - 1) as f64 * share) as usize].as_nanos() as f64 / 1e3;
    println!(
        "{what}: p50 {:.1} µs, p99 {:.1} µs, p99.9 {:.1} µs; {:.1} holders",
        at(0.5),
        at(0.99),
        at(0.999),
        holders as f64 / QUERIES as f64
    );
}

/// A tenth of the nodes leaves at once.
fn leave(owner: &mut Owner) {
    let begun = Instant::now();
    owner.members(protocol::Instant::ORIGIN, (NODES / 10..NODES).map(id));
    let dropped = begun.elapsed();
    let (mut ticks, mut longest) = (0, Duration::ZERO);
    while owner.next_deadline() == Some(protocol::Instant::ORIGIN) && ticks < 10_000 {
        let begun = Instant::now();
        owner.tick(protocol::Instant::ORIGIN);
        (ticks, longest) = (ticks + 1, longest.max(begun.elapsed()));
    }
    println!(
        "{} nodes leave: {:.0} µs, then {ticks} ticks of at most {:.0} µs",
        NODES / 10,
        dropped.as_nanos() as f64 / 1e3,
        longest.as_nanos() as f64 / 1e3
    );
}
