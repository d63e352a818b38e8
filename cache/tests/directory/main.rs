//! The machines of the directory: each alone, and some together over calls that get lost, doubled and
//! late. Many of them, under the faults of a network, are in the simulator (tests/sim).

mod owner;
mod pair;
mod reporter;

use cache::directory::{CallId, Owner, OwnerConfig, Reporter, ReporterConfig, ReporterInput};
use cache::directory::{ReporterOutput, ReporterStats};
use protocol::directory::{Events, Heard, News, Part, Piece, Query, Report, ShortName, Sum};
use protocol::{Instant, Machine, NodeId};

const MODEL: [u8; 32] = [7; 32];
const PART: Part = Part { identity: MODEL, shard: 0, shards: 1 };

fn at(millis: u64) -> Instant {
    Instant::from_millis(millis)
}

fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn nodes(n: std::ops::Range<u8>) -> Vec<NodeId> {
    n.map(node).collect()
}

fn name(n: u64) -> ShortName {
    ShortName::from_number(n)
}

fn names(list: &[u64]) -> Vec<ShortName> {
    list.iter().copied().map(name).collect()
}

fn events(list: &[(u64, bool)]) -> Events {
    let mut events = Events::default();
    list.iter().for_each(|(n, removed)| events.push(name(*n), *removed));
    events
}

fn sum(list: &[u64]) -> Sum {
    let mut sum = Sum::default();
    list.iter().for_each(|n| sum.add(name(*n)));
    sum
}

/// Everything between two names.
fn piece(first: u64, last: u64, list: &[u64]) -> Option<Piece> {
    Some(Piece { first: name(first), last: name(last), names: names(list) })
}

fn all(list: &[u64]) -> Option<Piece> {
    piece(0, u64::MAX, list)
}

fn report(epoch: u64, first: u64, list: &[(u64, bool)], piece: Option<Piece>) -> Report {
    summed(epoch, first, list, piece, None)
}

fn summed(
    epoch: u64,
    first: u64,
    list: &[(u64, bool)],
    piece: Option<Piece>,
    sum: Option<Sum>,
) -> Report {
    let events = events(list);
    Report { part: PART, epoch, news: News::Blocks { first, events, piece, sum } }
}

fn known(next: u64) -> Heard {
    Heard::Known { next, missing: None }
}

fn missing(next: u64, from: u64) -> Heard {
    Heard::Known { next, missing: Some(name(from)) }
}

fn query(owner: &mut Owner, list: &[u64]) -> Vec<(NodeId, u32)> {
    let query = Query { part: PART, names: names(list), holders_max: 64 };
    owner.query(&query).holders.iter().map(|holder| (holder.node, holder.blocks)).collect()
}
