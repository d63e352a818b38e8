//! Measurements in the world, the same for any membership: detection of crashes, bytes, evictions,
//! joins.

use std::collections::{BTreeMap, BTreeSet};

use protocol::membership::MembershipConfig;

use crate::actor::{Actor, NodeIndex, Sight};
use crate::foca::{Baseline, tightened};
use crate::net::Links;
use crate::oracle::{Oracle, converged};
use crate::quic::QuicCosts;
use crate::vine::Vine;
use crate::world::{SECOND, World};

/// A membership to measure: makes worlds of nodes that know each other, or not.
pub trait System {
    type Actor: Actor;

    fn world(&self, seed: u64, nodes: usize, links: Links) -> World<Self::Actor>;

    /// Lets a node hold all others for present.
    fn acquaint(&self, actor: &mut Self::Actor, now: protocol::Instant, nodes: &[NodeIndex]);

    /// A world whose nodes all run and know each other.
    fn acquainted(&self, seed: u64, nodes: usize, links: Links) -> World<Self::Actor> {
        let mut world = self.world(seed, nodes, links);
        let all: Vec<_> = (0..nodes as NodeIndex).collect();
        for &node in &all {
            world.start_with(node, vec![0], |actor, now| self.acquaint(actor, now, &all));
        }
        world
    }
}

/// Our membership with a configuration.
#[derive(Clone, Default)]
pub struct Ours(pub MembershipConfig);

impl System for Ours {
    type Actor = Vine;

    fn world(&self, seed: u64, nodes: usize, links: Links) -> World<Vine> {
        World::new(seed, nodes, links, Vine::maker(self.0.clone(), nodes))
    }

    fn acquaint(&self, actor: &mut Vine, now: protocol::Instant, nodes: &[NodeIndex]) {
        actor.knows(now, nodes);
    }
}

/// foca, tightened for that many members.
pub struct Foca;

impl System for Foca {
    type Actor = Baseline;

    fn world(&self, seed: u64, nodes: usize, links: Links) -> World<Baseline> {
        World::new(seed, nodes, links, Baseline::maker(tightened(nodes)))
    }

    fn acquaint(&self, actor: &mut Baseline, now: protocol::Instant, nodes: &[NodeIndex]) {
        actor.knows(now, nodes);
    }
}

/// Times, in seconds.
#[derive(Clone, Debug, Default)]
pub struct Times {
    sorted: Vec<f64>,
    /// Cases that had no end within the time given.
    pub unfinished: usize,
}

impl Times {
    fn push(&mut self, seconds: f64) {
        let place = self.sorted.partition_point(|s| *s < seconds);
        self.sorted.insert(place, seconds);
    }

    pub fn len(&self) -> usize {
        self.sorted.len() + self.unfinished
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The time within which that share of the cases ended; none if too many did not.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let rank = (self.len() as f64 * share).ceil().max(1.0) as usize;
        self.sorted.get(rank - 1).copied()
    }

    pub fn merge(&mut self, other: &Times) {
        other.sorted.iter().for_each(|s| self.push(*s));
        self.unfinished += other.unfinished;
    }
}

/// Hears how much of a measurement is done, from 0 to 1.
pub type Progress<'a> = &'a mut dyn FnMut(f64);

/// Crashes `crashes` nodes, one each `gap_s`, and takes the time until the last survivor knew.
pub fn detection<S: System>(
    system: &S,
    seed: u64,
    nodes: usize,
    crashes: usize,
    progress: Progress<'_>,
) -> Times {
    const WARM_UP_S: u64 = 5;
    const GAP_S: u64 = 9;
    let mut world = system.acquainted(seed, nodes, Links::default());
    world.run_until(WARM_UP_S * SECOND);
    let mut times = Times::default();
    for crash in 0..crashes {
        progress(crash as f64 / crashes as f64);
        let up: Vec<_> = world.up().collect();
        let victim = up[world.random.below(up.len())];
        // Not in step with anyone's timers.
        let spread = world.random.below(SECOND as usize) as u64;
        let at = world.now + spread;
        world.run_until(at);
        world.seen.clear();
        world.crash(victim);
        world.run_until(at + GAP_S * SECOND);
        let mut last = 0;
        let mut observers = BTreeSet::new();
        for seen in world.seen.iter().filter(|s| s.subject == victim && s.sight == Sight::Died) {
            if observers.insert(seen.observer) {
                last = last.max(seen.at);
            }
        }
        match observers.len() == up.len() - 1 {
            true => times.push((last - at) as f64 / SECOND as f64),
            false => times.unfinished += 1,
        }
    }
    times
}

/// Bytes that nodes send in a second, IPv4 and UDP headers included.
#[derive(Clone, Copy, Debug)]
pub struct Bandwidth {
    pub mean: f64,
    /// Of the node that sent most.
    pub most: f64,
    pub datagrams_per_s: f64,
    /// As `mean` and `most`, with what QUIC adds ([`crate::quic`]).
    pub quic_mean: f64,
    pub quic_most: f64,
}

/// Nodes at rest for `seconds`.
pub fn bandwidth<S: System>(
    system: &S,
    seed: u64,
    nodes: usize,
    loss: f64,
    seconds: u64,
) -> Bandwidth {
    const WARM_UP_S: u64 = 5;
    let links = Links { loss, ..Links::default() };
    let mut world = system.acquainted(seed, nodes, links);
    world.run_until(WARM_UP_S * SECOND);
    for node in &mut world.nodes {
        (node.bytes_out, node.datagrams_out) = (0, 0);
    }
    world.quic = Some(QuicCosts::new(nodes));
    world.run_until((WARM_UP_S + seconds) * SECOND);
    let quic = world.quic.take().expect("it was put there").end(world.now);
    let with_quic = world.nodes.iter().zip(&quic).map(|(node, added)| node.bytes_out + added);
    let per_s = |sum: u64| sum as f64 / seconds as f64;
    let bytes = world.nodes.iter().map(|n| n.bytes_out);
    Bandwidth {
        mean: per_s(bytes.clone().sum()) / nodes as f64,
        most: per_s(bytes.max().unwrap_or(0)),
        datagrams_per_s: per_s(world.nodes.iter().map(|n| n.datagrams_out).sum()) / nodes as f64,
        quic_mean: per_s(with_quic.clone().sum()) / nodes as f64,
        quic_most: per_s(with_quic.max().unwrap_or(0)),
    }
}

/// Who was declared dead without being so.
#[derive(Clone, Debug, Default)]
pub struct Evictions {
    /// Times that a running node that never stalled was declared dead by someone: by victim and
    /// second, so that one eviction that many believe counts once.
    pub healthy: usize,
    /// The same for nodes that stalled at that time.
    pub stalled: usize,
    pub suspicions_healthy: u64,
    pub probes: u64,
}

/// 10 % of the nodes stall for `stall_s`, run for 1 to 10 s, stall again, for 150 s.
pub fn stalls<S: System>(system: &S, seed: u64, nodes: usize, stall_s: f64) -> Evictions {
    const SECONDS: u64 = 150;
    let mut world = system.acquainted(seed, nodes, Links::default());
    let stallers = (nodes / 10) as NodeIndex;
    let mut next: BTreeMap<NodeIndex, u64> = (0..stallers)
        .map(|node| (node, 5 * SECOND + world.random.below(5 * SECOND as usize) as u64))
        .collect();
    let mut victims = BTreeSet::new();
    let mut oracle = Oracle::default();
    let stall = (stall_s * SECOND as f64) as u64;
    while world.now < SECONDS * SECOND {
        world.run_until(world.now + SECOND / 20);
        for (node, at) in &mut next {
            if *at <= world.now {
                world.stall(*node, stall);
                *at += stall + SECOND + world.random.below(9 * SECOND as usize) as u64;
            }
        }
        oracle.judge(&world.seen);
        for seen in world.seen.drain(..).filter(|s| s.sight == Sight::Died) {
            victims.insert((seen.subject, seen.at / (5 * SECOND)));
        }
    }
    let (stalled, healthy): (Vec<_>, Vec<_>) =
        victims.into_iter().partition(|(node, _)| *node < stallers);
    Evictions {
        healthy: healthy.len(),
        stalled: stalled.len(),
        suspicions_healthy: oracle.false_suspicions,
        probes: 0,
    }
}

/// Healthy nodes with lossy links until `probes` probes were made.
pub fn lossy(
    config: &MembershipConfig,
    seed: u64,
    nodes: usize,
    loss: f64,
    probes: u64,
    progress: Progress<'_>,
) -> Evictions {
    let links = Links { loss, ..Links::default() };
    let mut world = Ours(config.clone()).acquainted(seed, nodes, links);
    let mut oracle = Oracle::default();
    let mut made = 0;
    while made < probes {
        world.run_until(world.now + SECOND);
        oracle.judge(&world.seen);
        world.seen.clear();
        let actors = world.nodes.iter().filter_map(|n| n.actor.as_ref());
        made = actors.map(|vine| vine.machine.stats().probes).sum();
        progress(made as f64 / probes as f64);
    }
    Evictions {
        healthy: oracle.healthy_evicted.len() + oracle.others_evicted.len(),
        stalled: 0,
        suspicions_healthy: oracle.false_suspicions,
        probes: made,
    }
}

/// `nodes` nodes start at once and know one seed. Seconds until every view is complete, and the bytes
/// sent by the node that sent most.
pub fn join<S: System>(
    system: &S,
    seed: u64,
    nodes: usize,
    within_s: u64,
    progress: Progress<'_>,
) -> (Option<f64>, u64) {
    let mut world = system.world(seed, nodes, Links::default());
    for node in 0..nodes as NodeIndex {
        world.start(node, vec![0]);
    }
    let mut done = None;
    while world.now < within_s * SECOND && done.is_none() {
        world.run_until(world.now + SECOND / 4);
        world.seen.clear();
        progress(world.now as f64 / (within_s * SECOND) as f64);
        if converged(&world).is_ok() {
            done = Some(world.now as f64 / SECOND as f64);
        }
    }
    (done, world.nodes.iter().map(|n| n.bytes_out).max().unwrap_or(0))
}
