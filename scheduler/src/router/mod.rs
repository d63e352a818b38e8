//! Which replica answers a request: the one with the least to do, as far as this node can know.
//!
//! Owns, for each node, its replicas' load as last reported plus what was sent there since, the state
//! of the path to it, and a circuit breaker. Refuses to send anything: the shell asks with
//! [`Router::choose`], sends, and says with [`Router::settle`] how it went.
//!
//! Load is never polled and never taken alone: a report is old when it arrives, and routers that all
//! trust it send to the same idle replica. So what was sent since counts until a report can know of it.

mod breaker;

use std::cmp::Reverse;
use std::collections::BTreeMap;

use protocol::{Duration, Instant, NodeId, RequestId};

use breaker::Breaker;

/// What an operator may set, and what a wrong value does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterConfig {
    /// Unit: time that a report is older than its arrival. What was sent within it before the arrival
    /// counts beside the report. Formula: `gossip delay + replica's own delay`. Too small: requests
    /// are forgotten before they are reported, and others follow them. Too large: they count twice for
    /// a while. Default 500 ms.
    pub report_lag: Duration,
    /// Unit: time that one running stream costs a newcomer, against waiting for prompts: it makes
    /// every step longer. Too small: a replica full of streams looks free. Too large: an idle slow
    /// replica is preferred to a fast one with a stream. Default 20 ms.
    pub stream_cost: Duration,
    /// Unit: time that another node costs against this one: a hop, and its share of failures. Too
    /// small: requests travel for nothing. Too large: this node works while others idle. Default 5 ms.
    pub hop_cost: Duration,
    /// Unit: failures in a row after which a node is left alone. Too small: one broken request takes
    /// a good node away. Too large: each client meets the bad node first. Default 3.
    pub failures_to_open: u32,
    /// Unit: time that a node is left alone, doubled at each failed trial after it, up to `open_max`.
    /// Too small: clients try it in vain. Too large: a healed node idles. Default 1 s.
    pub open_min: Duration,
    /// Default 30 s.
    pub open_max: Duration,
}

impl Default for RouterConfig {
    fn default() -> Self {
        RouterConfig {
            report_lag: Duration::from_millis(500),
            stream_cost: Duration::from_millis(20),
            hop_cost: Duration::from_millis(5),
            failures_to_open: 3,
            open_min: Duration::from_secs(1),
            open_max: Duration::from_secs(30),
        }
    }
}

/// One replica's load, as its node reported it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplicaLoad {
    /// It takes requests: loaded, not draining.
    pub ready: bool,
    /// Sequences that have blocks.
    pub running: u32,
    /// Sequences that wait for them.
    pub waiting: u32,
    /// Prompt tokens not yet computed, of all of them.
    pub prompt_tokens: u64,
    /// Prompt tokens per second that it computes; 0 if not yet measured.
    pub prefill_rate: u32,
    /// Names its weights and numerics: replicas with one value answer alike.
    pub weights: u64,
}

/// A request that needs a replica.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    pub request: RequestId,
    pub model: &'a str,
    /// Prompt tokens, or a guess.
    pub prompt_tokens: u64,
    /// Nodes that failed this request already.
    pub excluded: &'a [NodeId],
    /// Nodes that membership suspects: asked only if no other can be, since they may well be healthy.
    pub suspected: &'a [NodeId],
    /// Only replicas with these weights: the answer has begun on them.
    pub weights: Option<u64>,
}

/// How an attempt went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The answer began: the node is well. The request still counts as running there.
    Began,
    /// The answer is complete, or its client left.
    Ended,
    /// The node said that it has no room now; it is well, and left alone for a moment.
    Refused { retry_after: Duration },
    /// No answer: not reached, broken off, or silent beyond the deadline.
    Failed,
}

/// Why no replica can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoReplica {
    /// No known node has the model.
    UnknownModel,
    /// Nodes have it, none can be asked now: each with its reason, in the order of their ids.
    Unavailable(Vec<(NodeId, Unavailable)>),
}

/// Why a node that has the model is not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// It loads the model, or drains.
    NotReady,
    /// The path to it is broken.
    PathDown,
    /// It failed too often; the next trial is after this time.
    Failing { retry_after: Duration },
    /// It had no room.
    Busy { retry_after: Duration },
    /// It failed this very request.
    Tried,
    /// The answer has begun on other weights.
    OtherWeights,
}

/// The choice and what it was made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    pub node: NodeId,
    /// Of its replica.
    pub weights: u64,
    /// Expected wait and harm, lower is better.
    pub cost: Duration,
    /// Replicas that could have been asked.
    pub candidates: usize,
}

/// What has happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouterStats {
    /// Requests given to this node.
    pub chosen_own: u64,
    /// Requests given to another node, each attempt.
    pub chosen_peer: u64,
    /// Requests for which no replica could be asked.
    pub unavailable: u64,
    /// Attempts that the node refused for want of room.
    pub refused: u64,
    /// Attempts that gave no answer, or broke off.
    pub failed: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Router {
    config: RouterConfig,
    /// This node: no hop, and its path is never down.
    own: NodeId,
    nodes: BTreeMap<NodeId, Node>,
    stats: RouterStats,
}

#[derive(Debug)]
struct Node {
    path_up: bool,
    breaker: Breaker,
    busy_until: Instant,
    reported_at: Instant,
    replicas: BTreeMap<String, ReplicaLoad>,
    sent: BTreeMap<RequestId, Sent>,
}

/// An attempt under way.
#[derive(Clone, Debug)]
struct Sent {
    at: Instant,
    model: String,
    prompt_tokens: u64,
}

impl Router {
    pub fn new(own: NodeId, config: RouterConfig) -> Self {
        Router { config, own, nodes: BTreeMap::new(), stats: RouterStats::default() }
    }

    /// A node's replicas and their load: all of them, those not named are gone.
    pub fn report(
        &mut self,
        now: Instant,
        node: NodeId,
        replicas: impl IntoIterator<Item = (String, ReplicaLoad)>,
    ) {
        let config = &self.config;
        let node = self.nodes.entry(node).or_insert_with(|| Node::new(config));
        node.reported_at = now;
        node.replicas = replicas.into_iter().take(REPLICAS_PER_NODE_MAX).collect();
    }

    /// A node has left or died: nothing is remembered of it.
    pub fn forget(&mut self, node: NodeId) {
        self.nodes.remove(&node);
    }

    /// The path to a node broke, or works again. At once, whatever membership thinks.
    pub fn path(&mut self, node: NodeId, up: bool) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.path_up = up;
        }
    }

    /// Models that any known node has, in the order of their names, with the number of ready replicas.
    pub fn models(&self) -> BTreeMap<&str, usize> {
        let mut models = BTreeMap::new();
        for node in self.nodes.values() {
            for (model, load) in &node.replicas {
                *models.entry(model.as_str()).or_default() += usize::from(load.ready);
            }
        }
        models
    }

    /// The weights that a model's name stands for, and whether ready replicas have others under the
    /// same name: those of this node, or of most ready replicas (the lowest value of several).
    pub fn weights(&self, model: &str) -> Option<(u64, bool)> {
        let ready =
            |node: &Node| Some(node.replicas.get(model)?).filter(|l| l.ready).map(|l| l.weights);
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        for weights in self.nodes.values().filter_map(ready) {
            *counts.entry(weights).or_default() += 1;
        }
        let own = self.nodes.get(&self.own).and_then(ready);
        let most = || counts.iter().max_by_key(|&(&weights, &n)| (n, Reverse(weights)));
        let weights = own.or_else(|| most().map(|(&weights, _)| weights))?;
        Some((weights, counts.len() > 1))
    }

    /// The replica to ask, which from now on counts the request. One with other weights than those the
    /// name stands for is asked only where no other can be, and a suspect only before those. Ties are
    /// broken by the request's id, so that routers which know the same do not all choose the same.
    pub fn choose(&mut self, now: Instant, ask: &Ask<'_>) -> Result<Choice, NoReplica> {
        let weights = ask.weights.or_else(|| Some(self.weights(ask.model)?.0));
        let mut best: Option<((bool, bool), u64, u64, NodeId)> = None;
        let (mut candidates, mut unavailable) = (0, Vec::new());
        for (&id, node) in &self.nodes {
            let Some(load) = node.replicas.get(ask.model) else { continue };
            if let Some(why) = node.unavailable(now, id == self.own, load, ask.excluded, id) {
                unavailable.push((id, why));
                continue;
            }
            if ask.weights.is_some_and(|weights| weights != load.weights) {
                unavailable.push((id, Unavailable::OtherWeights));
                continue;
            }
            candidates += 1;
            let cost = self.cost_us(id, node, load, ask);
            let last_resort = (Some(load.weights) != weights, ask.suspected.contains(&id));
            let key = (last_resort, cost, tie(ask.request, id), id);
            if best.is_none_or(|best| key < best) {
                best = Some(key);
            }
        }
        let Some((_, cost, _, id)) = best else {
            if unavailable.is_empty() {
                return Err(NoReplica::UnknownModel);
            }
            self.stats.unavailable += 1;
            return Err(NoReplica::Unavailable(unavailable));
        };
        let chosen = match id == self.own {
            true => &mut self.stats.chosen_own,
            false => &mut self.stats.chosen_peer,
        };
        *chosen += 1;
        let node = self.nodes.get_mut(&id).expect("chosen among them");
        let weights = node.replicas.get(ask.model).map_or(0, |load| load.weights);
        node.breaker.tried(now);
        if node.sent.len() < SENT_PER_NODE_MAX {
            let model = ask.model.to_owned();
            let sent = Sent { at: now, model, prompt_tokens: ask.prompt_tokens };
            node.sent.insert(ask.request, sent);
        }
        Ok(Choice { node: id, weights, cost: Duration::from_micros(cost), candidates })
    }

    /// How an attempt went that [`Router::choose`] gave out. Unknown ones are ignored: the node may
    /// have been forgotten meanwhile.
    pub fn settle(&mut self, now: Instant, node: NodeId, request: RequestId, outcome: Outcome) {
        let own = node == self.own;
        let Some(node) = self.nodes.get_mut(&node) else { return };
        match outcome {
            Outcome::Began => node.breaker.succeeded(),
            Outcome::Ended => {
                node.breaker.settled();
                node.sent.remove(&request);
            }
            Outcome::Refused { retry_after } => {
                self.stats.refused += 1;
                node.breaker.succeeded();
                node.sent.remove(&request);
                node.busy_until = now + retry_after.min(self.config.open_max);
            }
            Outcome::Failed => {
                self.stats.failed += 1;
                node.sent.remove(&request);
                // What fails here is this request's fault, or seen by the registry.
                if !own {
                    node.breaker.failed(now, &self.config, tie(request, self.own));
                }
            }
        }
    }

    /// What has happened since the start.
    pub fn stats(&self) -> RouterStats {
        self.stats
    }

    /// Requests under way to other nodes.
    pub fn in_flight_elsewhere(&self) -> usize {
        self.nodes.iter().filter(|(id, _)| **id != self.own).map(|(_, node)| node.sent.len()).sum()
    }

    /// Nodes left alone because they failed too often.
    pub fn breakers_open(&self, now: Instant) -> usize {
        self.nodes.values().filter(|node| node.breaker.open_for(now).is_some()).count()
    }

    /// Requests under way to a node, as this router counts them.
    pub fn in_flight(&self, node: NodeId) -> usize {
        self.nodes.get(&node).map_or(0, |node| node.sent.len())
    }

    /// Expected wait of the request and what its neighbours cost it, in microseconds.
    fn cost_us(&self, id: NodeId, node: &Node, load: &ReplicaLoad, ask: &Ask<'_>) -> u64 {
        let (mut streams, mut prompt_tokens) =
            (u64::from(load.running) + u64::from(load.waiting), load.prompt_tokens);
        let known_before =
            node.reported_at.as_nanos().saturating_sub(nanos(self.config.report_lag));
        for sent in node.sent.values() {
            if sent.at.as_nanos() >= known_before && sent.model == ask.model {
                streams += 1;
                prompt_tokens = prompt_tokens.saturating_add(sent.prompt_tokens);
            }
        }
        let tokens = prompt_tokens.saturating_add(ask.prompt_tokens);
        let rate = if load.prefill_rate == 0 { PREFILL_RATE_GUESS } else { load.prefill_rate };
        let prefill = tokens.saturating_mul(1_000_000) / u64::from(rate);
        let neighbours = streams.saturating_mul(micros(self.config.stream_cost));
        let hop = if id == self.own { 0 } else { micros(self.config.hop_cost) };
        prefill.saturating_add(neighbours).saturating_add(hop)
    }
}

impl Node {
    fn new(config: &RouterConfig) -> Self {
        Node {
            path_up: true,
            breaker: Breaker::new(config),
            busy_until: Instant::ORIGIN,
            reported_at: Instant::ORIGIN,
            replicas: BTreeMap::new(),
            sent: BTreeMap::new(),
        }
    }

    fn unavailable(
        &self,
        now: Instant,
        own: bool,
        load: &ReplicaLoad,
        excluded: &[NodeId],
        id: NodeId,
    ) -> Option<Unavailable> {
        if excluded.contains(&id) {
            return Some(Unavailable::Tried);
        }
        if !load.ready {
            return Some(Unavailable::NotReady);
        }
        if !own && !self.path_up {
            return Some(Unavailable::PathDown);
        }
        if let Some(retry_after) = self.breaker.open_for(now) {
            return Some(Unavailable::Failing { retry_after });
        }
        let busy = self.busy_until.saturating_since(now);
        (!busy.is_zero()).then_some(Unavailable::Busy { retry_after: busy })
    }
}

/// An even spread from ids: SplitMix64's finisher over both.
fn tie(request: RequestId, node: NodeId) -> u64 {
    let (words, _) = node.0.as_chunks::<8>();
    let mut mix = (request.0 >> 64) as u64 ^ request.0 as u64;
    for word in words {
        mix ^= u64::from_le_bytes(*word);
        mix = (mix ^ (mix >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mix = (mix ^ (mix >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mix ^= mix >> 31;
    }
    mix
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Replicas kept of one node's report; more are not looked at.
pub const REPLICAS_PER_NODE_MAX: usize = 256;

/// Attempts counted for one node; beyond it, more are sent and not counted.
pub const SENT_PER_NODE_MAX: usize = 65_536;

/// Prompt tokens per second of a replica that has measured nothing yet: low, so that measured ones
/// are preferred, and high enough that it gets a request to measure.
const PREFILL_RATE_GUESS: u32 = 200;
