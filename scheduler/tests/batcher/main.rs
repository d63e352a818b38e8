//! The batcher from outside, with a model of an executor.

mod replica;
mod scenarios;
mod simulation;
