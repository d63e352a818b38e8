use thiserror::Error;

/// Why a tokenizer was not built. Nothing is kept of a refused one.
#[derive(Debug, Error)]
pub enum TokenizerError {
    #[error("tokenizer.json: {0}")]
    Json(String),
    #[error("tokenizer.json: {part} of type {kind:?} is not supported")]
    Unsupported { part: &'static str, kind: String },
    #[error("tokenizer.ggml.model: {0:?} is not supported, expected \"gpt2\" or \"llama\"")]
    UnknownModel(String),
    #[error("tokenizer.ggml.pre: {0:?} is not known, so text would be split wrongly")]
    UnknownPretokenizer(String),
    #[error("tokenizer.ggml.{key}: {reason}")]
    Metadata { key: &'static str, reason: String },
    #[error("vocabulary has id {id}, the limit is {limit}")]
    TooManyTokens { id: usize, limit: usize },
}

/// Why a text has no ids.
#[derive(Debug, Error)]
pub enum EncodeError {
    #[error("tokenizer failed on this text: {0}")]
    Failed(String),
}
