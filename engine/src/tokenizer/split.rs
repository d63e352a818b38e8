//! Pre-tokenization: where byte-pair merging may not cross.
//!
//! The families of public models are written as scanners, each one pass over the text. The regular
//! expressions they are equal to stand beside them; a backtracking engine needs quadratic time or
//! gives up on long runs of spaces.

use std::sync::LazyLock;

use tokenizers::utils::SysRegex;

/// How a text is cut into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Splitter {
    /// [`LLAMA3`] with digits in groups of at most this many.
    Llama3 { digits: usize },
    /// [`GPT2`].
    Gpt2,
    /// Each digit alone, then [`GPT2`] on what is between.
    DigitsThenGpt2,
    /// llama.cpp's `default`: punctuation runs, [`GPT2`], digits in threes, each on what the one
    /// before left.
    Default,
}

impl Splitter {
    /// The splitter for `tokenizer.ggml.pre`, and whether that family takes whole words first.
    pub(super) fn by_gguf_name(name: &str) -> Option<(Self, bool)> {
        Some(match name {
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral"
            | "midm-2.0" | "lfm2" => (Self::Llama3 { digits: 3 }, true),
            "dbrx" | "smaug-bpe" => (Self::Llama3 { digits: 3 }, false),
            "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "hunyuan" | "megrez" | "kormo" => {
                (Self::Llama3 { digits: 1 }, false)
            }
            "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" | "jais" | "jina-es" | "jina-de"
            | "roberta-bpe" | "gigachat" | "mellum" => (Self::Gpt2, false),
            "smollm" | "starcoder" | "refact" | "codeshell" | "exaone" | "minerva-7b" => {
                (Self::DigitsThenGpt2, false)
            }
            "default" => (Self::Default, false),
            _ => return None,
        })
    }

    /// The splitter that is equal to a regular expression of a `tokenizer.json`.
    pub(super) fn by_pattern(pattern: &str) -> Option<Self> {
        [
            (LLAMA3, Self::Llama3 { digits: 3 }),
            (QWEN2, Self::Llama3 { digits: 1 }),
            (LLAMA3_SPELLED, Self::Llama3 { digits: 3 }),
            (QWEN2_SPELLED, Self::Llama3 { digits: 1 }),
            (GPT2, Self::Gpt2),
        ]
        .into_iter()
        .find_map(|(known, splitter)| (known == pattern).then_some(splitter))
    }

    /// Calls `word` with each piece of `text`, in order; together they are `text`.
    pub(super) fn split(self, text: &str, word: &mut dyn FnMut(&str)) {
        match self {
            Self::Llama3 { digits } => scan(text, |t| llama3_word(t, digits), word),
            Self::Gpt2 => scan(text, gpt2_word, word),
            Self::DigitsThenGpt2 => {
                isolate(text, is_number, 1, &mut |t, cut| {
                    if cut { word(t) } else { scan(t, gpt2_word, word) }
                });
            }
            Self::Default => split_default(text, word),
        }
    }
}

/// Cuts `text` by `next`, which says how many bytes the word at the front has (at least one char).
fn scan(text: &str, next: impl Fn(&str) -> usize, word: &mut dyn FnMut(&str)) {
    let mut rest = text;
    while !rest.is_empty() {
        let (front, after) = rest.split_at(next(rest));
        word(front);
        rest = after;
    }
}

/// Runs of at most `longest` characters of a class as pieces (`true`) and what is between.
fn isolate(
    text: &str,
    class: impl Fn(char) -> bool,
    longest: usize,
    piece: &mut dyn FnMut(&str, bool),
) {
    let mut rest = text;
    while !rest.is_empty() {
        let outside = rest.find(&class).unwrap_or(rest.len());
        let (front, after) = rest.split_at(outside);
        if !front.is_empty() {
            piece(front, false);
        }
        let inside = run(after, longest, &class);
        if inside > 0 {
            piece(&after[..inside], true);
        }
        rest = &after[inside..];
    }
}

fn split_default(text: &str, word: &mut dyn FnMut(&str)) {
    let mut number = |t: &str, cut: bool| {
        if !cut {
            return word(t);
        }
        let mut rest = t;
        while !rest.is_empty() {
            let three = rest.as_bytes().windows(3).position(|w| w.iter().all(u8::is_ascii_digit));
            let (before, after) = rest.split_at(three.unwrap_or(rest.len()));
            if !before.is_empty() {
                word(before);
            }
            let (digits, after) = after.split_at(after.len().min(3));
            if !digits.is_empty() {
                word(digits);
            }
            rest = after;
        }
    };
    isolate(text, is_punctuation, usize::MAX, &mut |t, _| {
        scan(t, gpt2_word, &mut |w| isolate(w, is_number, usize::MAX, &mut number));
    });
}

fn llama3_word(text: &str, digits: usize) -> usize {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return 0 };
    let after = chars.as_str();
    let second = after.chars().next();
    if first == '\''
        && let Some(len) = contraction(after, true)
    {
        return 1 + len;
    }
    if is_letter(first) {
        return first.len_utf8() + run(after, usize::MAX, is_letter);
    }
    if is_number(first) {
        return run(text, digits, is_number);
    }
    if !is_newline(first) && second.is_some_and(is_letter) {
        return first.len_utf8() + run(after, usize::MAX, is_letter);
    }
    let lead = usize::from(first == ' ');
    let other = run(&text[lead..], usize::MAX, is_other);
    if other > 0 {
        let end = lead + other;
        return end + run(&text[end..], usize::MAX, is_newline);
    }
    let space = run(text, usize::MAX, char::is_whitespace);
    if let Some(newline) = text[..space].rfind(is_newline) {
        return newline + 1;
    }
    trailing_space(text, space)
}

fn gpt2_word(text: &str) -> usize {
    if let Some(after) = text.strip_prefix('\'')
        && let Some(len) = contraction(after, false)
    {
        return 1 + len;
    }
    let lead = usize::from(text.starts_with(' '));
    for class in [is_letter, is_number, is_other] {
        let len = run(&text[lead..], usize::MAX, class);
        if len > 0 {
            return lead + len;
        }
    }
    trailing_space(text, run(text, usize::MAX, char::is_whitespace))
}

/// `\s+(?!\S)|\s+`: a run of `space` bytes gives its last character to the word behind it.
fn trailing_space(text: &str, space: usize) -> usize {
    if space == text.len() {
        return space;
    }
    let last = text[..space].chars().next_back().map_or(0, char::len_utf8);
    if space > last { space - last } else { space }
}

/// Length of `s t re ve m ll d` at the front of what follows an apostrophe.
fn contraction(after: &str, any_case: bool) -> Option<usize> {
    let mut chars = after.chars().map(|c| if any_case { fold(c) } else { c });
    let (a, b) = (chars.next()?, chars.next());
    match (a, b) {
        ('s' | 't' | 'm' | 'd', _) => after.chars().next().map(char::len_utf8),
        ('r' | 'v', Some('e')) | ('l', Some('l')) => {
            Some(after.chars().take(2).map(char::len_utf8).sum())
        }
        _ => None,
    }
}

fn fold(c: char) -> char {
    if c == 'ſ' { 's' } else { c.to_ascii_lowercase() }
}

/// Bytes of the characters of `class` at the front, at most `longest` of them.
fn run(text: &str, longest: usize, class: impl Fn(char) -> bool) -> usize {
    text.chars().take(longest).take_while(|&c| class(c)).map(char::len_utf8).sum()
}

fn is_newline(c: char) -> bool {
    matches!(c, '\r' | '\n')
}

fn is_letter(c: char) -> bool {
    if c.is_ascii() { c.is_ascii_alphabetic() } else { LETTERS.contains(c) }
}

fn is_number(c: char) -> bool {
    c.is_numeric()
}

fn is_other(c: char) -> bool {
    !c.is_whitespace() && !is_letter(c) && !is_number(c)
}

fn is_punctuation(c: char) -> bool {
    PUNCTUATION.contains(c)
}

/// A Unicode class as ranges, read once from the regex engine, so that both agree.
struct Class(Vec<(u32, u32)>);

impl Class {
    fn of(pattern: &str) -> Self {
        let every: String = ('\0'..=char::MAX).collect();
        let regex = SysRegex::new(pattern).expect("the pattern is a constant class");
        let chars = |text: &str| {
            let first = text.chars().next().map_or(0, |c| c as u32);
            (first, text.chars().next_back().map_or(0, |c| c as u32))
        };
        Self(regex.find_iter(&every).map(|(start, end)| chars(&every[start..end])).collect())
    }

    fn contains(&self, c: char) -> bool {
        let at = self.0.partition_point(|&(_, last)| last < c as u32);
        self.0.get(at).is_some_and(|&(first, _)| first <= c as u32)
    }
}

static LETTERS: LazyLock<Class> = LazyLock::new(|| Class::of(r"\p{L}+"));
static PUNCTUATION: LazyLock<Class> = LazyLock::new(|| Class::of(r"[\p{P}\$\+<=>\^~\|]+"));

/// Llama 3's `tokenizer.json`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's `tokenizer.json`.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same as [`LLAMA3`] for engines without inline flags.
const LLAMA3_SPELLED: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same as [`QWEN2`] for engines without inline flags.
const QWEN2_SPELLED: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2's pattern, also what a `ByteLevel` pre-tokenizer does by itself.
pub(super) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

#[cfg(test)]
mod tests {
    use super::*;

    fn by_regex(regex: &SysRegex, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        let mut end = 0;
        for (a, b) in regex.find_iter(text) {
            assert_eq!(a, end, "the pattern leaves nothing out");
            out.push(text[a..b].to_owned());
            end = b;
        }
        assert_eq!(end, text.len());
        out
    }

    fn by_scanner(splitter: Splitter, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        splitter.split(text, &mut |w| out.push(w.to_owned()));
        out
    }

    #[test]
    fn scanners_equal_their_patterns() {
        let alphabet: Vec<char> =
            "aZſéß中م१٣Ⅷ0129  \t\n\r\u{a0}\u{3000}\u{85}'''sStTlLrRvVeEmMdD.,<|_~$`\u{301}\u{200d}👍\u{0}"
                .chars()
                .collect();
        let known = [LLAMA3, QWEN2, GPT2].map(|pattern| {
            let splitter = Splitter::by_pattern(pattern).expect("known");
            (splitter, SysRegex::new(pattern).expect("valid"))
        });
        let mut state = 12345u64;
        for round in 0..20_000 {
            let len = round % 24;
            let text: String = (0..len)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    alphabet[(state >> 33) as usize % alphabet.len()]
                })
                .collect();
            for (splitter, regex) in &known {
                assert_eq!(by_scanner(*splitter, &text), by_regex(regex, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn splitters_lose_nothing() {
        let text = "Hello  world!! 12345 can't\n\n \t x٣٤٥ $$~~ 12-345 ";
        for name in ["default", "smollm", "gpt-2", "qwen2", "llama-bpe"] {
            let (splitter, _) = Splitter::by_gguf_name(name).expect("known");
            assert_eq!(by_scanner(splitter, text).concat(), text, "{name}");
        }
        assert!(Splitter::by_gguf_name("nonsense").is_none());
    }
}
