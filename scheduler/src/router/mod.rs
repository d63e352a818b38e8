//! Which replica answers a request: the one where that costs least time, as far as this node can know;
//! and where the keys and values of a prompt come from ([`plan_prefill`]).
//!
//! Owns, for each node, its replicas' load as last reported plus what was sent there since, the path to
//! it and what that carries, a circuit breaker, and the record of the last decisions. Refuses to send
//! anything: the shell asks with [`Router::choose`], sends, and says with [`Router::settle`] how it went.
//!
//! Load is never polled and never taken alone: a report is old when it arrives, and routers that all
//! trust it send to the same idle replica. So what was sent since counts until a report can know of it.
//! The whole story, with what is measured and what is guessed: docs/routing.md.

mod breaker;
mod config;
mod cost;
mod decisions;
mod least;
mod links;
mod nodes;
mod prefill;
mod survey;

use std::cmp::Reverse;
use std::collections::BTreeMap;

use protocol::node_record::NodeRole;
use protocol::{Duration, Instant, NodeId, RequestId};

use nodes::{Nodes, Sent};
use survey::{Scene, Survey, Taken, tie};

pub use config::{Policy, RouterConfig};
pub use cost::{CostParts, KvPath, PREFILL_RATE_GUESS};
pub use decisions::{
    Candidate, DECISION_BYTES_MAX, DECISIONS_MAX, Decided, Decision, DecisionStats, Decisions, End,
    OTHERS_KEPT_MAX, Outcomes, Rank, ReplicaDecision, Why,
};
pub use links::{BYTES_PER_S_GUESS, LinkFigures, RTT_GUESS, SAMPLE_BYTES_MIN};
pub use nodes::SENT_PER_NODE_MAX;
pub use prefill::{
    Disagg, OPTIONS_KEPT_MAX, PEERS_MAX, PlannedSource, PrefillAsk, PrefillInputs, PrefillKind,
    PrefillLoad, PrefillOption, PrefillPeer, PrefillPlan, SOURCES_MAX, plan_prefill,
};

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
    /// Microseconds of a step that only decodes; 0 if not yet measured.
    pub decode_step_us: u32,
    /// Keys and values of one token, in bytes.
    pub kv_bytes_per_token: u32,
    /// What a token that lies below the pool takes to be in it, nanoseconds; 0 if none was brought up yet.
    pub below_ns_per_token: u32,
    pub kv_blocks_free: u32,
    pub kv_blocks: u32,
    /// What its node is there for.
    pub role: NodeRole,
}

/// A request that needs a replica.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    pub request: RequestId,
    pub model: &'a str,
    /// Prompt tokens, or a guess.
    pub prompt_tokens: u64,
    /// Tokens that the answer will have, or a guess.
    pub output_tokens: u64,
    /// How many of the prompt's first tokens each node has cached, as far as anybody knows.
    pub overlap_tokens: &'a BTreeMap<NodeId, u64>,
    /// How many of these, the last of them, lie below the node's pool.
    pub below_tokens: &'a BTreeMap<NodeId, u64>,
    /// Nodes that were asked for this request already and gave no whole answer.
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
    /// This node answers by itself: its own reports, made anew for each decision, know of it at once.
    TakenHere,
    /// The answer is complete, or its client left, or another node has it now.
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
    /// It was asked for this very request already, and gave no whole answer.
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
    /// Expected time to the first token.
    pub ttft: Duration,
    pub why: Why,
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
    nodes: Nodes,
    decisions: Decisions,
    stats: RouterStats,
    /// Decisions made.
    turn: u64,
    /// Kept between decisions for its memory.
    survey: Survey,
}

impl Router {
    pub fn new(own: NodeId, config: RouterConfig) -> Self {
        Router {
            config,
            own,
            nodes: Nodes::new(own),
            decisions: Decisions::default(),
            stats: RouterStats::default(),
            // Routers that start together do not take the same turns.
            turn: u64::from(own.0[0]),
            survey: Survey::default(),
        }
    }

    pub fn config(&self) -> &RouterConfig {
        &self.config
    }

    /// What the path to a node carries, as measured.
    pub fn link(&self, node: NodeId) -> LinkFigures {
        self.nodes.link_to(node)
    }

    /// The transport's smoothed round trip to a node. Of one that has not reported nothing is kept.
    pub fn rtt(&mut self, node: NodeId, rtt: Duration) {
        self.nodes.change_link(&self.config, node, |link| link.rtt = Some(rtt));
    }

    /// So many bytes came from a node; see [`LinkFigures::carried`].
    pub fn carried(&mut self, node: NodeId, bytes: u64, took: Duration) {
        self.nodes.change_link(&self.config, node, |link| link.carried(bytes, took));
    }

    /// The last decisions, with what came of them.
    pub fn decisions(&self) -> &Decisions {
        &self.decisions
    }

    /// For what this router does not see: first tokens, and decisions about prompts.
    pub fn decisions_mut(&mut self) -> &mut Decisions {
        &mut self.decisions
    }

    /// A node's replicas and their load: all of them, those not named are gone.
    pub fn report(
        &mut self,
        now: Instant,
        node: NodeId,
        replicas: impl IntoIterator<Item = (String, ReplicaLoad)>,
    ) {
        let replicas = replicas.into_iter().take(REPLICAS_PER_NODE_MAX).collect();
        self.nodes.report(&self.config, now, node, replicas);
    }

    /// A node has left or died: nothing is remembered of it.
    pub fn forget(&mut self, node: NodeId) {
        self.nodes.forget(node);
    }

    /// The path to a node broke, or works again. At once, whatever membership thinks.
    pub fn path(&mut self, node: NodeId, up: bool) {
        self.nodes.change(node, |node| node.path_up = up);
    }

    /// Models that any known node has, in the order of their names, with the number of ready replicas.
    pub fn models(&self) -> BTreeMap<&str, usize> {
        self.nodes.models().map(|(name, model)| (name, model.ready.values().sum())).collect()
    }

    /// The weights that a model's name stands for, and whether ready replicas have others under the
    /// same name: those of this node, or of most ready replicas (the lowest value of several).
    pub fn weights(&self, model: &str) -> Option<(u64, bool)> {
        let model = self.nodes.model(model)?;
        let own = model.place(self.own).ok().map(|place| model.seats[place].load);
        let own = own.filter(|load| load.ready).map(|load| load.weights);
        let most = || model.ready.iter().max_by_key(|&(&weights, &n)| (n, Reverse(weights)));
        let weights = own.or_else(|| most().map(|(&weights, _)| weights))?;
        Some((weights, model.ready.len() > 1))
    }

    /// The replica to ask, which from now on counts the request: the cheapest of those that nothing
    /// speaks against ([`Rank`]), else the cheapest of the next rank. Ties are broken by the request's
    /// id, so that routers which know the same do not all choose the same.
    pub fn choose(&mut self, now: Instant, ask: &Ask<'_>) -> Result<Choice, NoReplica> {
        let weights = || self.weights(ask.model).map(|(weights, _)| weights);
        let weights = ask.weights.or_else(weights);
        if self.nodes.model(ask.model).is_none() {
            return Err(NoReplica::UnknownModel);
        }
        let mut survey = std::mem::take(&mut self.survey);
        let model = self.nodes.model(ask.model).expect("it was there");
        let scene = Scene {
            config: &self.config,
            own: self.own,
            nodes: &self.nodes,
            model,
            now,
            ask,
            weights,
            turn: self.turn,
        };
        let taken = survey.take(&scene);
        self.turn += 1;
        let result = match &taken {
            Some(taken) => Ok(self.give_out(now, ask, taken)),
            None => {
                self.stats.unavailable += 1;
                Err(NoReplica::Unavailable(survey.unavailable.clone()))
            }
        };
        self.remember(now, ask, taken, &survey.unavailable);
        self.survey = survey;
        result
    }

    /// Counts the chosen one as asked.
    fn give_out(&mut self, now: Instant, ask: &Ask<'_>, taken: &Taken) -> Choice {
        let Candidate { node: id, load, overlap_tokens, parts, .. } = taken.chosen;
        let chosen = match id == self.own {
            true => &mut self.stats.chosen_own,
            false => &mut self.stats.chosen_peer,
        };
        *chosen += 1;
        let mut counted = false;
        self.nodes.change(id, |node| {
            node.breaker.tried(now);
            counted = node.sent.len() < SENT_PER_NODE_MAX;
            if counted {
                node.sent.insert(ask.request);
            }
        });
        if counted {
            let overlap = |node| ask.overlap_tokens.get(&node).copied().unwrap_or(0);
            let (prompt_tokens, there) = match parts.path {
                KvPath::Recompute | KvPath::Local => (ask.prompt_tokens - overlap_tokens, None),
                KvPath::Fetch { from } => (ask.prompt_tokens.saturating_sub(overlap(from)), None),
                KvPath::Remote { by } => {
                    (0, Some((by, ask.prompt_tokens.saturating_sub(overlap(by)))))
                }
            };
            let prefilled_by = there.map(|(by, _)| by);
            let model = ask.model.to_owned();
            let sent = Sent { request: ask.request, at: now, model, prompt_tokens, prefilled_by };
            if let Some((by, prompt_tokens)) = there {
                let there = Sent { prompt_tokens, prefilled_by: None, ..sent.clone() };
                self.nodes.count_sent(&self.config, by, there);
            }
            self.nodes.count_sent(&self.config, id, sent);
        }
        Choice {
            node: id,
            weights: load.weights,
            cost: Duration::from_micros(parts.score_us()),
            ttft: Duration::from_micros(parts.ttft_us()),
            why: taken.why,
            candidates: taken.others_total + 1,
        }
    }

    /// Writes the decision down.
    fn remember(
        &mut self,
        now: Instant,
        ask: &Ask<'_>,
        taken: Option<Taken>,
        unavailable: &[(NodeId, Unavailable)],
    ) {
        let (chosen, why, others, others_total) = match taken {
            Some(Taken { chosen, why, others, others_total }) => {
                (Some(chosen), why, others, others_total)
            }
            None => (None, Why::Nobody, Vec::new(), 0),
        };
        let decision = ReplicaDecision {
            model: ask.model.to_owned(),
            prompt_tokens: ask.prompt_tokens,
            output_tokens: ask.output_tokens,
            chosen,
            why,
            others,
            others_total,
            unavailable: unavailable.iter().take(OTHERS_KEPT_MAX).copied().collect(),
        };
        self.decisions.record(now, ask.request, Decided::Replica(decision));
    }

    /// How an attempt went that [`Router::choose`] gave out. Unknown ones are ignored: the node may
    /// have been forgotten meanwhile.
    pub fn settle(&mut self, now: Instant, node: NodeId, request: RequestId, outcome: Outcome) {
        match outcome {
            Outcome::Began => self.decisions.began(now, request, node),
            Outcome::TakenHere => {}
            Outcome::Ended => self.decisions.ended(now, request, node, End::Done),
            Outcome::Refused { .. } => self.decisions.ended(now, request, node, End::Refused),
            Outcome::Failed => self.decisions.ended(now, request, node, End::Failed),
        }
        let (id, own) = (node, node == self.own);
        let mut prefilled_by = None;
        if outcome != Outcome::Began {
            let sent = self.nodes.uncount(&self.config, id, request);
            prefilled_by = sent.and_then(|sent| sent.prefilled_by);
        }
        // Who computes the prompt for this node has still to say so.
        prefilled_by = prefilled_by.filter(|_| outcome != Outcome::TakenHere);
        let Router { config, nodes, stats, own: own_id, .. } = self;
        nodes.change(id, |node| {
            if outcome != Outcome::Began {
                node.sent.remove(&request);
            }
            match outcome {
                Outcome::Began => node.breaker.succeeded(),
                Outcome::TakenHere | Outcome::Ended => node.breaker.settled(),
                Outcome::Refused { retry_after } => {
                    stats.refused += 1;
                    node.breaker.succeeded();
                    node.busy_until = now + retry_after.min(config.open_max);
                }
                Outcome::Failed => {
                    stats.failed += 1;
                    // What fails here is this request's fault, or seen by the registry.
                    if !own {
                        node.breaker.failed(now, config, tie(request, *own_id));
                    }
                }
            }
        });
        if let Some(helper) = prefilled_by {
            while nodes.uncount(config, helper, request).is_some() {}
        }
    }

    /// What has happened since the start.
    pub fn stats(&self) -> RouterStats {
        self.stats
    }

    /// Requests under way to other nodes.
    pub fn in_flight_elsewhere(&self) -> usize {
        self.nodes.all().filter(|(id, _)| *id != self.own).map(|(_, node)| node.sent.len()).sum()
    }

    /// Nodes left alone because they failed too often.
    pub fn breakers_open(&self, now: Instant) -> usize {
        self.nodes.all().filter(|(_, node)| node.breaker.is_open(now)).count()
    }

    /// Requests under way to a node, as this router counts them.
    pub fn in_flight(&self, node: NodeId) -> usize {
        self.nodes.node(node).map_or(0, |node| node.sent.len())
    }
}

/// For where nothing lies below any pool.
pub static NOTHING_BELOW: BTreeMap<NodeId, u64> = BTreeMap::new();
/// Replicas kept of one node's report; more are not looked at.
pub const REPLICAS_PER_NODE_MAX: usize = 256;
