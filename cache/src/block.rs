//! Blocks by number.

/// Index of a block in the executor's KV storage, `0..capacity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// Tokens in a block unless configured (8, 16, 32 or 64).
pub const BLOCK_TOKENS_DEFAULT: usize = 16;
