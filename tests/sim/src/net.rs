//! The network between nodes: delay, loss, duplication, reordering (delays differ for each datagram),
//! partitions, one-way links, and hosts behind NATs.

use std::collections::{BTreeMap, BTreeSet};

use protocol::random::Random;
use serde::{Deserialize, Serialize};

use crate::actor::NodeIndex;

/// How all links behave.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Links {
    /// Least one-way delay.
    pub latency_ms: f64,
    /// Mean of the exponential part on top of it, cut at ten times itself.
    pub jitter_ms: f64,
    /// Share of datagrams lost.
    pub loss: f64,
    /// Share of datagrams that arrive twice.
    pub duplicate: f64,
}

impl Default for Links {
    fn default() -> Self {
        Links { latency_ms: 2.0, jitter_ms: 8.0, loss: 0.0, duplicate: 0.0 }
    }
}

#[derive(Debug, Default)]
pub struct Network {
    pub links: Links,
    /// Nodes in other groups than 0; datagrams stay within a group.
    groups: BTreeMap<NodeIndex, u32>,
    /// Directed pairs that lose everything.
    blocked: BTreeSet<(NodeIndex, NodeIndex)>,
    /// Hosts behind NATs, and when each last sent to whom.
    natted: BTreeSet<NodeIndex>,
    holes: BTreeMap<(NodeIndex, NodeIndex), u64>,
    pub lost: u64,
}

impl Network {
    pub fn new(links: Links) -> Self {
        Network { links, ..Network::default() }
    }

    /// Splits the nodes: those of each group reach each other only; all not named are one group.
    pub fn partition(&mut self, groups: &[Vec<NodeIndex>]) {
        self.groups.clear();
        for (number, group) in (1..).zip(groups) {
            self.groups.extend(group.iter().map(|node| (*node, number)));
        }
    }

    /// Loses everything that `from` send to `to`.
    pub fn block(&mut self, from: &[NodeIndex], to: &[NodeIndex]) {
        self.blocked.extend(from.iter().flat_map(|f| to.iter().map(|t| (*f, *t))));
    }

    /// Puts a node behind a NAT: others reach it only where it has sent to within [`HOLE_NANOS`].
    pub fn put_behind_nat(&mut self, node: NodeIndex) {
        self.natted.insert(node);
    }

    /// Ends partitions and one-way links. NATs stay.
    pub fn heal(&mut self) {
        self.groups.clear();
        self.blocked.clear();
    }

    /// Whether `from` could ever reach `to` as things are.
    pub fn is_open(&self, from: NodeIndex, to: NodeIndex) -> bool {
        let group = |node| self.groups.get(&node).copied().unwrap_or(0);
        group(from) == group(to) && !self.blocked.contains(&(from, to))
    }

    pub fn is_disturbed(&self) -> bool {
        !self.groups.is_empty() || !self.blocked.is_empty() || self.links.loss > 0.0
    }

    /// The delays, in nanoseconds, after which a datagram sent now arrives: none, one or two.
    pub fn send(
        &mut self,
        now: u64,
        from: NodeIndex,
        to: NodeIndex,
        random: &mut Random,
    ) -> [Option<u64>; 2] {
        if self.natted.contains(&from) {
            self.holes.insert((from, to), now);
        }
        if !self.is_open(from, to) || self.is_shut_by_nat(now, from, to) || self.loses(random) {
            self.lost += 1;
            return [None, None];
        }
        let first = self.delay(random);
        let twice = self.links.duplicate > 0.0 && random.unit() < self.links.duplicate;
        [Some(first), twice.then(|| self.delay(random))]
    }

    fn is_shut_by_nat(&self, now: u64, from: NodeIndex, to: NodeIndex) -> bool {
        let open = |sent: &u64| now - sent <= HOLE_NANOS;
        self.natted.contains(&to) && !self.holes.get(&(to, from)).is_some_and(open)
    }

    fn loses(&self, random: &mut Random) -> bool {
        self.links.loss > 0.0 && random.unit() < self.links.loss
    }

    fn delay(&self, random: &mut Random) -> u64 {
        let Links { latency_ms, jitter_ms, .. } = self.links;
        let jitter = jitter_ms * (-(1.0 - random.unit()).ln()).min(10.0);
        ((latency_ms + jitter) * 1e6) as u64
    }
}

/// How long a NAT keeps a mapping without traffic (RFC 4787 allows two minutes; many do less).
pub const HOLE_NANOS: u64 = 30_000_000_000;
