//! What each node is said to have cached: late, and not quite right about what was evicted.

use std::collections::{BTreeMap, BTreeSet};

use cache::{BLOCK_TOKENS_DEFAULT, BlockHash};
use protocol::NodeId;

use super::node_id;

pub struct Directory {
    nodes: Vec<Cached>,
    blocks_max: usize,
    tick: u64,
}

/// One node's blocks, in the order of their last use.
#[derive(Default)]
struct Cached {
    /// When it was stored and last used.
    blocks: BTreeMap<BlockHash, (u64, u64)>,
    order: BTreeSet<(u64, BlockHash)>,
}

impl Directory {
    pub fn new(nodes: usize, blocks_max: usize) -> Directory {
        Directory { nodes: (0..nodes).map(|_| Cached::default()).collect(), blocks_max, tick: 0 }
    }

    /// A node has computed, or used, these.
    pub fn stored(&mut self, now_us: u64, node: usize, names: &[BlockHash]) {
        let cached = &mut self.nodes[node];
        // The end of a prefix goes before its beginning does.
        for name in names.iter().rev() {
            self.tick += 1;
            let entry = cached.blocks.entry(*name).or_insert((now_us, 0));
            cached.order.remove(&(entry.1, *name));
            entry.1 = self.tick;
            cached.order.insert((self.tick, *name));
        }
        while cached.blocks.len() > self.blocks_max {
            let Some((_, oldest)) = cached.order.pop_first() else { break };
            cached.blocks.remove(&oldest);
        }
    }

    /// How many of a prompt's first tokens each node has, as was known a while ago.
    pub fn overlaps(&self, now_us: u64, names: &[BlockHash]) -> BTreeMap<NodeId, u64> {
        let of = |cached: &Cached| {
            let is_known = |name: &&BlockHash| {
                cached.blocks.get(*name).is_some_and(|(stored, _)| stored + LATE_US <= now_us)
            };
            (names.iter().take_while(is_known).count() * BLOCK_TOKENS_DEFAULT) as u64
        };
        let all = self.nodes.iter().enumerate().map(|(node, cached)| (node_id(node), of(cached)));
        all.filter(|(_, tokens)| *tokens > 0).collect()
    }
}

/// Until others hear of a block.
const LATE_US: u64 = 300_000;
