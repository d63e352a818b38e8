//! Names and counts of KV blocks; never their bytes.

mod block;

pub use block::{BLOCK_TOKENS_DEFAULT, BlockId};
