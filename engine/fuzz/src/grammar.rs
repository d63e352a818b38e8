//! Grammars: what a caller may ask a text to be.

use std::sync::OnceLock;

use engine::chat::ToolFormat;
use engine::grammar::{Grammar, GrammarError, GrammarSpec, TokenizerEnv, ToolGrammar};
use serde_json::Value;

use super::parts;
use super::text::tokenizers;

/// A Lark grammar or a regular expression, and behind it which tokens are taken. The first byte
/// says which of both.
pub fn grammar(bytes: &[u8]) {
    let [text, walk] = parts(bytes);
    let Some((&kind, text)) = text.split_first() else { return };
    let text = String::from_utf8_lossy(text).into_owned();
    let spec = match kind % 2 {
        0 => GrammarSpec::Regex(text),
        _ => GrammarSpec::Lark(text),
    };
    exercise(&spec, walk);
}

/// A JSON schema, and behind it which tokens are taken. The first byte says whether of the whole
/// text or of a call's arguments.
pub fn schema(bytes: &[u8]) {
    let [text, walk] = parts(bytes);
    let Some((&kind, text)) = text.split_first() else { return };
    let Ok(schema) = serde_json::from_slice::<Value>(text) else { return };
    let call = |format| {
        GrammarSpec::ToolCalls(ToolGrammar {
            format,
            tools: vec![("f".to_owned(), schema.clone()), ("now".to_owned(), Value::Null)],
            parallel: true,
        })
    };
    let spec = match kind % 8 {
        0 => call(ToolFormat::Hermes),
        1 => call(ToolFormat::Llama3),
        2 => call(ToolFormat::MistralArray),
        3 => call(ToolFormat::MistralArgs),
        _ => GrammarSpec::JsonSchema(schema),
    };
    exercise(&spec, walk);
}

/// Compiles, then takes a few tokens that the masks allow.
fn exercise(spec: &GrammarSpec, walk: &[u8]) {
    let grammar = match Grammar::compile(env(), spec) {
        Ok(grammar) => grammar,
        Err(GrammarError::Refused(_) | GrammarError::TooLarge { .. }) => return,
        Err(error) => panic!("not the caller's fault: {error}"),
    };
    let mut matcher = grammar.matcher();
    let mut taken = Vec::new();
    for &choice in walk.iter().take(TOKENS_MAX) {
        if matcher.is_finished() {
            break;
        }
        let Ok(mask) = matcher.mask() else { return };
        let bits = |word: usize| (0..32u32).map(move |bit| word as u32 * 32 + bit);
        let allowed: Vec<u32> = (0..mask.len())
            .flat_map(bits)
            .filter(|&token| mask[token as usize / 32] >> (token % 32) & 1 == 1)
            .collect();
        let token = allowed[usize::from(choice) % allowed.len()];
        if env().tokenizer().is_end_of_generation(token) {
            assert!(matcher.is_complete());
            break;
        }
        // the grammar's own limits may end it here
        if matcher.accept(token).is_err() {
            return;
        }
        taken.push(token);
    }
    let mut there = grammar.matcher_at(&taken).expect("a state is its tokens");
    assert_eq!(there.is_complete(), matcher.is_complete());
}

fn env() -> &'static TokenizerEnv {
    static ENV: OnceLock<TokenizerEnv> = OnceLock::new();
    ENV.get_or_init(|| TokenizerEnv::new(&tokenizers()[0].0).expect("a vocabulary with an end"))
}

const TOKENS_MAX: usize = 24;
