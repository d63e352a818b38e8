use std::collections::BTreeMap;

use protocol::TokenId;

/// The bytes and the kind of each id, in one buffer.
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// End of piece `i` in `bytes`; it starts where the one before ends.
    ends: Vec<u32>,
    special: Vec<bool>,
    by_text: BTreeMap<String, TokenId>,
    strip_leading_space: bool,
}

impl Pieces {
    /// `pieces[id]` is (bytes, special); ids without a token have no bytes.
    pub(super) fn new(pieces: Vec<(Vec<u8>, bool)>, strip_leading_space: bool) -> Self {
        let total = pieces.iter().map(|(b, _)| b.len()).sum();
        let mut out = Self {
            bytes: Vec::with_capacity(total),
            ends: Vec::with_capacity(pieces.len()),
            special: Vec::with_capacity(pieces.len()),
            by_text: BTreeMap::new(),
            strip_leading_space,
        };
        for (id, (bytes, special)) in pieces.into_iter().enumerate() {
            out.bytes.extend_from_slice(&bytes);
            out.ends.push(out.bytes.len() as u32);
            out.special.push(special);
            if special && let Ok(text) = String::from_utf8(bytes) {
                out.by_text.entry(text).or_insert(id as TokenId);
            }
        }
        out
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    pub(super) fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    pub(super) fn special_id(&self, text: &str) -> Option<TokenId> {
        self.by_text.get(text).copied()
    }

    pub(super) fn special_texts(&self) -> Vec<String> {
        let mut texts: Vec<String> =
            self.by_text.keys().filter(|t| !t.is_empty()).cloned().collect();
        texts.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        texts
    }

    pub(super) fn strips_leading_space(&self) -> bool {
        self.strip_leading_space
    }
}
