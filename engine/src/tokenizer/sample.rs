//! A small vocabulary for tests.

use super::Tokenizer;
use crate::weights::GgufTokenizer;

/// 256 bytes, some words, and the special tokens of the published families from id 300 on.
pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::from_gguf(&metadata()).expect("consistent")
}

pub(crate) fn metadata() -> GgufTokenizer {
    let mut tokens: Vec<String> = (0..=255u8).map(|byte| char_of(byte).to_string()).collect();
    let mut merges = Vec::new();
    for (left, right) in [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")] {
        merges.push(format!("{left} {right}"));
        tokens.push(format!("{left}{right}"));
    }
    let mut token_types = vec![1; tokens.len()];
    tokens.resize_with(300, || "unused".to_owned());
    token_types.resize(300, 5);
    for special in SPECIALS {
        tokens.push((*special).to_owned());
        token_types.push(3);
    }
    GgufTokenizer {
        model: "gpt2".to_owned(),
        pre: Some("llama-bpe".to_owned()),
        scores: Vec::new(),
        token_types,
        merges,
        bos: Some(300),
        eos: Some(301),
        eot: Some(302),
        eom: None,
        unk: None,
        sep: None,
        pad: None,
        add_bos: Some(true),
        add_eos: None,
        add_space_prefix: None,
        remove_extra_whitespaces: None,
        tokens,
    }
}

fn char_of(byte: u8) -> char {
    (0..0x200)
        .filter_map(char::from_u32)
        .find(|&c| super::bpe::byte_of_char(c) == Some(byte))
        .expect("every byte has a character")
}

const SPECIALS: &[&str] = &[
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[INST]",
    "[/INST]",
];
