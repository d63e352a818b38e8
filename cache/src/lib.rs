//! Names and counts of KV blocks; never their bytes.

mod block;
mod hash;
mod pool;

pub use block::{BLOCK_TOKENS_DEFAULT, BlockId};
pub use hash::{BlockHash, HashChain, IdentityParts, NumericalIdentity, TenantSalt};
pub use pool::{Allocated, BlockPool, Committed, Lookup, PoolStats};
