//! Names and counts of KV blocks; never their bytes.
//!
//! Owns: what a block is called ([`HashChain`]), which block holds what and who may write it
//! ([`BlockPool`]), what lies below the pool ([`tiers`]), which node has what ([`directory`]), and how
//! blocks come from and go to other nodes ([`transfer`]). The rules that keep one sequence from reading
//! another's keys live here: only full blocks have names, a block with a name is never written, names
//! are keyed with the tenant's salt.
//! Refuses: IO, tensors, policy.

mod block;
pub mod directory;
mod hash;
mod pool;
pub mod tiers;
pub mod transfer;

pub use block::{BLOCK_TOKENS_DEFAULT, BlockId};
pub use hash::{BlockHash, HashChain, IdentityParts, Namer, NumericalIdentity, TenantSalt};
pub use pool::{Allocated, BlockPool, Committed, Lookup, NameChange, PoolStats};
