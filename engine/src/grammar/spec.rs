use blake3::Hasher;
use serde_json::Value;

use crate::chat::ToolFormat;

/// What a generated text must be.
#[derive(Clone, Debug, PartialEq)]
pub enum GrammarSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that the schema accepts. Keywords that cannot be enforced are refused.
    JsonSchema(Value),
    /// A grammar in llguidance's Lark dialect.
    Lark(String),
    /// The whole text matches this regular expression (Rust syntax, no look-around).
    Regex(String),
    /// One or more calls of tools.
    ToolCalls(ToolGrammar),
}

/// Calls that always fit their tools, in the form in which the model writes them.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolGrammar {
    pub format: ToolFormat,
    /// Name and JSON schema of the arguments of each function that may be called. For
    /// `tool_choice: required` all, for a named function that one.
    pub tools: Vec<(String, Value)>,
    /// Whether there may be more than one call.
    pub parallel: bool,
}

impl GrammarSpec {
    /// Equal for equal specs only. The order of a schema's fields counts, as it does in the text.
    pub(super) fn digest(&self) -> [u8; 32] {
        let mut hasher = Hasher::new();
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        match self {
            Self::JsonObject => add("object"),
            Self::JsonSchema(schema) => ["schema", &schema.to_string()].into_iter().for_each(add),
            Self::Lark(text) => ["lark", text].into_iter().for_each(add),
            Self::Regex(text) => ["regex", text].into_iter().for_each(add),
            Self::ToolCalls(calls) => {
                add(&format!("calls {:?} {}", calls.format, calls.parallel));
                for (name, schema) in &calls.tools {
                    add(name);
                    add(&schema.to_string());
                }
            }
        }
        *hasher.finalize().as_bytes()
    }
}
