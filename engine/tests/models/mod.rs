//! Tiny random models in memory, for the executor and for the reference alike.

use engine::model::{Architecture, Decoder, DecoderConfig, LoadOptions, RopeLayout, TensorSource};
use engine::weights::testing::{encode, values};
use engine::weights::{Format, ModelError, Tensor, TensorRole};
use kernels::format::dequantize;
use kernels::isa::Isa;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// A model whose matrices are in one format, its vectors in F32.
pub struct TinyModel {
    config: DecoderConfig,
    tensors: BTreeMap<TensorRole, (Format, Vec<u8>)>,
}

impl TinyModel {
    pub fn new(config: DecoderConfig, format: Format, seed: u64) -> Self {
        let roles = TensorRole::all(&config);
        let tensors = roles.map(|role| {
            let format = if role.is_matrix() { format } else { Format::F32 };
            let (_, cols) = role.shape(&config);
            (role, (format, encode(format, cols, &values(&config, role, seed))))
        });
        TinyModel { tensors: tensors.collect(), config }
    }

    /// The weights of a role as the formats' exact values, rows in Hugging Face order.
    pub fn dense(&self, role: TensorRole) -> Option<Vec<f32>> {
        let (format, bytes) = self.tensors.get(&role)?;
        let (rows, cols) = role.shape(&self.config);
        let mut values = vec![0.0; rows * cols];
        dequantize(*format, bytes, &mut values).expect("encoded from as many values");
        Some(values)
    }

    /// The weights by their Hugging Face name.
    pub fn by_name(&self, name: &str) -> Option<Vec<f32>> {
        let mut roles = self.tensors.keys();
        let role = roles.find(|role| hf_name(**role, self.config.architecture) == name)?;
        self.dense(*role)
    }

    pub fn load(self, isa: Isa) -> Arc<Decoder> {
        let options = LoadOptions { isa, threads: 1, quant: None, progress: &mut |_| {} };
        Arc::new(Decoder::load(Arc::new(self), options).expect("a whole model loads"))
    }
}

impl TensorSource for TinyModel {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn tensor(&self, role: TensorRole) -> Result<Tensor<'_>, ModelError> {
        let Some((format, bytes)) = self.tensors.get(&role) else {
            let tensor = format!("{role:?}");
            return Err(ModelError::MissingTensor { file: PathBuf::from("tiny"), tensor });
        };
        let (rows, cols) = role.shape(&self.config);
        let turns = matches!(
            role,
            TensorRole::Q(_) | TensorRole::K(_) | TensorRole::QBias(_) | TensorRole::KBias(_)
        );
        let bytes = if turns && self.config.rope.layout == RopeLayout::Interleaved {
            let outputs = if rows == 1 { cols } else { rows };
            Cow::Owned(interleave(bytes, bytes.len() / outputs, self.config.head_dim))
        } else {
            Cow::Borrowed(bytes.as_slice())
        };
        Ok(Tensor { name: format!("{role:?}"), format: *format, rows, cols, bytes })
    }

    fn digest(&self) -> [u8; 32] {
        [7; 32]
    }
}

/// Rows `i` and `i + half` of each head become rows `2i` and `2i + 1`.
fn interleave(bytes: &[u8], row_bytes: usize, head_dim: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(head_dim * row_bytes) {
        let (low, high) = head.split_at(head.len() / 2);
        for (a, b) in low.chunks_exact(row_bytes).zip(high.chunks_exact(row_bytes)) {
            out.extend_from_slice(a);
            out.extend_from_slice(b);
        }
    }
    out
}

fn hf_name(role: TensorRole, architecture: Architecture) -> String {
    use TensorRole::*;
    let mixtral = architecture == Architecture::Mixtral;
    let block = if mixtral { "block_sparse_moe" } else { "mlp" };
    let (layer, part) = match role {
        TokenEmbedding => return "model.embed_tokens.weight".into(),
        OutputNorm => return "model.norm.weight".into(),
        Output => return "lm_head.weight".into(),
        AttnNorm(l) => (l, "input_layernorm.weight".into()),
        Q(l) => (l, "self_attn.q_proj.weight".into()),
        K(l) => (l, "self_attn.k_proj.weight".into()),
        V(l) => (l, "self_attn.v_proj.weight".into()),
        QBias(l) => (l, "self_attn.q_proj.bias".into()),
        KBias(l) => (l, "self_attn.k_proj.bias".into()),
        VBias(l) => (l, "self_attn.v_proj.bias".into()),
        QNorm(l) => (l, "self_attn.q_norm.weight".into()),
        KNorm(l) => (l, "self_attn.k_norm.weight".into()),
        AttnOut(l) => (l, "self_attn.o_proj.weight".into()),
        AttnOutBias(l) => (l, "self_attn.o_proj.bias".into()),
        FfnNorm(l) => (l, "post_attention_layernorm.weight".into()),
        Gate(l) => (l, "mlp.gate_proj.weight".into()),
        Up(l) => (l, "mlp.up_proj.weight".into()),
        Down(l) => (l, "mlp.down_proj.weight".into()),
        GateBias(l) => (l, "mlp.gate_proj.bias".into()),
        UpBias(l) => (l, "mlp.up_proj.bias".into()),
        DownBias(l) => (l, "mlp.down_proj.bias".into()),
        Router(l) => (l, format!("{block}.gate.weight")),
        ExpertGate(l, e) => (l, expert(block, e, if mixtral { "w1" } else { "gate_proj" })),
        ExpertUp(l, e) => (l, expert(block, e, if mixtral { "w3" } else { "up_proj" })),
        ExpertDown(l, e) => (l, expert(block, e, if mixtral { "w2" } else { "down_proj" })),
    };
    format!("model.layers.{layer}.{part}")
}

fn expert(block: &str, expert: usize, part: &str) -> String {
    format!("{block}.experts.{expert}.{part}.weight")
}
