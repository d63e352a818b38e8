//! Decoders: their description and their weights made ready to compute.
//!
//! Owns what a model is to the executor: one description with options for all families, and its
//! matrices packed for a device. Refuses to know files (`weights` does) and steps (`executor` does).

mod config;
mod decoder;
mod identity;
mod layer;
mod source;

pub use config::*;
pub use decoder::{Decoder, LoadError, LoadOptions, LoadProgress, Quant};
pub use identity::{NUMERICS_VERSION, NumericalIdentity};
pub use layer::Projection;
pub(crate) use layer::{Attention, FeedForward, Gated, Layer, Mixture};
pub use source::TensorSource;
