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
