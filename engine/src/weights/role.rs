//! What a tensor is for, whatever a file calls it.

use crate::model::DecoderConfig;

/// The place of a tensor in a [`DecoderConfig`]; the number is the layer, then the expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorRole {
    /// `[vocab, hidden]`
    TokenEmbedding,
    /// `[hidden]`
    OutputNorm,
    /// `[vocab, hidden]`; the token embedding where embeddings are tied.
    Output,
    /// `[hidden]`
    AttnNorm(usize),
    /// `[heads * head_dim, hidden]`
    Q(usize),
    /// `[kv_heads * head_dim, hidden]`
    K(usize),
    /// `[kv_heads * head_dim, hidden]`
    V(usize),
    /// `[heads * head_dim]`
    QBias(usize),
    /// `[kv_heads * head_dim]`
    KBias(usize),
    /// `[kv_heads * head_dim]`
    VBias(usize),
    /// `[head_dim]`
    QNorm(usize),
    /// `[head_dim]`
    KNorm(usize),
    /// `[hidden, heads * head_dim]`
    AttnOut(usize),
    /// `[hidden]`
    AttnOutBias(usize),
    /// `[hidden]`
    FfnNorm(usize),
    /// `[intermediate, hidden]`
    Gate(usize),
    /// `[intermediate, hidden]`
    Up(usize),
    /// `[hidden, intermediate]`
    Down(usize),
    /// `[intermediate]`
    GateBias(usize),
    /// `[intermediate]`
    UpBias(usize),
    /// `[hidden]`
    DownBias(usize),
    /// `[experts, hidden]`
    Router(usize),
    /// `[moe.intermediate, hidden]`
    ExpertGate(usize, usize),
    /// `[moe.intermediate, hidden]`
    ExpertUp(usize, usize),
    /// `[hidden, moe.intermediate]`
    ExpertDown(usize, usize),
}

impl TensorRole {
    /// Rows and columns that the description asks for; a vector is one row.
    pub fn shape(self, config: &DecoderConfig) -> (usize, usize) {
        use TensorRole::*;
        let (hidden, q, kv) = (config.hidden, config.q_width(), config.kv_width());
        let expert = config.moe.as_ref().map_or(0, |moe| moe.intermediate);
        match self {
            TokenEmbedding | Output => (config.vocab, hidden),
            OutputNorm | AttnNorm(_) | FfnNorm(_) | AttnOutBias(_) | DownBias(_) => (1, hidden),
            Q(_) => (q, hidden),
            K(_) | V(_) => (kv, hidden),
            QBias(_) => (1, q),
            KBias(_) | VBias(_) => (1, kv),
            QNorm(_) | KNorm(_) => (1, config.head_dim),
            AttnOut(_) => (hidden, q),
            Gate(_) | Up(_) => (config.intermediate, hidden),
            Down(_) => (hidden, config.intermediate),
            GateBias(_) | UpBias(_) => (1, config.intermediate),
            Router(_) => (config.moe.as_ref().map_or(0, |moe| moe.experts), hidden),
            ExpertGate(..) | ExpertUp(..) => (expert, hidden),
            ExpertDown(..) => (hidden, expert),
        }
    }

    /// Whether it is multiplied as a matrix, so that it may be quantized while loading.
    pub fn is_matrix(self) -> bool {
        use TensorRole::*;
        matches!(
            self,
            TokenEmbedding | Output | Q(_) | K(_) | V(_) | AttnOut(_) | Gate(_) | Up(_) | Down(_)
        ) || matches!(self, ExpertGate(..) | ExpertUp(..) | ExpertDown(..))
    }

    /// Every tensor that a model of this description has, in the order of computation. `Output`
    /// is left out where it is the token embedding.
    pub fn all(config: &DecoderConfig) -> impl Iterator<Item = TensorRole> + '_ {
        let output = (!config.tied_embeddings).then_some(TensorRole::Output);
        std::iter::once(TensorRole::TokenEmbedding)
            .chain((0..config.layers).flat_map(|layer| TensorRole::of_layer(config, layer)))
            .chain(std::iter::once(TensorRole::OutputNorm))
            .chain(output)
    }

    fn of_layer(config: &DecoderConfig, l: usize) -> Vec<TensorRole> {
        use TensorRole::*;
        let mut roles = vec![AttnNorm(l), Q(l), K(l), V(l)];
        if config.qkv_bias {
            roles.extend([QBias(l), KBias(l), VBias(l)]);
        }
        if config.qk_norm {
            roles.extend([QNorm(l), KNorm(l)]);
        }
        roles.push(AttnOut(l));
        roles.extend(config.o_bias.then_some(AttnOutBias(l)));
        roles.push(FfnNorm(l));
        match &config.moe {
            Some(moe) => {
                roles.push(Router(l));
                for e in 0..moe.experts {
                    roles.extend([ExpertGate(l, e), ExpertUp(l, e), ExpertDown(l, e)]);
                }
            }
            None => roles.extend([Gate(l), Up(l), Down(l)]),
        }
        if config.mlp_bias {
            roles.extend([GateBias(l), UpBias(l), DownBias(l)]);
        }
        roles
    }
}
