//! Why a request went where it went: the answer of `GET /admin/v1/requests/{id}/explain`.
//!
//! Times are milliseconds. What a part of an estimate is, and how regret is reckoned, is in
//! docs/routing.md.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What one node has decided about a request, in the order in which it did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// The request's id, as in its `x-request-id`.
    pub request: String,
    /// Who says this.
    pub node: ExplainedNode,
    pub decisions: Vec<ExplainedDecision>,
}

/// A node, for people and for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedNode {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The node that says this.
    pub this_node: bool,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedDecision {
    /// How long ago it was made.
    pub age_ms: f64,
    #[serde(flatten)]
    pub what: ExplainedChoice,
    pub outcome: ExplainedOutcome,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ExplainedChoice {
    Replica(Box<ExplainedReplica>),
    Prefill(ExplainedPrefill),
}

/// Which replica answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedReplica {
    pub model: String,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    /// `cheapest`, `only`, `explored`, `last_resort` or `nobody`.
    pub why: String,
    /// Absent if nobody could be asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<ExplainedCandidate>,
    /// The best of the others.
    pub others: Vec<ExplainedCandidate>,
    pub others_total: u64,
    pub unavailable: Vec<ExplainedUnavailable>,
}

/// A replica that could have answered, and what that was thought to cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedCandidate {
    pub node: ExplainedNode,
    pub running: u32,
    pub waiting: u32,
    /// Prompt tokens to be computed before.
    pub queue_tokens: u64,
    /// Prompt tokens per second; 0 if not measured.
    pub prefill_rate: u32,
    pub decode_step_ms: f64,
    /// The beginning of the prompt that it has cached.
    pub overlap_tokens: u64,
    /// Of them, those that lie below its pool, in host memory or on disk.
    #[serde(default)]
    pub below_tokens: u64,
    /// Where its keys and values come from: `recompute`, `local`, `fetch` or `remote`.
    pub path: String,
    /// The peer that they come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_peer: Option<ExplainedNode>,
    pub queue_ms: f64,
    /// Bringing up what lies below the pool of whoever has it.
    #[serde(default)]
    pub raise_ms: f64,
    pub kv_ms: f64,
    pub prefill_ms: f64,
    pub hop_ms: f64,
    /// The sum of these five: the estimate of the time to the first token.
    pub ttft_ms: f64,
    pub decode_ms: f64,
    /// The sum of both: lower is better.
    pub score_ms: f64,
    /// Why it ranks behind others whatever it costs: `other_weights`, `suspected`, `prefill_only`,
    /// `overloaded`.
    pub against: Vec<String>,
}

/// A node that has the model and could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedUnavailable {
    pub node: ExplainedNode,
    pub why: String,
}

/// Where the keys and values of a prompt come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedPrefill {
    /// `auto`, `always` or `never`.
    pub mode: String,
    pub prompt_tokens: u64,
    /// Of them in this node's cache.
    pub cached_tokens: u64,
    /// Of these, those that lie below its pool, in host memory or on disk.
    #[serde(default)]
    pub below_tokens: u64,
    /// `recompute`, `fetch` or `remote`.
    pub choice: String,
    /// Who is asked, the best first.
    pub sources: Vec<ExplainedSource>,
    /// What was weighed: computing it here first.
    pub options: Vec<ExplainedOption>,
    /// Peers with nothing to give, or that are not well.
    pub passed_over: u64,
}

/// A peer that is asked for blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedSource {
    pub node: ExplainedNode,
    /// It computes what it has not.
    pub prefill: bool,
}

/// One way to them, and what it was thought to cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedOption {
    /// Absent: this node computes all that its cache has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<ExplainedNode>,
    pub prefill: bool,
    pub queue_ms: f64,
    /// Bringing up what lies below the pools, here and there.
    #[serde(default)]
    pub raise_ms: f64,
    pub prefill_ms: f64,
    pub kv_ms: f64,
    pub harm_ms: f64,
    /// The sum of all; lower is better.
    pub cost_ms: f64,
}

/// What came of it, in milliseconds since the decision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExplainedOutcome {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_began_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<f64>,
    /// `done`, `refused` or `failed`; absent while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<String>,
    /// What the best of the others would have saved, as far as can be estimated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regret_ms: Option<f64>,
}
