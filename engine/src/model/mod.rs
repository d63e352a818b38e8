//! model

mod config;

pub use config::*;
