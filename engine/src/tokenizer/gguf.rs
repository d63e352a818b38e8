//! Tokenizers from the `tokenizer.ggml.*` metadata of GGUF files.

use std::collections::HashMap;
use std::sync::Arc;

use protocol::TokenId;

use super::bpe::{Bpe, BpeRefused, Halves, bytes_of_token};
use super::encode::{Added, ByteLevel, Pipeline};
use super::error::TokenizerError;
use super::pieces::Pieces;
use super::split::Splitter;
use super::spm::{SPACE, Spm};
use super::{Encoder, Inner, Tokenizer, VOCAB_MAX, markers};
use crate::weights::GgufTokenizer;

impl Tokenizer {
    /// From GGUF metadata.
    ///
    /// # Errors
    /// An unknown model or pre-tokenizer, arrays of different lengths, ids outside the vocabulary,
    /// merges of tokens that do not exist.
    pub fn from_gguf(parts: &GgufTokenizer) -> Result<Self, TokenizerError> {
        check(parts)?;
        match parts.model.as_str() {
            "gpt2" => byte_level(parts),
            "llama" => sentence_piece(parts),
            other => Err(TokenizerError::UnknownModel(other.to_owned())),
        }
    }
}

fn check(parts: &GgufTokenizer) -> Result<(), TokenizerError> {
    let n = parts.tokens.len();
    if n == 0 {
        return Err(metadata("tokens", "is missing or empty"));
    }
    if n > VOCAB_MAX {
        return Err(TokenizerError::TooManyTokens { id: n - 1, limit: VOCAB_MAX });
    }
    if !parts.token_types.is_empty() && parts.token_types.len() != n {
        let has = parts.token_types.len();
        return Err(metadata("token_type", format!("has {has} entries for {n} tokens")));
    }
    let ids = [
        ("bos_token_id", parts.bos),
        ("eos_token_id", parts.eos),
        ("eot_token_id", parts.eot),
        ("eom_token_id", parts.eom),
        ("unknown_token_id", parts.unk),
    ];
    for (key, id) in ids {
        if let Some(id) = id.filter(|&id| id as usize >= n) {
            return Err(metadata(key, format!("is {id}, the vocabulary has {n} tokens")));
        }
    }
    Ok(())
}

fn byte_level(parts: &GgufTokenizer) -> Result<Tokenizer, TokenizerError> {
    let pre = parts.pre.as_deref().unwrap_or("default");
    let (splitter, whole_words) = Splitter::by_gguf_name(pre)
        .ok_or_else(|| TokenizerError::UnknownPretokenizer(pre.to_owned()))?;
    let mut vocab = HashMap::with_capacity(parts.tokens.len());
    for (id, token) in parts.tokens.iter().enumerate() {
        if !is_special(parts, id) {
            let bytes = bytes_of_token(token).into_boxed_slice();
            vocab.entry(bytes).or_insert(id as TokenId);
        }
    }
    let merges = parts.merges.iter().enumerate().map(|(i, m)| split_merge(i, m));
    let bpe = Bpe::new(vocab, merges.collect::<Result<_, _>>()?, whole_words)
        .map_err(|refused| refused_bpe(&refused))?;
    // Llama 3 files written before the key existed still expect it
    let add_bos = parts.add_bos.unwrap_or(whole_words);
    let (prefix, suffix) = around(parts, add_bos);
    let added = added(parts);
    let encoder = Pipeline::ByteLevel(Box::new(ByteLevel {
        bpe,
        splitter,
        // GGUF has no key for it, but Qwen's own tokenizers normalize.
        nfc: pre == "qwen2",
        added,
        prefix,
        suffix,
    }));
    let pieces = parts.tokens.iter().enumerate().map(|(id, token)| {
        let verbatim = matches!(kind(parts, id), CONTROL | UNKNOWN | USER_DEFINED);
        let bytes = if verbatim { token.as_bytes().to_vec() } else { bytes_of_token(token) };
        (bytes, is_special(parts, id))
    });
    let pieces = Pieces::new(pieces.collect(), false);
    Ok(finish(parts, Encoder::Pipeline(Box::new(encoder)), pieces))
}

fn sentence_piece(parts: &GgufTokenizer) -> Result<Tokenizer, TokenizerError> {
    if parts.scores.len() != parts.tokens.len() {
        let (has, n) = (parts.scores.len(), parts.tokens.len());
        return Err(metadata("scores", format!("has {has} entries for {n} tokens")));
    }
    let mut pieces = HashMap::with_capacity(parts.tokens.len());
    let mut bytes = [None; 256];
    let mut texts = Vec::with_capacity(parts.tokens.len());
    for (id, token) in parts.tokens.iter().enumerate() {
        let text = match kind(parts, id) {
            BYTE => {
                let byte = byte_piece(token).ok_or_else(|| {
                    metadata("tokens", format!("entry {id} {token:?} is no byte like <0x0A>"))
                })?;
                bytes[byte as usize] = Some(id as TokenId);
                vec![byte]
            }
            NORMAL => {
                let score = parts.scores[id];
                pieces.entry(token.as_str().into()).or_insert((id as TokenId, score));
                token.replace(SPACE, " ").into_bytes()
            }
            _ => token.replace(SPACE, " ").into_bytes(),
        };
        texts.push((text, is_special(parts, id)));
    }
    let longest = parts.tokens.iter().map(String::len).max().unwrap_or(0);
    let space_prefix = parts.add_space_prefix.unwrap_or(true);
    let (prefix, suffix) = around(parts, parts.add_bos.unwrap_or(true));
    let unknown = parts.unk.or_else(|| {
        (0..parts.tokens.len()).find(|&id| kind(parts, id) == UNKNOWN).map(|id| id as TokenId)
    });
    let added = added(parts);
    let encoder = Encoder::Spm(Box::new(Spm {
        pieces,
        bytes,
        unknown,
        added,
        space_prefix,
        prefix,
        suffix,
        longest,
    }));
    Ok(finish(parts, encoder, Pieces::new(texts, space_prefix)))
}

fn finish(parts: &GgufTokenizer, encoder: Encoder, pieces: Pieces) -> Tokenizer {
    let special_texts = pieces.special_texts();
    let added = (0..parts.tokens.len()).filter(|&id| kind(parts, id) == USER_DEFINED);
    let marker_texts = markers(added.map(|id| parts.tokens[id].as_str()));
    let ends = [parts.eos, parts.eot, parts.eom].into_iter().flatten();
    let end_of_generation = end_of_generation(&pieces, ends);
    Tokenizer(Arc::new(Inner {
        encoder,
        pieces,
        bos: parts.bos,
        eos: parts.eos,
        end_of_generation,
        special_texts,
        marker_texts,
    }))
}

/// `declared` and every special token that ends a turn or a text by its well-known name.
pub(super) fn end_of_generation(
    pieces: &Pieces,
    declared: impl IntoIterator<Item = TokenId>,
) -> Vec<TokenId> {
    let named = END_NAMES.iter().filter_map(|name| pieces.special_id(name));
    let mut ids: Vec<TokenId> = declared.into_iter().chain(named).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn around(parts: &GgufTokenizer, add_bos: bool) -> (Vec<TokenId>, Vec<TokenId>) {
    let prefix = parts.bos.filter(|_| add_bos).into_iter().collect();
    let suffix = parts.eos.filter(|_| parts.add_eos.unwrap_or(false)).into_iter().collect();
    (prefix, suffix)
}

fn added(parts: &GgufTokenizer) -> Added {
    let tokens = parts.tokens.iter().enumerate().filter_map(|(id, text)| {
        let added = matches!(kind(parts, id), CONTROL | UNKNOWN | USER_DEFINED);
        added.then_some((text.as_str(), id as TokenId, is_special(parts, id)))
    });
    Added::new(tokens)
}

fn split_merge(index: usize, merge: &str) -> Result<Halves, TokenizerError> {
    // a half is never empty, so a leading space belongs to the left one
    let first = merge.chars().next().map_or(0, char::len_utf8);
    let at = merge[first..].find(' ').map(|at| at + first);
    let Some(at) = at.filter(|&at| at + 1 < merge.len()) else {
        return Err(metadata("merges", format!("entry {index} {merge:?} has not two parts")));
    };
    let half = |text: &str| bytes_of_token(text).into_boxed_slice();
    Ok((half(&merge[..at]), half(&merge[at + 1..])))
}

fn refused_bpe(refused: &BpeRefused) -> TokenizerError {
    match refused {
        BpeRefused::NoByte(byte) => metadata("tokens", format!("no token for byte {byte:#04x}")),
        BpeRefused::Merge { index, reason } => {
            metadata("merges", format!("entry {index}: {reason}"))
        }
    }
}

/// The byte of a token like `<0x0A>`.
pub(super) fn byte_piece(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 { None } else { u8::from_str_radix(hex, 16).ok() }
}

fn kind(parts: &GgufTokenizer, id: usize) -> i32 {
    parts.token_types.get(id).copied().unwrap_or(NORMAL)
}

fn is_special(parts: &GgufTokenizer, id: usize) -> bool {
    matches!(kind(parts, id), CONTROL | UNKNOWN)
}

fn metadata(key: &'static str, reason: impl Into<String>) -> TokenizerError {
    TokenizerError::Metadata { key, reason: reason.into() }
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// Special tokens that end a turn or a text in the published families.
const END_NAMES: &[&str] = &[
    "</s>",
    "<EOT>",
    "<eos>",
    "<end_of_turn>",
    "<|EOT|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|endoftext|>",
    "<|end|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];
