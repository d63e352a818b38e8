//! SentencePiece vocabularies of GGUF files: merges by score, with byte fallback.
//!
//! Kudo and Richardson 2018; a merge makes the piece with the highest score, the leftmost of
//! equal ones, as the reference implementation of its BPE model does.

use std::collections::{BinaryHeap, HashMap};

use protocol::TokenId;

use super::encode::{Added, Segment, without};

/// Encoder of a vocabulary with scores.
pub(super) struct Spm {
    pub(super) pieces: HashMap<Box<str>, (TokenId, f32)>,
    /// Ids of `<0x00>` to `<0xFF>`, where the vocabulary has them.
    pub(super) bytes: [Option<TokenId>; 256],
    pub(super) unknown: Option<TokenId>,
    pub(super) added: Added,
    pub(super) space_prefix: bool,
    pub(super) prefix: Vec<TokenId>,
    pub(super) suffix: Vec<TokenId>,
    /// Length in bytes of the longest piece: no longer text is looked up.
    pub(super) longest: usize,
}

impl Spm {
    pub(super) fn encode(
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
        // a space goes before the text's start and before what follows a special token
        let mut at_start = true;
        self.added.split(text, parse_special, &mut |segment| match segment {
            Segment::Token { id, special } => {
                if self.space_prefix && at_start && !special {
                    self.merge("▁", &mut out);
                }
                out.push(id);
                at_start = special;
            }
            Segment::Text(text) => {
                let text = without(text, mark);
                if text.is_empty() {
                    return;
                }
                let mut escaped = String::with_capacity(text.len() + 3);
                if self.space_prefix && at_start {
                    escaped.push(SPACE);
                }
                escaped.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
                self.merge(&escaped, &mut out);
                at_start = false;
            }
        });
        if add_special {
            out.extend_from_slice(&self.suffix);
        }
        out
    }

    fn merge(&self, text: &str, out: &mut Vec<TokenId>) {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start: start as u32,
                end: (start + c.len_utf8()) as u32,
                prev: i as u32,
                next: i as u32 + 1,
            })
            .collect();
        let mut queue = BinaryHeap::new();
        for left in 0..symbols.len().saturating_sub(1) {
            self.consider(text, &symbols, left, left + 1, &mut queue);
        }
        while let Some(candidate) = queue.pop() {
            let (left, right) = (candidate.left as usize, candidate.right as usize);
            // stale when either half has merged since
            if symbols[left].start == symbols[left].end
                || symbols[left].next != candidate.right
                || symbols[right].end != candidate.end
            {
                continue;
            }
            let next = symbols[right].next;
            symbols[left].end = symbols[right].end;
            symbols[left].next = next;
            symbols[right].start = symbols[right].end;
            if (next as usize) < symbols.len() {
                symbols[next as usize].prev = candidate.left + 1;
                self.consider(text, &symbols, left, next as usize, &mut queue);
            }
            // `prev` is stored one higher, so that zero means none
            if symbols[left].prev > 0 {
                let before = symbols[left].prev as usize - 1;
                self.consider(text, &symbols, before, left, &mut queue);
            }
        }
        for symbol in symbols.iter().filter(|s| s.start < s.end) {
            self.emit(&text[symbol.start as usize..symbol.end as usize], out);
        }
    }

    fn consider(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
        queue: &mut BinaryHeap<Candidate>,
    ) {
        let (start, end) = (symbols[left].start, symbols[right].end);
        if (end - start) as usize > self.longest {
            return;
        }
        if let Some(&(_, score)) = self.pieces.get(&text[start as usize..end as usize]) {
            queue.push(Candidate { score, left: left as u32, right: right as u32, end });
        }
    }

    fn emit(&self, piece: &str, out: &mut Vec<TokenId>) {
        if let Some(&(id, _)) = self.pieces.get(piece) {
            out.push(id);
            return;
        }
        let bytes = piece.bytes().map(|b| self.bytes[b as usize]);
        match bytes.collect::<Option<Vec<_>>>() {
            Some(ids) => out.extend(ids),
            None => out.extend(self.unknown),
        }
    }
}

struct Symbol {
    start: u32,
    end: u32,
    /// Index of the symbol before, plus one; zero for none.
    prev: u32,
    next: u32,
}

struct Candidate {
    score: f32,
    left: u32,
    right: u32,
    end: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

/// SentencePiece's visible space, U+2581.
pub(super) const SPACE: char = '▁';
