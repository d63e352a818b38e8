//! Tokenizers from `tokenizer.json` (and `tokenizer_config.json`).

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use protocol::TokenId;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::bpe::{Bpe, BpeRefused, bytes_of_token};
use super::encode::{Added, ByteLevel, Generic, Pipeline};
use super::error::TokenizerError;
use super::gguf::{byte_piece, end_of_generation};
use super::pieces::Pieces;
use super::split::{GPT2, Splitter};
use super::spm::SPACE;
use super::{Encoder, Inner, Tokenizer, VOCAB_MAX, markers};
use crate::weights::HfTokenizer;

#[derive(Deserialize)]
struct File<'a> {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(borrow)]
    model: &'a RawValue,
}

#[derive(Deserialize)]
struct AddedToken {
    id: TokenId,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
}

#[derive(Deserialize)]
struct BpeModel {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: Vocab,
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

type Vocab = HashMap<String, TokenId>;

/// How the bytes of a token follow from its text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Decoder {
    ByteLevel,
    /// `▁` is a space and `<0x0A>` a byte; `strip`: a text loses one leading space.
    Metaspace {
        strip: bool,
    },
}

impl Tokenizer {
    /// From `tokenizer.json` and the files beside it.
    ///
    /// # Errors
    /// What is not JSON of the expected form, a decoder that is neither byte-level nor
    /// SentencePiece-like, ids above [`VOCAB_MAX`].
    pub fn from_hf(files: &HfTokenizer) -> Result<Self, TokenizerError> {
        let json = files.tokenizer_json.as_slice();
        let file: File<'_> = serde_json::from_slice(json).map_err(json_error)?;
        let decoder = decoder(&file.decoder)?;
        if let Some(top) = file.added_tokens.iter().map(|t| t.id as usize).max()
            && top >= VOCAB_MAX
        {
            return Err(TokenizerError::TooManyTokens { id: top, limit: VOCAB_MAX });
        }
        let (encoder, vocab) = match byte_level(&file, decoder)? {
            Some((encoder, vocab)) => (Pipeline::ByteLevel(encoder), vocab),
            None => {
                let (generic, vocab) = generic(json)?;
                (Pipeline::Generic(Box::new(generic)), vocab)
            }
        };
        let pieces = pieces(&file, decoder, vocab)?;
        Ok(finish(encoder, pieces, files, &file))
    }
}

fn finish(encoder: Pipeline, pieces: Pieces, files: &HfTokenizer, file: &File<'_>) -> Tokenizer {
    let named = |key: &str| {
        let token =
            files.tokenizer_config.get(key).or_else(|| files.special_tokens_map.get(key))?;
        let text = token.as_str().or_else(|| token["content"].as_str())?;
        let added = file.added_tokens.iter().find(|t| t.content == text).map(|t| t.id);
        added.or_else(|| pieces.special_id(text))
    };
    let known = |id: &TokenId| (*id as usize) < pieces.len();
    let eos = files.eos_ids.iter().copied().filter(known);
    let eos_token = named("eos_token").or_else(|| eos.clone().next());
    let ends = eos.chain(eos_token);
    let end_of_generation = end_of_generation(&pieces, ends);
    let bos = named("bos_token").or(files.bos_id.filter(known));
    let special_texts = pieces.special_texts();
    let ordinary = file.added_tokens.iter().filter(|t| !t.special);
    let marker_texts = markers(ordinary.map(|t| t.content.as_str()));
    Tokenizer(Arc::new(Inner {
        encoder: Encoder::Pipeline(Box::new(encoder)),
        bos,
        eos: eos_token,
        end_of_generation,
        special_texts,
        marker_texts,
        pieces,
    }))
}

/// The fast encoder, when the file describes one; `None` when the crate's pipeline is needed.
fn byte_level(
    file: &File<'_>,
    decoder: Decoder,
) -> Result<Option<(Box<ByteLevel>, Vocab)>, TokenizerError> {
    let simple_added = file.added_tokens.iter().all(|t| {
        let moves = t.single_word || t.lstrip || t.rstrip;
        !moves && (!t.normalized || file.normalizer.is_null() || t.content.is_ascii())
    });
    let nfc = file.normalizer["type"] == "NFC";
    let (Some(splitter), Some((prefix, suffix))) =
        (splitter(&file.pre_tokenizer), around(&file.post_processor))
    else {
        return Ok(None);
    };
    if decoder != Decoder::ByteLevel || !simple_added || !(nfc || file.normalizer.is_null()) {
        return Ok(None);
    }
    let Ok(model) = serde_json::from_str::<BpeModel>(file.model.get()) else { return Ok(None) };
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if model.kind.as_deref().is_some_and(|k| k != "BPE")
        || model.byte_fallback
        || affixes.into_iter().flatten().any(|a| !a.is_empty())
    {
        return Ok(None);
    }
    let bytes: HashMap<Box<[u8]>, TokenId> =
        model.vocab.iter().map(|(t, &id)| (bytes_of_token(t).into_boxed_slice(), id)).collect();
    let half = |t: &str| bytes_of_token(t).into_boxed_slice();
    let merges = model.merges.iter().map(|m| match m {
        Merge::Pair(l, r) => Some((half(l), half(r))),
        Merge::Line(line) => line.split_once(' ').map(|(l, r)| (half(l), half(r))),
    });
    let Some(merges) = merges.collect::<Option<Vec<_>>>() else {
        return Err(TokenizerError::Json("model.merges: an entry has not two parts".to_owned()));
    };
    let bpe = match Bpe::new(bytes, merges, model.ignore_merges) {
        Ok(bpe) => bpe,
        Err(BpeRefused::NoByte(_)) => return Ok(None),
        Err(BpeRefused::Merge { index, reason }) => {
            return Err(TokenizerError::Json(format!("model.merges[{index}]: {reason}")));
        }
    };
    let added = Added::new(file.added_tokens.iter().map(|t| (t.content.as_str(), t.id, t.special)));
    Ok(Some((Box::new(ByteLevel { bpe, splitter, nfc, added, prefix, suffix }), model.vocab)))
}

fn splitter(pre_tokenizer: &Value) -> Option<Splitter> {
    let is_byte_level = |v: &Value, regex: bool| {
        v["type"] == "ByteLevel"
            && v["add_prefix_space"] == false
            && v["use_regex"].as_bool().unwrap_or(true) == regex
    };
    if is_byte_level(pre_tokenizer, true) {
        return Splitter::by_pattern(GPT2);
    }
    let parts = pre_tokenizer["pretokenizers"].as_array()?;
    match parts.as_slice() {
        [split, bytes]
            if is_byte_level(bytes, false)
                && split["type"] == "Split"
                && split["behavior"] == "Isolated"
                && split["invert"] == false =>
        {
            Splitter::by_pattern(split["pattern"]["Regex"].as_str()?)
        }
        [digits, bytes]
            if is_byte_level(bytes, true)
                && digits["type"] == "Digits"
                && digits["individual_digits"] == true =>
        {
            Some(Splitter::DigitsThenGpt2)
        }
        _ => None,
    }
}

/// The ids before and after a text, when the post-processor does no more than that.
fn around(post: &Value) -> Option<(Vec<TokenId>, Vec<TokenId>)> {
    let kind = post["type"].as_str();
    match kind {
        None => Some((Vec::new(), Vec::new())),
        Some("ByteLevel") => Some((Vec::new(), Vec::new())),
        Some("TemplateProcessing") => template(post),
        Some("Sequence") => {
            let parts = post["processors"].as_array()?;
            let mut busy = parts.iter().filter(|p| p["type"] != "ByteLevel");
            match (busy.next(), busy.next()) {
                (None, _) => Some((Vec::new(), Vec::new())),
                (Some(one), None) if one["type"] == "TemplateProcessing" => template(one),
                _ => None,
            }
        }
        Some(_) => None,
    }
}

fn template(post: &Value) -> Option<(Vec<TokenId>, Vec<TokenId>)> {
    let (mut prefix, mut suffix, mut past_text) = (Vec::new(), Vec::new(), false);
    for part in post["single"].as_array()? {
        if part.get("Sequence").is_some() {
            if past_text {
                return None;
            }
            past_text = true;
            continue;
        }
        let name = part["SpecialToken"]["id"].as_str()?;
        for id in post["special_tokens"][name]["ids"].as_array()? {
            let id = TokenId::try_from(id.as_u64()?).ok()?;
            if past_text { suffix.push(id) } else { prefix.push(id) }
        }
    }
    past_text.then_some((prefix, suffix))
}

fn generic(json: &[u8]) -> Result<(Generic, Vocab), TokenizerError> {
    // the crate indexes and unwraps by what the file says (merges longer than any token,
    // patterns that its clone compiles again), so a hostile file can panic inside it
    let loaded = catch_unwind(|| tokenizers::Tokenizer::from_bytes(json))
        .map_err(|_| TokenizerError::Json("its parts do not fit each other".to_owned()))?;
    let mut tokenizer = loaded.map_err(|e| TokenizerError::Json(e.to_string()))?;
    let _ = tokenizer.with_truncation(None);
    tokenizer.with_padding(None);
    let mut with_special = tokenizer.get_added_vocabulary().clone();
    with_special.set_encode_special_tokens(false);
    let mut without_special = with_special.clone();
    without_special.set_encode_special_tokens(true);
    let vocab = catch_unwind(AssertUnwindSafe(|| tokenizer.get_vocab(true)))
        .map_err(|_| TokenizerError::Json("its vocabulary is inconsistent".to_owned()))?;
    Ok((Generic { tokenizer, with_special, without_special }, vocab.into_iter().collect()))
}

fn pieces(file: &File<'_>, decoder: Decoder, vocab: Vocab) -> Result<Pieces, TokenizerError> {
    let added = file.added_tokens.iter().map(|t| t.id);
    let top = vocab.values().copied().chain(added).max();
    let Some(top) = top.map(|id| id as usize) else {
        return Err(TokenizerError::Json("model.vocab is empty".to_owned()));
    };
    if top >= VOCAB_MAX {
        return Err(TokenizerError::TooManyTokens { id: top, limit: VOCAB_MAX });
    }
    let mut pieces = vec![(Vec::new(), false); top + 1];
    for (text, id) in vocab {
        pieces[id as usize].0 = match decoder {
            Decoder::ByteLevel => bytes_of_token(&text),
            Decoder::Metaspace { .. } => match byte_piece(&text) {
                Some(byte) => vec![byte],
                None => text.replace(SPACE, " ").into_bytes(),
            },
        };
    }
    for token in &file.added_tokens {
        pieces[token.id as usize] = (token.content.as_bytes().to_vec(), token.special);
    }
    Ok(Pieces::new(pieces, decoder == Decoder::Metaspace { strip: true }))
}

fn decoder(decoder: &Value) -> Result<Decoder, TokenizerError> {
    let one = |part: &Value| part["type"].as_str().unwrap_or("none").to_owned();
    let unsupported = |kind: String| TokenizerError::Unsupported { part: "decoder", kind };
    match decoder["type"].as_str() {
        Some("ByteLevel") => Ok(Decoder::ByteLevel),
        Some("Metaspace") => {
            let strip = decoder["prepend_scheme"] != "never"
                && decoder["add_prefix_space"].as_bool().unwrap_or(true);
            Ok(Decoder::Metaspace { strip })
        }
        Some("Sequence") => {
            let parts = decoder["decoders"].as_array().map_or(&[][..], Vec::as_slice);
            let mut found = Decoder::Metaspace { strip: false };
            for part in parts {
                match part["type"].as_str() {
                    Some("ByteLevel") => found = Decoder::ByteLevel,
                    Some("Replace") if part["content"] == " " => {}
                    Some("ByteFallback" | "Fuse") => {}
                    Some("Strip") if part["content"] == " " && part["start"] == 1 => {
                        found = Decoder::Metaspace { strip: true };
                    }
                    Some("Metaspace") => found = self::decoder(part)?,
                    _ => return Err(unsupported(one(part))),
                }
            }
            Ok(found)
        }
        _ => Err(unsupported(one(decoder))),
    }
}

fn json_error(e: serde_json::Error) -> TokenizerError {
    TokenizerError::Json(e.to_string())
}
