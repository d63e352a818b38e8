//! What the router remembers of a request, in the words of the API.

use protocol::api::{
    ExplainedCandidate, ExplainedChoice, ExplainedDecision, ExplainedNode, ExplainedOption,
    ExplainedOutcome, ExplainedPrefill, ExplainedReplica, ExplainedSource, ExplainedUnavailable,
    Explanation,
};
use protocol::{Instant, NodeId, RequestId};
use scheduler::router::{
    Candidate, Decided, Decision, End, PrefillKind, PrefillOption, PrefillPlan, Rank,
    ReplicaDecision, Unavailable,
};

use super::roster::Roster;

impl Roster {
    /// What this node has decided about a request, or about the last one; `None` if it has not, or does
    /// not remember it.
    pub(super) fn explain(&self, request: Option<RequestId>) -> Option<Explanation> {
        let (now, decisions) = self.with_router(|now, router| {
            let request = request.or_else(|| router.decisions().latest().next());
            let of = |request| router.decisions().of(request).cloned().collect::<Vec<Decision>>();
            (now, request.map(of).unwrap_or_default())
        })?;
        let own = self.mesh()?.node();
        let words = Words { roster: self, own, now };
        Some(Explanation {
            request: decisions.first()?.request.to_string(),
            node: words.node(own),
            decisions: decisions.iter().map(|decision| words.decision(decision)).collect(),
        })
    }
}

/// Everything that turns inner values into words.
struct Words<'a> {
    roster: &'a Roster,
    own: NodeId,
    now: Instant,
}

impl Words<'_> {
    fn node(&self, node: NodeId) -> ExplainedNode {
        ExplainedNode {
            id: node.to_string(),
            name: self.roster.own_name_of(node),
            this_node: node == self.own,
        }
    }

    fn decision(&self, decision: &Decision) -> ExplainedDecision {
        let Decision { at, what, outcome, .. } = decision;
        let since = |then: Instant| then.saturating_since(*at).as_secs_f64() * 1e3;
        ExplainedDecision {
            age_ms: self.now.saturating_since(*at).as_secs_f64() * 1e3,
            what: match what {
                Decided::Replica(replica) => {
                    ExplainedChoice::Replica(Box::new(self.replica(replica)))
                }
                Decided::Prefill(plan) => ExplainedChoice::Prefill(self.prefill(plan)),
            },
            outcome: ExplainedOutcome {
                answer_began_ms: outcome.answer_began.map(since),
                first_token_ms: outcome.first_token.map(since),
                ended_ms: outcome.ended.map(|(then, _)| since(then)),
                end: outcome.ended.map(|(_, end)| End::as_str(end).to_owned()),
                regret_ms: outcome.regret_us.map(ms),
            },
        }
    }

    fn replica(&self, decision: &ReplicaDecision) -> ExplainedReplica {
        let unavailable = |&(node, why): &(NodeId, Unavailable)| ExplainedUnavailable {
            node: self.node(node),
            why: unavailable(why),
        };
        ExplainedReplica {
            model: decision.model.clone(),
            prompt_tokens: decision.prompt_tokens,
            output_tokens: decision.output_tokens,
            why: decision.why.as_str().to_owned(),
            chosen: decision.chosen.as_ref().map(|chosen| self.candidate(chosen)),
            others: decision.others.iter().map(|other| self.candidate(other)).collect(),
            others_total: decision.others_total as u64,
            unavailable: decision.unavailable.iter().map(unavailable).collect(),
        }
    }

    fn candidate(&self, candidate: &Candidate) -> ExplainedCandidate {
        let Candidate { node, load, overlap_tokens, below_tokens, rank, parts } = candidate;
        ExplainedCandidate {
            node: self.node(*node),
            running: load.running,
            waiting: load.waiting,
            queue_tokens: load.prompt_tokens,
            prefill_rate: load.prefill_rate,
            decode_step_ms: ms(u64::from(load.decode_step_us)),
            overlap_tokens: *overlap_tokens,
            below_tokens: *below_tokens,
            path: parts.path.as_str().to_owned(),
            path_peer: parts.path.peer().map(|peer| self.node(peer)),
            queue_ms: ms(parts.queue_us),
            raise_ms: ms(parts.raise_us),
            kv_ms: ms(parts.kv_us),
            prefill_ms: ms(parts.prefill_us),
            hop_ms: ms(parts.hop_us),
            ttft_ms: ms(parts.ttft_us()),
            decode_ms: ms(parts.decode_us),
            score_ms: ms(parts.score_us()),
            against: against(rank),
        }
    }

    fn prefill(&self, plan: &PrefillPlan) -> ExplainedPrefill {
        let choice = match plan.kind() {
            PrefillKind::Recompute => "recompute",
            PrefillKind::Fetch => "fetch",
            PrefillKind::Remote => "remote",
        };
        let option = |option: &PrefillOption| ExplainedOption {
            peer: option.peer.map(|peer| self.node(peer)),
            prefill: option.prefill,
            queue_ms: ms(option.queue_us),
            raise_ms: ms(option.raise_us),
            prefill_ms: ms(option.prefill_us),
            kv_ms: ms(option.kv_us),
            harm_ms: ms(option.harm_us),
            cost_ms: ms(option.cost_us()),
        };
        let sources = plan.sources.iter();
        ExplainedPrefill {
            mode: plan.mode.as_str().to_owned(),
            prompt_tokens: plan.prompt_tokens,
            cached_tokens: plan.cached_tokens,
            below_tokens: plan.below_tokens,
            choice: choice.to_owned(),
            sources: sources
                .map(|s| ExplainedSource { node: self.node(s.peer), prefill: s.prefill })
                .collect(),
            options: plan.options.iter().map(option).collect(),
            passed_over: plan.passed_over as u64,
        }
    }
}

fn against(rank: &Rank) -> Vec<String> {
    let all = [
        (rank.other_weights, "other_weights"),
        (rank.suspected, "suspected"),
        (rank.prefill_only, "prefill_only"),
        (rank.overloaded, "overloaded"),
    ];
    all.into_iter().filter(|(is, _)| *is).map(|(_, what)| what.to_owned()).collect()
}

fn unavailable(why: Unavailable) -> String {
    let text = match why {
        Unavailable::NotReady => "loads the model, or drains",
        Unavailable::PathDown => "its path is broken",
        Unavailable::Failing { .. } => "failed several times of late",
        Unavailable::Busy { .. } => "said that it had no room",
        Unavailable::Tried => "was asked for this very request already, and gave no whole answer",
        Unavailable::OtherWeights => "has other weights than those on which the answer began",
    };
    text.to_owned()
}

fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}
