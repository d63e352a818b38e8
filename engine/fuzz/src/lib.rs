//! What each fuzz target does with its bytes. Also compiled into the ordinary test
//! `regressions`, which gives every kept input to its target again.
//!
//! A target panics when something does not hold; it returns for every input that is refused.

pub mod chat;
pub mod files;
pub mod grammar;
pub mod text;

#[path = "../../tests/text/goldens.rs"]
pub mod goldens;

/// A target: its name, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// Every target, by name.
pub const TARGETS: [Target; 13] = [
    ("detokenize", text::detokenize),
    ("encode", text::encode),
    ("gguf", files::gguf),
    ("gguf_tokenizer", text::gguf_tokenizer),
    ("grammar", grammar::grammar),
    ("hf_config", files::hf_config),
    ("hf_text", files::hf_text),
    ("requests", chat::requests),
    ("safetensors", files::safetensors),
    ("schema", grammar::schema),
    ("template", chat::template),
    ("tokenizer_json", text::tokenizer_json),
    ("tool_calls", chat::tool_calls),
];

/// Leaves panics that the engine catches to the engine: libFuzzer's own hook ends the process at
/// each one. What nobody catches still ends it.
#[allow(dead_code, reason = "tests and seeds have hooks of their own")]
pub fn let_caught_panics_pass() {
    std::panic::set_hook(Box::new(|_| {}));
}

/// The parts of an input that has several: they end with a byte that no UTF-8 has.
pub fn parts<const N: usize>(bytes: &[u8]) -> [&[u8]; N] {
    let mut parts = bytes.splitn(N, |&byte| byte == END);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// What ends a part of an input.
pub const END: u8 = 0xff;
