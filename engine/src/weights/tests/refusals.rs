//! What broken files are told. The sentences are the product: file, place, reason.

use std::sync::OnceLock;

use serde_json::json;

use crate::model::Architecture;
use crate::weights::testing::{self, GgufFile, HfFiles, Meta};
use crate::weights::{Format, ModelSource};

fn whole() -> GgufFile {
    static WHOLE: OnceLock<GgufFile> = OnceLock::new();
    let make = || testing::gguf(&testing::tiny(Architecture::Llama), Format::Q8_0, 1);
    WHOLE.get_or_init(make).clone()
}

fn refusal(bytes: Vec<u8>) -> String {
    match ModelSource::from_bytes("m.gguf", bytes) {
        Ok(_) => "opened".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// Each change to a good file, and the end of the sentence that it gets.
type Table<'a, T> = &'a [(fn(&mut T), &'a str)];

fn check_gguf(table: Table<'_, GgufFile>) {
    for (change, expected) in table {
        let mut file = whole();
        change(&mut file);
        assert_eq!(refusal(file.bytes()), format!("m.gguf: {expected}"));
    }
}

#[test]
fn gguf_containers() {
    check_gguf(&[
        (|f| f.version = 1, "GGUF version 1 is not supported; supported are 2 and 3"),
        (|f| f.version = 3u32.swap_bytes(), "a big-endian GGUF file; convert it to little endian"),
        (
            |f| f.metadata.push(("general.name".to_owned(), Meta::Bool(true))),
            "metadata key `general.name` is there twice",
        ),
        (|f| f.set("x", Meta::Raw(13, vec![])), "`x` has the unknown value type 13"),
        (|f| f.set("x", Meta::Raw(7, vec![2])), "the value of `x` is a boolean that is not 0 or 1"),
        (
            |f| {
                let nested =
                    |inner: Vec<u8>| [&[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][..], &inner].concat();
                f.set("x", Meta::Raw(9, nested(nested(nested(nested(vec![0; 12]))))));
            },
            "the array of `x` is nested more than 4 deep",
        ),
        (
            |f| f.set("general.alignment", Meta::U32(24)),
            "`general.alignment` is 24; expected a power of two up to 1048576",
        ),
    ]);
    let not = refusal(b"PK\x03\x04 and more".to_vec());
    assert_eq!(
        not,
        "m.gguf: not a GGUF file: it begins with 0x504b0304 (of a Hugging Face model, give the directory)"
    );
    let empty = refusal(Vec::new());
    assert_eq!(
        empty,
        "m.gguf: the file ends too early: the magic number needs 4 bytes at 0, the file has 0"
    );
    let mut many = whole().bytes();
    many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(
        refusal(many),
        "m.gguf: it promises 18446744073709551615 tensors; at most 1048576 are read"
    );
}

#[test]
fn gguf_tensors() {
    check_gguf(&[
        (
            |f| f.tensor("output_norm.weight").name = "output.weight".to_owned(),
            "tensor `output.weight`: there are two of this name",
        ),
        (
            |f| f.tensor("blk.0.attn_q.weight").kind = 16,
            "tensor `blk.0.attn_q.weight`: its type is IQ2_XXS (16); supported are F32, F16, \
             BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS",
        ),
        (
            |f| f.tensor("blk.0.attn_q.weight").dims = vec![],
            "tensor `blk.0.attn_q.weight`: it has 0 dimensions; expected 1 to 4",
        ),
        (
            |f| f.tensor("blk.0.attn_q.weight").dims = vec![256, 0],
            "tensor `blk.0.attn_q.weight`: its shape [256, 0] has a zero",
        ),
        (
            |f| f.tensor("blk.0.attn_q.weight").dims = vec![250, 256],
            "tensor `blk.0.attn_q.weight`: its rows of 250 values do not fill Q8_0 blocks of 32",
        ),
        (
            |f| f.tensor("blk.0.attn_q.weight").dims = vec![1 << 40, 1 << 40],
            "tensor `blk.0.attn_q.weight`: its shape [1099511627776, 1099511627776] is too large",
        ),
        (
            |f| f.tensor("blk.0.attn_q.weight").offset = Some(33),
            "tensor `blk.0.attn_q.weight`: its offset 33 is not a multiple of 32",
        ),
        (
            |f| f.tensor("blk.0.attn_norm.weight").offset = Some(0),
            "tensor `blk.0.attn_norm.weight`: its data overlaps that of `token_embd.weight`",
        ),
        (
            |f| f.tensor("blk.1.attn_k.weight").dims = vec![256, 64],
            "tensor `blk.1.attn_k.weight`: its shape is [64, 256]; the description asks for \
             [128, 256]",
        ),
        (
            |f| f.tensors.retain(|t| t.name != "blk.1.ffn_down.weight"),
            "tensor `blk.1.ffn_down.weight` is missing",
        ),
        (
            |f| f.tensor("blk.1.ffn_down.weight").name = "blk.1.attn_sinks.weight".to_owned(),
            "tensor `blk.1.ffn_down.weight` is missing",
        ),
        (
            |f| {
                let mut extra = f.tensor("output_norm.weight").clone();
                extra.name = "blk.0.attn_sinks.weight".to_owned();
                f.tensors.push(extra);
            },
            "tensor `blk.0.attn_sinks.weight`: a llama model as described has no such tensor",
        ),
    ]);
    let refused = {
        let mut file = whole();
        file.tensor("output.weight").offset = Some(1 << 40);
        refusal(file.bytes())
    };
    assert!(
        refused.starts_with(
            "m.gguf: tensor `output.weight`: its 87040 bytes at offset 1099511627776 reach beyond"
        ),
        "{refused}"
    );
}

#[test]
fn gguf_descriptions() {
    check_gguf(&[
        (
            |f| f.set("general.architecture", Meta::Text("mamba".to_owned())),
            "architecture `mamba` is not supported; supported are llama, qwen2, qwen3, qwen3moe",
        ),
        (
            |f| f.unset("general.architecture"),
            "`general.architecture` is missing; expected the name of an architecture",
        ),
        (
            |f| f.unset("llama.context_length"),
            "`llama.context_length` is missing; expected a whole number",
        ),
        (
            |f| f.set("llama.block_count", Meta::Text("two".to_owned())),
            "`llama.block_count` is \"two\"; expected a whole number",
        ),
        (
            |f| f.set("llama.block_count", Meta::U32(u32::MAX)),
            "`llama.block_count` is 4294967295; expected a whole number from 1 to 1024",
        ),
        (
            |f| f.set("llama.attention.head_count", Meta::U32(0)),
            "`llama.attention.head_count` is 0; expected a whole number from 1 to 1024",
        ),
        (
            |f| f.set("llama.attention.head_count_kv", Meta::U32(3)),
            "`llama.attention.head_count_kv` is 3; expected a divisor of the 8 attention heads",
        ),
        (
            |f| f.set("llama.attention.head_count_kv", Meta::I32s(vec![4, 2])),
            "`llama.attention.head_count_kv` is an array of 2; expected a whole number, the same \
             for each layer",
        ),
        (
            |f| f.set("llama.attention.value_length", Meta::U32(64)),
            "`llama.attention.value_length` is 64; expected 32, the length of a key",
        ),
        (
            |f| f.set("llama.attention.layer_norm_rms_epsilon", Meta::F32(f32::NAN)),
            "`llama.attention.layer_norm_rms_epsilon` is NaN; expected a number between 0 and 1",
        ),
        (
            |f| f.set("llama.rope.freq_base", Meta::F32(f32::INFINITY)),
            "`llama.rope.freq_base` is inf; expected a number above 1 and at most 1e12",
        ),
        (
            |f| f.set("llama.rope.dimension_count", Meta::U32(34)),
            "`llama.rope.dimension_count` is 34; expected an even number from 2 to the head's 32",
        ),
        (
            |f| {
                f.set("llama.attention.sliding_window", Meta::U32(8));
                f.set("llama.attention.sliding_window_pattern", Meta::I32s(vec![1]));
            },
            "`llama.attention.sliding_window_pattern` is an array of 1; expected a whole number, \
             or true or false for each of 2 layers",
        ),
        (
            |f| f.set("llama.rope.scaling.type", Meta::Text("longrope".to_owned())),
            "`llama.rope.scaling.type` is \"longrope\"; expected none, linear or yarn",
        ),
        (
            |f| f.set("tokenizer.ggml.token_type", Meta::I32s(vec![1])),
            "`tokenizer.ggml.token_type` is an array of 1; expected an array of 320 numbers, one \
             for each token",
        ),
        (
            |f| f.set("tokenizer.ggml.eos_token_id", Meta::U32(320)),
            "`tokenizer.ggml.eos_token_id` is 320; expected a token, so a whole number below 320",
        ),
        (
            |f| f.unset("tokenizer.ggml.model"),
            "`tokenizer.ggml.model` is missing; expected the name of a tokenizer",
        ),
    ]);
}

#[test]
fn truncated_anywhere() {
    let bytes = whole().bytes();
    // Every border of the head, then some of the data.
    let lengths = (0..256).chain((256..bytes.len()).step_by(40_009));
    for len in lengths {
        let refused = refusal(bytes[..len].to_vec());
        let early = refused.starts_with("m.gguf: the file ends too early: ");
        let damaged = refused.starts_with("m.gguf: tensor `")
            && refused.ends_with("the file is truncated or damaged");
        assert!(early || damaged, "{len}: {refused}");
    }
}

fn check_hf(table: Table<'_, HfFiles>) {
    let directory = tempfile::tempdir().expect("a directory");
    let whole = testing::hf(&testing::tiny(Architecture::Qwen2), Format::BF16, 1);
    for (change, expected) in table {
        let mut files = whole.clone();
        change(&mut files);
        files.write(directory.path(), 1).expect("written");
        let refused = ModelSource::open(directory.path()).expect_err(expected).to_string();
        let prefix = format!("{}/", directory.path().display());
        assert_eq!(refused.strip_prefix(&prefix), Some(*expected), "{refused}");
    }
}

#[test]
fn hf_descriptions() {
    check_hf(&[
        (
            |f| f.config["architectures"] = json!(["GPT2LMHeadModel"]),
            "config.json: architecture `GPT2LMHeadModel` is not supported; supported are \
             LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, \
             MixtralForCausalLM, Qwen3MoeForCausalLM",
        ),
        (
            |f| f.config["architectures"] = json!([]),
            "config.json: `architectures` is missing; expected an array of one name",
        ),
        (
            |f| f.config["hidden_size"] = json!("big"),
            "config.json: `hidden_size` is \"big\"; expected a whole number",
        ),
        (
            |f| f.config["hidden_size"] = json!(-1),
            "config.json: `hidden_size` is -1; expected a whole number",
        ),
        (
            |f| f.config["num_key_value_heads"] = json!(3),
            "config.json: `num_key_value_heads` is 3; expected a divisor of the 8 attention heads",
        ),
        (
            |f| f.config["hidden_act"] = json!("gelu"),
            "config.json: `hidden_act` is \"gelu\"; expected silu",
        ),
        (
            |f| f.config["quantization_config"] = json!({ "quant_method": "gptq" }),
            "config.json: `quantization_config` is {\"quant_method\":\"gptq\"}; expected no such \
             key: give the unquantized model, or a GGUF",
        ),
        (
            |f| f.config["rope_scaling"] = json!({ "rope_type": "longrope" }),
            "config.json: `rope_scaling.rope_type` is \"longrope\"; expected default, linear, \
             llama3 or yarn",
        ),
        (
            |f| f.config["rope_parameters"] = json!({ "rope_type": "yarn" }),
            "config.json: `rope_parameters.factor` is missing; expected a number",
        ),
        (
            |f| f.config["rope_scaling"] = json!({ "rope_type": "linear", "factor": 0 }),
            "config.json: `rope_scaling.factor` is 0; expected a number above 0 and at most 1e9",
        ),
        (
            |f| {
                f.config["use_sliding_window"] = json!(true);
                f.config["sliding_window"] = json!(8);
                f.config["layer_types"] = json!(["full_attention", "chunked"]);
            },
            "config.json: `layer_types` is an array of 2; expected 2 of full_attention or \
             sliding_attention",
        ),
        (
            |f| f.generation_config["eos_token_id"] = json!([1, 320]),
            "generation_config.json: `eos_token_id` is [1,320]; expected tokens, so whole \
             numbers below 320",
        ),
        (
            |f| f.tokenizer_config["chat_template"] = json!(7),
            "tokenizer_config.json: `chat_template` is 7; expected a text, or an array of \
             objects with `name` and `template`",
        ),
        (|f| f.config = json!([1]), "config.json: it is not a JSON object"),
    ]);
}

#[test]
fn hf_tensors() {
    check_hf(&[
        (
            |f| f.tensors.retain(|(name, ..)| name != "model.norm.weight"),
            "model.safetensors: tensor `model.norm.weight` is missing",
        ),
        (
            |f| f.tensors[0].1 = "I16",
            "model.safetensors: tensor `model.embed_tokens.weight`: its type is I16; supported \
             are F32, F16, BF16",
        ),
        (
            |f| f.tensors[0].2 = vec![256, 320],
            "model.safetensors: tensor `model.embed_tokens.weight`: its shape is [256, 320]; \
             the description asks for [320, 256]",
        ),
        (
            |f| f.tensors[0].2 = vec![320, 255],
            "model.safetensors: tensor `model.embed_tokens.weight`: [320, 255] of BF16 takes \
             163200 bytes; its offsets say 163840",
        ),
        (
            |f| {
                let mut extra = f.tensors[1].clone();
                extra.0 = "model.layers.0.self_attn.sinks".to_owned();
                f.tensors.push(extra);
            },
            "model.safetensors: tensor `model.layers.0.self_attn.sinks`: a qwen2 model as \
             described has no such tensor",
        ),
    ]);
}

#[test]
fn hf_directories() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let refused = |ending: &str| {
        let refused = ModelSource::open(path).expect_err(ending).to_string();
        assert!(refused.ends_with(ending), "{refused}");
    };
    refused("config.json: cannot be read: there is no such file; a model directory needs one");
    testing::hf(&testing::tiny(Architecture::Qwen2), Format::F16, 1)
        .write(path, 2)
        .expect("written");
    let index = path.join("model.safetensors.index.json");
    std::fs::remove_file(path.join("model-00002-of-00002.safetensors")).expect("removed");
    refused("index.json: it names model-00002-of-00002.safetensors, which is not there");
    for outside in
        ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", ".safetensors"]
    {
        let map = json!({ "weight_map": { "model.norm.weight": outside } });
        std::fs::write(&index, map.to_string()).expect("written");
        refused("expected the name of a file in the same directory");
    }
    std::fs::remove_file(&index).expect("removed");
    refused("it has neither model.safetensors nor model.safetensors.index.json");
    std::fs::write(path.join("model.safetensors"), [1, 0, 0, 0, 0, 0, 0, 0xff, 0])
        .expect("written");
    refused("model.safetensors: the safetensors header: header too large");
    std::fs::remove_file(path.join("tokenizer.json")).expect("removed");
    testing::hf(&testing::tiny(Architecture::Qwen2), Format::F16, 1)
        .write(path, 1)
        .expect("written");
    std::fs::remove_file(path.join("tokenizer.json")).expect("removed");
    refused("there is no such file; save the model's fast tokenizer into the directory");
    let absent = ModelSource::open(&path.join("absent.gguf")).expect_err("absent").to_string();
    assert!(absent.contains("absent.gguf: cannot be read: No such file"), "{absent}");
}
