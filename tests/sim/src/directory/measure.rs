//! What the directory costs.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use cache::directory::{OwnerConfig, ReporterConfig};
use protocol::directory::{Part, owners};

use super::node::{Command, DirectoryNode, Ledger, NodeSetup, id};
use super::pool::Texts;
use crate::actor::NodeIndex;
use crate::net::Links;
use crate::quic::QuicCosts;
use crate::world::{Birth, SECOND, World};

/// What every node does.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    pub prompts_per_s: f64,
    /// Of which all are new, and for which as many are forgotten.
    pub blocks_per_prompt: usize,
    pub owners: usize,
}

/// What nodes send, bytes in a second: frames of RPC, QUIC, UDP and IPv4 included.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    /// Blocks stored and blocks removed by one node in a second.
    pub events_per_s: f64,
    /// Of the nodes that own nothing.
    pub reporter: f64,
    /// Of the owner that sends most: its answers, and what it reports itself to the other owner.
    pub owner: f64,
    /// What an owner receives.
    pub owner_receives: f64,
}

/// Nodes of one model that compute prompts which nobody has computed before.
pub fn traffic(seed: u64, nodes: usize, rates: Rates, seconds: u64) -> Traffic {
    const WARM_UP_S: u64 = 10;
    let blocks = rates.blocks_per_prompt;
    // As good as never the same prompt twice: the pools hold a second of work.
    let texts =
        Texts { families: 1 << 20, variants: 1 << 20, shared: 0, blocks_max: 2 * blocks - 1 };
    let setup = NodeSetup {
        identity: [7; 32],
        texts,
        capacity: 2 * blocks.max((rates.prompts_per_s * blocks as f64) as usize),
        reporter: ReporterConfig { owners: rates.owners, ..ReporterConfig::default() },
        owner: OwnerConfig::default(),
        prompts_per_s: Rc::new(Cell::new(rates.prompts_per_s)),
        sabotage: None,
        ledger: Rc::new(RefCell::new(Ledger::default())),
    };
    let make = move |birth: Birth| DirectoryNode::new(setup.clone(), birth);
    let links = Links { latency_ms: 0.2, jitter_ms: 0.3, ..Links::default() };
    let mut world = World::new(seed, nodes, links, make);
    let all: Vec<NodeIndex> = (0..nodes as NodeIndex).collect();
    for node in &all {
        world.start(*node, Vec::new());
        let actor = world.nodes[*node as usize].actor.as_mut().expect("started");
        actor.command(Command::Members(all.clone()));
        world.schedule_wake(*node);
    }
    world.run_until(WARM_UP_S * SECOND);
    let before: Vec<(u64, u64)> = world.nodes.iter().map(sent).collect();
    world.quic = Some(QuicCosts::new(nodes));
    world.run_until((WARM_UP_S + seconds) * SECOND);
    let quic = world.quic.take().expect("it was put there").end(world.now);
    let after: Vec<(u64, u64)> = world.nodes.iter().map(sent).collect();
    let per_s = |sum: u64| sum as f64 / seconds as f64;
    let rates_of = |node: usize| per_s(after[node].0 - before[node].0 + quic[node]);
    let events: u64 = after.iter().zip(&before).map(|(a, b)| a.1 - b.1).sum();
    let part = Part { identity: [7; 32], shard: 0, shards: 1 };
    let ids: Vec<_> = all.iter().copied().map(id).collect();
    let owning = owners(&part, &ids, rates.owners);
    let is_owner = |node: &usize| owning.contains(&ids[*node]);
    let reporters: Vec<f64> = (0..nodes).filter(|n| !is_owner(n)).map(rates_of).collect();
    let reporter = reporters.iter().sum::<f64>() / reporters.len().max(1) as f64;
    Traffic {
        // Each event is sent to each owner.
        events_per_s: per_s(events) / nodes as f64 / rates.owners as f64,
        reporter,
        owner: (0..nodes).filter(is_owner).map(rates_of).fold(0.0, f64::max),
        owner_receives: reporters.iter().sum::<f64>() / rates.owners as f64,
    }
}

/// Bytes without QUIC's, and events reported.
fn sent(node: &crate::world::Node<DirectoryNode>) -> (u64, u64) {
    let actor = node.actor.as_ref().expect("nobody dies");
    (node.bytes_out + actor.more_bytes, actor.reporter.stats().events)
}
