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
mod links;
mod prefill;
mod survey;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use protocol::node_record::NodeRole;
use protocol::{Duration, Instant, NodeId, RequestId};

use breaker::Breaker;
use cost::micros;
use survey::Survey;

pub use config::RouterConfig;
pub use cost::{CostParts, KvPath, PREFILL_RATE_GUESS};
pub use decisions::{
    Candidate, DECISION_BYTES_MAX, DECISIONS_MAX, Decided, Decision, DecisionStats, Decisions, End,
    OTHERS_KEPT_MAX, Outcomes, Rank, ReplicaDecision, Why,
};
pub use links::{BYTES_PER_S_GUESS, LINKS_MAX, LinkFigures, Links, RTT_GUESS, SAMPLE_BYTES_MIN};
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
    /// This node answers by itself: its own reports, made anew for each decision, know of it at once.
    TakenHere,
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
    nodes: BTreeMap<NodeId, Node>,
    links: Links,
    decisions: Decisions,
    stats: RouterStats,
    /// Kept between decisions for its memory.
    survey: Survey,
}

#[derive(Debug)]
struct Node {
    path_up: bool,
    breaker: Breaker,
    busy_until: Instant,
    reported_at: Instant,
    replicas: BTreeMap<String, ReplicaLoad>,
    /// Attempts under way.
    sent: BTreeSet<RequestId>,
    /// Those of them that no report can know of yet.
    unreported: Vec<Sent>,
}

/// An attempt under way.
#[derive(Clone, Debug)]
struct Sent {
    request: RequestId,
    at: Instant,
    model: String,
    /// To be computed there.
    prompt_tokens: u64,
    /// Who computes the rest of the prompt, as far as this router thinks.
    prefilled_by: Option<NodeId>,
}

impl Router {
    pub fn new(own: NodeId, config: RouterConfig) -> Self {
        Router {
            config,
            own,
            nodes: BTreeMap::new(),
            links: Links::default(),
            decisions: Decisions::default(),
            stats: RouterStats::default(),
            survey: Survey::default(),
        }
    }

    pub fn config(&self) -> &RouterConfig {
        &self.config
    }

    /// What the paths to others carry.
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// For what the shell measures of them.
    pub fn links_mut(&mut self) -> &mut Links {
        &mut self.links
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
        let config = &self.config;
        let node = self.nodes.entry(node).or_insert_with(|| Node::new(config));
        node.reported_at = now;
        node.replicas = replicas.into_iter().take(REPLICAS_PER_NODE_MAX).collect();
        let known_before = node.known_before(config);
        node.unreported.retain(|sent| sent.at >= known_before);
    }

    /// A node has left or died: nothing is remembered of it.
    pub fn forget(&mut self, node: NodeId) {
        self.nodes.remove(&node);
        self.links.forget(node);
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

    /// The replica to ask, which from now on counts the request: the cheapest of those that nothing
    /// speaks against ([`Rank`]), else the cheapest of the next rank. Ties are broken by the request's
    /// id, so that routers which know the same do not all choose the same.
    pub fn choose(&mut self, now: Instant, ask: &Ask<'_>) -> Result<Choice, NoReplica> {
        let weights = ask.weights.or_else(|| self.stands_for(ask.model));
        let mut survey = std::mem::take(&mut self.survey);
        survey.take(self, now, ask, weights);
        let result = match self.pick(ask, &survey.candidates) {
            Some((place, why)) => {
                survey.candidates.swap(0, place);
                let choice = self.give_out(now, ask, &survey.candidates, why);
                self.remember(now, ask, &mut survey, why);
                Ok(choice)
            }
            None if survey.unavailable.is_empty() => Err(NoReplica::UnknownModel),
            None => {
                self.stats.unavailable += 1;
                self.remember(now, ask, &mut survey, Why::Nobody);
                Err(NoReplica::Unavailable(survey.unavailable.clone()))
            }
        };
        self.survey = survey;
        result
    }

    /// The place of the one to take, and why that one.
    fn pick(&self, ask: &Ask<'_>, candidates: &[Candidate]) -> Option<(usize, Why)> {
        let key = |c: &Candidate| (c.rank, c.parts.score_us());
        let before = |a: &Candidate, b: &Candidate| {
            let tied = || (tie(ask.request, a.node), a.node) < (tie(ask.request, b.node), b.node);
            key(a) < key(b) || (key(a) == key(b) && tied())
        };
        let best =
            candidates.iter().enumerate().reduce(|best, other| match before(other.1, best.1) {
                true => other,
                false => best,
            });
        let (place, best) = best?;
        let why = match (best.rank.is_first(), candidates.len()) {
            (false, _) => Why::LastResort,
            (true, 1) => Why::Only,
            (true, _) => Why::Cheapest,
        };
        let learnt = (why == Why::Cheapest).then(|| self.explore(ask, candidates, place)).flatten();
        Some(learnt.map_or((place, why), |other| (other, Why::Explored)))
    }

    /// Another one in place of the best, now and then: any of those that cost little more.
    fn explore(&self, ask: &Ask<'_>, candidates: &[Candidate], best: usize) -> Option<usize> {
        let drawn = tie(ask.request, EXPLORATION);
        let first_time = ask.excluded.is_empty() && ask.weights.is_none();
        if !first_time || drawn % 1000 >= u64::from(self.config.explore_permille) {
            return None;
        }
        let extra = micros(self.config.explore_cost_max);
        let most = candidates[best].parts.score_us().saturating_add(extra);
        let near = || {
            let is_near = |c: &Candidate| c.rank.is_first() && c.parts.score_us() <= most;
            let others = candidates.iter().enumerate().filter(move |(place, _)| *place != best);
            others.filter(move |(_, c)| is_near(c)).map(|(place, _)| place)
        };
        let count = u64::try_from(near().count()).unwrap_or(u64::MAX);
        let nth = (drawn / 1000).checked_rem(count)?;
        near().nth(usize::try_from(nth).unwrap_or(0))
    }

    /// Counts the first of the candidates as asked.
    fn give_out(
        &mut self,
        now: Instant,
        ask: &Ask<'_>,
        candidates: &[Candidate],
        why: Why,
    ) -> Choice {
        let Candidate { node: id, load, overlap_tokens, parts, .. } = candidates[0];
        let chosen = match id == self.own {
            true => &mut self.stats.chosen_own,
            false => &mut self.stats.chosen_peer,
        };
        *chosen += 1;
        let node = self.nodes.get_mut(&id).expect("chosen among them");
        node.breaker.tried(now);
        if node.sent.len() < SENT_PER_NODE_MAX {
            let overlap = |node| ask.overlap_tokens.get(&node).copied().unwrap_or(0);
            let (computed, there) = match parts.path {
                KvPath::Recompute | KvPath::Local => (ask.prompt_tokens - overlap_tokens, None),
                KvPath::Fetch { from } => (ask.prompt_tokens.saturating_sub(overlap(from)), None),
                KvPath::Remote { by } => {
                    (0, Some((by, ask.prompt_tokens.saturating_sub(overlap(by)))))
                }
            };
            node.sent.insert(ask.request);
            let model = ask.model.to_owned();
            let prefilled_by = there.map(|(by, _)| by);
            let sent = Sent {
                request: ask.request,
                at: now,
                model,
                prompt_tokens: computed,
                prefilled_by,
            };
            node.unreported.push(sent.clone());
            if let Some((by, prompt_tokens)) = there
                && let Some(helper) = self.nodes.get_mut(&by)
                && helper.unreported.len() < SENT_PER_NODE_MAX
            {
                helper.unreported.push(Sent { prompt_tokens, prefilled_by: None, ..sent });
            }
        }
        Choice {
            node: id,
            weights: load.weights,
            cost: Duration::from_micros(parts.score_us()),
            ttft: Duration::from_micros(parts.ttft_us()),
            why,
            candidates: candidates.len(),
        }
    }

    /// Writes the decision down: the first candidate is the chosen one, unless nobody is.
    fn remember(&mut self, now: Instant, ask: &Ask<'_>, survey: &mut Survey, why: Why) {
        let (chosen, others) = match survey.candidates.split_first_mut() {
            Some((chosen, others)) => (Some(*chosen), others),
            None => (None, &mut [][..]),
        };
        let others_total = others.len();
        let key = |c: &Candidate| (c.rank, c.parts.score_us(), c.node);
        if others_total > OTHERS_KEPT_MAX {
            others.select_nth_unstable_by_key(OTHERS_KEPT_MAX, key);
        }
        let kept = &mut others[..others_total.min(OTHERS_KEPT_MAX)];
        kept.sort_unstable_by_key(key);
        let decision = ReplicaDecision {
            model: ask.model.to_owned(),
            prompt_tokens: ask.prompt_tokens,
            output_tokens: ask.output_tokens,
            chosen,
            why,
            others: kept.to_vec(),
            others_total,
            unavailable: survey.unavailable.iter().take(OTHERS_KEPT_MAX).copied().collect(),
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
        let own = node == self.own;
        let Some(node) = self.nodes.get_mut(&node) else { return };
        let mut prefilled_by = None;
        if outcome != Outcome::Began {
            node.sent.remove(&request);
            if let Some(place) = node.unreported.iter().position(|sent| sent.request == request) {
                prefilled_by = node.unreported.swap_remove(place).prefilled_by;
            }
        }
        // Who computes the prompt for this node has still to say so.
        prefilled_by = prefilled_by.filter(|_| outcome != Outcome::TakenHere);
        match outcome {
            Outcome::Began => node.breaker.succeeded(),
            Outcome::TakenHere | Outcome::Ended => node.breaker.settled(),
            Outcome::Refused { retry_after } => {
                self.stats.refused += 1;
                node.breaker.succeeded();
                node.busy_until = now + retry_after.min(self.config.open_max);
            }
            Outcome::Failed => {
                self.stats.failed += 1;
                // What fails here is this request's fault, or seen by the registry.
                if !own {
                    node.breaker.failed(now, &self.config, tie(request, self.own));
                }
            }
        }
        if let Some(helper) = prefilled_by.and_then(|by| self.nodes.get_mut(&by)) {
            helper.unreported.retain(|sent| sent.request != request);
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

    /// The weights that a model's name stands for; see [`Router::weights`].
    fn stands_for(&self, model: &str) -> Option<u64> {
        let own = self.nodes.get(&self.own).and_then(|node| node.replicas.get(model));
        match own.filter(|load| load.ready) {
            Some(own) => Some(own.weights),
            None => Some(self.weights(model)?.0),
        }
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
            sent: BTreeSet::new(),
            unreported: Vec::new(),
        }
    }

    /// What was sent before this is in the last report.
    fn known_before(&self, config: &RouterConfig) -> Instant {
        let reported = self.reported_at.as_nanos();
        Instant::from_nanos(reported.saturating_sub(nanos(config.report_lag)))
    }

    /// Requests for a model that the last report cannot know of, and the prompt tokens to compute for
    /// them.
    fn sent_since_report(&self, config: &RouterConfig, model: &str) -> (u32, u64) {
        let known_before = self.known_before(config);
        let since = self.unreported.iter();
        let since = since.filter(|sent| sent.at >= known_before && sent.model == model);
        since.fold((0, 0), |(sequences, tokens): (u32, u64), sent| {
            (sequences.saturating_add(1), tokens.saturating_add(sent.prompt_tokens))
        })
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

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Replicas kept of one node's report; more are not looked at.
pub const REPLICAS_PER_NODE_MAX: usize = 256;

/// Attempts counted for one node; beyond it, more are sent and not counted.
pub const SENT_PER_NODE_MAX: usize = 65_536;

/// Stands for no node: makes the draw for exploration another one than that of ties.
const EXPLORATION: NodeId = NodeId([0xa5; 32]);
