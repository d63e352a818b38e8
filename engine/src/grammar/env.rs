use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId};

use super::GrammarError;
use crate::tokenizer::Tokenizer;

/// A vocabulary as grammars need it: a trie of all tokens. Built once for a model (about half a
/// second for 150,000 tokens). Cheap to clone.
#[derive(Clone)]
pub struct TokenizerEnv {
    factory: Arc<ParserFactory>,
    tokenizer: Tokenizer,
}

impl TokenizerEnv {
    /// # Errors
    /// A vocabulary without an end-of-generation token: a constrained text could never end.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let Some(&end) = tokenizer.end_of_generation().first() else {
            let reason = "the vocabulary has no token that ends a text";
            return Err(GrammarError::Broken(reason.to_owned()));
        };
        let size = tokenizer.vocab_size();
        let words: Vec<Vec<u8>> = (0..size as TokenId).map(|id| word(tokenizer, id)).collect();
        let info = TokRxInfo::new(size as u32, end);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(tokenizer.end_of_generation());
        let env: TokEnv = Arc::new(Env { trie, tokenizer: tokenizer.clone() });
        let mut factory =
            ParserFactory::new_simple(&env).map_err(|e| GrammarError::Broken(e.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        // a grammar's states stay with its streams: about 2 kB each
        factory.limits_mut().max_lexer_states = LEXER_STATES_MAX;
        Ok(Self { factory: Arc::new(factory), tokenizer: tokenizer.clone() })
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub(super) fn factory(&self) -> Arc<ParserFactory> {
        self.factory.clone()
    }
}

impl std::fmt::Debug for TokenizerEnv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenizerEnv").field("tokenizer", &self.tokenizer).finish_non_exhaustive()
    }
}

/// A special token's word starts with the byte that no text has, so no text rule matches it.
fn word(tokenizer: &Tokenizer, id: TokenId) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    let special = tokenizer.is_special(id) || tokenizer.is_end_of_generation(id);
    if bytes.len() > WORD_BYTES_MAX || bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
        return Vec::new();
    }
    if special { [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat() } else { bytes.to_vec() }
}

struct Env {
    trie: TokTrie,
    tokenizer: Tokenizer,
}

impl llguidance::toktrie::TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, s: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(s, |text| {
            let ids = self.tokenizer.encode(text, false).unwrap_or_default();
            let same =
                ids.iter().flat_map(|&id| self.tokenizer.token_bytes(id)).eq(text.as_bytes());
            if same { ids } else { self.trie.greedy_tokenize(text.as_bytes()) }
        })
    }

    /// The model chooses how forced text is cut, within the mask.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// No rule needs a longer token; a trie's depth is bounded by it.
const WORD_BYTES_MAX: usize = 1_024;
const LEXER_STATES_MAX: usize = 50_000;
