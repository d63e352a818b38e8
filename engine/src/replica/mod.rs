//! One model being served: the batcher that decides, the executor that computes and the state of
//! each stream (sampler, stop strings, grammar), coupled without threads or clocks of their own.
//!
//! The shell calls [`Replica::submit`] and its kin when requests arrive and [`Replica::step`] as long
//! as there is work. Refuses sockets and queues to clients: events leave by value.

mod request;
mod stop;

pub use request::{
    CHOICES_MAX, EmbedRequest, Event, FinishReason, GenerateRequest, PRIORITY_DEFAULT, Pooling,
    RequestError, STOP_BYTES_MAX, STOP_STRINGS_MAX, ScoreRequest,
};
