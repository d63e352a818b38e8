//! What Hugging Face files mean where they leave something out or say it in two ways.

use serde_json::{Value, json};

use crate::model::{Architecture, DecoderConfig, RopeScaling};
use crate::weights::testing::{self, HfFiles};
use crate::weights::{Format, ModelSource};

fn open(architecture: Architecture, change: impl Fn(&mut HfFiles)) -> ModelSource {
    let directory = tempfile::tempdir().expect("a directory");
    let mut files = testing::hf(&testing::smallest(architecture), Format::BF16, 1);
    change(&mut files);
    files.write(directory.path(), 1).expect("written");
    ModelSource::open(directory.path()).expect("opens")
}

fn config(architecture: Architecture, changes: Value) -> DecoderConfig {
    let set = |files: &mut HfFiles| {
        let map = files.config.as_object_mut().expect("an object");
        for (key, value) in changes.as_object().expect("an object") {
            match value.as_str() {
                Some("absent") => map.remove(key),
                _ => map.insert(key.clone(), value.clone()),
            };
        }
    };
    open(architecture, set).config
}

#[test]
fn sliding_windows() {
    use Architecture::*;
    let table = [
        (Mistral, json!({ "sliding_window": 8 }), Some(8)),
        (Mistral, json!({ "sliding_window": null }), None),
        (Mistral, json!({ "sliding_window": "absent" }), Some(4096)),
        (Llama, json!({ "sliding_window": 8 }), None),
        (Mixtral, json!({ "sliding_window": "absent" }), None),
        (Qwen2, json!({ "sliding_window": 8 }), None),
        (Qwen2, json!({ "sliding_window": 8, "use_sliding_window": true }), None),
        (
            Qwen2,
            json!({ "sliding_window": 8, "use_sliding_window": true, "max_window_layers": 0 }),
            Some(8),
        ),
        (
            Qwen3,
            json!({
                "sliding_window": 8, "use_sliding_window": true,
                "layer_types": ["sliding_attention"],
            }),
            Some(8),
        ),
    ];
    for (architecture, changes, expected) in table {
        assert_eq!(config(architecture, changes.clone()).window(0), expected, "{changes}");
    }
}

#[test]
fn rope_parameters() {
    let table = [
        (json!({ "rope_theta": "absent" }), 10_000.0, RopeScaling::None),
        (
            json!({
                "rope_theta": "absent",
                "rope_parameters": { "rope_type": "default", "rope_theta": 5e5 },
            }),
            5e5,
            RopeScaling::None,
        ),
        (
            json!({ "rope_scaling": { "type": "linear", "factor": 2 } }),
            10_000.0,
            RopeScaling::Linear { factor: 2.0 },
        ),
        (
            json!({
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8, "low_freq_factor": 1,
                    "high_freq_factor": 4,
                },
            }),
            5e5,
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_context: 512,
            },
        ),
    ];
    for (changes, theta, scaling) in table {
        let rope = config(Architecture::Llama, changes.clone()).rope;
        assert_eq!((rope.theta, rope.scaling), (theta, scaling), "{changes}");
    }
    let mixtral = config(Architecture::Mixtral, json!({ "rope_theta": "absent" }));
    assert_eq!(mixtral.rope.theta, 1e6);
    let partial = config(Architecture::Llama, json!({ "partial_rotary_factor": 0.5 }));
    assert_eq!(partial.rope.dims, 4);
}

#[test]
fn chat_templates() {
    let named = open(Architecture::Llama, |files| {
        files.tokenizer_config["chat_template"] = json!([
            { "name": "tool_use", "template": "T" }, { "name": "default", "template": "D" },
        ]);
    });
    assert_eq!(named.chat_template.as_deref(), Some("D"));
    assert_eq!(named.named_templates, [("tool_use".to_owned(), "T".to_owned())]);
    let directory = tempfile::tempdir().expect("a directory");
    let files = testing::hf(&testing::smallest(Architecture::Llama), Format::BF16, 1);
    files.write(directory.path(), 1).expect("written");
    std::fs::write(directory.path().join("chat_template.jinja"), "J").expect("written");
    let file = ModelSource::open(directory.path()).expect("opens");
    assert_eq!(file.chat_template.as_deref(), Some("J"));
}

#[test]
fn tokens_that_end() {
    let table = [
        (json!({}), json!({ "eos_token_id": 5 }), vec![5]),
        (json!({ "eos_token_id": [7, 8] }), json!({ "eos_token_id": 5 }), vec![7, 8]),
        (json!({}), json!({ "eos_token_id": null }), vec![]),
    ];
    for (generation, config, expected) in table {
        let source = open(Architecture::Llama, |files| {
            files.generation_config = generation.clone();
            files.config["eos_token_id"] = config["eos_token_id"].clone();
        });
        assert_eq!(source.eos_ids, expected);
    }
}
