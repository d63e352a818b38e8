//! Every decision of Grapevine, as pure code: today admission and the [`Batcher`] (continuous
//! batching, chunked prefill, priorities, preemption).
//!
//! Refuses effects of any kind: what must happen leaves as an output.

mod plan;

pub use plan::{LogitsWanted, SequenceStep, StepPlan};
