//! Models made to compute: files to weights, text to tokens, a step plan to logits, logits to tokens.
//!
//! Everything here is synchronous. Refuses: tokio, sockets and policy.

pub mod chat;
pub mod device;
pub mod executor;
pub mod grammar;
pub mod model;
pub mod replica;
pub mod sampler;
pub mod tiers;
pub mod tokenizer;
pub mod weights;
