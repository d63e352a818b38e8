//! Text to token ids and back, for `tokenizer.json` and for GGUF metadata.
//!
//! Owns: the two encoders (the `tokenizers` crate's pipeline for byte-level BPE and everything a
//! `tokenizer.json` can say, `spm` for SentencePiece vocabularies in GGUF files), the bytes of
//! each token, the incremental [`Detokenizer`], and the rule that **text of a user never becomes
//! a special token** ([`Guard`]).
//!
//! Refuses: vocabularies above [`VOCAB_MAX`], unknown pre-tokenizers (a wrong split gives wrong
//! ids without a sign), decoders that lose bytes.
//!
//! A *special* token is what the vocabulary declares as such: `special: true` in
//! `tokenizer.json`, type control or unknown in GGUF. Tokens that a vocabulary adds without that
//! mark (runs of spaces, `<think>` of some models) are ordinary vocabulary and match in any text,
//! as in transformers with `split_special_tokens=True`. In a chat, those of them that the model's
//! template writes as markers are kept out of the text of users too ([`Guard`]).

mod bpe;
mod detokenizer;
mod encode;
mod error;
mod gguf;
mod guard;
mod hf;
mod pieces;
mod split;
mod spm;

use std::sync::Arc;

use protocol::TokenId;

pub use detokenizer::Detokenizer;
pub use error::{EncodeError, TokenizerError};
pub use guard::{Guard, GuardError};
use pieces::Pieces;

use crate::weights::TokenizerSource;

/// Encoder and decoder of one model. Cheap to clone, shared between threads.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    encoder: Encoder,
    pieces: Pieces,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    /// Sorted, without repeats.
    end_of_generation: Vec<TokenId>,
    /// Contents of the special tokens, longest first.
    special_texts: Vec<String>,
    marker_texts: Vec<String>,
}

enum Encoder {
    Pipeline(Box<encode::Pipeline>),
    Spm(Box<spm::Spm>),
}

impl Tokenizer {
    /// From what a model's files say.
    ///
    /// # Errors
    /// What the files say is inconsistent or not supported; nothing is guessed.
    pub fn new(source: &TokenizerSource) -> Result<Self, TokenizerError> {
        match source {
            TokenizerSource::Gguf(metadata) => Self::from_gguf(metadata),
            TokenizerSource::Hf(files) => Self::from_hf(files),
        }
    }

    /// The ids of `text`, in which nothing is a special token, whatever it looks like.
    ///
    /// `add_special`: also what the model expects around a text (usually the begin-of-sequence
    /// token). Time is about linear in the length of `text`.
    ///
    /// # Errors
    /// A `tokenizer.json` whose parts do not fit each other can fail for some texts.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, EncodeError> {
        match &self.0.encoder {
            Encoder::Pipeline(p) => p.encode(text, None, add_special, false),
            Encoder::Spm(s) => Ok(s.encode(text, None, add_special, false)),
        }
    }

    /// The ids of a rendered chat template, in which special tokens are read, except where
    /// `guard` broke their text apart before rendering. Nothing is added around it: a template
    /// writes its own begin-of-sequence token.
    pub fn encode_template(
        &self,
        rendered: &str,
        guard: &Guard,
    ) -> Result<Vec<TokenId>, EncodeError> {
        match &self.0.encoder {
            Encoder::Pipeline(p) => p.encode(rendered, Some(guard.mark()), false, true),
            Encoder::Spm(s) => Ok(s.encode(rendered, Some(guard.mark()), false, true)),
        }
    }

    /// The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary
    /// give nothing.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let mut stream = Detokenizer::new(self.clone(), skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id));
        }
        text.push_str(&stream.finish());
        text
    }

    /// What the token adds to a text; of a special token, its name. Empty for an id without one.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.0.pieces.bytes(id)
    }

    /// True for tokens that only a template may write.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.0.pieces.is_special(id)
    }

    /// True when generation ends at this token.
    pub fn is_end_of_generation(&self, id: TokenId) -> bool {
        self.0.end_of_generation.binary_search(&id).is_ok()
    }

    /// Every token at which generation ends, ascending.
    pub fn end_of_generation(&self) -> &[TokenId] {
        &self.0.end_of_generation
    }

    /// One more than the highest id. A model's logits may be wider (padding).
    pub fn vocab_size(&self) -> usize {
        self.0.pieces.len()
    }

    pub fn bos(&self) -> Option<TokenId> {
        self.0.bos
    }

    pub fn eos(&self) -> Option<TokenId> {
        self.0.eos
    }

    /// The id of the special token with this very text.
    pub fn special_id(&self, text: &str) -> Option<TokenId> {
        self.0.pieces.special_id(text)
    }

    /// Texts of the special tokens, longest first: what [`Guard`] keeps user text from forming.
    pub fn special_texts(&self) -> &[String] {
        &self.0.special_texts
    }

    /// Texts of tokens that are not special and look like markup: `<think>`, `[ARGS]`.
    pub fn marker_texts(&self) -> &[String] {
        &self.0.marker_texts
    }

    /// True when a decoded text loses one leading space (SentencePiece with a space prefix).
    pub(crate) fn strips_leading_space(&self) -> bool {
        self.0.pieces.strips_leading_space()
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos())
            .field("eos", &self.eos())
            .finish_non_exhaustive()
    }
}

/// Those of the added tokens that are written like markup, in one bracket without a space.
fn markers<'a>(added: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let brackets = |text: &str| matches!(text.as_bytes(), [b'<', .., b'>'] | [b'[', .., b']']);
    let plain = |text: &&str| brackets(text) && !text.contains(char::is_whitespace);
    added.into_iter().filter(plain).map(str::to_owned).collect()
}

/// Highest number of ids. The largest public vocabularies have 262,144; more than this is a
/// damaged or hostile file, which is refused before memory is taken for it.
pub const VOCAB_MAX: usize = 1 << 21;

#[cfg(test)]
pub(crate) mod sample;
#[cfg(test)]
mod tests;
