//! The description of a decoder, from `config.json`.

use serde_json::Value;

use super::json::{Object, shown};
use crate::model::{
    Architecture, ConfigError, DecoderConfig, Field, LAYERS_MAX, Moe, Rope, RopeLayout,
    RopeScaling, SlidingWindow,
};
use crate::weights::ModelError;

/// What the file describes.
pub(super) fn decoder_config(json: &Object) -> Result<DecoderConfig, ModelError> {
    let architecture = architecture(json)?;
    refuse_unsupported(json)?;
    let (layers, hidden) =
        (json.required_size("num_hidden_layers")?, json.required_size("hidden_size")?);
    let heads = json.required_size("num_attention_heads")?;
    let head_dim = head_dim(json, architecture, hidden, heads)?;
    let llama = architecture == Architecture::Llama;
    let qwen3 = matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe);
    let flag = |key: &str| Ok(json.bool(key)?.unwrap_or(false));
    let attention_bias = (llama || qwen3) && flag("attention_bias")?;
    let rope = rope(json, architecture, head_dim)?;
    let config = DecoderConfig {
        architecture,
        layers,
        hidden,
        heads,
        kv_heads: json.size("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        intermediate: json.required_size("intermediate_size")?,
        vocab: json.required_size("vocab_size")?,
        context: rope.reach(json.required_size("max_position_embeddings")?),
        rms_eps: json.number("rms_norm_eps")?.unwrap_or(EPS_DEFAULT) as f32,
        rope,
        sliding_window: sliding_window(json, architecture, layers)?,
        qkv_bias: attention_bias || architecture == Architecture::Qwen2,
        o_bias: attention_bias,
        mlp_bias: llama && flag("mlp_bias")?,
        qk_norm: qwen3,
        tied_embeddings: flag("tie_word_embeddings")?,
        moe: moe(json, architecture)?,
    };
    config.validate().map_err(|error| wrong(json, architecture, error))?;
    Ok(config)
}

fn architecture(json: &Object) -> Result<Architecture, ModelError> {
    let names = json.optional("architectures", "an array of one name", Value::as_array)?;
    let name = names.and_then(|names| names.first()).and_then(Value::as_str);
    let Some(name) = name else {
        return Err(json.missing("architectures", "an array of one name"));
    };
    let known = ARCHITECTURES.into_iter().find(|(known, _)| *known == name);
    known.map(|(_, architecture)| architecture).ok_or_else(|| ModelError::Architecture {
        file: json.file.clone(),
        found: name.to_owned(),
        supported: ARCHITECTURES.map(|(name, _)| name).join(", "),
    })
}

/// Options that change the arithmetic in ways that the description has no word for.
fn refuse_unsupported(json: &Object) -> Result<(), ModelError> {
    match json.text("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => return Err(json.wrong("hidden_act", format!("{other:?}"), "silu")),
    }
    if let Some(value) = json.value("quantization_config") {
        let expected = "no such key: give the unquantized model, or a GGUF";
        return Err(json.wrong("quantization_config", shown(value), expected));
    }
    Ok(())
}

fn head_dim(
    json: &Object,
    architecture: Architecture,
    hidden: usize,
    heads: usize,
) -> Result<usize, ModelError> {
    match json.size("head_dim")? {
        Some(head_dim) => Ok(head_dim),
        None if architecture == Architecture::Qwen3 => Ok(QWEN3_HEAD_DIM),
        None if heads > 0 && !hidden.is_multiple_of(heads) => {
            let expected =
                format!("a divisor of `hidden_size`, {hidden}, where there is no `head_dim`");
            Err(json.wrong("num_attention_heads", heads.to_string(), &expected))
        }
        None => Ok(hidden.checked_div(heads).unwrap_or(0)),
    }
}

fn moe(json: &Object, architecture: Architecture) -> Result<Option<Moe>, ModelError> {
    match architecture {
        Architecture::Mixtral => Ok(Some(Moe {
            experts: json.required_size("num_local_experts")?,
            experts_per_token: json.required_size("num_experts_per_tok")?,
            intermediate: json.required_size("intermediate_size")?,
            norm_topk_prob: true,
        })),
        Architecture::Qwen3Moe => {
            if json.size("decoder_sparse_step")?.is_some_and(|step| step != 1) {
                let step = json.value("decoder_sparse_step").map(shown).unwrap_or_default();
                return Err(json.wrong("decoder_sparse_step", step, "1: experts in every layer"));
            }
            let dense = json.optional("mlp_only_layers", "an array", Value::as_array)?;
            if let Some(dense) = dense.filter(|dense| !dense.is_empty()) {
                let value = format!("an array of {}", dense.len());
                let expected = "an empty array: experts in every layer";
                return Err(json.wrong("mlp_only_layers", value, expected));
            }
            // transformers 5 writes the second name.
            let experts = match json.size("num_experts")? {
                Some(experts) => Some(experts),
                None => json.size("num_local_experts")?,
            };
            Ok(Some(Moe {
                experts: experts.ok_or_else(|| json.missing("num_experts", "a whole number"))?,
                experts_per_token: json.required_size("num_experts_per_tok")?,
                intermediate: json.required_size("moe_intermediate_size")?,
                norm_topk_prob: json.bool("norm_topk_prob")?.unwrap_or(false),
            }))
        }
        _ => Ok(None),
    }
}

fn sliding_window(
    json: &Object,
    architecture: Architecture,
    layers: usize,
) -> Result<Option<SlidingWindow>, ModelError> {
    use Architecture::*;
    let key = "sliding_window";
    // A key that is there but null switches the window off; without one, the family's default
    // counts.
    let tokens = match (json.size(key)?, json.map.contains_key(key)) {
        (Some(tokens), _) => Some(tokens),
        (None, true) => None,
        (None, false) => match architecture {
            Mistral | Qwen2 | Qwen3 | Qwen3Moe => Some(WINDOW_DEFAULT),
            Llama | Mixtral => None,
        },
    };
    let used = match architecture {
        Llama => false,
        Mistral | Mixtral => true,
        Qwen2 | Qwen3 | Qwen3Moe => json.bool("use_sliding_window")?.unwrap_or(false),
    };
    let Some(tokens) = tokens.filter(|_| used) else { return Ok(None) };
    let layers = layers.min(LAYERS_MAX);
    let pattern = match architecture {
        Qwen2 | Qwen3 => windowed_layers(json, layers)?,
        _ => vec![true; layers],
    };
    let any = pattern.contains(&true);
    Ok(any.then_some(SlidingWindow { tokens, layers: pattern }))
}

/// `layer_types` where it is given, else every layer from `max_window_layers` on.
fn windowed_layers(json: &Object, layers: usize) -> Result<Vec<bool>, ModelError> {
    let expected = format!("{layers} of full_attention or sliding_attention");
    let types = json.optional("layer_types", &expected, Value::as_array)?;
    let Some(types) = types else {
        let first = json.size("max_window_layers")?.unwrap_or(MAX_WINDOW_LAYERS_DEFAULT);
        return Ok((0..layers).map(|layer| layer >= first).collect());
    };
    let windowed = |value: &Value| match value.as_str() {
        Some("full_attention") => Some(false),
        Some("sliding_attention") => Some(true),
        _ => None,
    };
    let pattern: Option<Vec<bool>> = types.iter().map(windowed).collect();
    let value = || format!("an array of {}", types.len());
    let fits = pattern.filter(|pattern| pattern.len() == layers);
    fits.ok_or_else(|| json.wrong("layer_types", value(), &expected))
}

fn rope(json: &Object, architecture: Architecture, head_dim: usize) -> Result<Rope, ModelError> {
    let theta_default = match architecture {
        Architecture::Mixtral => THETA_MIXTRAL,
        _ => THETA_DEFAULT,
    };
    // Newer files put all of it into `rope_parameters`, older ones only the scaling into
    // `rope_scaling`.
    let parameters = match json.object("rope_parameters")? {
        None => json.object("rope_scaling")?,
        some => some,
    };
    let either = |key: &str| -> Result<Option<f64>, ModelError> {
        match parameters.as_ref().map(|object| object.number(key)).transpose()?.flatten() {
            None => json.number(key),
            some => Ok(some),
        }
    };
    let theta = either("rope_theta")?.unwrap_or(theta_default);
    let partial = either("partial_rotary_factor")?.unwrap_or(1.0);
    let dims = (head_dim as f64 * partial) as usize;
    let scaling = match &parameters {
        None => RopeScaling::None,
        Some(parameters) => scaling(json, parameters)?,
    };
    Ok(Rope { theta, dims, layout: RopeLayout::Half, scaling, factors: None })
}

fn scaling(json: &Object, parameters: &Object) -> Result<RopeScaling, ModelError> {
    let kind = match parameters.text("rope_type")? {
        None => parameters.text("type")?.unwrap_or("default"),
        Some(kind) => kind,
    };
    let factor =
        |key: &str| parameters.number(key)?.ok_or_else(|| parameters.missing(key, "a number"));
    let original = || {
        let key = "original_max_position_embeddings";
        match (json.size(key)?, parameters.size(key)?) {
            (Some(context), _) | (None, Some(context)) => Ok(context),
            (None, None) => json.required_size("max_position_embeddings"),
        }
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: factor("factor")?,
            low_freq_factor: factor("low_freq_factor")?,
            high_freq_factor: factor("high_freq_factor")?,
            original_context: original()?,
        }),
        "yarn" => Ok(RopeScaling::Yarn {
            factor: factor("factor")?,
            original_context: original()?,
            beta_fast: parameters.number("beta_fast")?.filter(|b| *b != 0.0).unwrap_or(32.0),
            beta_slow: parameters.number("beta_slow")?.filter(|b| *b != 0.0).unwrap_or(1.0),
            attention_factor: parameters.number("attention_factor")?,
            mscale: parameters.number("mscale")?,
            mscale_all_dim: parameters.number("mscale_all_dim")?,
            truncate: parameters.bool("truncate")?.unwrap_or(true),
        }),
        other => Err(parameters.wrong("rope_type", format!("{other:?}"), SCALINGS)),
    }
}

/// Puts the file's own key into an error.
fn wrong(json: &Object, architecture: Architecture, error: ConfigError) -> ModelError {
    let nested = match json.value("rope_parameters") {
        Some(_) => "rope_parameters.",
        None => "rope_scaling.",
    };
    let mixtral = architecture == Architecture::Mixtral;
    let (nested, name) = match error.field {
        Field::Layers => ("", "num_hidden_layers"),
        Field::Hidden => ("", "hidden_size"),
        Field::Heads => ("", "num_attention_heads"),
        Field::KvHeads => ("", "num_key_value_heads"),
        Field::HeadDim => ("", "head_dim"),
        Field::Intermediate => ("", "intermediate_size"),
        Field::Vocab => ("", "vocab_size"),
        Field::Context => ("", "max_position_embeddings"),
        Field::RmsEps => ("", "rms_norm_eps"),
        Field::RopeTheta => ("", "rope_theta"),
        Field::RopeDims => ("", "partial_rotary_factor"),
        Field::RopeScaling | Field::RopeFactors => (nested, "rope_type"),
        Field::RopeFactor => (nested, "factor"),
        Field::RopeOriginalContext => (nested, "original_max_position_embeddings"),
        Field::RopeLowFreqFactor => (nested, "low_freq_factor"),
        Field::RopeHighFreqFactor => (nested, "high_freq_factor"),
        Field::RopeBetaFast => (nested, "beta_fast"),
        Field::RopeBetaSlow => (nested, "beta_slow"),
        Field::RopeAttentionFactor => (nested, "attention_factor"),
        Field::SlidingWindow => ("", "sliding_window"),
        Field::Experts if mixtral => ("", "num_local_experts"),
        Field::Experts => ("", "num_experts"),
        Field::ExpertsPerToken => ("", "num_experts_per_tok"),
        Field::ExpertIntermediate if mixtral => ("", "intermediate_size"),
        Field::ExpertIntermediate => ("", "moe_intermediate_size"),
    };
    json.wrong(&format!("{nested}{name}"), error.value, &error.expected)
}

const ARCHITECTURES: [(&str, Architecture); 6] = [
    ("LlamaForCausalLM", Architecture::Llama),
    ("MistralForCausalLM", Architecture::Mistral),
    ("Qwen2ForCausalLM", Architecture::Qwen2),
    ("Qwen3ForCausalLM", Architecture::Qwen3),
    ("MixtralForCausalLM", Architecture::Mixtral),
    ("Qwen3MoeForCausalLM", Architecture::Qwen3Moe),
];
const EPS_DEFAULT: f64 = 1e-6;
const THETA_DEFAULT: f64 = 10_000.0;
const THETA_MIXTRAL: f64 = 1_000_000.0;
const QWEN3_HEAD_DIM: usize = 128;
const WINDOW_DEFAULT: usize = 4096;
const MAX_WINDOW_LAYERS_DEFAULT: usize = 28;
const SCALINGS: &str = "default, linear, llama3 or yarn";
