//! Who is asked: four ways to decide it, with the same knowledge.

use std::collections::BTreeMap;

use protocol::random::mix;
use protocol::{Instant, NodeId, RequestId};
use scheduler::router::{Ask, DecisionStats, Outcome, ReplicaLoad, Router, RouterConfig};

use super::{BEGAN, node_id};

/// How an ingress chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    /// One after the other.
    RoundRobin,
    /// Fewest sequences, those sent since the last report included.
    LeastLoaded,
    /// Who has most of the prompt cached, whatever it has to do; the tenant's own node if nobody has any.
    Prefix,
    /// The daemon's router.
    Cost,
}

impl Policy {
    pub const ALL: [Policy; 4] =
        [Policy::RoundRobin, Policy::LeastLoaded, Policy::Prefix, Policy::Cost];

    pub const fn as_str(self) -> &'static str {
        match self {
            Policy::RoundRobin => "round robin",
            Policy::LeastLoaded => "least loaded",
            Policy::Prefix => "prefix only",
            Policy::Cost => "cost",
        }
    }
}

/// A turn to be answered.
pub struct Wanted {
    pub request: RequestId,
    pub tenant: usize,
    pub prompt_tokens: u64,
    pub overlap_tokens: BTreeMap<NodeId, u64>,
}

/// One node's view of all, and its way to choose.
pub struct Ingress {
    policy: Policy,
    router: Router,
    loads: Vec<ReplicaLoad>,
    reported: Instant,
    /// Sent to each node, and when.
    sent: Vec<(usize, Instant)>,
    turn: usize,
    /// The routers' names of the simulator's numbers.
    requests: BTreeMap<u64, RequestId>,
}

impl Ingress {
    pub fn new(policy: Policy, own: NodeId) -> Ingress {
        Ingress {
            policy,
            router: Router::new(own, RouterConfig::default()),
            loads: Vec::new(),
            reported: Instant::ORIGIN,
            sent: Vec::new(),
            turn: usize::from(own.0[0]),
            requests: BTreeMap::new(),
        }
    }

    pub fn report(&mut self, now: Instant, own: usize, loads: &[ReplicaLoad]) {
        self.loads = loads.to_vec();
        let lag = self.router.config().report_lag;
        self.reported = now;
        self.sent.retain(|(_, at)| now.saturating_since(*at) <= lag);
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
        if let Some(load) = self.loads.get_mut(own) {
            *load = own_load;
        }
        let nodes = self.loads.len();
        let node = match self.policy {
            Policy::RoundRobin => {
                self.turn += 1;
                self.turn % nodes
            }
            Policy::LeastLoaded => self.least_loaded(own, wanted),
            Policy::Prefix => {
                let most = (0..nodes).max_by_key(|&node| {
                    let tokens = wanted.overlap_tokens.get(&node_id(node)).copied().unwrap_or(0);
                    (tokens, mix(wanted.tenant as u64 * 64 + node as u64))
                });
                most.expect("there are nodes")
            }
            Policy::Cost => return self.cheapest(now, own, own_load, wanted),
        };
        if node != own {
            self.sent.push((node, now));
        }
        node
    }

    fn least_loaded(&self, own: usize, wanted: &Wanted) -> usize {
        let load = |node: usize| {
            let sent = self.sent.iter().filter(|(to, _)| *to == node && node != own).count();
            (self.loads[node].running + self.loads[node].waiting) as usize + sent
        };
        let tie = |node: usize| mix(wanted.request.0 as u64 ^ node as u64);
        let least = (0..self.loads.len()).min_by_key(|&node| (load(node), tie(node)));
        least.expect("there are nodes")
    }

    fn cheapest(
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
