//! Every decision of Grapevine, as pure code: today the batcher (continuous batching, chunked prefill,
//! priorities, preemption, fairness), the router (which replica answers) and the journals (which copies of
//! streams are kept).
//!
//! Refuses effects of any kind: what must happen leaves as an output.

mod batcher;
pub mod journals;
mod plan;
pub mod router;

pub use batcher::{
    Batcher, BatcherConfig, BatcherInput, BatcherOutput, BatcherStats, ConfigError, DropReason,
    FinishReason, SequenceKind, StepResult, Submission,
};
pub use plan::{LogitsWanted, SequenceStep, StepPlan};
