use protocol::TokenId;

use super::Tokenizer;

/// Token ids to text, piece by piece, never cutting a code point.
///
/// Holds back at most three bytes of an unfinished code point. The pieces together are exactly
/// [`Tokenizer::decode`] of all ids.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    strip_space: bool,
    pending: Vec<u8>,
}

impl Detokenizer {
    /// For a text that starts with the first id.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let strip_space = tokenizer.strips_leading_space();
        Self { tokenizer, skip_special, strip_space, pending: Vec::with_capacity(4) }
    }

    /// For ids that go on from a text which is already there: a leading space is kept.
    pub fn continuing(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { strip_space: false, ..Self::new(tokenizer, skip_special) }
    }

    /// The text that this token completes; often empty, never half a code point.
    pub fn push(&mut self, token: TokenId) -> String {
        if self.skip_special && self.tokenizer.is_special(token) {
            return String::new();
        }
        let mut bytes = self.tokenizer.token_bytes(token);
        if self.strip_space && !bytes.is_empty() {
            self.strip_space = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        self.drain_complete()
    }

    /// What is still held back, as U+FFFD. The stream is then empty and can go on.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }

    fn drain_complete(&mut self) -> String {
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, after) = rest.split_at(e.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    let Some(bad) = e.error_len() else {
                        rest = after;
                        break;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[bad..];
                }
            }
        }
        let kept = self.pending.len() - rest.len();
        self.pending.drain(..kept);
        text
    }
}
