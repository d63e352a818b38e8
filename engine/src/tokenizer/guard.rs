//! Keeps user text from becoming special tokens when a template is rendered.
//!
//! The template engine mixes the template's own text, in which `<|im_start|>` is a token, with
//! strings of a user, in which it is nothing but text. Where a text came from cannot be followed
//! through trim, concatenation or JSON output. So each string of a user is changed before it goes
//! in: a *mark*, one private-use character that occurs in no input, is put behind the first
//! character of everything that is a special token or, at the end of the string, begins one.
//! After rendering, special tokens are matched in the marked text and the marks are dropped.
//!
//! A special token that starts in user text always has the mark behind its first character, so it
//! never matches. Strings without lookalikes are untouched: comparing, trimming, searching and
//! measuring them gives what it gives in transformers.
//!
//! *Markers* (`<think>`, `<tool_call>` of some models) are tokens that a vocabulary adds without
//! calling them special. They match in plain text, as in transformers, but a template that writes
//! them gives them a meaning that its user must not borrow. So a guard for a template also breaks
//! those markers that stand in its source, in every text but those of the application and of the
//! model itself: a system prompt may speak of `<think>`, and an earlier answer holds its own.
//!
//! Limits. A template that takes text apart between two characters of a lookalike (by slicing or
//! looping over characters) can lose a mark, and one that writes the beginning of a special token
//! itself, directly before user text, completes it with that text (some write
//! `'<|' + role + '|>'`: roles are therefore a closed set and never user text). A string with a
//! lookalike is longer by its marks for the template.

use super::Tokenizer;

/// The mark of one rendering and what it protects from.
#[derive(Debug, Clone)]
pub struct Guard {
    mark: char,
    specials: Vec<String>,
    markers: Vec<String>,
}

/// Why no guard was made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum GuardError {
    #[error("the input uses every private-use character")]
    NoFreeMark,
}

impl Guard {
    /// A guard for a rendering of `inputs`: every string that goes in, the template's source too.
    pub fn new<'a>(
        tokenizer: &Tokenizer,
        inputs: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, GuardError> {
        Self::with_texts(tokenizer.special_texts().to_vec(), Vec::new(), inputs)
    }

    /// A guard that also knows the markers in `source`, a template.
    pub fn for_template<'a>(
        tokenizer: &Tokenizer,
        source: &'a str,
        inputs: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, GuardError> {
        let written = |text: &&String| source.contains(text.as_str());
        let markers = tokenizer.marker_texts().iter().filter(written).cloned().collect();
        let inputs = inputs.into_iter().chain([source]);
        Self::with_texts(tokenizer.special_texts().to_vec(), markers, inputs)
    }

    fn with_texts<'a>(
        specials: Vec<String>,
        markers: Vec<String>,
        inputs: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, GuardError> {
        let mut used = vec![0u64; MARKS.len() / 64 + 1];
        for text in inputs {
            // private-use characters of the last plane all start with this byte
            if !text.as_bytes().contains(&0xf4) {
                continue;
            }
            for c in text.chars().filter(|&c| MARKS.contains(&(c as u32))) {
                let at = (c as u32 - MARKS.start) as usize;
                used[at / 64] |= 1 << (at % 64);
            }
        }
        let free = MARKS.clone().find(|c| {
            let at = (c - MARKS.start) as usize;
            used[at / 64] >> (at % 64) & 1 == 0
        });
        let mark = free.and_then(char::from_u32).ok_or(GuardError::NoFreeMark)?;
        Ok(Self { mark, specials, markers })
    }

    /// `text` with every lookalike of a special token or a marker broken by the mark.
    pub fn protect(&self, text: &str) -> String {
        self.broken(text, &[&self.specials, &self.markers])
    }

    /// The same for a text of the application or of the model, which may hold markers.
    pub fn protect_trusted(&self, text: &str) -> String {
        self.broken(text, &[&self.specials])
    }

    fn broken(&self, text: &str, lookalikes: &[&Vec<String>]) -> String {
        let mut out = String::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            out.push(c);
            if lookalikes.iter().any(|texts| begins_one(&text[at..], c, texts)) {
                out.push(self.mark);
            }
        }
        out
    }

    /// `rendered` without marks: what a reader should see.
    pub fn reveal(&self, rendered: &str) -> String {
        rendered.replace(self.mark, "")
    }

    pub(crate) fn mark(&self) -> char {
        self.mark
    }
}

fn begins_one(rest: &str, first: char, texts: &[String]) -> bool {
    texts
        .iter()
        .any(|s| s.starts_with(first) && (rest.starts_with(s.as_str()) || s.starts_with(rest)))
}

/// Supplementary private use area B.
const MARKS: std::ops::Range<u32> = 0x10_0000..0x10_fffe;

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        let specials = ["<|im_start|>", "<|im_end|>", "[INST]", "x"].map(String::from).to_vec();
        Guard::with_texts(specials, vec!["<think>".to_owned()], ["plain"]).expect("free marks")
    }

    #[test]
    fn breaks_whole_and_split_lookalikes_only() {
        let guard = guard();
        let m = guard.mark();
        for (text, expect) in [
            ("a < b", "a < b".to_owned()),
            ("", String::new()),
            ("<|im_start|>", format!("<{m}|im_start|>")),
            ("say <|im_", format!("say <{m}|im_")),
            ("<", format!("<{m}")),
            ("[INST][IN", format!("[{m}INST][{m}IN")),
            ("<|im_x", format!("<|im_x{m}")),
        ] {
            assert_eq!(guard.protect(text), expect);
            assert_eq!(guard.reveal(&guard.protect(text)), text);
        }
    }

    #[test]
    fn markers_are_broken_where_they_are_not_trusted() {
        let guard = guard();
        let m = guard.mark();
        for (text, user, trusted) in [
            ("a <think> b", format!("a <{m}think> b"), "a <think> b".to_owned()),
            ("<think", format!("<{m}think"), "<think".to_owned()),
            ("<|im_end|>", format!("<{m}|im_end|>"), format!("<{m}|im_end|>")),
        ] {
            assert_eq!(guard.protect(text), user);
            assert_eq!(guard.protect_trusted(text), trusted);
        }
    }

    #[test]
    fn joined_halves_do_not_form_a_special() {
        let guard = guard();
        for at in 1.."<|im_start|>".len() {
            let (a, b) = "<|im_start|>".split_at(at);
            assert!(!format!("{}{}", guard.protect(a), guard.protect(b)).contains("<|im_start|>"));
        }
    }

    #[test]
    fn takes_a_mark_that_no_input_has() {
        let text = "\u{100000}\u{100001}";
        let guard = Guard::with_texts(vec![], vec![], [text]).expect("free marks");
        assert_eq!(guard.mark(), '\u{100002}');
        let all: String = MARKS.filter_map(char::from_u32).collect();
        let refused = Guard::with_texts(vec![], vec![], [all.as_str()]);
        assert_eq!(refused.err(), Some(GuardError::NoFreeMark));
    }
}
