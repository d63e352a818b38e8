//! The parts of a decoder, packed for a device.

use crate::device::Device;

/// One block of the decoder: attention and feed-forward, each behind its norm.
pub(crate) struct Layer<D: Device> {
    /// `[hidden]`
    pub attention_norm: D::Vector,
    pub attention: Attention<D>,
    /// `[hidden]`
    pub feed_forward_norm: D::Vector,
    pub feed_forward: FeedForward<D>,
}

pub(crate) struct Attention<D: Device> {
    /// `[heads * head_dim, hidden]`
    pub q: Projection<D>,
    /// `[kv_heads * head_dim, hidden]`
    pub k: Projection<D>,
    /// `[kv_heads * head_dim, hidden]`
    pub v: Projection<D>,
    /// `[hidden, heads * head_dim]`
    pub output: Projection<D>,
    /// `[head_dim]`: the norm of each head of the queries, before rotation (Qwen3).
    pub q_norm: Option<D::Vector>,
    /// `[head_dim]`
    pub k_norm: Option<D::Vector>,
    /// Positions that a query sees, its own included; all where `None`.
    pub window: Option<usize>,
}

/// A product, then a bias if there is one.
pub struct Projection<D: Device> {
    pub weight: D::Matrix,
    /// `[rows of weight]`
    pub bias: Option<D::Vector>,
}

pub(crate) enum FeedForward<D: Device> {
    Dense(Gated<D>),
    Mixture(Mixture<D>),
}

/// `down(silu(gate(x)) * up(x))`.
pub(crate) struct Gated<D: Device> {
    /// `[inner, hidden]`
    pub gate: Projection<D>,
    /// `[inner, hidden]`
    pub up: Projection<D>,
    /// `[hidden, inner]`
    pub down: Projection<D>,
}

/// A mixture of experts: each token goes through those that its router scores highest.
pub(crate) struct Mixture<D: Device> {
    /// `[experts, hidden]`
    pub router: Projection<D>,
    pub experts: Vec<Gated<D>>,
    /// Experts for each token.
    pub used: usize,
    /// Whether the weights of the chosen experts are scaled to sum to one.
    pub normalize: bool,
}
