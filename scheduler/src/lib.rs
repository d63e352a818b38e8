//! Every decision of Grapevine, as pure code: today the batcher (continuous batching, chunked prefill,
//! priorities, preemption, fairness) and the router (which replica answers).
//!
//! Refuses effects of any kind: what must happen leaves as an output.

mod batcher;
mod plan;
pub mod router;

pub use batcher::{
    Batcher, BatcherConfig, BatcherInput, BatcherOutput, BatcherStats, ConfigError, DropReason,
    FinishReason, SequenceKind, StepResult, Submission,
};
pub use plan::{LogitsWanted, SequenceStep, StepPlan};
