//! The one description of a decoder: every supported family is a setting of these options.
//!
//! Owns the meaning of each option, the range it may have and the rotary frequencies that follow
//! from it. Refuses to know where a value came from: `weights` reads files and puts the file's own
//! key names into the errors.

use std::fmt;

/// The family a model belongs to. The executor follows the options of [`DecoderConfig`], never
/// this name; it is for messages, metrics and the identity of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Mixtral,
    Qwen3Moe,
}

impl Architecture {
    /// A short lower-case name, as GGUF writes it where GGUF has one.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Mixtral => "mixtral",
            Architecture::Qwen3Moe => "qwen3moe",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A pre-norm transformer decoder with grouped-query attention, rotary positions and a gated SiLU
/// feed-forward.
///
/// Each block computes `x += o(attention(rope(q), rope(k), v))` of the normed `x`, then
/// `x += down(silu(gate) * up)` of the normed `x`. Matrices are `[rows = out, cols = in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    pub architecture: Architecture,
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Width of the dense feed-forward; with `moe`, used by no layer.
    pub intermediate: usize,
    pub vocab: usize,
    /// Positions the model was made for, scaling included.
    pub context: usize,
    pub rms_eps: f32,
    pub rope: Rope,
    pub sliding_window: Option<SlidingWindow>,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// RMS norms over each head of q and k, before the rotation.
    pub qk_norm: bool,
    /// The output matrix is the token embedding.
    pub tied_embeddings: bool,
    pub moe: Option<Moe>,
}

/// A mixture of experts in place of the feed-forward of every layer: softmax over the router's
/// logits, the best `experts_per_token` experts, their outputs summed by weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    pub experts: usize,
    pub experts_per_token: usize,
    /// Width of one expert.
    pub intermediate: usize,
    /// Whether the chosen weights are scaled to sum to one.
    pub norm_topk_prob: bool,
}

/// Attention limited to the latest positions on some layers.
#[derive(Clone, Debug, PartialEq)]
pub struct SlidingWindow {
    /// Keys that a query sees, its own included: position `q` sees `k` with `q - k < tokens`.
    pub tokens: usize,
    /// For each layer, whether the window applies.
    pub layers: Vec<bool>,
}

/// Rotary position embedding (Su et al. 2021, RoFormer).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    /// Elements of each head that turn, from its start; even, at most `head_dim`.
    pub dims: usize,
    pub layout: RopeLayout,
    pub scaling: RopeScaling,
    /// A divisor for each frequency (`dims / 2` of them), from a GGUF `rope_freqs.weight`.
    pub factors: Option<Vec<f32>>,
}

/// Which two elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// `2i` and `2i + 1`: the rows of q and k of a GGUF `llama`.
    Interleaved,
    /// `i` and `i + dims / 2`: Hugging Face files, and the other GGUF architectures.
    Half,
}

/// How the frequencies were stretched to reach a longer context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by `factor` (Chen et al. 2023, position interpolation).
    Linear {
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context: usize,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        factor: f64,
        original_context: usize,
        beta_fast: f64,
        beta_slow: f64,
        /// Multiplies sine and cosine; without it, `mscale / mscale_all_dim`, or a function of
        /// `factor`.
        attention_factor: Option<f64>,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        /// Whether the borders of the ramp are rounded outwards to whole dimensions.
        truncate: bool,
    },
}

/// A number of a model's description, as the errors name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Field {
    Layers,
    Hidden,
    Heads,
    KvHeads,
    HeadDim,
    Intermediate,
    Vocab,
    Context,
    RmsEps,
    RopeTheta,
    RopeDims,
    RopeScaling,
    RopeFactor,
    RopeOriginalContext,
    RopeLowFreqFactor,
    RopeHighFreqFactor,
    RopeBetaFast,
    RopeBetaSlow,
    RopeAttentionFactor,
    RopeFactors,
    SlidingWindow,
    Experts,
    ExpertsPerToken,
    ExpertIntermediate,
}

/// A value that no model can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    pub field: Field,
    pub value: String,
    pub expected: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is {}; expected {}", self.field, self.value, self.expected)
    }
}

impl std::error::Error for ConfigError {}

impl DecoderConfig {
    /// Elements of the queries of one token.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of the keys (or of the values) of one token.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Query heads that share one key head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The attention window of `layer`, in tokens; none where it sees every position before it.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let window = self.sliding_window.as_ref()?;
        window.layers.get(layer).copied().unwrap_or(false).then_some(window.tokens)
    }

    /// Checks that every number is in its range and that the numbers fit each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_sizes()?;
        self.validate_relations()?;
        self.rope.validate(self.head_dim)?;
        if let Some(moe) = &self.moe {
            within(Field::Experts, moe.experts, EXPERTS_MAX)?;
            within(Field::ExpertsPerToken, moe.experts_per_token, moe.experts)?;
            within(Field::ExpertIntermediate, moe.intermediate, WIDTH_MAX)?;
        }
        Ok(())
    }

    fn validate_sizes(&self) -> Result<(), ConfigError> {
        within(Field::Layers, self.layers, LAYERS_MAX)?;
        within(Field::Hidden, self.hidden, WIDTH_MAX)?;
        within(Field::Heads, self.heads, HEADS_MAX)?;
        within(Field::KvHeads, self.kv_heads, HEADS_MAX)?;
        within(Field::HeadDim, self.head_dim, HEAD_DIM_MAX)?;
        if self.moe.is_none() {
            within(Field::Intermediate, self.intermediate, WIDTH_MAX)?;
        }
        within(Field::Vocab, self.vocab, VOCAB_MAX)?;
        within(Field::Context, self.context, CONTEXT_MAX)?;
        if !(self.rms_eps > 0.0 && self.rms_eps < 1.0) {
            return Err(bad(Field::RmsEps, self.rms_eps, "a number between 0 and 1"));
        }
        Ok(())
    }

    fn validate_relations(&self) -> Result<(), ConfigError> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of the {} attention heads", self.heads);
            return Err(bad(Field::KvHeads, self.kv_heads, expected));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(bad(Field::HeadDim, self.head_dim, "an even number"));
        }
        if let Some(window) = &self.sliding_window {
            within(Field::SlidingWindow, window.tokens, CONTEXT_MAX)?;
            if window.layers.len() != self.layers {
                let expected = format!("a choice for each of {} layers", self.layers);
                return Err(bad(Field::SlidingWindow, window.layers.len(), expected));
            }
        }
        Ok(())
    }
}

impl Rope {
    /// The angle per position of each turning pair, in radians: `dims / 2` numbers.
    ///
    /// Rounded to f32 at the same places as `transformers` does, so that long contexts agree.
    pub fn inv_freq(&self) -> Vec<f32> {
        let mut freqs: Vec<f32> = (0..self.dims / 2).map(|i| 1.0 / self.period(i)).collect();
        match &self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => freqs.iter_mut().for_each(|f| *f /= *factor as f32),
            RopeScaling::Llama3 { .. } => freqs.iter_mut().for_each(|f| *f = self.llama3(*f)),
            RopeScaling::Yarn { .. } => self.yarn(&mut freqs),
        }
        if let Some(factors) = &self.factors {
            freqs.iter_mut().zip(factors).for_each(|(f, factor)| *f /= factor);
        }
        freqs
    }

    /// What sine and cosine are multiplied by: 1 except for YaRN.
    pub fn mscale(&self) -> f32 {
        let RopeScaling::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. } =
            &self.scaling
        else {
            return 1.0;
        };
        let grown = |weight: f64| match *factor {
            factor if factor <= 1.0 => 1.0,
            factor => 0.1 * weight * factor.ln() + 1.0,
        };
        let inferred = match (mscale, mscale_all_dim) {
            (Some(m), Some(all)) if *m != 0.0 && *all != 0.0 => grown(*m) / grown(*all),
            _ => grown(1.0),
        };
        attention_factor.unwrap_or(inferred) as f32
    }

    /// The positions that a model can use which says it was made for `context`: with YaRN, files
    /// may give the number from before the stretching.
    pub fn reach(&self, context: usize) -> usize {
        match self.scaling {
            RopeScaling::Yarn { factor, original_context, .. } => {
                context.max((original_context as f64 * factor) as usize)
            }
            _ => context,
        }
    }

    /// `theta ^ (2 pair / dims)`. The power is taken in f64 and rounded once, which gives the same
    /// bits on every platform.
    fn period(&self, pair: usize) -> f32 {
        let exponent = (2 * pair) as f32 / self.dims as f32;
        f64::from(self.theta as f32).powf(f64::from(exponent)) as f32
    }

    fn llama3(&self, freq: f32) -> f32 {
        let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } =
            self.scaling
        else {
            return freq;
        };
        let context = original_context as f64;
        let wavelength = std::f64::consts::TAU as f32 / freq;
        let (longest, shortest) =
            ((context / low_freq_factor) as f32, (context / high_freq_factor) as f32);
        if wavelength > longest {
            freq / factor as f32
        } else if wavelength < shortest {
            freq
        } else {
            let span = (high_freq_factor - low_freq_factor) as f32;
            let smooth = (context as f32 / wavelength - low_freq_factor as f32) / span;
            (1.0 - smooth) * freq / factor as f32 + smooth * freq
        }
    }

    fn yarn(&self, freqs: &mut [f32]) {
        let RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } =
            self.scaling
        else {
            return;
        };
        let dims = self.dims as f64;
        let border = |turns: f64| {
            let turned = (original_context as f64 / (turns * std::f64::consts::TAU)).ln();
            dims * turned / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (border(beta_fast), border(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dims - 1.0));
        if low == high {
            high += 0.001;
        }
        for (i, freq) in freqs.iter_mut().enumerate() {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            let stretched = 1.0 / (factor as f32 * self.period(i));
            *freq = stretched * (1.0 - kept) + *freq * kept;
        }
    }

    fn validate(&self, head_dim: usize) -> Result<(), ConfigError> {
        if !(self.theta > 1.0 && self.theta <= THETA_MAX) {
            let expected = format!("a number above 1 and at most {THETA_MAX:e}");
            return Err(bad(Field::RopeTheta, self.theta, expected));
        }
        if self.dims == 0 || self.dims > head_dim || !self.dims.is_multiple_of(2) {
            let expected = format!("an even number from 2 to the head's {head_dim}");
            return Err(bad(Field::RopeDims, self.dims, expected));
        }
        if let Some(factors) = &self.factors {
            if factors.len() != self.dims / 2 {
                let expected = format!("{} numbers", self.dims / 2);
                return Err(bad(Field::RopeFactors, format!("{} long", factors.len()), expected));
            }
            if let Some(factor) = factors.iter().find(|f| !f.is_normal() || **f <= 0.0) {
                return Err(bad(Field::RopeFactors, factor, "finite positive numbers"));
            }
        }
        self.validate_scaling()
    }

    fn validate_scaling(&self) -> Result<(), ConfigError> {
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive(Field::RopeFactor, *factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive(Field::RopeFactor, *factor)?;
                positive(Field::RopeLowFreqFactor, *low_freq_factor)?;
                positive(Field::RopeHighFreqFactor, *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    let expected = format!("more than the low one, {low_freq_factor}");
                    return Err(bad(Field::RopeHighFreqFactor, high_freq_factor, expected));
                }
                within(Field::RopeOriginalContext, *original_context, CONTEXT_MAX)
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                ..
            } => {
                positive(Field::RopeFactor, *factor)?;
                positive(Field::RopeBetaFast, *beta_fast)?;
                positive(Field::RopeBetaSlow, *beta_slow)?;
                attention_factor.map_or(Ok(()), |f| positive(Field::RopeAttentionFactor, f))?;
                positive(Field::RopeAttentionFactor, f64::from(self.mscale()))?;
                within(Field::RopeOriginalContext, *original_context, CONTEXT_MAX)
            }
        }
    }
}

fn within(field: Field, value: usize, max: usize) -> Result<(), ConfigError> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err(bad(field, value, format!("a whole number from 1 to {max}")))
}

fn positive(field: Field, value: f64) -> Result<(), ConfigError> {
    if value > 0.0 && value <= FACTOR_MAX {
        return Ok(());
    }
    Err(bad(field, value, format!("a number above 0 and at most {FACTOR_MAX:e}")))
}

fn bad(field: Field, value: impl fmt::Display, expected: impl Into<String>) -> ConfigError {
    ConfigError { field, value: value.to_string(), expected: expected.into() }
}

#[cfg(test)]
mod tests;

/// Layers that a model may have.
pub const LAYERS_MAX: usize = 1024;
/// Width of the residual stream or of a feed-forward.
pub const WIDTH_MAX: usize = 1 << 18;
/// Query heads.
pub const HEADS_MAX: usize = 1024;
/// Elements of one head.
pub const HEAD_DIM_MAX: usize = 1024;
/// Tokens of a vocabulary.
pub const VOCAB_MAX: usize = 1 << 22;
/// Positions of a context.
pub const CONTEXT_MAX: usize = 1 << 27;
/// Experts of one layer.
pub const EXPERTS_MAX: usize = 1024;
const THETA_MAX: f64 = 1e12;
const FACTOR_MAX: f64 = 1e9;
