//! The side that is told by all and asked by all.

use std::collections::{BTreeMap, BTreeSet};

use protocol::directory::{
    Events, Found, HOLDERS_MAX, Heard, Holder, News, Part, Piece, Query, Report, ShortName, Sum,
};
use protocol::random::Random;
use protocol::{Duration, Instant, NodeId};

use super::index::{Index, Slot};

/// Bounds and waits of an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerConfig {
    /// Unit: names of all parts together, those that several nodes have counted once; 44 to 88 bytes each,
    /// and 128 more where more than seven nodes have one. Formula: `different blocks of all replicas of a
    /// model x models owned`. Too small: some nodes are not followed, and their blocks are computed again
    /// elsewhere. Too large: memory that the cache could use. Default 2,097,152.
    pub names_max: usize,
    /// Unit: parts. Default 64. Too small: some models have fewer owners.
    pub parts_max: usize,
    /// Unit: nodes of one part that say all they have at the same time, in more than one piece; others
    /// come again. Too small: a new owner takes long to know all. Too large: it does nothing else, and
    /// queries wait. Default 8.
    pub dumps_max: usize,
    /// Unit: time without a word after which a node is not believed any more. Must be some times the
    /// reporters' `refresh`. Too small: a stutter costs a dump. Too large: who asks is sent to nodes that
    /// cannot be reached. Default 45 s.
    pub silent_for: Duration,
    /// Unit: time without a word after which a node that has not said all loses its place. Must be more
    /// than the reporters' `answer_wait`. Default 5 s.
    pub dump_silent_for: Duration,
    /// Unit: time after which a node for which there was no room comes again. Default 30 s.
    pub full_retry: Duration,
}

impl Default for OwnerConfig {
    fn default() -> Self {
        OwnerConfig {
            names_max: 1 << 21,
            parts_max: 64,
            dumps_max: 8,
            silent_for: Duration::from_secs(45),
            dump_silent_for: Duration::from_secs(5),
            full_retry: Duration::from_secs(30),
        }
    }
}

/// What this node knows of other nodes' blocks, and of its own.
///
/// It follows every member that reports to it, whether or not it owns the part in its own view: who
/// reports has looked at the members, too. So it needs no agreement, and no word when ownership moves:
/// the nodes tell the next owner, and are forgotten here when they have been silent.
///
/// Not a [`Machine`](protocol::Machine), because each input has one answer: [`told`](Self::told) and
/// [`query`](Self::query) give it. [`tick`](Self::tick) is due at [`next_deadline`](Self::next_deadline).
#[derive(Debug)]
pub struct Owner {
    config: OwnerConfig,
    random: Random,
    members: BTreeSet<NodeId>,
    parts: BTreeMap<Part, Followed>,
    stats: OwnerStats,
    /// When silent nodes are looked for again.
    look_at: Instant,
    /// The latest time heard of: when a sweep is due.
    now: Instant,
}

/// An owner at one moment, and what has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnerStats {
    pub parts: usize,
    /// Nodes followed, once for each part.
    pub nodes: usize,
    pub names: usize,
    /// Nodes that began to say all they have.
    pub dumps: u64,
    /// Nodes sent away because there was no room for their names, or for them.
    pub full: u64,
    /// Nodes of which something else was known than they have. Not zero: a fault of a program.
    pub unequal: u64,
}

/// One part.
#[derive(Debug)]
struct Followed {
    index: Index,
    nodes: BTreeMap<NodeId, Node>,
    by_slot: BTreeMap<Slot, NodeId>,
}

/// What is known of one node.
#[derive(Debug)]
struct Node {
    slot: Slot,
    epoch: u64,
    /// All its events before this one are in the index.
    next: u64,
    /// Its names from this one on are not.
    missing: Option<ShortName>,
    sum: Sum,
    heard: Instant,
}

impl Owner {
    /// `seed` is a secret of the process.
    pub fn new(config: OwnerConfig, seed: u64) -> Self {
        Owner {
            config,
            random: Random::new(seed),
            members: BTreeSet::new(),
            parts: BTreeMap::new(),
            stats: OwnerStats::default(),
            look_at: Instant::ORIGIN,
            now: Instant::ORIGIN,
        }
    }

    /// Who is a member now: alive or suspected, this node included. All others are forgotten at once.
    pub fn members(&mut self, now: Instant, members: impl IntoIterator<Item = NodeId>) {
        self.now = now;
        self.members = members.into_iter().collect();
        for part in self.parts.values_mut() {
            part.drop_where(|node, _| !self.members.contains(node));
        }
    }

    /// Takes a report of `from`, whom the connection has authenticated.
    pub fn told(&mut self, now: Instant, from: NodeId, report: Report) -> Heard {
        self.now = now;
        let Report { part, epoch, news } = report;
        if !self.members.contains(&from) {
            // It has just come, or it is just going.
            return self.busy(STRANGER_RETRY);
        }
        match news {
            News::Gone => {
                if let Some(followed) = self.parts.get_mut(&part) {
                    followed.drop_where(|node, known| *node == from && known.epoch == epoch);
                }
                Heard::Unknown
            }
            News::Blocks { first, events, piece, sum } => {
                let news = Blocks { first, events: &events, piece: piece.as_ref(), sum };
                self.take(part, from, epoch, &news)
            }
        }
    }

    /// Who has the longest beginning. Nothing is known of a part that is not owned.
    pub fn query(&mut self, query: &Query) -> Found {
        let Some(followed) = self.parts.get(&query.part) else { return Found::default() };
        let n = usize::from(query.holders_max).min(HOLDERS_MAX);
        let found = followed.index.query(&query.names, n, self.random.next_u64());
        let holder = |(slot, blocks)| Holder { node: followed.by_slot[&slot], blocks };
        let known = followed.nodes.values().filter(|node| node.missing.is_none());
        Found { nodes: known.count() as u32, holders: found.into_iter().map(holder).collect() }
    }

    /// Forgets who is silent, and goes on with removing what is dead, a piece at a time.
    pub fn tick(&mut self, now: Instant) {
        self.now = now;
        if now >= self.look_at {
            self.look_at = now + LOOK;
            let OwnerConfig { silent_for, dump_silent_for, .. } = self.config;
            for part in self.parts.values_mut() {
                part.drop_where(|_, node| {
                    let patience =
                        if node.missing.is_some() { dump_silent_for } else { silent_for };
                    now >= node.heard + patience
                });
            }
            self.parts.retain(|_, part| !part.nodes.is_empty() || part.index.is_unswept());
        }
        if let Some(part) = self.parts.values_mut().find(|part| part.index.is_unswept()) {
            part.index.sweep(SWEEP_ROWS);
        }
    }

    /// When [`tick`](Self::tick) must next be called.
    pub fn next_deadline(&self) -> Option<Instant> {
        match self.parts.values().any(|part| part.index.is_unswept()) {
            true => Some(self.now),
            false => (!self.parts.is_empty()).then_some(self.look_at),
        }
    }

    pub fn stats(&self) -> OwnerStats {
        let nodes = self.parts.values().map(|part| part.nodes.len()).sum();
        OwnerStats { parts: self.parts.len(), nodes, names: self.names(), ..self.stats }
    }

    /// All names known of a node, in ascending order; `None` if it is not followed or has not said all.
    /// Looks at the whole part: for inspection and tests.
    pub fn names_of(&self, part: &Part, node: NodeId) -> Option<Vec<ShortName>> {
        let followed = self.parts.get(part)?;
        let known = followed.nodes.get(&node).filter(|known| known.missing.is_none())?;
        let mut names: Vec<ShortName> = followed.index.names_of(known.slot).collect();
        names.sort_unstable();
        Some(names)
    }

    fn take(&mut self, part: Part, from: NodeId, epoch: u64, news: &Blocks<'_>) -> Heard {
        let known = self.parts.get(&part).and_then(|followed| followed.nodes.get(&from));
        let known = known.filter(|node| node.epoch == epoch);
        if known.is_none_or(|node| node.next < news.first) {
            if news.piece.is_none_or(|piece| piece.first != ShortName::FIRST) {
                // There is a gap; or all of it is one.
                return known.map_or(Heard::Unknown, Node::answer);
            }
            if let Err(busy) = self.follow(part, from, epoch, news) {
                return busy;
            }
        }
        let room = self.config.names_max.saturating_sub(self.names());
        let followed = self.parts.get_mut(&part).expect("it is followed");
        if news.names() > room {
            followed.drop_where(|node, _| *node == from);
            self.stats.full += 1;
            return self.busy(self.config.full_retry);
        }
        let node = followed.nodes.get_mut(&from).expect("it is followed");
        node.heard = self.now;
        node.apply(&mut followed.index, news);
        let is_equal = node.missing.is_some()
            || news.end() != node.next
            || news.sum.is_none_or(|sum| sum == node.sum);
        let answer = node.answer();
        if !is_equal {
            followed.drop_where(|node, _| *node == from);
            self.stats.unequal += 1;
            return Heard::Unknown;
        }
        answer
    }

    /// Begins anew with a node, whose first piece this is.
    fn follow(
        &mut self,
        part: Part,
        from: NodeId,
        epoch: u64,
        news: &Blocks<'_>,
    ) -> Result<(), Heard> {
        if self.parts.len() >= self.config.parts_max && !self.parts.contains_key(&part) {
            self.stats.full += 1;
            return Err(self.busy(self.config.full_retry));
        }
        let seed = self.random.next_u64();
        let followed = self.parts.entry(part).or_insert_with(|| Followed::new(seed));
        followed.drop_where(|node, _| *node == from);
        let is_long = news.piece.is_none_or(|piece| piece.last != ShortName::LAST);
        let dumps = followed.nodes.values().filter(|node| node.missing.is_some()).count();
        if is_long && dumps >= self.config.dumps_max {
            return Err(self.busy(DUMP_RETRY));
        }
        let Some(slot) = followed.index.take_slot() else {
            self.stats.full += 1;
            return Err(self.busy(self.config.full_retry));
        };
        let node = Node {
            slot,
            epoch,
            next: news.end(),
            missing: Some(ShortName::FIRST),
            sum: Sum::default(),
            heard: self.now,
        };
        followed.nodes.insert(from, node);
        followed.by_slot.insert(slot, from);
        self.stats.dumps += 1;
        Ok(())
    }

    fn names(&self) -> usize {
        self.parts.values().map(|part| part.index.names()).sum()
    }

    /// Spread, so that those sent away together do not come together.
    fn busy(&mut self, retry: Duration) -> Heard {
        let spread = retry.mul_f64(0.5 + self.random.unit());
        Heard::Busy { retry_ms: u32::try_from(spread.as_millis()).unwrap_or(u32::MAX) }
    }
}

/// [`News::Blocks`].
struct Blocks<'a> {
    first: u64,
    events: &'a Events,
    piece: Option<&'a Piece>,
    sum: Option<Sum>,
}

impl Blocks<'_> {
    fn end(&self) -> u64 {
        self.first.saturating_add(self.events.len() as u64)
    }

    /// Names that it may bring.
    fn names(&self) -> usize {
        self.events.len() + self.piece.map_or(0, |piece| piece.names.len())
    }
}

impl Node {
    /// What is known already is passed over, and so is a piece from another time than the events'.
    fn apply(&mut self, index: &mut Index, news: &Blocks<'_>) {
        let skip = usize::try_from(self.next - news.first).unwrap_or(usize::MAX);
        for (name, removed) in news.events.iter().skip(skip) {
            match removed {
                true if index.remove(name, self.slot) => self.sum.subtract(name),
                false if index.insert(name, self.slot) => self.sum.add(name),
                _ => {}
            }
        }
        self.next = self.next.max(news.end());
        let Some(piece) = news.piece else { return };
        if self.next != news.end() || self.missing != Some(piece.first) {
            return;
        }
        for name in &piece.names {
            if index.insert(*name, self.slot) {
                self.sum.add(*name);
            }
        }
        self.missing = piece.last.successor();
    }

    fn answer(&self) -> Heard {
        Heard::Known { next: self.next, missing: self.missing }
    }
}

impl Followed {
    fn new(seed: u64) -> Self {
        Followed { index: Index::new(seed), nodes: BTreeMap::new(), by_slot: BTreeMap::new() }
    }

    fn drop_where(&mut self, mut dropped: impl FnMut(&NodeId, &Node) -> bool) {
        let Followed { index, nodes, by_slot } = self;
        nodes.retain(|id, node| {
            let stays = !dropped(id, node);
            if !stays {
                index.drop_slot(node.slot);
                by_slot.remove(&node.slot);
            }
            stays
        });
    }
}

/// Between two looks for silent nodes.
const LOOK: Duration = Duration::from_secs(1);
/// Rows of one tick's sweep: about 50 µs.
const SWEEP_ROWS: usize = 4096;
const STRANGER_RETRY: Duration = Duration::from_millis(500);
const DUMP_RETRY: Duration = Duration::from_millis(200);
