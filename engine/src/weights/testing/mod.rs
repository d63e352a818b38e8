//! Small random models for tests, written as real files.
//!
//! Owns writers of both containers and one set of weights for each seed: the same description and
//! seed give the same function in a GGUF and in a Hugging Face directory. Compiled for tests and
//! with the feature `testing` only.

mod gguf;
mod hf;
mod random;
mod vocabulary;

pub use gguf::{GgufFile, GgufTensor, Meta, gguf};
pub use hf::{HfFiles, hf};
pub use random::Random;
pub use vocabulary::{BOS, CHATML, EOS, VOCAB};

use super::{Format, ModelError, ModelSource, TensorRole};
use crate::model::{
    Architecture, DecoderConfig, Moe, Rope, RopeLayout, RopeScaling, SlidingWindow,
};

/// Every architecture.
pub const ARCHITECTURES: [Architecture; 6] = [
    Architecture::Llama,
    Architecture::Mistral,
    Architecture::Qwen2,
    Architecture::Qwen3,
    Architecture::Mixtral,
    Architecture::Qwen3Moe,
];

/// A description of about a million weights, in which no two sizes that could be confused are
/// equal; every row fills blocks of 256, so that it can be stored in every format.
pub fn tiny(architecture: Architecture) -> DecoderConfig {
    use Architecture::*;
    let moe = matches!(architecture, Mixtral | Qwen3Moe).then(|| Moe {
        experts: 4,
        experts_per_token: 2,
        intermediate: 256,
        norm_topk_prob: true,
    });
    let qwen3 = matches!(architecture, Qwen3 | Qwen3Moe);
    DecoderConfig {
        architecture,
        layers: 2,
        hidden: 256,
        heads: 8,
        kv_heads: if qwen3 { 2 } else { 4 },
        head_dim: if qwen3 { 64 } else { 32 },
        intermediate: if architecture == Mixtral { 256 } else { 512 },
        vocab: VOCAB,
        context: 512,
        rms_eps: 1e-5,
        rope: Rope {
            theta: 10_000.0,
            dims: if qwen3 { 64 } else { 32 },
            layout: RopeLayout::Half,
            scaling: RopeScaling::None,
            factors: None,
        },
        sliding_window: (architecture == Mistral)
            .then(|| SlidingWindow { tokens: 24, layers: vec![true; 2] }),
        qkv_bias: architecture == Qwen2,
        o_bias: false,
        mlp_bias: false,
        qk_norm: qwen3,
        tied_embeddings: matches!(architecture, Qwen2 | Qwen3),
        moe,
    }
}

/// A description of a few thousand weights, for tests that open thousands of files.
pub fn smallest(architecture: Architecture) -> DecoderConfig {
    let mut config = tiny(architecture);
    (config.layers, config.hidden, config.heads, config.kv_heads) = (1, 32, 4, 2);
    (config.head_dim, config.rope.dims, config.intermediate) = (8, 8, 64);
    if let Some(moe) = &mut config.moe {
        moe.intermediate = 32;
        config.intermediate = 32;
    }
    if let Some(window) = &mut config.sliding_window {
        window.layers.truncate(1);
    }
    config
}

/// Uses all of a model that opened, and checks that a refusal is a sentence; tells which it was.
///
/// # Panics
/// If the model does not keep what opening it promised.
pub fn exercise(opened: Result<ModelSource, ModelError>) -> bool {
    match opened {
        Ok(source) => {
            for role in TensorRole::all(&source.config) {
                let tensor = source.tensor(role).expect("was checked when it was opened");
                let len = tensor.format.bytes_for(tensor.rows * tensor.cols);
                assert_eq!(len, Some(tensor.bytes.len()), "{role:?}");
            }
            assert!(source.config.rope.inv_freq().iter().all(|freq| freq.is_finite()));
            assert!(source.config.rope.mscale().is_finite());
            source.digest();
            true
        }
        Err(error) => {
            let sentence = error.to_string();
            assert!(sentence.len() > 20 && sentence.contains(": "), "{sentence}");
            false
        }
    }
}

/// The values of a tensor: a function of seed and role alone, each exact in bfloat16. The rows of
/// q and k are in the order of [`RopeLayout::Half`].
pub fn values(config: &DecoderConfig, role: TensorRole, seed: u64) -> Vec<f32> {
    let (rows, cols) = role.shape(config);
    let mut random = Random::new(seed ^ fnv(format!("{role:?}").as_bytes()));
    let is_norm = rows == 1 && !is_bias(role);
    let spread = match role {
        _ if is_norm => 0.1,
        _ if is_bias(role) => 0.3,
        TensorRole::TokenEmbedding => 0.5,
        TensorRole::Q(_) | TensorRole::K(_) => 1.5 / (cols as f32).sqrt(),
        _ => 1.0 / (cols as f32).sqrt(),
    };
    let centre = if is_norm { 1.0 } else { 0.0 };
    let mut values = vec![0.0; rows * cols];
    values.fill_with(|| to_bf16(centre + spread * random.normal()));
    values
}

/// `values` in the bytes of `format`. The formats that nothing here quantizes to get random
/// blocks with scales of the right size instead, which are as good as any weights.
pub fn encode(format: Format, cols: usize, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; format.bytes_for(values.len()).expect("rows fill blocks")];
    match format {
        Format::F32 => {
            for (v, out) in values.iter().zip(bytes.chunks_exact_mut(4)) {
                out.copy_from_slice(&v.to_le_bytes());
            }
        }
        Format::F16 => encode_halves(values, &mut bytes, kernels::float::f32_to_f16),
        Format::BF16 => encode_halves(values, &mut bytes, |v| (v.to_bits() >> 16) as u16),
        Format::Q8_0 => kernels::quant::quantize_q8_0(values, &mut bytes).expect("whole blocks"),
        Format::Q4_0 => kernels::quant::quantize_q4_0(values, &mut bytes).expect("whole blocks"),
        _ => random_blocks(format, cols, values, &mut bytes),
    }
    bytes
}

fn encode_halves(values: &[f32], bytes: &mut [u8], convert: impl Fn(f32) -> u16) {
    for (v, out) in values.iter().zip(bytes.chunks_exact_mut(2)) {
        out.copy_from_slice(&convert(*v).to_le_bytes());
    }
}

fn random_blocks(format: Format, cols: usize, values: &[f32], bytes: &mut [u8]) {
    let seed = values.iter().fold(0, |sum: u64, v| sum.rotate_left(5) ^ u64::from(v.to_bits()));
    let mut random = Random::new(seed);
    bytes.fill_with(|| random.next() as u8);
    let (scales, largest) = scales(format);
    let scale = kernels::float::f32_to_f16(1.0 / (largest * (cols as f32).sqrt()));
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for at in scales {
            block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
}

/// Where the binary16 scales of a block are, and about how large a value is in units of them.
fn scales(format: Format) -> (&'static [usize], f32) {
    match format {
        Format::Q4_1 => (&[0, 2], 16.0),
        Format::Q5_0 => (&[0], 16.0),
        Format::Q5_1 => (&[0, 2], 32.0),
        Format::Q2_K => (&[80, 82], 45.0),
        Format::Q3_K => (&[108], 128.0),
        Format::Q4_K => (&[0, 2], 1000.0),
        Format::Q5_K => (&[0, 2], 2000.0),
        Format::Q6_K => (&[208], 4000.0),
        Format::IQ4_XS => (&[0], 4000.0),
        _ => (&[0], 127.0),
    }
}

fn is_bias(role: TensorRole) -> bool {
    use TensorRole::*;
    matches!(role, QBias(_) | KBias(_) | VBias(_) | AttnOutBias(_))
        || matches!(role, GateBias(_) | UpBias(_) | DownBias(_))
}

fn to_bf16(value: f32) -> f32 {
    f32::from_bits(value.to_bits() & 0xffff_0000)
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
