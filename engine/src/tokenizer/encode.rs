use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use protocol::TokenId;
use tokenizers::tokenizer::pre_tokenizer::OffsetType;
use tokenizers::{AddedVocabulary, Model, NormalizedString, PreTokenizer};

use super::bpe::Bpe;
use super::error::EncodeError;
use super::split::Splitter;

/// An encoder of a `tokenizer.json`, or of byte-level metadata.
pub(super) enum Pipeline {
    ByteLevel(Box<ByteLevel>),
    Generic(Box<Generic>),
}

/// Byte-level BPE with a known pre-tokenizer: nearly every published model.
pub(super) struct ByteLevel {
    pub(super) bpe: Bpe,
    pub(super) splitter: Splitter,
    pub(super) nfc: bool,
    pub(super) added: Added,
    pub(super) prefix: Vec<TokenId>,
    pub(super) suffix: Vec<TokenId>,
}

/// Anything else that the `tokenizers` crate can run.
pub(super) struct Generic {
    pub(super) tokenizer: tokenizers::Tokenizer,
    /// The tokenizer's own, once reading special tokens and once not.
    pub(super) with_special: AddedVocabulary,
    pub(super) without_special: AddedVocabulary,
}

impl Pipeline {
    pub(super) fn encode(
        &self,
        text: &str,
        mark: Option<char>,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<TokenId>, EncodeError> {
        match self {
            Self::ByteLevel(b) => Ok(b.encode(text, mark, add_special, parse_special)),
            // the crate indexes by what the file says, in its post-processors for one
            Self::Generic(g) => {
                let encode = || g.encode(text, mark, add_special, parse_special);
                match catch_unwind(AssertUnwindSafe(encode)) {
                    Ok(ids) => ids.map_err(|e| EncodeError::Failed(e.to_string())),
                    Err(_) => Err(EncodeError::Failed("its parts do not fit".to_owned())),
                }
            }
        }
    }
}

impl ByteLevel {
    fn encode(
        &self,
        text: &str,
        mark: Option<char>,
        add_special: bool,
        parse_special: bool,
    ) -> Vec<TokenId> {
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        if add_special {
            out.extend_from_slice(&self.prefix);
        }
        self.added.split(text, parse_special, &mut |segment| match segment {
            Segment::Token { id, .. } => out.push(id),
            Segment::Text(text) => {
                let text = without(text, mark);
                let text = if self.nfc { nfc(&text) } else { text };
                self.splitter.split(&text, &mut |word| {
                    self.bpe.encode_word(word.as_bytes(), &mut out);
                });
            }
        });
        if add_special {
            out.extend_from_slice(&self.suffix);
        }
        out
    }
}

impl Generic {
    fn encode(
        &self,
        text: &str,
        mark: Option<char>,
        add_special: bool,
        parse_special: bool,
    ) -> tokenizers::Result<Vec<TokenId>> {
        let added = if parse_special { &self.with_special } else { &self.without_special };
        let mut pieces = added.extract_and_normalize(self.tokenizer.get_normalizer(), text);
        if let Some(mark) = mark
            && text.contains(mark)
        {
            pieces.normalize(|piece| {
                piece.filter(|c| c != mark);
                Ok(())
            })?;
        }
        if let Some(pre_tokenizer) = self.tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|piece| self.tokenizer.get_model().tokenize(piece.get()))?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None)?;
        Ok(self.tokenizer.post_process(encoding, None, add_special)?.get_ids().to_vec())
    }
}

/// The tokens that are matched as they stand before anything else, as a byte trie.
#[derive(Default)]
pub(super) struct Added {
    nodes: Vec<Node>,
}

#[derive(Default)]
struct Node {
    children: Vec<(u8, u32)>,
    token: Option<(TokenId, bool)>,
}

/// A part of a text: a token that stands in it, or text between such.
pub(super) enum Segment<'a> {
    Token { id: TokenId, special: bool },
    Text(&'a str),
}

impl Added {
    /// `tokens`: text, id, special. Empty texts are left out, of equal ones the first counts.
    pub(super) fn new<'a>(tokens: impl IntoIterator<Item = (&'a str, TokenId, bool)>) -> Self {
        let mut trie = Self { nodes: vec![Node::default()] };
        for (text, id, special) in tokens {
            if text.is_empty() {
                continue;
            }
            let mut at = 0;
            for byte in text.bytes() {
                at = match trie.child(at, byte) {
                    Some(next) => next,
                    None => {
                        let next = trie.nodes.len();
                        trie.nodes.push(Node::default());
                        trie.nodes[at].children.push((byte, next as u32));
                        next
                    }
                };
            }
            trie.nodes[at].token.get_or_insert((id, special));
        }
        trie
    }

    /// Calls `each` with the parts of `text` in order; the longest token at the leftmost place
    /// wins. Special tokens are text unless `parse_special`.
    pub(super) fn split(&self, text: &str, parse_special: bool, each: &mut dyn FnMut(Segment<'_>)) {
        let (mut from, mut at) = (0, 0);
        while at < text.len() {
            let Some((end, id, special)) = self.longest_at(text.as_bytes(), at, parse_special)
            else {
                at += 1;
                continue;
            };
            if from < at {
                each(Segment::Text(&text[from..at]));
            }
            each(Segment::Token { id, special });
            (from, at) = (end, end);
        }
        if from < text.len() {
            each(Segment::Text(&text[from..]));
        }
    }

    fn longest_at(
        &self,
        text: &[u8],
        start: usize,
        parse_special: bool,
    ) -> Option<(usize, TokenId, bool)> {
        let (mut node, mut best) = (0, None);
        for (at, &byte) in text.iter().enumerate().skip(start) {
            let Some(next) = self.child(node, byte) else { break };
            node = next;
            if let Some((id, special)) = self.nodes[node].token
                && (parse_special || !special)
            {
                best = Some((at + 1, id, special));
            }
        }
        best
    }

    fn child(&self, node: usize, byte: u8) -> Option<usize> {
        let children = &self.nodes.get(node)?.children;
        children.iter().find(|&&(b, _)| b == byte).map(|&(_, next)| next as usize)
    }
}

/// `text` without the guard's marks.
pub(super) fn without(text: &str, mark: Option<char>) -> Cow<'_, str> {
    match mark {
        Some(mark) if text.contains(mark) => Cow::Owned(text.replace(mark, "")),
        _ => Cow::Borrowed(text),
    }
}

fn nfc(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return Cow::Owned(text.to_owned());
    }
    let mut normalized = NormalizedString::from(text);
    normalized.nfc();
    Cow::Owned(normalized.get().to_owned())
}
