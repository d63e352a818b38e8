//! Damaged files: refused with a sentence or used, never a panic, never a hang. The same inputs as
//! the fuzz targets get, from a fixed generator.

use engine::chat::{Calendar, ChatInput, ChatTemplate, ToolFormat, ToolParser};
use engine::tokenizer::Tokenizer;
use engine::weights::HfTokenizer;
use serde_json::{Map, Value, json};

use super::goldens::{gguf_metadata, goldens, hf};

/// PCG without its permutation: enough to choose places.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below.max(1)
    }
}

/// A few edits: bytes changed, cut, doubled, or replaced by a word of `dictionary`.
fn mutated(dice: &mut Dice, seed: &[u8], dictionary: &[&str]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..1 + dice.roll(4) {
        let at = dice.roll(bytes.len());
        let len = dice.roll(1 + 16.min(bytes.len() - at));
        match dice.roll(5) {
            0 => bytes[at] ^= 1 << dice.roll(8),
            1 => drop(bytes.drain(at..at + len)),
            2 => {
                let copy = bytes[at..at + len].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => {
                let word = dictionary[dice.roll(dictionary.len())].bytes();
                bytes.splice(at..at + len, word);
            }
        }
        if bytes.is_empty() {
            bytes.push(b'{');
        }
    }
    bytes
}

fn exercise(tokenizer: &Tokenizer) {
    for text in ["", "Hello world 123 \u{e9}\u{1f600}<|im_start|>", "   \n\n a"] {
        for around in [false, true] {
            if let Ok(ids) = tokenizer.encode(text, around) {
                tokenizer.decode(&ids, around);
            }
        }
    }
    for id in [0, 1, 299, tokenizer.vocab_size() as u32, u32::MAX] {
        tokenizer.token_bytes(id);
        tokenizer.is_special(id);
    }
}

#[test]
fn damaged_tokenizer_json() {
    let words = [
        "null",
        "-1",
        "4294967295",
        "18446744073709551616",
        "1e99",
        "\"\"",
        "[]",
        "{}",
        "true",
        "\"type\":",
        "\"ByteLevel\"",
        "\"Metaspace\"",
        "\"Sequence\"",
        "\"\\u0000\"",
        "\\p{L}",
        "(((",
        "\"Split\"",
        "\"Unigram\"",
        "\"WordPiece\"",
        "\"Digits\"",
        "\u{120}",
        ",",
        "\"",
    ];
    let goldens = goldens("tokenizers");
    for name in ["llama3", "gpt2", "metaspace"] {
        let whole = goldens[name]["json"].as_str().expect("a text");
        // most of a vocabulary is alike: the edits go where the structure is
        let (head, model) = whole.split_at(whole.find("\"vocab\"").expect("a vocabulary"));
        let mut dice = Dice(name.len() as u64);
        for round in 0..150 {
            let text = match round % 3 {
                0 => mutated(&mut dice, whole.as_bytes(), &words),
                _ => [&mutated(&mut dice, head.as_bytes(), &words), model.as_bytes()].concat(),
            };
            let files = HfTokenizer {
                tokenizer_json: text,
                tokenizer_config: Map::new(),
                special_tokens_map: Map::new(),
                eos_ids: vec![u32::MAX, 5],
                bos_id: Some(u32::MAX),
            };
            if let Ok(tokenizer) = Tokenizer::from_hf(&files) {
                exercise(&tokenizer);
            }
        }
    }
}

#[test]
fn damaged_metadata() {
    let goldens = goldens("tokenizers");
    for name in ["llama3", "spm"] {
        let mut dice = Dice(3);
        for _ in 0..150 {
            let mut metadata = gguf_metadata(&goldens[name]);
            for _ in 0..1 + dice.roll(3) {
                let at = dice.roll(metadata.tokens.len());
                match dice.roll(7) {
                    0 => metadata.tokens[at].clear(),
                    1 => metadata.tokens[at] = "\u{2581}<0x4".to_owned(),
                    2 => metadata.tokens.truncate(at),
                    3 => metadata.token_types.iter_mut().skip(at).step_by(7).for_each(|t| *t = 6),
                    4 => metadata.scores.iter_mut().skip(at).for_each(|s| *s = f32::NAN),
                    5 => metadata.merges.iter_mut().take(at).for_each(|m| m.push(' ')),
                    _ => metadata.bos = Some(at as u32 * 1_000),
                }
                if metadata.tokens.is_empty() {
                    break;
                }
            }
            if let Ok(tokenizer) = Tokenizer::from_gguf(&metadata) {
                exercise(&tokenizer);
            }
        }
    }
}

#[test]
fn damaged_templates() {
    let tokenizer = hf(&goldens("tokenizers")["llama3"]);
    let words = [
        "{%",
        "%}",
        "{{",
        "}}",
        "{#",
        "#}",
        "-%}",
        "{% endfor %}",
        "{% set ",
        "{% for x in ",
        "'",
        "\"",
        " | ",
        "~",
        "(",
        ")",
        "[::-1]",
        "**",
        "99999999999",
        "{% macro m(a",
        "{% raw %}",
        "=",
        "messages",
        "loop",
        "range(99999)",
        "{% generation %}",
        "{% call ",
        ".append(",
        "\u{1f600}",
    ];
    let messages = [
        json!({"role": "user", "content": "hi"}),
        json!({"role": "assistant", "content": [1, null], "tool_calls": [{"function": 3}, []]}),
        json!("no object"),
        json!({"role": ["x"], "content": {"a": 1.5}}),
    ];
    let tools = [json!({"function": {"name": "f", "parameters": {"type": "object"}}}), Value::Null];
    let sources = [
        include_str!("templates/hermes.jinja"),
        include_str!("templates/llama3.jinja"),
        include_str!("templates/mistral.jinja"),
        include_str!("templates/oddities.jinja"),
        include_str!("templates/qwen3.jinja"),
    ];
    let mut dice = Dice(11);
    for round in 0..600 {
        let text = mutated(&mut dice, sources[round % 5].as_bytes(), &words);
        let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(&text)) else { continue };
        let _ = ToolFormat::detect(&template, &tokenizer);
        for count in [1, messages.len()] {
            let input = ChatInput {
                messages: &messages[..count],
                tools: &tools[..round % 3],
                documents: &[],
                add_generation_prompt: true,
                variables: &Map::new(),
                now: Calendar::from_unix_s(i64::MIN / 4),
            };
            let _ = template.render(&tokenizer, &input);
        }
    }
}

#[test]
fn damaged_calls() {
    let words =
        ["<tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "{", "}", "\"", "\\", "é"];
    let seed = "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":[1,\"x\"]}}</tool_call>[TOOL_CALLS]f[ARGS]{}";
    let mut dice = Dice(5);
    for _ in 0..2_000 {
        let text = mutated(&mut dice, seed.as_bytes(), &words);
        let text = String::from_utf8_lossy(&text);
        for format in [
            ToolFormat::Hermes,
            ToolFormat::Llama3,
            ToolFormat::MistralArray,
            ToolFormat::MistralArgs,
        ] {
            let mut parser = ToolParser::new(format, vec!["f".to_owned()], b"");
            for piece in text.split_inclusive([' ', '{', '"']) {
                parser.push(piece);
            }
            parser.finish();
        }
    }
}
