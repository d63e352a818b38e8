//! Calls of tools in the text of a model.
//!
//! Each family writes calls in its own form ([`ToolFormat`]); [`ToolParser`] reads them from the
//! stream as the tokens come.

mod header;
mod parser;

pub use parser::{ToolEvent, ToolParser};

use protocol::TokenId;

use super::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// How a model writes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// Qwen 2.5/3, Hermes: `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`.
    Hermes,
    /// Llama 3.x: `{"name": ..., "parameters": {...}}`, sometimes behind `<|python_tag|>`, more
    /// calls behind `;`. The whole answer is calls, or none of it.
    Llama3,
    /// Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`.
    MistralArray,
    /// Mistral since 2025: `[TOOL_CALLS]name[ARGS]{...}`, repeated.
    MistralArgs,
}

impl ToolFormat {
    /// The form that a model was trained on, by the markers in its template. `None`: the template
    /// knows no tools, or writes calls in a form that is not read here.
    pub fn detect(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<Self> {
        let source = template.source();
        let has = |text: &str| source.contains(text);
        if !has("tools") && !has("tool_calls") {
            return None;
        }
        if has("[TOOL_CALLS]") {
            let args = has("[ARGS]") || tokenizer.special_id("[ARGS]").is_some();
            return Some(if args { Self::MistralArgs } else { Self::MistralArray });
        }
        if has("<function=") || has("<arg_key>") {
            return None;
        }
        if has("<tool_call>") {
            return Some(Self::Hermes);
        }
        let llama = has("<|start_header_id|>") && has("parameters");
        (llama || has("<|python_tag|>")).then_some(Self::Llama3)
    }

    /// The special tokens that belong to the text of an answer with calls: without them the
    /// parser would not see where a call starts.
    pub fn visible_specials(self, tokenizer: &Tokenizer) -> Vec<TokenId> {
        let markers: &[&str] = match self {
            Self::Hermes => &["<tool_call>", "</tool_call>"],
            Self::Llama3 => &["<|python_tag|>"],
            Self::MistralArray => &["[TOOL_CALLS]"],
            Self::MistralArgs => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
        };
        markers.iter().filter_map(|marker| tokenizer.special_id(marker)).collect()
    }
}

#[cfg(test)]
mod tests;
