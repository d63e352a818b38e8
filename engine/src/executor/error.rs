//! Why a step was refused.

use crate::device::DeviceError;
use cache::BlockId;
use protocol::{SequenceId, TokenId};
use thiserror::Error;

/// A step that the executor did not begin, so that nothing was computed and no block changed; but for
/// [`Device`](StepError::Device), after which nothing is known of any block.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StepError {
    #[error("{sequence} appears twice in one step")]
    SequenceTwice { sequence: SequenceId },
    #[error("{sequence} has no tokens in this step")]
    NoTokens { sequence: SequenceId },
    #[error("{sequence}: token {token} is not in the vocabulary of {vocab} tokens")]
    UnknownToken { sequence: SequenceId, token: TokenId, vocab: usize },
    #[error(
        "{sequence}: {end} tokens do not fit the context of {context_tokens_max} tokens; \
         shorten the prompt or the answer"
    )]
    ContextExceeded { sequence: SequenceId, end: usize, context_tokens_max: usize },
    #[error("{sequence}: a table of {have} blocks does not hold {end} tokens; {need} are needed")]
    TableTooShort { sequence: SequenceId, have: usize, need: usize, end: usize },
    #[error("{sequence}: block {} is beyond the {capacity} blocks of the storage", block.0)]
    UnknownBlock { sequence: SequenceId, block: BlockId, capacity: usize },
    #[error("{sequence}: block {} appears twice in its table", block.0)]
    BlockTwice { sequence: SequenceId, block: BlockId },
    #[error("block {} is written by {writer} while {other} uses it in the same step", block.0)]
    BlockShared { block: BlockId, writer: SequenceId, other: SequenceId },
    #[error(
        "the step asks for {rows} rows of output, {rows_max} fit the output buffer; \
         take them by `step_each` or in smaller steps"
    )]
    OutputTooLarge { rows: usize, rows_max: usize },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Why an executor could not be made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExecutorError {
    #[error("blocks of {block_tokens} tokens are not supported; use 8, 16, 32 or 64")]
    BlockTokens { block_tokens: usize },
    #[error(
        "{blocks} blocks of {block_bytes} bytes are no usable room for keys and values; \
         give at least the bytes of one block and at most 2^32 blocks"
    )]
    KvBlocks { blocks: usize, block_bytes: usize },
    #[error(
        "the system does not have the memory for {blocks} blocks of {block_bytes} bytes of keys and \
         values; give less"
    )]
    KvTooLarge { blocks: usize, block_bytes: usize },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Why a payload was not written. The block is as it was, but for [`Device`](BlockWriteError::Device),
/// after which nothing is known of any block.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BlockWriteError {
    #[error("block {} is beyond the {capacity} blocks of the storage", block.0)]
    UnknownBlock { block: BlockId, capacity: usize },
    #[error("a payload of {bytes} bytes is not a block of {block_bytes} bytes")]
    WrongSize { bytes: usize, block_bytes: usize },
    #[error(transparent)]
    Device(#[from] DeviceError),
}
