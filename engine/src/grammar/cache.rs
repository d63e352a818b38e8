use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::{Grammar, GrammarError, GrammarSpec, TokenizerEnv};

/// Compiled grammars of one model, the last [`GRAMMARS_KEPT_MAX`] asked for. What was refused is
/// compiled again each time.
pub struct GrammarCache {
    env: TokenizerEnv,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// By the digest of the spec; the vocabulary is the same for all.
    entries: BTreeMap<[u8; 32], Entry>,
    /// Counts uses, so that the smallest is the longest ago.
    uses: u64,
    compiled: u64,
}

struct Entry {
    grammar: Grammar,
    used: u64,
}

impl GrammarCache {
    pub fn new(env: TokenizerEnv) -> Self {
        Self { env, kept: Mutex::default() }
    }

    /// The grammar of `spec`, from before or compiled now. Shares no state with any other: the
    /// automaton of a grammar grows with the texts that it reads, within bounds of its own.
    /// Requests that ask for the same new grammar at once may each compile it.
    ///
    /// # Errors
    /// As [`Grammar::compile`].
    pub fn compile(&self, spec: &GrammarSpec) -> Result<Grammar, GrammarError> {
        let digest = spec.digest();
        if let Some(grammar) = self.with(|kept| kept.take(&digest)) {
            return Ok(grammar.apart());
        }
        let grammar = Grammar::compile(&self.env, spec)?;
        let copy = grammar.apart();
        self.with(|kept| kept.insert(digest, copy));
        Ok(grammar)
    }

    /// How many grammars were compiled and not found.
    pub fn compiled(&self) -> u64 {
        self.with(|kept| kept.compiled)
    }

    fn with<R>(&self, act: impl FnOnce(&mut Kept) -> R) -> R {
        act(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Kept {
    fn take(&mut self, digest: &[u8; 32]) -> Option<Grammar> {
        self.uses += 1;
        let entry = self.entries.get_mut(digest)?;
        entry.used = self.uses;
        Some(entry.grammar.clone())
    }

    fn insert(&mut self, digest: [u8; 32], grammar: Grammar) {
        self.uses += 1;
        self.compiled += 1;
        self.entries.insert(digest, Entry { grammar, used: self.uses });
        while self.entries.len() > GRAMMARS_KEPT_MAX {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
            let Some(oldest) = oldest.map(|(&digest, _)| digest) else { return };
            self.entries.remove(&oldest);
        }
    }
}

/// Grammars that are kept. Too small: applications with many schemas wait for compilations (some
/// milliseconds each). Too large: memory, of some 100 kB for an ordinary schema and of some MB for
/// the largest.
pub const GRAMMARS_KEPT_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::sample;

    #[test]
    fn the_last_ones_are_kept() {
        let env = TokenizerEnv::new(&sample::tokenizer()).expect("has an end");
        let cache = GrammarCache::new(env);
        let regex = |i: usize| GrammarSpec::Regex(format!("a{{{}}}", i + 1));
        for i in 0..GRAMMARS_KEPT_MAX {
            cache.compile(&regex(i)).expect("compiles");
        }
        let full = GRAMMARS_KEPT_MAX as u64;
        for i in 0..GRAMMARS_KEPT_MAX {
            cache.compile(&regex(i)).expect("compiles");
        }
        assert_eq!(cache.compiled(), full);
        // one more takes the place of the one that was used the longest time ago
        cache.compile(&regex(0)).expect("compiles");
        cache.compile(&regex(GRAMMARS_KEPT_MAX)).expect("compiles");
        cache.compile(&regex(0)).expect("compiles");
        assert_eq!(cache.compiled(), full + 1);
        cache.compile(&regex(1)).expect("compiles");
        assert_eq!(cache.compiled(), full + 2);
        cache.compile(&GrammarSpec::Regex("(".to_owned())).expect_err("refused");
    }

    #[test]
    fn a_kept_grammar_starts_anew() {
        let tokenizer = sample::tokenizer();
        let cache = GrammarCache::new(TokenizerEnv::new(&tokenizer).expect("has an end"));
        let tokens = tokenizer.encode("{\"a\": 1}", false).expect("encodes");
        for _ in 0..3 {
            let grammar = cache.compile(&GrammarSpec::JsonObject).expect("compiles");
            assert!(grammar.matcher_at(&tokens).expect("fits").is_complete());
        }
        assert_eq!(cache.compiled(), 1);
    }
}
