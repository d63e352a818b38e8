//! The tiers below a pool: on a disk that breaks, and below a real model.

mod faulty;
mod model;
mod peers;
mod storms;
#[path = "../../../node/tests/api/tiny_model.rs"]
mod tiny_model;
