//! A byte-level vocabulary without merges but a few, for models whose text does not matter.

use serde_json::{Value, json};

/// Tokens: 256 bytes, a few merges, control tokens and unused ones.
pub const VOCAB: usize = 320;
/// `<|begin|>`
pub const BOS: u32 = 300;
/// `<|im_end|>`
pub const EOS: u32 = 302;
/// The chat template of all these models.
pub const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] \
    }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The pieces by id, in the alphabet of byte-level BPE.
pub fn tokens() -> Vec<String> {
    let mut tokens: Vec<String> = (0..=255u8).map(|byte| letter(byte).to_string()).collect();
    tokens.extend(MERGES.map(|(left, right)| format!("{left}{right}")));
    while tokens.len() < BOS as usize {
        tokens.push(format!("<|unused{}|>", tokens.len()));
    }
    tokens.extend(["<|begin|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned));
    while tokens.len() < VOCAB {
        tokens.push(format!("<|unused{}|>", tokens.len()));
    }
    tokens
}

/// The kinds of the pieces, as GGUF counts them.
pub fn kinds() -> Vec<i32> {
    let plain = 256 + MERGES.len();
    let kind = |id: usize| match id {
        id if id < plain => 1,
        300..=302 => 3,
        _ => 5,
    };
    (0..VOCAB).map(kind).collect()
}

/// The merges, best first, as GGUF writes them.
pub fn merges() -> Vec<String> {
    MERGES.map(|(left, right)| format!("{left} {right}")).to_vec()
}

/// The same vocabulary as a `tokenizer.json`.
pub fn tokenizer_json() -> Value {
    let kinds = kinds();
    let tokens = tokens();
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| kinds[*id] != 3)
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let added: Vec<Value> = (300..=302)
        .map(|id: usize| {
            json!({
                "id": id, "content": tokens[id], "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        })
        .collect();
    let merges: Vec<Value> = MERGES.iter().map(|(left, right)| json!([left, right])).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true,
        },
        "post_processor": null,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true,
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    })
}

/// The printable letter that stands for a byte: itself where it is printable Latin-1, else the
/// next free one from U+0100 on.
fn letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match printable(byte) {
        true => char::from(byte),
        false => {
            let nth = (0..byte).filter(|b| !printable(*b)).count() as u32;
            char::from_u32(0x100 + nth).expect("below U+0200")
        }
    }
}

const MERGES: [(&str, &str); 8] = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("\u{120}", "w"),
    ("o", "r"),
    ("\u{120}w", "or"),
    ("l", "d"),
];
