//! A writer of Hugging Face directories, well-formed or not.

use std::io;
use std::path::Path;

use serde_json::{Value, json};

use super::{BOS, CHATML, EOS, encode, values, vocabulary};
use crate::model::{Architecture, DecoderConfig, RopeScaling};
use crate::weights::{Format, TensorRole, hf as names};

/// The parts of a directory. Everything can be changed before it is written.
#[derive(Clone, Debug)]
pub struct HfFiles {
    pub config: Value,
    pub generation_config: Value,
    pub tokenizer: Value,
    pub tokenizer_config: Value,
    /// Name, dtype, shape and bytes.
    pub tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
}

impl HfFiles {
    /// Writes the directory with its tensors in `shards` files.
    pub fn write(&self, directory: &Path, shards: usize) -> io::Result<()> {
        let json = |name: &str, value: &Value| {
            std::fs::write(directory.join(name), serde_json::to_vec_pretty(value)?)
        };
        std::fs::create_dir_all(directory)?;
        json("config.json", &self.config)?;
        json("generation_config.json", &self.generation_config)?;
        json("tokenizer.json", &self.tokenizer)?;
        json("tokenizer_config.json", &self.tokenizer_config)?;
        if shards == 1 {
            return std::fs::write(directory.join("model.safetensors"), self.shard(0, 1));
        }
        let name = |shard: usize| format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let mut map = serde_json::Map::new();
        for (index, (tensor, ..)) in self.tensors.iter().enumerate() {
            map.insert(tensor.clone(), name(index % shards).into());
        }
        for shard in 0..shards {
            std::fs::write(directory.join(name(shard)), self.shard(shard, shards))?;
        }
        json("model.safetensors.index.json", &json!({ "metadata": {}, "weight_map": map }))
    }

    /// The bytes of one safetensors file.
    pub fn shard(&self, shard: usize, shards: usize) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        let mut data: Vec<u8> = Vec::new();
        for (name, dtype, shape, bytes) in self.tensors.iter().skip(shard).step_by(shards) {
            let start = data.len();
            data.extend(bytes);
            let info =
                json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] });
            header.insert(name.clone(), info);
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header);
        out.extend(data);
        out
    }
}

/// A model with random weights, all in `format`: F32, F16 or BF16.
pub fn hf(config: &DecoderConfig, format: Format, seed: u64) -> HfFiles {
    let mixtral = config.architecture == Architecture::Mixtral;
    let tensors = TensorRole::all(config).map(|role| {
        let (rows, cols) = role.shape(config);
        let shape = match role {
            // Only a vector is one row in this enumeration.
            _ if rows == 1 => vec![cols],
            _ => vec![rows, cols],
        };
        let bytes = encode(format, cols, &values(config, role, seed));
        (names::name(role, mixtral), format.name(), shape, bytes)
    });
    HfFiles {
        tensors: tensors.collect(),
        config: config_json(config),
        generation_config: json!({ "bos_token_id": BOS, "eos_token_id": [EOS] }),
        tokenizer: vocabulary::tokenizer_json(),
        tokenizer_config: json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
            "eos_token": "<|im_end|>", "chat_template": CHATML, "add_bos_token": false,
            "clean_up_tokenization_spaces": false,
        }),
    }
}

fn config_json(config: &DecoderConfig) -> Value {
    let (class, kind) = match config.architecture {
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Mistral => ("MistralForCausalLM", "mistral"),
        Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        Architecture::Mixtral => ("MixtralForCausalLM", "mixtral"),
        Architecture::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe"),
    };
    let mut json = json!({
        "architectures": [class], "model_type": kind, "hidden_size": config.hidden,
        "intermediate_size": config.intermediate, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.context, "rms_norm_eps": shortest(config.rms_eps),
        "rope_theta": config.rope.theta, "rope_scaling": scaling(&config.rope.scaling),
        "tie_word_embeddings": config.tied_embeddings, "vocab_size": config.vocab,
        "sliding_window": config.sliding_window.as_ref().map(|window| window.tokens),
        "attention_bias": config.o_bias, "mlp_bias": config.mlp_bias,
        "bos_token_id": BOS, "eos_token_id": EOS,
    });
    if let Some(moe) = &config.moe {
        json["num_experts_per_tok"] = moe.experts_per_token.into();
        match config.architecture {
            Architecture::Mixtral => json["num_local_experts"] = moe.experts.into(),
            _ => {
                json["num_experts"] = moe.experts.into();
                json["moe_intermediate_size"] = moe.intermediate.into();
                json["norm_topk_prob"] = moe.norm_topk_prob.into();
            }
        }
    }
    json
}

/// The decimal that people write: 1e-5, not its nearest f32 in f64's digits.
fn shortest(value: f32) -> Value {
    value.to_string().parse::<f64>().unwrap_or(f64::from(value)).into()
}

fn scaling(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_context,
            })
        }
        RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            attention_factor,
            mscale,
            mscale_all_dim,
            truncate,
        } => json!({
            "rope_type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow,
            "original_max_position_embeddings": original_context, "mscale": mscale,
            "attention_factor": attention_factor, "mscale_all_dim": mscale_all_dim,
            "truncate": truncate,
        }),
    }
}
