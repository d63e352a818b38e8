//! Tokenizers, chat templates and their goldens, which `make.py` makes with the reference
//! implementations.

mod goldens;
mod hostile;

use engine::chat::{Calendar, ChatInput, ChatTemplate, TemplateError};
use engine::tokenizer::{Guard, Tokenizer};
use goldens::{gguf, goldens, hf};
use serde_json::Value;

fn ids(value: &Value) -> Vec<u32> {
    let items = value.as_array().expect("ids").iter();
    items.map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// Every difference, so that one run shows them all.
fn differences(name: &str, tokenizer: &Tokenizer, cases: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, text: &str, got: String, expect: String| {
        if got != expect {
            let text: String = text.chars().take(60).collect();
            found.push(format!("{name}, {what} of {text:?}\n  got {got}\n  not {expect}"));
        }
    };
    for case in cases.as_array().expect("cases") {
        let text = case["text"].as_str().expect("a text");
        let plain = ids(&case["ids"]);
        let got = tokenizer.encode(text, false).expect("encodes");
        compare("ids", text, format!("{got:?}"), format!("{plain:?}"));
        let around = tokenizer.encode(text, true).expect("encodes");
        compare("ids around", text, format!("{around:?}"), format!("{:?}", ids(&case["around"])));
        let decoded = tokenizer.decode(&plain, false);
        compare("text", text, decoded, case["decoded"].as_str().expect("a text").to_owned());
        if case["special"].is_array() {
            let guard = Guard::new(tokenizer, [text]).expect("free marks");
            let special = tokenizer.encode_template(text, &guard).expect("encodes");
            compare(
                "special",
                text,
                format!("{special:?}"),
                format!("{:?}", ids(&case["special"])),
            );
            let protected = tokenizer.encode_template(&guard.protect(text), &guard).expect("ids");
            compare("protected", text, format!("{protected:?}"), format!("{plain:?}"));
        }
    }
    found
}

#[test]
fn ids_equal_the_reference() {
    let goldens = goldens("tokenizers");
    let mut found = Vec::new();
    for name in ["llama3", "qwen2", "gpt2", "metaspace"] {
        let golden = &goldens[name];
        found.extend(differences(name, &hf(golden), &golden["cases"]));
        if golden["gguf"].is_object() {
            let name = format!("{name} from metadata");
            found.extend(differences(&name, &gguf(golden), &golden["cases"]));
        }
    }
    let golden = &goldens["spm"];
    found.extend(differences("spm", &gguf(golden), &golden["cases"]));
    assert!(found.is_empty(), "{} differences\n{}", found.len(), found.join("\n"));
}

fn template(name: &str) -> ChatTemplate {
    let source = match name {
        "hermes.jinja" => include_str!("templates/hermes.jinja"),
        "llama3.jinja" => include_str!("templates/llama3.jinja"),
        "mistral.jinja" => include_str!("templates/mistral.jinja"),
        "oddities.jinja" => include_str!("templates/oddities.jinja"),
        "qwen3.jinja" => include_str!("templates/qwen3.jinja"),
        other => panic!("no template {other}"),
    };
    ChatTemplate::new(source).expect("compiles")
}

#[test]
fn prompts_equal_the_reference() {
    let tokenizer = hf(&goldens("tokenizers")["llama3"]);
    let mut found = Vec::new();
    for case in goldens("chats").as_array().expect("cases") {
        let name = case["template"].as_str().expect("a name");
        let input = ChatInput {
            messages: case["messages"].as_array().expect("messages"),
            tools: case["tools"].as_array().expect("tools"),
            documents: &[],
            add_generation_prompt: case["add_generation_prompt"] == true,
            variables: case["kwargs"].as_object().expect("variables"),
            now: Calendar::from_unix_s(NOW_UNIX_S),
        };
        let got = template(name).render(&tokenizer, &input);
        let same = match (&got, case["text"].as_str(), case["error"].as_str()) {
            (Ok(prompt), Some(text), _) => prompt.text == text,
            (Err(TemplateError::Refused(reason)), _, Some(error)) => reason == error,
            _ => false,
        };
        if !same {
            let expect =
                case["text"].as_str().unwrap_or_else(|| case["error"].as_str().expect("a reason"));
            let got = got.map_or_else(|e| format!("error {e}"), |prompt| prompt.text);
            found.push(format!("{name} {}\n--- got\n{got}\n--- not\n{expect}", case["number"]));
        }
    }
    assert!(found.is_empty(), "{} differences\n{}", found.len(), found.join("\n"));
}

/// 2025-03-09T07:05:03Z, the moment that make.py fixes.
const NOW_UNIX_S: i64 = 1_741_503_903;
