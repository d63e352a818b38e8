//! What goes into the batcher and what comes out.

use cache::TenantSalt;
use protocol::{Duration, Instant, SequenceId, TenantId, TokenId};

use crate::StepPlan;

/// A sequence to serve.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Never used before in this process.
    pub sequence: SequenceId,
    /// Whose turn is charged.
    pub tenant: TenantId,
    /// Key of the tenant's block names: sequences share blocks only under the same salt.
    pub salt: TenantSalt,
    /// Higher goes first, and may preempt lower; 0 is usual.
    pub priority: i8,
    /// The prompt, at least one token.
    pub tokens: Vec<TokenId>,
    /// Tokens to generate at most; `usize::MAX` for what the context leaves. Only for
    /// [`SequenceKind::Generate`].
    pub max_new_tokens: usize,
    /// Dropped between steps once this is reached.
    pub deadline: Option<Instant>,
    /// Whether to take the prompt's beginning from the cache, wait for others that compute it, and
    /// leave the own blocks to the cache. Without: every token is computed, nothing is kept.
    /// `Embed` and `Score` need every row and never share, whatever this says.
    pub reuse_prefix: bool,
    pub kind: SequenceKind,
}

/// What is wanted of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceKind {
    /// Tokens: steps ask for [`LogitsWanted::Last`](crate::LogitsWanted::Last) where one is sampled.
    Generate,
    /// The hidden states of the prompt, chunk by chunk, from position 0.
    Embed,
    /// The logits of the prompt, chunk by chunk, from position 0.
    Score,
    /// Nothing but its blocks, which are in the pool under their names when it is
    /// [`Complete`](FinishReason::Complete): a prefill for another node.
    Prefill,
}

/// What happened to a sequence in a step that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepResult {
    pub sequence: SequenceId,
    /// The token sampled, for a sequence whose step wanted [`Last`](crate::LogitsWanted::Last).
    pub token: Option<TokenId>,
    /// The shell wants no more of it: end of text, stop string, grammar's end.
    pub finished: bool,
}

#[derive(Clone, Debug)]
pub enum BatcherInput {
    Submit(Submission),
    /// The client has gone. Unknown or ended sequences are ignored.
    Cancel(SequenceId),
    /// Write the next step. Nothing happens while a step is in flight.
    Plan,
    /// The step in flight has been computed. One result for each sequence that wanted `Last`; more are
    /// ignored, also those of sequences cancelled meanwhile.
    StepDone {
        results: Vec<StepResult>,
    },
    /// The step in flight could not be computed: its sequences are dropped.
    StepFailed,
    /// The time of `next_deadline` has come.
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BatcherOutput {
    /// Compute this, then say `StepDone`.
    Step(StepPlan),
    /// The sequence got its blocks; `cached_tokens` of its prompt need no computing.
    Started { sequence: SequenceId, cached_tokens: usize },
    /// Its blocks went to another; it waits again and will be recomputed. Rows of an `Embed` or
    /// `Score` received so far come again from position 0; tokens generated stay.
    Preempted { sequence: SequenceId },
    /// Back after a preemption.
    Resumed { sequence: SequenceId, cached_tokens: usize },
    /// The last word about a sequence that was served.
    Finished { sequence: SequenceId, reason: FinishReason },
    /// The last word about a sequence that was not.
    Dropped { sequence: SequenceId, reason: DropReason },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The shell said so in a [`StepResult`].
    Stop,
    /// `max_new_tokens` or the end of the context.
    Length,
    /// Every row of an `Embed` or `Score`, every block of a `Prefill` has been computed.
    Complete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    Cancelled,
    DeadlineExceeded,
    /// `waiting_max` sequences wait already, or too many of this tenant.
    QueueFull {
        retry_after: Duration,
    },
    /// The prompt can never fit: at most `limit` tokens.
    TooLong {
        limit: usize,
    },
    EmptyPrompt,
    /// The executor failed, or gave no token where one was due.
    StepFailed,
}

/// The batcher at one moment, for metrics. Counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatcherStats {
    pub running: usize,
    pub waiting: usize,
    /// Prompt tokens not yet computed, of all of them; what the cache has is not known before a
    /// sequence gets its turn.
    pub prompt_tokens_left: u64,
    /// Prompt tokens per second of late; 0 while nothing has been measured.
    pub prompt_rate: u32,
    /// A step that only decodes, of late; zero while nothing has been measured.
    pub decode_step: Duration,
    pub blocks_free: usize,
    /// Unreferenced, still found by prefix: free when needed.
    pub blocks_cached: usize,
    pub blocks_used: usize,
    /// Prompt tokens of sequences started, and how many of them came from the cache.
    pub prompt_tokens: u64,
    pub prefix_hit_tokens: u64,
    pub computed_tokens: u64,
    pub generated_tokens: u64,
    pub preemptions: u64,
    pub evictions: u64,
    pub steps: u64,
}
