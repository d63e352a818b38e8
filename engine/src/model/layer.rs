//! The parts of a decoder, packed.

use kernels::linear::Matrix;

/// One block of the decoder: attention and feed-forward, each behind its norm.
#[derive(Debug)]
pub(crate) struct Layer {
    /// `[hidden]`
    pub attention_norm: Vec<f32>,
    pub attention: Attention,
    /// `[hidden]`
    pub feed_forward_norm: Vec<f32>,
    pub feed_forward: FeedForward,
}

#[derive(Debug)]
pub(crate) struct Attention {
    /// `[heads * head_dim, hidden]`
    pub q: Projection,
    /// `[kv_heads * head_dim, hidden]`
    pub k: Projection,
    /// `[kv_heads * head_dim, hidden]`
    pub v: Projection,
    /// `[hidden, heads * head_dim]`
    pub output: Projection,
    /// `[head_dim]`: the norm of each head of the queries, before rotation (Qwen3).
    pub q_norm: Option<Vec<f32>>,
    /// `[head_dim]`
    pub k_norm: Option<Vec<f32>>,
    /// Positions that a query sees, its own included; all where `None`.
    pub window: Option<usize>,
}

/// A product, then a bias if there is one.
#[derive(Debug)]
pub(crate) struct Projection {
    pub weight: Matrix,
    /// `[rows of weight]`
    pub bias: Option<Vec<f32>>,
}

#[derive(Debug)]
pub(crate) enum FeedForward {
    Dense(Gated),
    Mixture(Mixture),
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct Gated {
    /// `[inner, hidden]`
    pub gate: Projection,
    /// `[inner, hidden]`
    pub up: Projection,
    /// `[hidden, inner]`
    pub down: Projection,
}

/// A mixture of experts: each token goes through those that its router scores highest.
#[derive(Debug)]
pub(crate) struct Mixture {
    /// `[experts, hidden]`
    pub router: Matrix,
    pub experts: Vec<Gated>,
    /// Experts for each token.
    pub used: usize,
    /// Whether the weights of the chosen experts are scaled to sum to one.
    pub normalize: bool,
}
