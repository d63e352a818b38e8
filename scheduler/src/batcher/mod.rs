//! Continuous batching (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, OSDI 2024).
//!
//! Owns: which sequence computes which tokens in the next step, and which blocks they go to.
//! Refuses: bytes of KV, sampling, clocks.

mod config;
mod message;

pub use config::{BatcherConfig, ConfigError};
pub use message::{
    BatcherInput, BatcherOutput, BatcherStats, DropReason, FinishReason, SequenceKind, StepResult,
    Submission,
};
