//! The tokenizers that `make.py` wrote, as the readers of models take them.

use engine::tokenizer::Tokenizer;
use engine::weights::{GgufTokenizer, HfTokenizer};
use serde_json::Value;

pub fn goldens(name: &str) -> Value {
    let text = match name {
        "tokenizers" => include_str!("tokenizers.json"),
        _ => include_str!("chats.json"),
    };
    serde_json::from_str(text).expect("make.py writes JSON")
}

pub fn hf(golden: &Value) -> Tokenizer {
    let object = |key: &str| golden[key].as_object().cloned().unwrap_or_default();
    let files = HfTokenizer {
        tokenizer_json: golden["json"].as_str().expect("a text").as_bytes().to_vec(),
        tokenizer_config: object("config"),
        special_tokens_map: object("none"),
        eos_ids: Vec::new(),
        bos_id: None,
    };
    Tokenizer::from_hf(&files).expect("a valid tokenizer.json")
}

pub fn gguf(golden: &Value) -> Tokenizer {
    Tokenizer::from_gguf(&gguf_metadata(golden)).expect("valid metadata")
}

pub fn gguf_metadata(golden: &Value) -> GgufTokenizer {
    let parts = &golden["gguf"];
    let texts = |key: &str| -> Vec<String> {
        let items = parts[key].as_array().expect("an array").iter();
        items.map(|v| v.as_str().expect("a text").to_owned()).collect()
    };
    let numbers = |key: &str| -> Vec<f64> {
        parts[key].as_array().expect("an array").iter().filter_map(Value::as_f64).collect()
    };
    let id = |key: &str| parts[key].as_u64().map(|id| id as u32);
    GgufTokenizer {
        model: parts["model"].as_str().expect("a text").to_owned(),
        pre: parts["pre"].as_str().map(str::to_owned),
        tokens: texts("tokens"),
        scores: numbers("scores").into_iter().map(|s| s as f32).collect(),
        token_types: numbers("token_types").into_iter().map(|t| t as i32).collect(),
        merges: texts("merges"),
        bos: id("bos"),
        eos: id("eos"),
        eot: None,
        eom: None,
        unk: id("unk"),
        sep: None,
        pad: None,
        add_bos: parts["add_bos"].as_bool(),
        add_eos: None,
        add_space_prefix: parts["add_space_prefix"].as_bool(),
        remove_extra_whitespaces: None,
    }
}
