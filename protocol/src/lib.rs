//! What every part of Grapevine says to the others: ids, virtual time, the [`Machine`] trait, frames,
//! [`identity`] and join and, behind the feature `api`, the types of the OpenAI-compatible API with
//! the one `ErrorCode`. And what nodes agree on without asking anyone: [`membership`].
//!
//! Refuses: IO, clocks, threads, ambient randomness and policy.

pub mod backup;
pub mod carry;
pub mod directory;
pub mod forward;
pub mod frame;
mod id;
pub mod identity;
pub mod journal;
mod machine;
pub mod membership;
pub mod node_record;
pub mod random;
pub mod records;
mod time;
pub mod transfer;
pub mod wire;

#[cfg(feature = "api")]
pub mod api;

pub use id::{BadId, MeshId, NodeId, RequestId, SequenceId, TenantId, TokenId};
pub use machine::Machine;
pub use time::{Duration, Instant};
