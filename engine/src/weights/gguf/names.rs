//! What GGUF calls each tensor.

use crate::weights::TensorRole;

/// The tensor's own name. For experts this is the older form, one tensor for each; see
/// [`stacked`].
pub(in crate::weights) fn name(role: TensorRole) -> String {
    use TensorRole::*;
    let (layer, rest) = match role {
        TokenEmbedding => return "token_embd.weight".to_owned(),
        OutputNorm => return "output_norm.weight".to_owned(),
        Output => return "output.weight".to_owned(),
        ExpertGate(l, e) => return format!("blk.{l}.ffn_gate.{e}.weight"),
        ExpertUp(l, e) => return format!("blk.{l}.ffn_up.{e}.weight"),
        ExpertDown(l, e) => return format!("blk.{l}.ffn_down.{e}.weight"),
        AttnNorm(l) => (l, "attn_norm.weight"),
        Q(l) => (l, "attn_q.weight"),
        K(l) => (l, "attn_k.weight"),
        V(l) => (l, "attn_v.weight"),
        QBias(l) => (l, "attn_q.bias"),
        KBias(l) => (l, "attn_k.bias"),
        VBias(l) => (l, "attn_v.bias"),
        QNorm(l) => (l, "attn_q_norm.weight"),
        KNorm(l) => (l, "attn_k_norm.weight"),
        AttnOut(l) => (l, "attn_output.weight"),
        AttnOutBias(l) => (l, "attn_output.bias"),
        FfnNorm(l) => (l, "ffn_norm.weight"),
        Gate(l) => (l, "ffn_gate.weight"),
        Up(l) => (l, "ffn_up.weight"),
        Down(l) => (l, "ffn_down.weight"),
        GateBias(l) => (l, "ffn_gate.bias"),
        UpBias(l) => (l, "ffn_up.bias"),
        DownBias(l) => (l, "ffn_down.bias"),
        Router(l) => (l, "ffn_gate_inp.weight"),
    };
    format!("blk.{layer}.{rest}")
}

/// The tensor that holds all experts of a layer one after the other, and which of them this is.
pub(in crate::weights) fn stacked(role: TensorRole) -> Option<(String, usize)> {
    match role {
        TensorRole::ExpertGate(l, e) => Some((format!("blk.{l}.ffn_gate_exps.weight"), e)),
        TensorRole::ExpertUp(l, e) => Some((format!("blk.{l}.ffn_up_exps.weight"), e)),
        TensorRole::ExpertDown(l, e) => Some((format!("blk.{l}.ffn_down_exps.weight"), e)),
        _ => None,
    }
}
