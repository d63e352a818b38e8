//! Byte-level byte-pair encoding (Sennrich et al. 2016, in GPT-2's form over bytes).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use protocol::TokenId;

/// Vocabulary and merges over raw bytes (the printable alphabet of the files is already undone).
pub(super) struct Bpe {
    vocab: HashMap<Box<[u8]>, TokenId>,
    /// (left, right) to (rank, merged).
    merges: HashMap<(TokenId, TokenId), (u32, TokenId), BuildHasherDefault<PairHasher>>,
    bytes: [TokenId; 256],
    /// Bytes without a token: no id stands for them, as in the reference implementation.
    missing: [bool; 256],
    /// A word that is a token is taken whole, whatever the merges say (Llama 3).
    whole_words: bool,
    longest: usize,
}

/// The two sides of a merge, in raw bytes.
pub(super) type Halves = (Box<[u8]>, Box<[u8]>);

/// What [`Bpe::new`] can refuse.
#[derive(Debug)]
pub(super) enum BpeRefused {
    NoByte(u8),
    Merge { index: usize, reason: String },
}

impl Bpe {
    /// `merges[i]` are the two halves of the merge of rank `i`, in raw bytes.
    pub(super) fn new(
        vocab: HashMap<Box<[u8]>, TokenId>,
        merges: Vec<Halves>,
        whole_words: bool,
    ) -> Result<Self, BpeRefused> {
        let mut bytes = [0; 256];
        let mut missing = [false; 256];
        for byte in 0..=255u8 {
            match vocab.get([byte].as_slice()) {
                Some(&id) => bytes[byte as usize] = id,
                // some vocabularies leave out bytes that no text has, or hardly any
                None if byte >= 0xc0 => missing[byte as usize] = true,
                None => return Err(BpeRefused::NoByte(byte)),
            }
        }
        let mut map = HashMap::with_capacity_and_hasher(merges.len(), Default::default());
        let mut merged = Vec::new();
        for (index, (left, right)) in merges.iter().enumerate() {
            merged.clear();
            merged.extend_from_slice(left);
            merged.extend_from_slice(right);
            let find = |text: &[u8]| {
                vocab.get(text).copied().ok_or_else(|| BpeRefused::Merge {
                    index,
                    reason: format!("{:?} is not a token", String::from_utf8_lossy(text)),
                })
            };
            map.insert((find(left)?, find(right)?), (index as u32, find(&merged)?));
        }
        let longest = vocab.keys().map(|k| k.len()).max().unwrap_or(0);
        Ok(Self { vocab, merges: map, bytes, missing, whole_words, longest })
    }

    /// Appends the ids of one pre-token. O(n log n) in its bytes.
    pub(super) fn encode_word(&self, word: &[u8], out: &mut Vec<TokenId>) {
        if (self.whole_words || word.len() == 1)
            && word.len() <= self.longest
            && let Some(&id) = self.vocab.get(word)
        {
            out.push(id);
            return;
        }
        if word.iter().any(|&byte| self.missing[byte as usize]) {
            let known = word.iter().copied().filter(|&byte| !self.missing[byte as usize]);
            self.merge_long(&known.collect::<Vec<u8>>(), out);
        } else if word.len() <= SHORT_WORD {
            self.merge_short(word, out);
        } else {
            self.merge_long(word, out);
        }
    }

    /// Quadratic in at most [`SHORT_WORD`] symbols, which is faster than a heap there.
    fn merge_short(&self, word: &[u8], out: &mut Vec<TokenId>) {
        let mut symbols = [0; SHORT_WORD];
        let mut len = word.len();
        for (symbol, &byte) in symbols.iter_mut().zip(word) {
            *symbol = self.bytes[byte as usize];
        }
        loop {
            let mut best: Option<(u32, usize, TokenId)> = None;
            for at in 1..len {
                if let Some(&(rank, id)) = self.merges.get(&(symbols[at - 1], symbols[at]))
                    && best.is_none_or(|(r, _, _)| rank < r)
                {
                    best = Some((rank, at - 1, id));
                }
            }
            let Some((_, at, id)) = best else { break };
            symbols[at] = id;
            symbols.copy_within(at + 2..len, at + 1);
            len -= 1;
        }
        out.extend_from_slice(&symbols[..len]);
    }

    fn merge_long(&self, word: &[u8], out: &mut Vec<TokenId>) {
        let mut list = SymbolList::new(word.iter().map(|&b| self.bytes[b as usize]));
        let mut queue = BinaryHeap::new();
        let consider = |list: &SymbolList, queue: &mut BinaryHeap<_>, left: u32| {
            let Some(right) = list.next(left) else { return };
            let pair = (list.id(left), list.id(right));
            if let Some(&(rank, _)) = self.merges.get(&pair) {
                queue.push(Reverse((rank, left, pair)));
            }
        };
        for left in 0..word.len() as u32 {
            consider(&list, &mut queue, left);
        }
        while let Some(Reverse((_, left, pair))) = queue.pop() {
            let Some(right) = list.next(left) else { continue };
            // an entry whose symbols changed since it was queued is stale
            if !list.alive(left) || (list.id(left), list.id(right)) != pair {
                continue;
            }
            let Some(&(_, id)) = self.merges.get(&pair) else { continue };
            list.merge(left, right, id);
            if let Some(before) = list.prev(left) {
                consider(&list, &mut queue, before);
            }
            consider(&list, &mut queue, left);
        }
        list.drain_into(out);
    }
}

/// Two ids to a place in the table, by multiplication (Fibonacci hashing, Knuth 6.4). The keys are
/// the model's, not a user's, so they need no secret.
#[derive(Default)]
struct PairHasher(u64);

impl Hasher for PairHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u32(byte.into()));
    }

    fn write_u32(&mut self, id: u32) {
        self.0 = (self.0.rotate_left(29) ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        // the table takes its bits from both ends
        self.0 ^ (self.0 >> 32)
    }
}

/// A doubly linked list of symbols in one array; a merged right half is dead.
struct SymbolList(Vec<Symbol>);

struct Symbol {
    id: TokenId,
    prev: u32,
    next: u32,
    alive: bool,
}

impl SymbolList {
    fn new(ids: impl ExactSizeIterator<Item = TokenId>) -> Self {
        let last = ids.len().saturating_sub(1);
        let symbol = |(at, id): (usize, TokenId)| Symbol {
            id,
            prev: if at == 0 { NONE } else { at as u32 - 1 },
            next: if at == last { NONE } else { at as u32 + 1 },
            alive: true,
        };
        Self(ids.enumerate().map(symbol).collect())
    }

    fn id(&self, at: u32) -> TokenId {
        self.0[at as usize].id
    }

    fn alive(&self, at: u32) -> bool {
        self.0[at as usize].alive
    }

    fn next(&self, at: u32) -> Option<u32> {
        Some(self.0[at as usize].next).filter(|&n| n != NONE)
    }

    fn prev(&self, at: u32) -> Option<u32> {
        Some(self.0[at as usize].prev).filter(|&n| n != NONE)
    }

    fn merge(&mut self, left: u32, right: u32, id: TokenId) {
        let after = self.0[right as usize].next;
        self.0[right as usize].alive = false;
        self.0[left as usize].id = id;
        self.0[left as usize].next = after;
        if after != NONE {
            self.0[after as usize].prev = left;
        }
    }

    fn drain_into(self, out: &mut Vec<TokenId>) {
        out.extend(self.0.iter().filter(|s| s.alive).map(|s| s.id));
    }
}

/// The byte that a character of GPT-2's printable alphabet stands for.
pub(super) fn byte_of_char(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x143 => Some(match code - 0x100 {
            n @ 0..=0x20 => n as u8,
            n @ 0x21..=0x42 => (n - 0x21 + 0x7f) as u8,
            _ => 0xad,
        }),
        _ => None,
    }
}

/// The bytes of a token written in that alphabet; the text itself when it is not.
pub(super) fn bytes_of_token(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(byte_of_char)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

const NONE: u32 = u32::MAX;
/// Words up to this many bytes are merged without a heap; nearly all words of any language.
const SHORT_WORD: usize = 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printable_alphabet_is_a_bijection() {
        let mut seen = [0; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(b) = byte_of_char(c) {
                seen[b as usize] += 1;
            }
        }
        assert!(seen.iter().all(|&n| n == 1), "{seen:?}");
        assert_eq!(byte_of_char('Ġ'), Some(b' '));
        assert_eq!(byte_of_char('Ċ'), Some(b'\n'));
        assert_eq!(byte_of_char('ł'), Some(0xa0));
        assert_eq!(byte_of_char('Ń'), Some(0xad));
    }

    fn sample() -> Bpe {
        let mut vocab: HashMap<Box<[u8]>, TokenId> =
            (0..=255u8).map(|b| (Box::from([b]), b as TokenId)).collect();
        let mut merges = Vec::new();
        for (i, (l, r)) in
            [("a", "a"), ("aa", "aa"), ("b", "c"), ("aa", "b"), ("a", "bc")].iter().enumerate()
        {
            vocab.insert([l.as_bytes(), r.as_bytes()].concat().into(), 256 + i as TokenId);
            merges.push((l.as_bytes().into(), r.as_bytes().into()));
        }
        Bpe::new(vocab, merges, false).expect("consistent")
    }

    #[test]
    fn short_and_long_words_merge_alike() {
        let bpe = sample();
        let mut state = 7u32;
        for len in 2..SHORT_WORD {
            let word: Vec<u8> = (0..len)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    b"aaabc"[(state >> 16) as usize % 5]
                })
                .collect();
            let (mut short, mut long) = (Vec::new(), Vec::new());
            bpe.merge_short(&word, &mut short);
            bpe.merge_long(&word, &mut long);
            assert_eq!(short, long, "{}", String::from_utf8_lossy(&word));
        }
    }
}
