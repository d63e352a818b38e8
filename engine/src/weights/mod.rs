//! Files to tensors.
//!
//! Owns what GGUF and Hugging Face files mean: the description of the decoder, the place of each
//! tensor, and the tokenizer's and template's sources. Refuses every file it cannot prove to be
//! whole and usable, with a sentence that names file, tensor or key, and reason.

mod error;
mod gguf;
mod hf;
mod role;
mod source;
mod tensor;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use error::ModelError;
pub use gguf::GgufTokenizer;
pub use hf::HfTokenizer;
pub use kernels::format::Format;
pub use role::TensorRole;
pub use source::{ModelSource, TokenizerSource};
pub use tensor::Tensor;
