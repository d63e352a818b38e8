//! The executor against a plain f64 forward pass, for each option of a decoder.

#[allow(dead_code)]
mod models;
mod reference;

use cache::BlockId;
use engine::executor::{Executor, ExecutorOptions, KvCapacity, KvDtype};
use engine::model::{Architecture, DecoderConfig, RopeLayout, RopeScaling, SlidingWindow};
use engine::weights::Format;
use engine::weights::testing::{Random, tiny};
use kernels::isa::Isa;
use models::TinyModel;
use protocol::SequenceId;
use reference::{Moe, Reference, ReferenceOutput, Shape, log_softmax};
use scheduler::{LogitsWanted, SequenceStep, StepPlan};

#[test]
fn every_option_computes_what_the_papers_say() {
    use Architecture::*;
    for (name, config) in [
        ("llama", tiny(Llama)),
        ("interleaved", with(Llama, |c| c.rope.layout = RopeLayout::Interleaved)),
        ("tied", with(Llama, |c| c.tied_embeddings = true)),
        ("one kv head", with(Llama, |c| c.kv_heads = 1)),
        ("a kv head for each head", with(Llama, |c| c.kv_heads = c.heads)),
        ("three layers", with(Llama, |c| c.layers = 3)),
        ("every bias", with(Llama, |c| (c.qkv_bias, c.o_bias, c.mlp_bias) = (true, true, true))),
        ("mistral", tiny(Mistral)),
        (
            "a window on one layer",
            with(Mistral, |c| {
                c.sliding_window = Some(SlidingWindow { tokens: 5, layers: vec![false, true] });
            }),
        ),
        ("qwen2", tiny(Qwen2)),
        ("qwen3", tiny(Qwen3)),
        ("mixtral", tiny(Mixtral)),
        ("qwen3moe", tiny(Qwen3Moe)),
        (
            "experts' weights as they are",
            with(Qwen3Moe, |c| c.moe.as_mut().expect("has experts").norm_topk_prob = false),
        ),
        ("linear", with(Llama, |c| c.rope.scaling = RopeScaling::Linear { factor: 4.0 })),
        (
            "llama3",
            with(Llama, |c| {
                c.rope.scaling = RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_context: 64,
                };
            }),
        ),
        (
            "yarn",
            with(Qwen2, |c| {
                c.rope.scaling = RopeScaling::Yarn {
                    factor: 4.0,
                    original_context: 64,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    attention_factor: None,
                    mscale: None,
                    mscale_all_dim: None,
                    truncate: true,
                };
            }),
        ),
    ] {
        let (got, want) = both(&config, Format::F32);
        let distance = worst_logprob(&got, &want);
        assert!(distance <= 5e-4, "{name}: log-probabilities differ by {distance:e}");
    }
}

/// Weights of binary16 meet the inputs as they are, those of bfloat16 inputs of their own precision.
#[test]
fn float_formats_are_computed_as_they_are() {
    for (format, bound) in [(Format::F16, 5e-4), (Format::BF16, 5e-2)] {
        let (got, want) = both(&tiny(Architecture::Llama), format);
        let distance = worst_logprob(&got, &want);
        assert!(distance <= bound, "{format}: log-probabilities differ by {distance:e}");
    }
}

/// Inputs of quantized products are eight bits wide, so these are close, not equal.
#[test]
fn quantized_formats_stay_close() {
    for format in Format::ALL.into_iter().filter(|f| f.is_quantized()) {
        let (got, want) = both(&tiny(Architecture::Qwen2), format);
        for (row, (got, want)) in got.iter().zip(&want.logits).enumerate() {
            let likeness = cosine(got, want);
            assert!(likeness > 0.995, "{format}: row {row} is like the exact one by {likeness}");
        }
    }
}

fn with(architecture: Architecture, change: impl FnOnce(&mut DecoderConfig)) -> DecoderConfig {
    let mut config = tiny(architecture);
    change(&mut config);
    let layers = config.layers;
    config.sliding_window.iter_mut().for_each(|w| w.layers.resize(layers, true));
    config
}

/// Logits of one text from the executor and from the reference.
fn both(config: &DecoderConfig, format: Format) -> (Vec<Vec<f64>>, ReferenceOutput) {
    let mut random = Random::new(3);
    let tokens: Vec<u32> = (0..TOKENS).map(|_| random.below(config.vocab) as u32).collect();
    let model = TinyModel::new(config.clone(), format, 5);
    let want =
        Reference { shape: shape(config), weights: &|name| model.by_name(name) }.forward(&tokens);
    let options = ExecutorOptions {
        kv_dtype: KvDtype::F32,
        kv_capacity: KvCapacity::Blocks(8),
        threads: 2,
        ..ExecutorOptions::default()
    };
    let mut executor = Executor::new(model.load(Isa::detect()), &options).expect("sound options");
    let step = SequenceStep {
        sequence: SequenceId(1),
        tokens,
        position: 0,
        blocks: [5, 2, 7, 1].map(BlockId).to_vec(),
        wanted: LogitsWanted::All,
    };
    let output = executor.step(&StepPlan { sequences: vec![step] }).expect("a sound plan");
    let rows = output.logits(0).chunks(output.vocab());
    (rows.map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect(), want)
}

fn shape(config: &DecoderConfig) -> Shape {
    let rope_scaling = match config.rope.scaling {
        RopeScaling::None => reference::RopeScaling::None,
        RopeScaling::Linear { factor } => reference::RopeScaling::Linear { factor },
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let (low, high) = (low_freq_factor, high_freq_factor);
            let original = original_context as f64;
            reference::RopeScaling::Llama3 { factor, low, high, original }
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, .. } => {
            let original = original_context as f64;
            reference::RopeScaling::Yarn { factor, beta_fast, beta_slow, original }
        }
    };
    Shape {
        hidden: config.hidden,
        layers: config.layers,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        eps: f64::from(config.rms_eps),
        rope_theta: config.rope.theta,
        rope_scaling,
        windows: (0..config.layers).map(|layer| config.window(layer)).collect(),
        moe: config.moe.as_ref().map(|moe| Moe {
            experts: moe.experts,
            used: moe.experts_per_token,
            normalize: moe.norm_topk_prob,
            mixtral_names: config.architecture == Architecture::Mixtral,
        }),
    }
}

fn worst_logprob(got: &[Vec<f64>], want: &ReferenceOutput) -> f64 {
    assert_eq!(got.len(), want.logits.len());
    let rows = got.iter().zip(&want.logits).map(|(got, want)| {
        let (got, want) = (log_softmax(got), log_softmax(want));
        got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    });
    rows.fold(0.0, f64::max)
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

const TOKENS: usize = 33;
