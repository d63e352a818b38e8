//! What one step computes: the batcher writes it, the executor obeys it.

use cache::BlockId;
use protocol::{SequenceId, TokenId};

/// One forward pass over a batch. Each sequence appears at most once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    pub sequences: Vec<SequenceStep>,
}

/// The part of a step that belongs to one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceStep {
    pub sequence: SequenceId,
    /// Tokens to compute now: one for decode, a chunk for prefill. Never empty.
    pub tokens: Vec<TokenId>,
    /// Position of `tokens[0]` in the sequence; everything before it is already in `blocks`.
    pub position: usize,
    /// The block table: entry `i` holds positions `i * block_tokens ..`. Covers the last token.
    pub blocks: Vec<BlockId>,
    pub wanted: LogitsWanted,
}

/// Which rows of a sequence's step leave the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted {
    /// A chunk in the middle of a prefill.
    None,
    /// Logits of the last token: what is sampled from.
    Last,
    /// Logits of every token: perplexity, `debug logits`.
    All,
    /// Final hidden states of every token, after the last norm: embeddings.
    Hidden,
}

impl StepPlan {
    pub fn token_count(&self) -> usize {
        self.sequences.iter().map(|s| s.tokens.len()).sum()
    }
}
