//! Hugging Face directories: `config.json`, safetensors, the tokenizer's files.
//!
//! Owns their names and defaults, which are those of `transformers`. Refuses pickled weights,
//! quantized checkpoints, and options it would have to ignore.

mod config;
mod json;
mod names;
mod open;
mod safetensors;

pub(super) use names::name;
pub(super) use open::open;

/// The tokenizer's files.
#[derive(Clone, Debug, PartialEq)]
pub struct HfTokenizer {
    /// `tokenizer.json`, as it is.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`: an object, empty if there is no such file.
    pub tokenizer_config: serde_json::Map<String, serde_json::Value>,
    /// `special_tokens_map.json`: an object, empty if there is no such file.
    pub special_tokens_map: serde_json::Map<String, serde_json::Value>,
    /// `eos_token_id` of `generation_config.json`, else of `config.json`.
    pub eos_ids: Vec<u32>,
    /// `bos_token_id` of the same.
    pub bos_id: Option<u32>,
}
