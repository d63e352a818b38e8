//! Structured output: which tokens may come next so that the whole text fits a grammar.
//!
//! Owns: what a text can be asked to be ([`GrammarSpec`]), its compilation by llguidance under
//! bounds, and the state of one text ([`Matcher`]). A state is a function of the grammar and of the
//! tokens so far, so it moves between nodes as those ([`Grammar::matcher_at`]).
//!
//! Refuses: specs above the bounds below, schema keywords that llguidance cannot promise (never
//! ignored), policy about which request gets which grammar.
//!
//! A mask costs no more than about 30 ms on one core (llguidance's fuel), usually under one.

mod cache;
mod compile;
mod env;
mod spec;

use llguidance::toktrie::SimpleVob;
use protocol::TokenId;
use thiserror::Error;

pub use cache::{GRAMMARS_KEPT_MAX, GrammarCache};
pub use env::TokenizerEnv;
pub use spec::{GrammarSpec, ToolGrammar};

/// A compiled grammar for one model. Cheap to clone.
#[derive(Clone)]
pub struct Grammar {
    start: llguidance::Matcher,
}

/// A grammar at some state of a text. A clone goes its own way from here.
#[derive(Clone)]
pub struct Matcher {
    inner: llguidance::Matcher,
    mask: Option<SimpleVob>,
}

/// Why a grammar was not compiled or a text cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GrammarError {
    /// The caller's grammar is at fault; the text names the keyword, the path or the line.
    #[error("grammar refused: {0}")]
    Refused(String),
    /// The caller's grammar is larger than what is compiled here.
    #[error("grammar refused: {what} is {size}, the limit is {limit}")]
    TooLarge { what: &'static str, size: usize, limit: usize },
    /// The token is not allowed here. The matcher is of no use any more.
    #[error("token {token} does not fit the grammar here")]
    Rejected { token: TokenId },
    /// The grammar's own limits were met, or there is no way to go on.
    #[error("grammar: {0}")]
    Broken(String),
}

impl Grammar {
    /// Compiles `spec` for the vocabulary of `env`. Takes milliseconds, for the largest grammars
    /// allowed about a second: not on a thread that others wait for.
    ///
    /// # Errors
    /// [`GrammarError::Refused`] and [`GrammarError::TooLarge`], both the caller's fault.
    pub fn compile(env: &TokenizerEnv, spec: &GrammarSpec) -> Result<Self, GrammarError> {
        Ok(Self { start: compile::compile(env, spec)? })
    }

    /// The same, sharing nothing: clones of one grammar also share what the lexer learns.
    fn apart(&self) -> Self {
        Self { start: self.start.deep_clone() }
    }

    /// A matcher before the first token.
    pub fn matcher(&self) -> Matcher {
        Matcher { inner: self.start.clone(), mask: None }
    }

    /// A matcher after `tokens`: how a stream goes on elsewhere.
    ///
    /// # Errors
    /// [`GrammarError::Rejected`] when they do not fit.
    pub fn matcher_at(&self, tokens: &[TokenId]) -> Result<Matcher, GrammarError> {
        let mut matcher = self.matcher();
        for &token in tokens {
            matcher.accept(token)?;
        }
        Ok(matcher)
    }
}

impl Matcher {
    /// One bit for each token of the vocabulary, lowest bit first: those that may come next.
    /// End-of-generation tokens are among them exactly when the text is complete.
    ///
    /// # Errors
    /// [`GrammarError::Broken`] when nothing may come next or the computation met its limit.
    pub fn mask(&mut self) -> Result<&[u32], GrammarError> {
        let mask = match self.mask.take() {
            Some(mask) => mask,
            None => self.inner.compute_mask_or_eos().map_err(broken)?,
        };
        if mask.is_zero() {
            return Err(GrammarError::Broken(
                "no token of the vocabulary can come next".to_owned(),
            ));
        }
        Ok(self.mask.insert(mask).as_slice())
    }

    /// Takes a token into the text.
    ///
    /// # Errors
    /// [`GrammarError::Rejected`] when the mask does not have it.
    pub fn accept(&mut self, token: TokenId) -> Result<(), GrammarError> {
        self.mask = None;
        match self.inner.try_consume_tokens(&[token]) {
            Ok(1) => Ok(()),
            Ok(_) => Err(GrammarError::Rejected { token }),
            Err(error) => Err(broken(error)),
        }
    }

    /// True when the text is complete and nothing more can be added to it.
    pub fn is_finished(&self) -> bool {
        self.inner.is_stopped() && !self.inner.is_error()
    }

    /// True when the text may end here.
    pub fn is_complete(&mut self) -> bool {
        self.is_finished() || self.inner.is_accepting().unwrap_or(false)
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher").field("finished", &self.is_finished()).finish_non_exhaustive()
    }
}

fn broken(error: impl std::fmt::Display) -> GrammarError {
    GrammarError::Broken(first_line(&error.to_string()))
}

/// llguidance appends backtraces and dumps of its state.
fn first_line(text: &str) -> String {
    let line = text.lines().find(|l| !l.trim().is_empty()).unwrap_or_default();
    line.chars().take(ERROR_CHARS_MAX).collect()
}

/// Longest schema, grammar or regular expression, in bytes of its text.
pub const SPEC_BYTES_MAX: usize = 64 << 10;
/// Deepest nesting of a schema. A recursive `$ref` counts once; the text may nest as deep as it
/// likes.
pub const SCHEMA_DEPTH_MAX: usize = 48;
/// Values of all `enum`s of a schema together.
pub const ENUM_VALUES_MAX: usize = 4_096;
const ERROR_CHARS_MAX: usize = 400;

#[cfg(test)]
mod tests;
