//! Who is asked: the daemon's router at each ingress, which goes by one policy or another.

use std::collections::BTreeMap;

use protocol::{Instant, NodeId, RequestId};
use scheduler::router::{Ask, DecisionStats, Outcome, Policy, ReplicaLoad, Router, RouterConfig};

use super::{BEGAN, node_id};

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
        let config = RouterConfig { policy, ..RouterConfig::default() };
        Ingress { router: Router::new(own, config), requests: BTreeMap::new() }
    }

    pub fn report(&mut self, now: Instant, own: usize, loads: &[ReplicaLoad]) {
        for (node, load) in loads.iter().enumerate().filter(|(node, _)| *node != own) {
            self.router.report(now, node_id(node), [(MODEL.to_owned(), *load)]);
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
