//! A whole node over loopback, as its clients see it.

mod byte_tokenizer;
mod common;
mod handoff;
mod http;
mod real;
mod taken_over;
mod tiers;
mod tiny_model;
