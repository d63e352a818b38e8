//! What was decided, why, and what came of it: the last decisions of this node, to be asked for, and
//! sums over all of them.
//!
//! What can be known afterwards is how the chosen replica did. How another would have done cannot: that
//! stays the estimate of the moment. So **regret** is what was realised less the best estimate of the
//! others, corrected by what the estimates were wrong by of late, the same for all: a model that is too
//! hopeful about everything has made no bad choice. It is never below zero, it says nothing where there
//! was one candidate only, and it is as good as the estimates are. A decision without a first token (it
//! failed, its client left, its answer was not streamed) has none.

use std::collections::{BTreeMap, VecDeque};
use std::mem::size_of;

use protocol::{Instant, NodeId, RequestId};

use super::cost::CostParts;
use super::prefill::{PrefillKind, PrefillOption, PrefillPlan};
use super::{ReplicaLoad, Unavailable};

/// One decision.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub request: RequestId,
    pub at: Instant,
    pub what: Decided,
    pub outcome: Outcomes,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq)]
// Nearly all are of the large kind, and a box would cost each an allocation.
#[allow(clippy::large_enum_variant)]
pub enum Decided {
    /// Which replica answers.
    Replica(ReplicaDecision),
    /// Where a prompt's keys and values come from.
    Prefill(PrefillPlan),
}

/// Which replica answers, and who else could have.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplicaDecision {
    pub model: String,
    pub prompt_tokens: u64,
    /// The answer's length that was reckoned with.
    pub output_tokens: u64,
    /// `None`: nobody could be asked.
    pub chosen: Option<Candidate>,
    pub why: Why,
    /// The best of the others, the best first; at most [`OTHERS_KEPT_MAX`].
    pub others: Vec<Candidate>,
    /// The others, all of them.
    pub others_total: usize,
    /// Nodes that have the model and could not be asked; at most [`OTHERS_KEPT_MAX`].
    pub unavailable: Vec<(NodeId, Unavailable)>,
}

/// Why the chosen one was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// It was the cheapest of several.
    Cheapest,
    /// There was no other.
    Only,
    /// To learn how it does: another was cheaper by a little.
    Explored,
    /// It is suspected, overloaded, has other weights or is there for prefills, and so are all others.
    LastResort,
    /// Nobody was chosen.
    Nobody,
}

impl Why {
    pub const ALL: [Why; 5] =
        [Why::Cheapest, Why::Only, Why::Explored, Why::LastResort, Why::Nobody];

    pub const fn as_str(self) -> &'static str {
        match self {
            Why::Cheapest => "cheapest",
            Why::Only => "only",
            Why::Explored => "explored",
            Why::LastResort => "last_resort",
            Why::Nobody => "nobody",
        }
    }
}

/// A replica that could be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub node: NodeId,
    /// As reported, with what was sent there since.
    pub load: ReplicaLoad,
    /// The beginning of the prompt that it has cached, as far as is known.
    pub overlap_tokens: u64,
    /// Of them, those that lie below its pool.
    pub below_tokens: u64,
    pub rank: Rank,
    pub parts: CostParts,
}

/// What is asked last, whatever it costs: any of these ranks behind none, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Not the weights that the model's name stands for.
    pub other_weights: bool,
    /// Membership suspects its node.
    pub suspected: bool,
    /// Its node is there for prefills.
    pub prefill_only: bool,
    /// It has more to do than it can begin soon.
    pub overloaded: bool,
}

impl Rank {
    /// Whether nothing speaks against it.
    pub fn is_first(self) -> bool {
        self == Rank::default()
    }
}

/// What came of a decision, as far as it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    pub answer_began: Option<Instant>,
    pub first_token: Option<Instant>,
    pub ended: Option<(Instant, End)>,
    /// See the module; microseconds.
    pub regret_us: Option<u64>,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Complete, or its client left.
    Done,
    /// The node had no room.
    Refused,
    /// The node did not answer, or broke off. Of a prefill: this node computed what was left.
    Failed,
}

impl End {
    pub const fn as_str(self) -> &'static str {
        match self {
            End::Done => "done",
            End::Refused => "refused",
            End::Failed => "failed",
        }
    }
}

/// Sums over all decisions since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecisionStats {
    /// By [`Why`], in the order of [`Why::ALL`].
    pub replicas: [u64; Why::ALL.len()],
    pub recompute: u64,
    pub fetch: u64,
    pub remote: u64,
    /// Decisions whose first token was seen, and how far their estimates were off in sum, up or down.
    pub first_tokens: u64,
    pub error_us: u64,
    /// Estimates are too low by that much of late, or too high if below zero.
    pub bias_us: i64,
    /// Of the decisions for the cheapest, and of those to learn something.
    pub regret_us: u64,
    pub regret_explored_us: u64,
    /// Decisions dropped for want of room, the oldest first.
    pub dropped: u64,
}

/// The last decisions; see the module.
#[derive(Debug, Default)]
pub struct Decisions {
    /// By request, then by the order in which they were made.
    entries: BTreeMap<(RequestId, u64), Decision>,
    order: VecDeque<(RequestId, u64)>,
    next: u64,
    bytes: usize,
    stats: DecisionStats,
}

impl Decisions {
    /// Keeps a decision; the oldest go when there are too many.
    pub fn record(&mut self, now: Instant, request: RequestId, what: Decided) {
        match &what {
            Decided::Replica(decision) => {
                let place = Why::ALL.iter().position(|why| *why == decision.why);
                self.stats.replicas[place.expect("all of them are there")] += 1;
            }
            Decided::Prefill(plan) => match plan.kind() {
                PrefillKind::Recompute => self.stats.recompute += 1,
                PrefillKind::Fetch => self.stats.fetch += 1,
                PrefillKind::Remote => self.stats.remote += 1,
            },
        }
        let decision = Decision { request, at: now, what, outcome: Outcomes::default() };
        let key = (request, self.next);
        self.next += 1;
        self.bytes += bytes_of(&decision);
        self.order.push_back(key);
        self.entries.insert(key, decision);
        while self.order.len() > DECISIONS_MAX || self.bytes > DECISION_BYTES_MAX {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some(gone) = self.entries.remove(&oldest) {
                self.bytes -= bytes_of(&gone);
                self.stats.dropped += 1;
            }
        }
    }

    /// All that is kept of a request, in the order in which it was decided.
    pub fn of(&self, request: RequestId) -> impl Iterator<Item = &Decision> {
        self.entries.range((request, 0)..=(request, u64::MAX)).map(|(_, decision)| decision)
    }

    /// The requests of the last decisions, the newest first.
    pub fn latest(&self) -> impl Iterator<Item = RequestId> {
        self.order.iter().rev().map(|&(request, _)| request)
    }

    pub fn stats(&self) -> DecisionStats {
        self.stats
    }

    /// Decisions kept.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The answer of that node has begun.
    pub fn began(&mut self, now: Instant, request: RequestId, node: NodeId) {
        if let Some(decision) = self.open_replica(request, Some(node)) {
            decision.outcome.answer_began.get_or_insert(now);
        }
    }

    /// The first token has left for the client, whoever made it.
    pub fn first_token(&mut self, now: Instant, request: RequestId) {
        let bias = self.stats.bias_us;
        let Some(decision) = self.open_replica(request, None) else { return };
        if decision.outcome.first_token.is_some() {
            return;
        }
        decision.outcome.first_token = Some(now);
        let Decided::Replica(replica) = &decision.what else { return };
        let Some(chosen) = &replica.chosen else { return };
        let took = micros_between(decision.at, now);
        let (estimate, decode) = (chosen.parts.ttft_us(), chosen.parts.decode_us);
        let others = replica.others.iter().filter(|other| other.rank <= chosen.rank);
        let best = others.map(|other| other.parts.score_us()).min();
        let corrected = best.map(|best| best.saturating_add_signed(bias));
        let regret = corrected.map(|best| took.saturating_add(decode).saturating_sub(best));
        let explored = replica.why == Why::Explored;
        decision.outcome.regret_us = regret;
        let regret = regret.unwrap_or(0);
        let stats = &mut self.stats;
        match explored {
            true => stats.regret_explored_us = stats.regret_explored_us.saturating_add(regret),
            false => stats.regret_us = stats.regret_us.saturating_add(regret),
        }
        stats.first_tokens += 1;
        stats.error_us = stats.error_us.saturating_add(took.abs_diff(estimate));
        let off = i64::try_from(took).unwrap_or(i64::MAX).saturating_sub_unsigned(estimate);
        let off = off.clamp(-BIAS_US_MAX, BIAS_US_MAX);
        stats.bias_us += (off - stats.bias_us) / BIAS_MEMORY;
    }

    /// The attempt at that node is over.
    pub fn ended(&mut self, now: Instant, request: RequestId, node: NodeId, end: End) {
        if let Some(decision) = self.open_replica(request, Some(node)) {
            decision.outcome.ended = Some((now, end));
        }
    }

    /// The keys and values of the prompt are there, from whoever it was; `Failed` if this node had to
    /// compute what others were to bring.
    pub fn prefill_ended(&mut self, now: Instant, request: RequestId, end: End) {
        let is_prefill = |d: &Decision| matches!(d.what, Decided::Prefill(_));
        if let Some(decision) = self.newest(request, is_prefill) {
            decision.outcome.ended = Some((now, end));
        }
    }

    fn open_replica(&mut self, request: RequestId, node: Option<NodeId>) -> Option<&mut Decision> {
        self.newest(request, |decision| match &decision.what {
            Decided::Replica(replica) => {
                let chosen = replica.chosen.as_ref().map(|chosen| chosen.node);
                decision.outcome.ended.is_none()
                    && chosen.is_some()
                    && node.is_none_or(|node| chosen == Some(node))
            }
            Decided::Prefill(_) => false,
        })
    }

    fn newest(
        &mut self,
        request: RequestId,
        is_it: impl Fn(&Decision) -> bool,
    ) -> Option<&mut Decision> {
        let all = self.entries.range_mut((request, 0)..=(request, u64::MAX)).rev();
        all.map(|(_, decision)| decision).find(|decision| is_it(decision))
    }
}

fn micros_between(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_since(from).as_micros()).unwrap_or(u64::MAX)
}

/// What a decision takes in memory, about.
fn bytes_of(decision: &Decision) -> usize {
    let inner = match &decision.what {
        Decided::Replica(replica) => {
            replica.model.len()
                + replica.others.len() * size_of::<Candidate>()
                + replica.unavailable.len() * size_of::<(NodeId, Unavailable)>()
        }
        Decided::Prefill(plan) => plan.options.len() * size_of::<PrefillOption>(),
    };
    size_of::<Decision>() + inner + KEY_BYTES
}

/// Decisions kept; then the oldest go. At a hundred requests a second: of the last 40 seconds.
pub const DECISIONS_MAX: usize = 4096;
/// Memory that they take, about; then the oldest go.
pub const DECISION_BYTES_MAX: usize = 8 << 20;
/// Replicas that are remembered beside the chosen one, and as many that could not be asked.
pub const OTHERS_KEPT_MAX: usize = 8;
/// In the two indices.
const KEY_BYTES: usize = 2 * size_of::<(RequestId, u64)>();
/// The bias follows the errors of about so many decisions.
const BIAS_MEMORY: i64 = 32;
/// One error counts at most so much: a node that hung is no bias.
const BIAS_US_MAX: i64 = 5_000_000;
