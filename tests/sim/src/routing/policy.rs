//! Who is asked: the daemon's router at each ingress, which goes by one policy or another.

use std::collections::BTreeMap;

use cache::BLOCK_TOKENS_DEFAULT;
use protocol::{Duration, Instant, NodeId, RequestId};
use scheduler::router::{
    Ask, DecisionStats, Disagg, NOTHING_BELOW, Outcome, Policy, PrefillAsk, ReplicaLoad, Router,
    RouterConfig,
};

use super::{BEGAN, HOP_US, node_id};

/// A turn to be answered.
pub struct Wanted {
    pub request: RequestId,
    pub prompt_tokens: u64,
    pub overlap_tokens: BTreeMap<NodeId, u64>,
}

/// One node's view of all, and its way to choose.
pub struct Ingress {
    router: Router,
    /// The routers' names of the simulator's numbers.
    requests: BTreeMap<u64, RequestId>,
}

impl Ingress {
    pub fn new(policy: Policy, own: NodeId) -> Ingress {
        let disagg = Disagg::Never;
        let config = RouterConfig { policy, disagg, ..RouterConfig::default() };
        Ingress { router: Router::new(own, config), requests: BTreeMap::new() }
    }

    pub fn report(&mut self, now: Instant, own: usize, loads: &[ReplicaLoad]) {
        for (node, load) in loads.iter().enumerate().filter(|(node, _)| *node != own) {
            self.router.report(now, node_id(node), [(MODEL.to_owned(), *load)]);
            self.router.rtt(node_id(node), Duration::from_micros(HOP_US));
        }
    }

    /// The node to ask. `own_load` is this node's, as it is now.
    pub fn choose(
        &mut self,
        now: Instant,
        own: usize,
        own_load: ReplicaLoad,
        wanted: &Wanted,
    ) -> usize {
        self.router.report(now, node_id(own), [(MODEL.to_owned(), own_load)]);
        let ask = Ask {
            request: wanted.request,
            model: MODEL,
            prompt_tokens: wanted.prompt_tokens,
            output_tokens: OUTPUT_GUESS,
            overlap_tokens: &wanted.overlap_tokens,
            below_tokens: &NOTHING_BELOW,
            excluded: &[],
            suspected: &[],
            weights: None,
        };
        let choice = self.router.choose(now, &ask).expect("every node is ready");
        let node = usize::from(choice.node.0[0]) - 1;
        if node == own {
            self.router.settle(now, choice.node, wanted.request, Outcome::TakenHere);
        }
        self.requests.insert(wanted.request.0 as u64, wanted.request);
        node
    }

    /// Whose cache a prompt's blocks are fetched from by this node, if any: it has `lengths.0` tokens, and
    /// the first `lengths.1` of them are here.
    pub fn plan_prefill(
        &mut self,
        now: Instant,
        (own, own_load): (usize, ReplicaLoad),
        request: u64,
        lengths: (usize, usize),
        overlap_tokens: &BTreeMap<NodeId, u64>,
    ) -> Option<usize> {
        self.router.report(now, node_id(own), [(MODEL.to_owned(), own_load)]);
        let ask = PrefillAsk {
            request: RequestId(u128::from(request)),
            model: MODEL,
            prompt_tokens: lengths.0 as u64,
            cached_tokens: lengths.1 as u64,
            cached_below_tokens: 0,
            block_tokens: BLOCK_TOKENS_DEFAULT as u32,
            overlap_tokens,
            below_tokens: &NOTHING_BELOW,
            suspected: &[],
        };
        let plan = self.router.plan_prefill(now, &ask)?;
        plan.sources.first().map(|source| usize::from(source.peer.0[0]) - 1)
    }

    /// So much came from a node.
    pub fn carried(&mut self, from: usize, bytes: u64, took_us: u64) {
        self.router.carried(node_id(from), bytes, Duration::from_micros(took_us));
    }

    pub fn first_token(&mut self, now: Instant, request: u64) {
        if let Some(request) = self.requests.get(&request) {
            self.router.decisions_mut().first_token(now, *request);
        }
    }

    pub fn ended(&mut self, now: Instant, node: usize, request: u64) {
        if let Some(request) = self.requests.remove(&request) {
            self.router.settle(now, node_id(node), request, BEGAN);
            self.router.settle(now, node_id(node), request, Outcome::Ended);
        }
    }

    pub fn decision_stats(&self) -> DecisionStats {
        self.router.decisions().stats()
    }
}

const MODEL: &str = "m";
/// What the daemon reckons with where a client does not say.
const OUTPUT_GUESS: u64 = 256;
