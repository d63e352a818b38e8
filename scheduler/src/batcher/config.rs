//! What an operator may set, and what a wrong value does.

use cache::{BLOCK_TOKENS_DEFAULT, NumericalIdentity};
use protocol::Duration;
use thiserror::Error;

/// Limits of one replica's batcher. [`BatcherConfig::new`] fills in the defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatcherConfig {
    /// Unit: tokens of one step, decodes and prefill chunks together. At least `sequences_max`, so
    /// that no decode ever waits for room. Step time grows with it once arithmetic is the limit:
    /// `inter-token latency while others prefill = tokens_per_step_max / prefill tokens per second`.
    /// Too small: prefill is slow, weights are read for few tokens. Too large: streams stutter
    /// whenever a long prompt arrives. Default 512.
    pub tokens_per_step_max: usize,
    /// Unit: sequences with KV blocks at one time. `blocks / blocks of a usual sequence` is a good
    /// value. Too small: memory and arithmetic lie idle, others queue. Too large: blocks run out in
    /// the middle and sequences are preempted, their work is done twice. Default 64.
    pub sequences_max: usize,
    /// Unit: sequences that wait for a place; more are refused with a time to retry after. Sequences
    /// preempted keep their right to wait and do not count; one tenant takes 8/9 of it at most.
    /// Formula: `longest bearable wait x sequences finished per second`. Too small: bursts are refused
    /// though they could be served. Too large: clients wait for answers that come too late to matter.
    /// Default 1,024.
    pub waiting_max: usize,
    /// Unit: tokens of one KV block, the same as the executor's: 8, 16, 32 or 64. Too small: long
    /// block tables. Too large: up to `block_tokens - 1` places wasted per sequence, and prefixes that
    /// differ late share less. Default 16.
    pub block_tokens: usize,
    /// Unit: blocks in the executor's storage: `KV memory / bytes of a block`. Too small: preemption,
    /// few prefixes kept. Too large: memory that the machine does not have.
    pub blocks: u32,
    /// Unit: tokens of prompt and answer of one sequence: the model's context. Too small: prompts are
    /// refused that the model could read. Too large: positions that the model was never trained on.
    pub context_max: usize,
    /// Unit: prompt tokens of one sequence in one step. Below `tokens_per_step_max` it keeps room in
    /// each step for other prompts of the same tenant. Too small: long prompts take many steps. Too
    /// large (no harm above `tokens_per_step_max`): a short prompt waits for a long one that came
    /// first. Default 512.
    pub prefill_chunk_max: usize,
    /// Unit: time of a step that decodes take part in, thus the longest pause between two tokens of a
    /// stream while others' prompts are computed. Prompt tokens per step are then `(target - time of
    /// decodes alone) / time of a prompt token`, both measured, at least 16 and within
    /// `tokens_per_step_max`. Too small: prompts take long. Too large, or `None`: a pause of
    /// `tokens_per_step_max / prompt tokens per second`; on a CPU that can be seconds, but there are
    /// fewer of them. Default `None`.
    pub step_time_target: Option<Duration>,
    /// Unit: uncached prompt tokens that a tenant may prefill before it is the next one's turn (the
    /// quantum of deficit round robin). Too small: chunks are cut into crumbs when many tenants wait.
    /// Too large: the order becomes first come, first served within a step. Default 128.
    pub tenant_quantum_tokens: usize,
    /// Unit: blocks that must stay free after a prompt is admitted, for decodes to grow into. Too
    /// small: sequences admitted a moment ago are preempted. Too large: memory that is never used.
    /// Default 1 % of `blocks`.
    pub blocks_watermark: u32,
    /// What else decides the bytes of a block: part of every block's name.
    pub identity: NumericalIdentity,
}

/// Why a configuration cannot work. Nothing has been built.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    #[error("{name} is {value}, must be at least {min}")]
    TooSmall { name: &'static str, value: usize, min: usize },
    #[error("{name} is {value}, must be at most {max}")]
    TooLarge { name: &'static str, value: usize, max: usize },
    #[error("block_tokens is {0}, must be 8, 16, 32 or 64")]
    BlockTokens(usize),
}

impl BatcherConfig {
    /// The defaults for a model of `context_max` tokens and storage for `blocks` blocks.
    pub fn new(blocks: u32, context_max: usize, identity: NumericalIdentity) -> Self {
        BatcherConfig {
            tokens_per_step_max: 512,
            sequences_max: 64,
            waiting_max: 1024,
            block_tokens: BLOCK_TOKENS_DEFAULT,
            blocks,
            context_max,
            prefill_chunk_max: 512,
            step_time_target: None,
            tenant_quantum_tokens: 128,
            blocks_watermark: blocks / 100,
            identity,
        }
    }

    /// Tokens of prompt and answer that one sequence can have: the context, or what all blocks hold
    /// if that is less. The last token of an answer is never computed and needs no place.
    pub fn tokens_max(&self) -> usize {
        self.context_max.min(self.blocks as usize * self.block_tokens + 1)
    }

    /// Tokens of a prompt that needs no answer.
    pub fn prompt_max(&self) -> usize {
        self.context_max.min(self.blocks as usize * self.block_tokens)
    }

    /// Refuses what cannot work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !BLOCK_TOKENS_ALLOWED.contains(&self.block_tokens) {
            return Err(ConfigError::BlockTokens(self.block_tokens));
        }
        for (name, value, min, max) in [
            ("sequences_max", self.sequences_max, 1, SEQUENCES_LIMIT),
            ("tokens_per_step_max", self.tokens_per_step_max, self.sequences_max, TOKENS_LIMIT),
            ("waiting_max", self.waiting_max, 1, WAITING_LIMIT),
            ("blocks", self.blocks as usize, 1, TOKENS_LIMIT),
            ("context_max", self.context_max, 2, TOKENS_LIMIT),
            ("prefill_chunk_max", self.prefill_chunk_max, 1, TOKENS_LIMIT),
            ("tenant_quantum_tokens", self.tenant_quantum_tokens, 1, TOKENS_LIMIT),
        ] {
            if value < min {
                return Err(ConfigError::TooSmall { name, value, min });
            }
            if value > max {
                return Err(ConfigError::TooLarge { name, value, max });
            }
        }
        Ok(())
    }
}

const BLOCK_TOKENS_ALLOWED: [usize; 4] = [8, 16, 32, 64];
const SEQUENCES_LIMIT: usize = 1 << 16;
const WAITING_LIMIT: usize = 1 << 20;
const TOKENS_LIMIT: usize = 1 << 28;
