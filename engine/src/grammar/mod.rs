//! Structured output.

use protocol::TokenId;
use thiserror::Error;

/// What the generated text must be.
#[derive(Clone, Debug, PartialEq)]
pub enum GrammarSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that the schema accepts.
    JsonSchema(serde_json::Value),
    /// A grammar in llguidance's Lark dialect.
    Lark(String),
    Regex(String),
}

/// A compiled grammar. None can be made yet.
#[derive(Clone, Debug)]
pub enum Grammar {}

/// A grammar at some state.
#[derive(Clone, Debug)]
pub enum Matcher {}

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GrammarError {
    #[error("grammar: {0}")]
    Broken(String),
}

impl Grammar {
    pub fn matcher(&self) -> Matcher {
        match *self {}
    }
}

impl Matcher {
    /// One bit for each token of the vocabulary.
    pub fn mask(&mut self) -> Result<&[u32], GrammarError> {
        match *self {}
    }

    pub fn accept(&mut self, _token: TokenId) -> Result<(), GrammarError> {
        match *self {}
    }

    pub fn is_finished(&self) -> bool {
        match *self {}
    }
}
