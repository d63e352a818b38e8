//! Models written by [`super::testing`], opened again.

mod fuzz;
mod hf;
mod refusals;

use std::path::PathBuf;

use super::testing::{self, ARCHITECTURES, EOS, Meta};
use super::{Format, ModelSource, TensorRole, TokenizerSource};
use crate::model::{Architecture, DecoderConfig, RopeLayout, RopeScaling};

/// What a GGUF gives back: it knows no Mistral, and keeps a llama's rows interleaved.
fn as_gguf(mut config: DecoderConfig) -> DecoderConfig {
    use Architecture::*;
    if matches!(config.architecture, Llama | Mistral | Mixtral) {
        config.rope.layout = RopeLayout::Interleaved;
    }
    if config.architecture == Mistral {
        config.architecture = Llama;
    }
    config
}

fn open_gguf(bytes: Vec<u8>) -> Result<ModelSource, super::ModelError> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tiny.gguf");
    std::fs::write(&path, bytes).expect("written");
    ModelSource::open(&path)
}

#[test]
fn windows_of_gguf_files() {
    // Arrays of booleans: the ids of their kind, their number, one byte each.
    let chosen = |layers: [u8; 2]| {
        let head = [&7u32.to_le_bytes()[..], &2u64.to_le_bytes()].concat();
        Meta::Raw(9, [head, layers.to_vec()].concat())
    };
    let table = [
        (0, None, [None; 2]),
        (8, None, [Some(8); 2]),
        (8, Some(Meta::U32(0)), [Some(8); 2]),
        (8, Some(Meta::U32(1)), [None; 2]),
        (8, Some(Meta::U32(2)), [Some(8), None]),
        (8, Some(chosen([0, 1])), [None, Some(8)]),
        (8, Some(chosen([0, 0])), [None; 2]),
        (0, Some(chosen([1, 1])), [None; 2]),
    ];
    for (row, (tokens, pattern, expected)) in table.into_iter().enumerate() {
        let mut file = testing::gguf(&testing::tiny(Architecture::Llama), Format::Q8_0, 1);
        file.set("llama.attention.sliding_window", Meta::U32(tokens));
        if let Some(pattern) = pattern {
            file.set("llama.attention.sliding_window_pattern", pattern);
        }
        let config = open_gguf(file.bytes()).expect("opens").config;
        assert_eq!([0, 1].map(|layer| config.window(layer)), expected, "row {row}");
    }
}

#[test]
fn every_architecture_comes_back() {
    for architecture in ARCHITECTURES {
        let config = testing::tiny(architecture);
        let source = open_gguf(testing::gguf(&config, Format::F32, 7).bytes()).expect("opens");
        assert_eq!(source.config, as_gguf(config.clone()));
        assert_eq!(source.eos_ids, [EOS]);
        assert_eq!(source.chat_template.as_deref(), Some(testing::CHATML));
        let directory = tempfile::tempdir().expect("a directory");
        for (shards, format) in [(1, Format::F32), (3, Format::BF16), (2, Format::F16)] {
            let path = directory.path().join(format!("{shards}"));
            testing::hf(&config, format, 7).write(&path, shards).expect("written");
            let hf = ModelSource::open(&path).expect("opens");
            assert_eq!(hf.config, config, "{shards} shards");
            assert_eq!(hf.eos_ids, [EOS]);
            assert_eq!(hf.chat_template.as_deref(), Some(testing::CHATML));
            same_tensors(&config, &hf, format);
        }
        same_tensors(&config, &source, Format::F32);
    }
}

/// Every tensor has the written values; q and k of a llama only up to the order of their rows.
fn same_tensors(config: &DecoderConfig, source: &ModelSource, format: Format) {
    for role in TensorRole::all(config) {
        let tensor = source.tensor(role).expect("is there");
        let mut found = vec![0.0; tensor.rows * tensor.cols];
        kernels::format::dequantize(tensor.format, &tensor.bytes, &mut found).expect("fits");
        let mut written = testing::values(config, role, 7);
        if source.config.rope.layout == RopeLayout::Interleaved {
            found.sort_by(f32::total_cmp);
            written.sort_by(f32::total_cmp);
        }
        // binary16 has no room for the smallest of them.
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-7;
        match format {
            Format::F16 => assert!(found.iter().zip(&written).all(close), "{role:?}"),
            _ => assert_eq!(found, written, "{role:?}"),
        }
    }
}

#[test]
fn every_format_comes_back() {
    let config = testing::tiny(Architecture::Qwen2);
    for format in Format::ALL {
        let source = open_gguf(testing::gguf(&config, format, 1).bytes()).expect("opens");
        let tensor = source.tensor(TensorRole::Down(1)).expect("is there");
        assert_eq!((tensor.format, tensor.rows, tensor.cols), (format, 256, 512));
        let mut values = vec![0.0; 256 * 512];
        kernels::format::dequantize(format, &tensor.bytes, &mut values).expect("fits");
        let largest = values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        assert!((0.01..2.0).contains(&largest), "{format}: {largest}");
    }
}

#[test]
fn options_come_back() {
    let base = testing::tiny(Architecture::Llama);
    let mut biased = base.clone();
    (biased.qkv_bias, biased.o_bias, biased.mlp_bias) = (true, true, true);
    let mut linear = base.clone();
    linear.rope.scaling = RopeScaling::Linear { factor: 4.0 };
    let mut llama3 = base.clone();
    llama3.rope.scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64,
    };
    let mut yarn = base.clone();
    yarn.rope.scaling = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 128,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    };
    let mut tied = base;
    tied.tied_embeddings = true;
    for config in [biased, linear, llama3, yarn, tied] {
        let source = open_gguf(testing::gguf(&config, Format::F32, 7).bytes()).expect("opens");
        let directory = tempfile::tempdir().expect("a directory");
        testing::hf(&config, Format::F32, 7).write(directory.path(), 1).expect("written");
        let hf = ModelSource::open(directory.path()).expect("opens");
        assert_eq!(hf.config, config);
        let flags = |c: &DecoderConfig| (c.qkv_bias, c.o_bias, c.mlp_bias, c.tied_embeddings);
        assert_eq!(flags(&source.config), flags(&config));
        assert_eq!(source.config.rope.mscale(), config.rope.mscale());
        let freqs = source.config.rope.inv_freq().into_iter().zip(config.rope.inv_freq());
        freqs.for_each(|(a, b)| assert!((a / b - 1.0).abs() < 1e-6, "{a} {b}"));
        same_tensors(&config, &source, Format::F32);
        same_tensors(&config, &hf, Format::F32);
    }
}

#[test]
fn a_split_file_is_one_model() {
    let config = testing::tiny(Architecture::Qwen3);
    let whole = testing::gguf(&config, Format::Q8_0, 3);
    let directory = tempfile::tempdir().expect("a directory");
    let path =
        |part: usize| -> PathBuf { directory.path().join(format!("tiny-{part:05}-of-00003.gguf")) };
    for part in 0..3usize {
        let mut file = whole.clone();
        file.metadata.retain(|(key, _)| part == 0 || key == "general.architecture");
        file.set("split.no", Meta::U32(part as u32));
        file.set("split.count", Meta::U32(3));
        let tensors = whole.tensors.iter().skip(part).step_by(3);
        file.tensors = tensors.cloned().collect();
        std::fs::write(path(part + 1), file.bytes()).expect("written");
    }
    let source = ModelSource::open(&path(1)).expect("opens");
    assert_eq!(source.digest(), open_gguf(whole.bytes()).expect("opens").digest());
    let refused = ModelSource::open(&path(2)).expect_err("is not the first").to_string();
    assert!(refused.ends_with("open the first part of a split model"), "{refused}");
    std::fs::remove_file(path(3)).expect("removed");
    let refused = ModelSource::open(&path(1)).expect_err("lacks a part").to_string();
    assert!(refused.contains("tiny-00003-of-00003.gguf: cannot be read"), "{refused}");
}

#[test]
fn the_digest_is_of_the_weights_alone() {
    let config = testing::tiny(Architecture::Qwen2);
    let digest = |file: &testing::GgufFile| open_gguf(file.bytes()).expect("opens").digest();
    let file = testing::gguf(&config, Format::Q8_0, 3);
    let mut renamed = file.clone();
    renamed.set("general.name", Meta::Text("another".to_owned()));
    renamed.tensors.reverse();
    assert_eq!(digest(&renamed), digest(&file));
    let mut changed = file.clone();
    changed.tensor("blk.1.ffn_up.weight").bytes[100] ^= 1;
    assert_ne!(digest(&changed), digest(&file));
}

#[test]
fn a_model_in_the_binary_needs_no_file() {
    let config = testing::tiny(Architecture::Llama);
    let bytes: &'static [u8] = testing::gguf(&config, Format::Q8_0, 3).bytes().leak();
    let source = ModelSource::from_static("built-in", bytes).expect("opens");
    assert_eq!(source.size_bytes(), bytes.len() as u64);
    assert_eq!(source.name, "tiny llama");
    let TokenizerSource::Gguf(tokenizer) = &source.tokenizer else { panic!("is a GGUF") };
    assert_eq!((tokenizer.model.as_str(), tokenizer.tokens.len()), ("gpt2", testing::VOCAB));
    let broken: &'static [u8] = &bytes[..bytes.len() / 2];
    let refused = ModelSource::from_static("built-in", broken).expect_err("is refused");
    assert!(refused.to_string().starts_with("built-in: tensor `"), "{refused}");
}
