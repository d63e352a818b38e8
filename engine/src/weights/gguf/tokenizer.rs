//! The tokenizer's and the template's sources, from GGUF metadata.

use super::config::TOKENS;
use super::{Array, Gguf, Value};
use crate::model::VOCAB_MAX;
use crate::weights::ModelError;
use crate::weights::source::Templates;

/// What `tokenizer.ggml.*` says; the names are the file's.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTokenizer {
    /// `gpt2` (byte-level BPE), `llama` (SentencePiece with scores) or another.
    pub model: String,
    /// Which pre-tokenizer splits the text, as llama.cpp names it.
    pub pre: Option<String>,
    /// By id.
    pub tokens: Vec<String>,
    /// As many as tokens, or none.
    pub scores: Vec<f32>,
    /// As many as tokens, or none: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    /// 6 byte.
    pub token_types: Vec<i32>,
    /// Two pieces with a space between, best first.
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eot: Option<u32>,
    pub eom: Option<u32>,
    pub unk: Option<u32>,
    pub sep: Option<u32>,
    pub pad: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    pub remove_extra_whitespaces: Option<bool>,
}

/// Reads and checks the tokenizer's keys.
pub(super) fn read(gguf: &Gguf<'_>) -> Result<GgufTokenizer, ModelError> {
    let model = gguf.required("tokenizer.ggml.model", "the name of a tokenizer", Value::text)?;
    let pre = gguf.optional("tokenizer.ggml.pre", "a name", Value::text)?;
    let array = gguf.required(TOKENS, "an array of strings", Value::array)?;
    if array.len() == 0 || array.len() > VOCAB_MAX {
        let expected = format!("1 to {VOCAB_MAX} tokens");
        return Err(gguf.wrong(TOKENS, array.len().to_string(), &expected));
    }
    let tokens = strings(gguf, TOKENS, array)?;
    let count = tokens.len();
    let scores = numbers(gguf, "tokenizer.ggml.scores", count, |value| {
        value.number().map(|score| score as f32)
    })?;
    let token_types = numbers(gguf, TOKEN_TYPES, count, |value| {
        value.number().filter(|kind| kind.fract() == 0.0).map(|kind| kind as i32)
    })?;
    let merges = match gguf.optional(MERGES, "an array of strings", Value::array)? {
        Some(merges) if merges.len() > MERGES_MAX => {
            let expected = format!("at most {MERGES_MAX} merges");
            return Err(gguf.wrong(MERGES, merges.len().to_string(), &expected));
        }
        Some(merges) => strings(gguf, MERGES, merges)?,
        None => Vec::new(),
    };
    let id = |name: &str| token_id(gguf, &format!("tokenizer.ggml.{name}_token_id"), count);
    let flag =
        |name: &str| gguf.optional(&format!("tokenizer.ggml.{name}"), "true or false", Value::bool);
    Ok(GgufTokenizer {
        model: model.to_owned(),
        pre: pre.map(str::to_owned),
        scores,
        token_types,
        merges,
        bos: id("bos")?,
        eos: id("eos")?,
        eot: id("eot")?,
        eom: id("eom")?,
        unk: id("unknown")?,
        sep: id("seperator")?,
        pad: id("padding")?,
        add_bos: flag("add_bos_token")?,
        add_eos: flag("add_eos_token")?,
        add_space_prefix: flag("add_space_prefix")?,
        remove_extra_whitespaces: flag("remove_extra_whitespaces")?,
        tokens,
    })
}

/// The tokens that end an answer: those that the file names, and the control tokens that chat
/// models are known to end a turn with, which many files do not name.
pub(super) fn eos_ids(tokenizer: &GgufTokenizer) -> Vec<u32> {
    let mut ids: Vec<u32> =
        [tokenizer.eos, tokenizer.eot, tokenizer.eom].into_iter().flatten().collect();
    for (id, (token, kind)) in tokenizer.tokens.iter().zip(&tokenizer.token_types).enumerate() {
        if *kind == CONTROL && TURN_ENDS.contains(&token.as_str()) {
            ids.push(id as u32);
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    ids.retain(|id| seen.insert(*id));
    ids
}

/// The chat template, and those that have names.
pub(super) fn chat_templates(gguf: &Gguf<'_>) -> Result<Templates, ModelError> {
    let default = gguf.optional(TEMPLATE, "a text", Value::text)?.map(str::to_owned);
    let mut named = Vec::new();
    for (key, value) in &gguf.metadata {
        let name = key.strip_prefix(TEMPLATE).and_then(|rest| rest.strip_prefix('.'));
        if let Some(name) = name {
            let Some(text) = value.text() else {
                return Err(gguf.wrong(key, value.to_string(), "a text"));
            };
            named.push((name.to_owned(), text.to_owned()));
        }
    }
    Ok(Templates { default, named })
}

fn strings(gguf: &Gguf<'_>, key: &str, array: Array<'_>) -> Result<Vec<String>, ModelError> {
    let Some(items) = array.strings() else {
        return Err(gguf.wrong(key, "an array of numbers".to_owned(), "an array of strings"));
    };
    let mut strings = Vec::with_capacity(array.len());
    for (index, bytes) in items.enumerate() {
        let Ok(text) = std::str::from_utf8(bytes) else {
            let value = format!("not UTF-8 at {index}");
            return Err(gguf.wrong(key, value, "UTF-8 strings"));
        };
        strings.push(text.to_owned());
    }
    Ok(strings)
}

/// As many numbers as there are tokens; none if the key is missing.
fn numbers<T>(
    gguf: &Gguf<'_>,
    key: &str,
    count: usize,
    read: impl Fn(&Value<'_>) -> Option<T>,
) -> Result<Vec<T>, ModelError> {
    let expected = format!("an array of {count} numbers, one for each token");
    let Some(array) = gguf.optional(key, &expected, Value::array)? else {
        return Ok(Vec::new());
    };
    let wrong = || gguf.wrong(key, format!("an array of {}", array.len()), &expected);
    if array.len() != count {
        return Err(wrong());
    }
    let items = array.numbers().ok_or_else(wrong)?;
    items.map(|item| read(&item)).collect::<Option<Vec<T>>>().ok_or_else(wrong)
}

fn token_id(gguf: &Gguf<'_>, key: &str, count: usize) -> Result<Option<u32>, ModelError> {
    let expected = format!("a token, so a whole number below {count}");
    // Converters write -1, also as its unsigned 32 bits, for "none".
    let none =
        |value: &Value<'_>| matches!(value, Value::Signed(-1) | Value::Unsigned(0xffff_ffff));
    let id = gguf.optional(key, &expected, |value| match none(value) {
        true => Some(None),
        false => value.size().filter(|id| *id < count).map(|id| Some(id as u32)),
    })?;
    Ok(id.flatten())
}

const TEMPLATE: &str = "tokenizer.chat_template";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
/// Merges of a byte-pair vocabulary.
const MERGES_MAX: usize = 1 << 23;
/// A token type.
const CONTROL: i32 = 3;
const TURN_ENDS: [&str; 7] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
];
