//! What Hugging Face files call each tensor.

use crate::weights::TensorRole;

/// The tensor's name; `mixtral` for Mixtral's names of router and experts.
pub(in crate::weights) fn name(role: TensorRole, mixtral: bool) -> String {
    use TensorRole::*;
    let (layer, rest) = match role {
        TokenEmbedding => return "model.embed_tokens.weight".to_owned(),
        OutputNorm => return "model.norm.weight".to_owned(),
        Output => return "lm_head.weight".to_owned(),
        ExpertGate(l, e) => return expert(l, e, mixtral, "gate_proj", "w1"),
        ExpertUp(l, e) => return expert(l, e, mixtral, "up_proj", "w3"),
        ExpertDown(l, e) => return expert(l, e, mixtral, "down_proj", "w2"),
        AttnNorm(l) => (l, "input_layernorm.weight"),
        Q(l) => (l, "self_attn.q_proj.weight"),
        K(l) => (l, "self_attn.k_proj.weight"),
        V(l) => (l, "self_attn.v_proj.weight"),
        QBias(l) => (l, "self_attn.q_proj.bias"),
        KBias(l) => (l, "self_attn.k_proj.bias"),
        VBias(l) => (l, "self_attn.v_proj.bias"),
        QNorm(l) => (l, "self_attn.q_norm.weight"),
        KNorm(l) => (l, "self_attn.k_norm.weight"),
        AttnOut(l) => (l, "self_attn.o_proj.weight"),
        AttnOutBias(l) => (l, "self_attn.o_proj.bias"),
        FfnNorm(l) => (l, "post_attention_layernorm.weight"),
        Gate(l) => (l, "mlp.gate_proj.weight"),
        Up(l) => (l, "mlp.up_proj.weight"),
        Down(l) => (l, "mlp.down_proj.weight"),
        GateBias(l) => (l, "mlp.gate_proj.bias"),
        UpBias(l) => (l, "mlp.up_proj.bias"),
        DownBias(l) => (l, "mlp.down_proj.bias"),
        Router(l) if mixtral => (l, "block_sparse_moe.gate.weight"),
        Router(l) => (l, "mlp.gate.weight"),
    };
    format!("model.layers.{layer}.{rest}")
}

fn expert(layer: usize, expert: usize, mixtral: bool, part: &str, mixtral_part: &str) -> String {
    match mixtral {
        true => {
            format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{mixtral_part}.weight")
        }
        false => format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight"),
    }
}
