//! The description of a decoder, from GGUF metadata.

use super::{Gguf, Value};
use crate::model::{
    Architecture, ConfigError, DecoderConfig, Field, HEAD_DIM_MAX, Moe, Rope, RopeLayout,
    RopeScaling, SlidingWindow,
};
use crate::weights::ModelError;

/// The names of the numbers under one `general.architecture`.
#[derive(Clone, Debug)]
struct Keys {
    prefix: String,
}

impl Keys {
    /// What the file calls `field`.
    fn key(&self, field: Field) -> String {
        let suffix = match field {
            Field::Layers => "block_count",
            Field::Hidden => "embedding_length",
            Field::Heads => "attention.head_count",
            Field::KvHeads => "attention.head_count_kv",
            Field::HeadDim => "attention.key_length",
            Field::Intermediate => "feed_forward_length",
            Field::Vocab => "vocab_size",
            Field::Context => "context_length",
            Field::RmsEps => "attention.layer_norm_rms_epsilon",
            Field::RopeTheta => "rope.freq_base",
            Field::RopeDims => "rope.dimension_count",
            Field::RopeScaling => "rope.scaling.type",
            Field::RopeFactor => "rope.scaling.factor",
            Field::RopeOriginalContext => "rope.scaling.original_context_length",
            Field::RopeLowFreqFactor => "rope.scaling.low_freq_factor",
            Field::RopeHighFreqFactor => "rope.scaling.high_freq_factor",
            Field::RopeBetaFast => "rope.scaling.yarn_beta_fast",
            Field::RopeBetaSlow => "rope.scaling.yarn_beta_slow",
            Field::RopeAttentionFactor => "rope.scaling.attn_factor",
            Field::RopeFactors => return "rope_freqs.weight".to_owned(),
            Field::SlidingWindow => "attention.sliding_window",
            Field::Experts => "expert_count",
            Field::ExpertsPerToken => "expert_used_count",
            Field::ExpertIntermediate => "expert_feed_forward_length",
        };
        format!("{}.{suffix}", self.prefix)
    }
}

/// The families that are read, for the refusal of the others.
fn supported() -> String {
    ARCHITECTURES.map(|(name, _)| name).join(", ")
}

/// What the file describes. `factors` are the numbers of its `rope_freqs.weight`; `has` says
/// whether a tensor is in the file, for the options that only its tensors tell.
pub(super) fn decoder_config(
    gguf: &Gguf<'_>,
    factors: Option<Vec<f32>>,
    has: &dyn Fn(&str) -> bool,
) -> Result<DecoderConfig, ModelError> {
    let name = gguf.required("general.architecture", "the name of an architecture", Value::text)?;
    let Some((_, architecture)) = ARCHITECTURES.into_iter().find(|(known, _)| *known == name)
    else {
        return Err(ModelError::Architecture {
            file: gguf.file.to_owned(),
            found: name.to_owned(),
            supported: supported(),
        });
    };
    let read = Reader { gguf, keys: Keys { prefix: name.to_owned() } };
    let config = read.config(architecture, factors, has)?;
    config.validate().map_err(|error| read.wrong(error))?;
    Ok(config)
}

struct Reader<'g, 'a> {
    gguf: &'g Gguf<'a>,
    keys: Keys,
}

impl Reader<'_, '_> {
    fn config(
        &self,
        architecture: Architecture,
        factors: Option<Vec<f32>>,
        has: &dyn Fn(&str) -> bool,
    ) -> Result<DecoderConfig, ModelError> {
        let moe = self.moe(architecture)?;
        let architecture = match (architecture, &moe) {
            (Architecture::Llama, Some(_)) => Architecture::Mixtral,
            (other, _) => other,
        };
        let layers = self.size(Field::Layers)?;
        let (hidden, heads) = (self.size(Field::Hidden)?, self.uniform(Field::Heads)?);
        let heads = heads.ok_or_else(|| self.missing(Field::Heads))?;
        let head_dim = self.head_dim(hidden, heads)?;
        let intermediate = match self.uniform(Field::Intermediate)? {
            Some(width) => width,
            None if moe.is_some() => 0,
            None => return Err(self.missing(Field::Intermediate)),
        };
        let qwen = !matches!(architecture, Architecture::Llama | Architecture::Mixtral);
        let rope = self.rope(head_dim, qwen, factors)?;
        Ok(DecoderConfig {
            architecture,
            layers,
            hidden,
            heads,
            kv_heads: self.uniform(Field::KvHeads)?.unwrap_or(heads),
            head_dim,
            intermediate,
            vocab: self.vocab()?,
            context: rope.reach(self.size(Field::Context)?),
            rms_eps: self.number(Field::RmsEps)?.ok_or_else(|| self.missing(Field::RmsEps))? as f32,
            rope,
            sliding_window: self.sliding_window(layers)?,
            qkv_bias: architecture == Architecture::Qwen2 || has("blk.0.attn_q.bias"),
            o_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_gate.bias"),
            qk_norm: matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe),
            tied_embeddings: !has("output.weight"),
            moe,
        })
    }

    fn moe(&self, architecture: Architecture) -> Result<Option<Moe>, ModelError> {
        let experts = self.optional_size(Field::Experts)?.unwrap_or(0);
        match (experts, architecture) {
            (0, Architecture::Qwen3Moe) => return Err(self.missing(Field::Experts)),
            (0, _) => return Ok(None),
            (_, Architecture::Llama | Architecture::Qwen3Moe) => {}
            (_, other) => {
                let expected = format!("none in a {other} model");
                return Err(self.wrong_value(Field::Experts, experts.to_string(), expected));
            }
        }
        let shared = Field::Intermediate;
        let intermediate = match self.optional_size(Field::ExpertIntermediate)? {
            Some(width) => width,
            None => self.uniform(shared)?.ok_or_else(|| self.missing(shared))?,
        };
        let experts_per_token = self.size(Field::ExpertsPerToken)?;
        Ok(Some(Moe { experts, experts_per_token, intermediate, norm_topk_prob: true }))
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, ModelError> {
        let divided = hidden.checked_div(heads).unwrap_or(0);
        let Some(head_dim) = self.optional_size(Field::HeadDim)? else {
            if heads > 0 && !hidden.is_multiple_of(heads) {
                let expected = format!("a divisor of the embedding length {hidden}");
                return Err(self.wrong_value(Field::Heads, heads.to_string(), expected));
            }
            return Ok(divided);
        };
        let value_key = format!("{}.attention.value_length", self.keys.prefix);
        let value_dim = self.gguf.optional(&value_key, A_SIZE, Value::size)?;
        match value_dim.unwrap_or(divided) {
            dim if dim == head_dim => Ok(head_dim),
            dim => {
                let expected = format!("{head_dim}, the length of a key");
                Err(self.gguf.wrong(&value_key, dim.to_string(), &expected))
            }
        }
    }

    /// The key where the file has it, the tokenizer's number of tokens otherwise.
    fn vocab(&self) -> Result<usize, ModelError> {
        if let Some(vocab) = self.optional_size(Field::Vocab)? {
            return Ok(vocab);
        }
        let tokens = self.gguf.required(TOKENS, "an array of strings", Value::array)?;
        Ok(tokens.len())
    }

    fn rope(
        &self,
        head_dim: usize,
        half: bool,
        factors: Option<Vec<f32>>,
    ) -> Result<Rope, ModelError> {
        let theta = self.number(Field::RopeTheta)?.unwrap_or(THETA_DEFAULT);
        let dims = self.optional_size(Field::RopeDims)?.unwrap_or(head_dim.min(HEAD_DIM_MAX));
        let layout = if half { RopeLayout::Half } else { RopeLayout::Interleaved };
        Ok(Rope { theta, dims, layout, scaling: self.scaling()?, factors })
    }

    fn scaling(&self) -> Result<RopeScaling, ModelError> {
        let key = self.keys.key(Field::RopeScaling);
        let kind = self.gguf.optional(&key, SCALINGS, Value::text)?;
        let legacy = format!("{}.rope.scale_linear", self.keys.prefix);
        let factor = match self.number(Field::RopeFactor)? {
            None => self.gguf.optional(&legacy, A_NUMBER, Value::number)?,
            some => some,
        };
        match kind.unwrap_or("linear") {
            "none" => Ok(RopeScaling::None),
            "linear" => match factor {
                // Converters write 0 for "not scaled".
                None | Some(0.0 | 1.0) => Ok(RopeScaling::None),
                Some(factor) => Ok(RopeScaling::Linear { factor }),
            },
            "yarn" => self.yarn(factor.ok_or_else(|| self.missing(Field::RopeFactor))?),
            other => Err(self.gguf.wrong(&key, format!("{other:?}"), SCALINGS)),
        }
    }

    fn yarn(&self, factor: f64) -> Result<RopeScaling, ModelError> {
        let original_context = match self.optional_size(Field::RopeOriginalContext)? {
            Some(context) => context,
            None => self.size(Field::Context)?,
        };
        let multiplier_key = format!("{}.rope.scaling.yarn_log_multiplier", self.keys.prefix);
        let multiplier = self.gguf.optional(&multiplier_key, A_NUMBER, Value::number)?;
        let mut scaling = RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast: self.number(Field::RopeBetaFast)?.unwrap_or(32.0),
            beta_slow: self.number(Field::RopeBetaSlow)?.unwrap_or(1.0),
            attention_factor: None,
            mscale: multiplier.map(|_| 1.0),
            mscale_all_dim: multiplier,
            truncate: true,
        };
        // GGUF's factor multiplies the inferred one, where Hugging Face's replaces it.
        if let Some(by) = self.number(Field::RopeAttentionFactor)? {
            let inferred = Rope {
                theta: THETA_DEFAULT,
                dims: 2,
                layout: RopeLayout::Half,
                scaling: scaling.clone(),
                factors: None,
            }
            .mscale();
            if let RopeScaling::Yarn { attention_factor, .. } = &mut scaling {
                *attention_factor = Some(by * f64::from(inferred));
            }
        }
        Ok(scaling)
    }

    /// The window that the file names. llama.cpp does not read it in files of these families and
    /// lets every layer see everything; transformers keeps to it, and so does this.
    fn sliding_window(&self, layers: usize) -> Result<Option<SlidingWindow>, ModelError> {
        let tokens = self.optional_size(Field::SlidingWindow)?.filter(|tokens| *tokens > 0);
        let Some(tokens) = tokens else { return Ok(None) };
        let layers = self.windowed_layers(layers.min(crate::model::LAYERS_MAX))?;
        Ok(layers.contains(&true).then_some(SlidingWindow { tokens, layers }))
    }

    /// Which layers have the window: all of them, unless the file says which, or that each n-th
    /// sees everything.
    fn windowed_layers(&self, layers: usize) -> Result<Vec<bool>, ModelError> {
        let key = format!("{}.attention.sliding_window_pattern", self.keys.prefix);
        let expected = format!("a whole number, or true or false for each of {layers} layers");
        let pattern = self.gguf.optional(&key, &expected, |value| match value.array() {
            None => {
                let every = value.size()?;
                Some((0..layers).map(|layer| every == 0 || layer % every + 1 < every).collect())
            }
            Some(array) if array.len() != layers => None,
            Some(array) => array.numbers()?.map(|windowed| windowed.bool()).collect(),
        })?;
        Ok(pattern.unwrap_or_else(|| vec![true; layers]))
    }

    fn size(&self, field: Field) -> Result<usize, ModelError> {
        self.gguf.required(&self.keys.key(field), A_SIZE, Value::size)
    }

    fn optional_size(&self, field: Field) -> Result<Option<usize>, ModelError> {
        self.gguf.optional(&self.keys.key(field), A_SIZE, Value::size)
    }

    fn number(&self, field: Field) -> Result<Option<f64>, ModelError> {
        self.gguf.optional(&self.keys.key(field), A_NUMBER, Value::number)
    }

    /// A whole number, or an array that repeats one for each layer.
    fn uniform(&self, field: Field) -> Result<Option<usize>, ModelError> {
        let expected = "a whole number, the same for each layer";
        self.gguf.optional(&self.keys.key(field), expected, |value| match value.array() {
            None => value.size(),
            Some(array) => {
                let mut sizes = array.numbers()?;
                let first = sizes.next()?.size()?;
                sizes.all(|size| size.size() == Some(first)).then_some(first)
            }
        })
    }

    fn missing(&self, field: Field) -> ModelError {
        ModelError::MissingKey {
            file: self.gguf.file.to_owned(),
            key: self.keys.key(field),
            expected: A_NUMBER.to_owned(),
        }
    }

    fn wrong(&self, error: ConfigError) -> ModelError {
        self.wrong_value(error.field, error.value, error.expected)
    }

    fn wrong_value(&self, field: Field, value: String, expected: String) -> ModelError {
        self.gguf.wrong(&self.keys.key(field), value, &expected)
    }
}

/// The key of the vocabulary.
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
const ARCHITECTURES: [(&str, Architecture); 4] = [
    ("llama", Architecture::Llama),
    ("qwen2", Architecture::Qwen2),
    ("qwen3", Architecture::Qwen3),
    ("qwen3moe", Architecture::Qwen3Moe),
];
const THETA_DEFAULT: f64 = 10_000.0;
const A_SIZE: &str = "a whole number";
const A_NUMBER: &str = "a number";
const SCALINGS: &str = "none, linear or yarn";
