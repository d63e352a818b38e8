//! Which node has which KV blocks: the wire types of the RPC methods [`REPORT`] and [`QUERY`].
//!
//! ```text
//! node with a replica ──► owner     Report: what was stored and removed since, or a piece of all ──► Heard
//! any node ──► owner                Query: the names of a prompt's blocks                        ──► Found
//! ```
//!
//! Who owns what needs no agreement: every node takes the first members in the order of [`rank`]. What is
//! said here are hints. One that is wrong costs a fetch that is refused, never a wrong token: blocks are
//! fetched by their whole names. The machines are in `cache`, the whole story is docs/kv-directory.md.

use bincode::{Decode, Encode};

use crate::NodeId;
use crate::random::mix;
use crate::wire::{self, DecodeError};

/// Method: this has happened to the blocks of the caller.
pub const REPORT: &str = "kv-report";
/// Method: who has the longest beginning of this.
pub const QUERY: &str = "kv-query";

/// The first eight bytes of a block's name: it may index, never identify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct ShortName(pub [u8; 8]);

/// What has owners of its own: the blocks of one model whose sequences begin with a block of this shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Part {
    /// The model's numerical identity.
    pub identity: [u8; 32],
    /// Below `shards`.
    pub shard: u16,
    /// 1 to [`SHARDS_MAX`]. Nodes that disagree on it do not find each other's blocks.
    pub shards: u16,
}

/// What a node says of its blocks to an owner of the part.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Report {
    pub part: Part,
    /// Chosen at random when the replica starts: events are numbered anew then.
    pub epoch: u64,
    pub news: News,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum News {
    /// Events in their order, then what is stored after them.
    Blocks {
        /// The number of the first event.
        first: u64,
        events: Events,
        piece: Option<Piece>,
        /// Of all that is stored after the events.
        sum: Option<Sum>,
    },
    /// The replica is no more.
    Gone,
}

/// Blocks stored and removed, at most [`NAMES_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Events {
    pub names: Vec<ShortName>,
    /// One bit for each name, the lowest of the first byte for the first: set if it was removed. The bits
    /// after the last are not set.
    pub removed: Vec<u8>,
}

/// All that is stored between two names, both included.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Piece {
    pub first: ShortName,
    pub last: ShortName,
    /// In ascending order, at most [`NAMES_MAX`].
    pub names: Vec<ShortName>,
}

/// A set of names in a few bytes, to see whether two are equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Sum {
    pub names: u32,
    /// Exclusive or of [`mix`] of each.
    pub xor: u64,
}

/// Where the owner stands after a report, so that the caller knows what to say next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Heard {
    Known {
        /// It has all events before this one.
        next: u64,
        /// It lacks what is stored from this name on.
        missing: Option<ShortName>,
    },
    /// It knows nothing of this epoch: it needs all pieces.
    Unknown,
    /// It has no room for this node now.
    Busy { retry_ms: u32 },
}

/// Who has the longest beginning of a sequence?
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Query {
    pub part: Part,
    /// The names of its blocks from the first one on, 1 to [`QUERY_NAMES_MAX`].
    pub names: Vec<ShortName>,
    /// Holders wanted, at most [`HOLDERS_MAX`].
    pub holders_max: u16,
}

/// An owner's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Found {
    /// Nodes of whose blocks it knows all. If these are fewer than have the model, another owner may
    /// know more.
    pub nodes: u32,
    /// The longest beginning first.
    pub holders: Vec<Holder>,
}

/// A node that is said to have a beginning of the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Holder {
    pub node: NodeId,
    /// Blocks of it, at least 1.
    pub blocks: u32,
}

impl ShortName {
    pub const FIRST: ShortName = ShortName([0; 8]);
    pub const LAST: ShortName = ShortName([0xff; 8]);

    pub fn of(name: &[u8; 32]) -> Self {
        ShortName(*name.first_chunk().expect("a name has 32 bytes"))
    }

    /// As a number of the same order.
    pub const fn number(self) -> u64 {
        u64::from_be_bytes(self.0)
    }

    pub const fn from_number(number: u64) -> Self {
        ShortName(number.to_be_bytes())
    }

    /// The next one in order; none after the last.
    pub fn successor(self) -> Option<Self> {
        self.number().checked_add(1).map(Self::from_number)
    }
}

impl Part {
    /// Where the blocks of a sequence belong that begins with the block `first`. 0 shards are taken for 1,
    /// more than [`SHARDS_MAX`] for that many.
    pub fn of(identity: [u8; 32], shards: u16, first: ShortName) -> Self {
        let shards = shards.clamp(1, SHARDS_MAX);
        let shard = (u128::from(first.number()) * u128::from(shards)) >> 64;
        Part { identity, shard: shard as u16, shards }
    }

    fn check(&self) -> Result<(), BadMessage> {
        let fits = (1..=SHARDS_MAX).contains(&self.shards) && self.shard < self.shards;
        fits.then_some(()).ok_or(BadMessage::Shard { shard: self.shard, shards: self.shards })
    }
}

impl Events {
    pub fn push(&mut self, name: ShortName, removed: bool) {
        let bit = self.names.len() % 8;
        if bit == 0 {
            self.removed.push(0);
        }
        if removed {
            *self.removed.last_mut().expect("pushed") |= 1 << bit;
        }
        self.names.push(name);
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }

    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Each name, and whether it was removed.
    pub fn iter(&self) -> impl Iterator<Item = (ShortName, bool)> + '_ {
        let is_set =
            |i: usize| self.removed.get(i / 8).is_some_and(|byte| byte >> (i % 8) & 1 == 1);
        self.names.iter().enumerate().map(move |(i, name)| (*name, is_set(i)))
    }

    fn check(&self) -> Result<(), BadMessage> {
        bounded("events", self.len(), 0, NAMES_MAX)?;
        let bits = self.len() % 8;
        let rest = self.removed.last().map_or(0, |last| if bits == 0 { 0 } else { last >> bits });
        let fits = self.removed.len() == self.len().div_ceil(8) && rest == 0;
        fits.then_some(()).ok_or(BadMessage::Bits)
    }
}

impl Piece {
    fn check(&self) -> Result<(), BadMessage> {
        bounded("names of a piece", self.names.len(), 0, NAMES_MAX)?;
        let ends = [self.names.first(), self.names.last()];
        let inside = ends.into_iter().flatten().all(|n| (self.first..=self.last).contains(n));
        let ascends = self.names.windows(2).all(|pair| pair[0] < pair[1]);
        (self.first <= self.last && inside && ascends).then_some(()).ok_or(BadMessage::Order)
    }
}

impl Sum {
    pub fn add(&mut self, name: ShortName) {
        self.names = self.names.wrapping_add(1);
        self.xor ^= mix(name.number());
    }

    pub fn subtract(&mut self, name: ShortName) {
        self.names = self.names.wrapping_sub(1);
        self.xor ^= mix(name.number());
    }
}

impl Report {
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// # Errors
    /// If the bytes are no report, or one beyond its bounds.
    pub fn from_bytes(bytes: &[u8]) -> Result<Report, BadMessage> {
        let report: Report = wire::decode::<_, MESSAGE_BYTES_MAX>(bytes)?;
        report.part.check()?;
        if let News::Blocks { first, events, piece, .. } = &report.news {
            events.check()?;
            first.checked_add(events.len() as u64).ok_or(BadMessage::Order)?;
            piece.as_ref().map_or(Ok(()), Piece::check)?;
        }
        Ok(report)
    }
}

impl Heard {
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// # Errors
    /// If the bytes are no such answer.
    pub fn from_bytes(bytes: &[u8]) -> Result<Heard, BadMessage> {
        Ok(wire::decode::<_, 64>(bytes)?)
    }
}

impl Query {
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// # Errors
    /// If the bytes are no query, or one beyond its bounds.
    pub fn from_bytes(bytes: &[u8]) -> Result<Query, BadMessage> {
        let query: Query = wire::decode::<_, MESSAGE_BYTES_MAX>(bytes)?;
        query.part.check()?;
        bounded("names", query.names.len(), 1, QUERY_NAMES_MAX)?;
        bounded("holders wanted", query.holders_max.into(), 1, HOLDERS_MAX)?;
        Ok(query)
    }
}

impl Found {
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// # Errors
    /// If the bytes are no such answer, or one beyond its bounds.
    pub fn from_bytes(bytes: &[u8]) -> Result<Found, BadMessage> {
        let found: Found = wire::decode::<_, MESSAGE_BYTES_MAX>(bytes)?;
        bounded("holders", found.holders.len(), 0, HOLDERS_MAX)?;
        let right = found.holders.iter().all(|holder| holder.blocks > 0)
            && found.holders.windows(2).all(|pair| pair[0].blocks >= pair[1].blocks);
        right.then_some(found).ok_or(BadMessage::Order)
    }
}

/// Rendezvous hashing (Thaler and Ravishankar, 1998): the members with the highest ranks own the part.
/// The loss of one moves its parts only. Whoever makes its id for the purpose can own a part; members
/// trust each other in that.
pub fn rank(part: &Part, node: NodeId) -> u64 {
    let words = |bytes: &[u8; 32], seed: u64| {
        let words =
            bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("8 bytes")));
        words.fold(seed, |hash, word| mix(hash ^ word).wrapping_add(word))
    };
    let shard = u64::from(part.shards) << 16 | u64::from(part.shard);
    mix(words(&node.0, words(&part.identity, mix(shard))))
}

/// The owners of a part: the `n` of `members` with the highest ranks, the first one first.
pub fn owners(part: &Part, members: &[NodeId], n: usize) -> Vec<NodeId> {
    let mut ranked: Vec<(u64, NodeId)> = members.iter().map(|m| (rank(part, *m), *m)).collect();
    if n < ranked.len() {
        ranked.select_nth_unstable_by(n, |a, b| b.cmp(a));
        ranked.truncate(n);
    }
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.dedup();
    ranked.into_iter().map(|(_, node)| node).collect()
}

fn bounded(what: &'static str, n: usize, min: usize, max: usize) -> Result<(), BadMessage> {
    match (min..=max).contains(&n) {
        true => Ok(()),
        false => Err(BadMessage::Count { what, n, min, max }),
    }
}

/// Why bytes are no message of the directory. Their sender is at fault; nothing was kept of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    #[error("the message cannot be decoded")]
    Malformed(#[from] DecodeError),
    #[error("{n} {what}, {min} to {max} are allowed")]
    Count { what: &'static str, n: usize, min: usize, max: usize },
    #[error("there is no shard {shard} of {shards}")]
    Shard { shard: u16, shards: u16 },
    #[error("the bits of events are not one for each")]
    Bits,
    #[error("names or numbers are not in their order")]
    Order,
}

/// Bytes of a message: its names and less than a kilobyte more.
pub const MESSAGE_BYTES_MAX: usize = 160 << 10;
/// Events of one report, and names of one piece.
pub const NAMES_MAX: usize = 8192;
/// Blocks of one query: the longest prompt that can be asked for from a peer.
pub const QUERY_NAMES_MAX: usize = crate::transfer::KV_BLOCKS_MAX;
/// Nodes of one answer.
pub const HOLDERS_MAX: usize = 64;
/// Shards of one model.
pub const SHARDS_MAX: u16 = 256;

const _: () = assert!(2 * 8 * NAMES_MAX + NAMES_MAX / 8 + 1024 <= MESSAGE_BYTES_MAX);
const _: () = assert!(8 * QUERY_NAMES_MAX + 1024 <= MESSAGE_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    fn part() -> Part {
        Part { identity: [7; 32], shard: 1, shards: 4 }
    }

    fn name(n: u64) -> ShortName {
        ShortName::from_number(n)
    }

    fn events(list: &[(u64, bool)]) -> Events {
        let mut events = Events::default();
        list.iter().for_each(|(n, removed)| events.push(name(*n), *removed));
        events
    }

    fn report(news: News) -> Report {
        Report { part: part(), epoch: 300, news }
    }

    fn whole() -> Report {
        report(News::Blocks {
            first: 9,
            events: events(&[(1, false), (2, true)]),
            piece: Some(Piece { first: name(3), last: ShortName::LAST, names: vec![name(5)] }),
            sum: Some(Sum { names: 6, xor: 7 }),
        })
    }

    #[test]
    fn golden_reports() {
        let head: &[u8] = &[&[7; 32][..], &[1, 4, 251, 44, 1]].concat();
        let gone = report(News::Gone);
        let bytes = [head, &[1]].concat();
        assert_eq!(gone.to_bytes(), bytes);
        assert_eq!(Report::from_bytes(&bytes), Ok(gone));
        let rest = [
            &[0, 9, 2][..],
            &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2],
            &[1, 0b10],
            &[1, 0, 0, 0, 0, 0, 0, 0, 3],
            &[255; 8],
            &[1, 0, 0, 0, 0, 0, 0, 0, 5],
            &[1, 6, 7],
        ];
        let bytes = [head, &rest.concat()].concat();
        assert_eq!(whole().to_bytes(), bytes);
        assert_eq!(Report::from_bytes(&bytes), Ok(whole()));
    }

    #[test]
    fn golden_answers() {
        let all: [(Heard, &[u8]); 4] = [
            (Heard::Known { next: 300, missing: None }, &[0, 251, 44, 1, 0]),
            (Heard::Known { next: 1, missing: Some(name(2)) }, &[0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 2]),
            (Heard::Unknown, &[1]),
            (Heard::Busy { retry_ms: 5 }, &[2, 5]),
        ];
        for (heard, bytes) in all {
            assert_eq!(heard.to_bytes(), bytes);
            assert_eq!(Heard::from_bytes(bytes), Ok(heard));
        }
        let query = Query { part: part(), names: vec![name(258)], holders_max: 3 };
        let bytes = [&[7; 32][..], &[1, 4, 1, 0, 0, 0, 0, 0, 0, 1, 2, 3]].concat();
        assert_eq!(query.to_bytes(), bytes);
        assert_eq!(Query::from_bytes(&bytes), Ok(query));
        let found = Found { nodes: 2, holders: vec![Holder { node: NodeId([8; 32]), blocks: 5 }] };
        let bytes = [&[2, 1][..], &[8; 32], &[5]].concat();
        assert_eq!(found.to_bytes(), bytes);
        assert_eq!(Found::from_bytes(&bytes), Ok(found));
    }

    #[test]
    fn bounds() {
        let said = |report: Report| Report::from_bytes(&report.to_bytes()).err();
        let blocks =
            |first, events, piece| report(News::Blocks { first, events, piece, sum: None });
        let many = |n: usize| events(&(0..n as u64).map(|i| (i, false)).collect::<Vec<_>>());
        let piece = |first, last, names: &[u64]| {
            let names = names.iter().copied().map(name).collect();
            Some(Piece { first: name(first), last: name(last), names })
        };
        let long: Vec<u64> = (0..NAMES_MAX as u64).collect();
        let full = piece(0, NAMES_MAX as u64, &long);
        assert_eq!(said(blocks(0, many(NAMES_MAX), full)), None);
        let count = |what, n, max| Some(BadMessage::Count { what, n, min: 0, max });
        let n = NAMES_MAX + 1;
        assert_eq!(said(blocks(0, many(n), None)), count("events", n, NAMES_MAX));
        let longer: Vec<u64> = (0..n as u64).collect();
        let longer = piece(0, n as u64, &longer);
        assert_eq!(said(blocks(0, many(0), longer)), count("names of a piece", n, NAMES_MAX));
        for (first, last, names) in
            [(2, 1, &[][..]), (2, 4, &[1]), (2, 4, &[5]), (2, 4, &[3, 3]), (2, 4, &[4, 3])]
        {
            let bad = blocks(0, many(0), piece(first, last, names));
            assert_eq!(said(bad), Some(BadMessage::Order), "{first} {last} {names:?}");
        }
        assert_eq!(said(blocks(u64::MAX, many(1), None)), Some(BadMessage::Order));
        for removed in [vec![], vec![0, 0], vec![0b10]] {
            let bad = blocks(0, Events { names: vec![name(1)], removed }, None);
            assert_eq!(said(bad), Some(BadMessage::Bits));
        }
        for (shard, shards) in [(0, 0), (4, 4), (0, SHARDS_MAX + 1)] {
            let part = Part { shard, shards, ..part() };
            let bad = Report { part, ..report(News::Gone) };
            assert_eq!(said(bad), Some(BadMessage::Shard { shard, shards }));
        }
    }

    #[test]
    fn bounds_of_queries() {
        let query = |n, holders_max| {
            let query = Query { part: part(), names: vec![name(1); n], holders_max };
            Query::from_bytes(&query.to_bytes()).is_ok()
        };
        assert!(query(1, 1) && query(QUERY_NAMES_MAX, HOLDERS_MAX as u16));
        assert!(!query(0, 1) && !query(QUERY_NAMES_MAX + 1, 1));
        assert!(!query(1, 0) && !query(1, HOLDERS_MAX as u16 + 1));
        let found = |blocks: &[u32]| {
            let holder = |blocks: &u32| Holder { node: NodeId([1; 32]), blocks: *blocks };
            let found = Found { nodes: 0, holders: blocks.iter().map(holder).collect() };
            Found::from_bytes(&found.to_bytes()).is_ok()
        };
        assert!(found(&[]) && found(&[5, 5, 1]) && found(&[1; HOLDERS_MAX]));
        assert!(!found(&[1; HOLDERS_MAX + 1]) && !found(&[1, 2]) && !found(&[0]));
    }

    #[test]
    fn damaged_messages_are_errors() {
        let bytes = whole().to_bytes();
        for end in 0..bytes.len() {
            assert!(Report::from_bytes(&bytes[..end]).is_err(), "{end}");
        }
        for i in 0..bytes.len() {
            for value in 0..=255 {
                let mut damaged = bytes.clone();
                damaged[i] = value;
                if let Ok(report) = Report::from_bytes(&damaged) {
                    assert_eq!(Report::from_bytes(&report.to_bytes()), Ok(report));
                }
                let _ = (Query::from_bytes(&damaged), Found::from_bytes(&damaged[32..]));
            }
        }
    }

    #[test]
    fn shards_are_of_equal_size() {
        let mut random = crate::random::Random::new(1);
        for shards in [1u16, 3, SHARDS_MAX] {
            let mut seen = vec![0; shards.into()];
            for _ in 0..1000 * usize::from(shards) {
                let part = Part::of([0; 32], shards, name(random.next_u64()));
                assert_eq!(part.check(), Ok(()));
                seen[usize::from(part.shard)] += 1;
            }
            assert!(seen.iter().all(|n| (800..1200).contains(n)), "{seen:?}");
        }
        assert_eq!(Part::of([0; 32], 0, ShortName::LAST).shards, 1);
    }

    #[test]
    fn owners_are_spread_and_stay() {
        let nodes: Vec<NodeId> = (0..10).map(|n| NodeId([n; 32])).collect();
        let (mut first, mut second) = ([0; 10], [0; 10]);
        for n in 0..1000u16 {
            let mut identity = [0; 32];
            identity[..2].copy_from_slice(&n.to_le_bytes());
            let part = Part { identity, shard: 0, shards: 1 };
            let both = owners(&part, &nodes, 2);
            first[both[0].0[0] as usize] += 1;
            second[both[1].0[0] as usize] += 1;
            // In any order of the members; and without the first, the second follows.
            let mut others: Vec<NodeId> = nodes.iter().rev().copied().collect();
            assert_eq!(owners(&part, &others, 2), both);
            assert_eq!(owners(&part, &others, 10)[..2], both);
            others.retain(|node| *node != both[0]);
            assert_eq!(owners(&part, &others, 1), both[1..]);
        }
        for counts in [first, second] {
            assert!(counts.iter().all(|n| (60..150).contains(n)), "{counts:?}");
        }
        assert_eq!(owners(&part(), &nodes[..1], 2), &nodes[..1]);
        assert!(owners(&part(), &[], 2).is_empty());
    }
}
