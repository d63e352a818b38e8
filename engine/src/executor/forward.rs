//! One pass through the decoder.
//!
//! Rows are the tokens of all segments, one after another. Every operation treats its rows apart and
//! in the same order of arithmetic whatever else is in the pass: that, kept by each kernel, is what
//! makes a sequence's bits independent of its company.

use super::batch::{Segment, wanted_suffix};
use super::kv::KvStorage;
use super::mixture::{MixtureScratch, forward_mixture};
use super::profile::{StepOp, StepProfile};
use crate::model::{Attention, Decoder, FeedForward, Gated, Layer, Projection};
use kernels::attention::{AttentionParams, AttentionScratch, SequenceQueries, attend, write_kv};
use kernels::linear::{Activations, matmul_many};
use kernels::ops::{self, RopeTable};
use kernels::pool::ThreadPool;
use protocol::TokenId;
use scheduler::StepPlan;

/// Buffers of a pass; they grow to the largest one and stay.
#[derive(Debug)]
pub(super) struct Scratch {
    /// Rows that the pass goes on with.
    rows: usize,
    tokens: Vec<TokenId>,
    positions: Vec<u32>,
    /// Block tables of all segments, one after another.
    tables: Vec<u32>,
    rope: RopeTable,
    /// Residual stream, `[rows, hidden]`.
    x: Vec<f32>,
    /// What a branch adds to the residual stream, `[rows, hidden]`.
    delta: Vec<f32>,
    /// Output of a norm, `[rows, hidden]`.
    pub normed: Activations,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Attention's output, `[rows, heads * head_dim]`.
    mixed: Activations,
    attention: AttentionScratch,
    feed_forward: FeedForwardScratch,
    mixture: MixtureScratch,
}

/// Buffers of one gated feed-forward.
#[derive(Debug, Default)]
pub(super) struct FeedForwardScratch {
    /// `[rows, inner]`
    inner: Activations,
    up: Vec<f32>,
}

impl Scratch {
    pub fn new(decoder: &Decoder) -> Self {
        Scratch {
            rows: 0,
            tokens: Vec::new(),
            positions: Vec::new(),
            tables: Vec::new(),
            rope: decoder.rope_table(),
            x: Vec::new(),
            delta: Vec::new(),
            normed: Activations::new(),
            q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
            mixed: Activations::new(),
            attention: AttentionScratch::new(),
            feed_forward: FeedForwardScratch::default(),
            mixture: MixtureScratch::default(),
        }
    }
}

/// A pass in the making: what it reads, and what it changes.
pub(super) struct Pass<'a> {
    pub decoder: &'a Decoder,
    pub pool: &'a ThreadPool,
    pub kv: &'a mut KvStorage,
    pub scratch: &'a mut Scratch,
    pub profile: &'a mut StepProfile,
    pub plan: &'a StepPlan,
    pub segments: &'a [Segment],
}

impl Pass<'_> {
    /// Computes the segments, stores their keys and values, and leaves the final hidden states of
    /// the wanted rows, after the last norm, in `scratch.normed`. Returns their number.
    pub fn run(&mut self) -> usize {
        self.gather();
        let tables = std::mem::take(&mut self.scratch.tables);
        let rows = self.layers(&self.queries(&tables), &self.wanted_queries(&tables));
        self.scratch.tables = tables;
        rows
    }

    fn layers(&mut self, queries: &[SequenceQueries<'_>], wanted: &[SequenceQueries<'_>]) -> usize {
        let decoder = self.decoder;
        self.embed();
        self.profile.lap(StepOp::Embed);
        self.first_norm();
        self.profile.lap(StepOp::Norm);
        for (index, layer) in decoder.layers.iter().enumerate() {
            let is_last = index + 1 == decoder.layers.len();
            self.project(&layer.attention);
            self.store(index, queries);
            self.profile.lap(StepOp::KvWrite);
            if is_last && self.keep_wanted() == 0 {
                return 0;
            }
            self.attend(index, layer.attention.window, if is_last { wanted } else { queries });
            self.profile.lap(StepOp::Attention);
            self.attention_output(&layer.attention.output);
            self.profile.lap(StepOp::AttentionOutput);
            self.add_and_norm(&layer.feed_forward_norm);
            self.profile.lap(StepOp::Norm);
            self.feed_forward(layer);
            let next = decoder.layers.get(index + 1).map(|next| &next.attention_norm);
            self.add_and_norm(next.unwrap_or(&decoder.final_norm));
            self.profile.lap(StepOp::Norm);
        }
        self.scratch.rows
    }

    fn gather(&mut self) {
        let block_tokens = self.kv.layout().block_tokens;
        let s = &mut *self.scratch;
        s.tokens.clear();
        s.positions.clear();
        s.tables.clear();
        for segment in self.segments {
            let step = &self.plan.sequences[segment.index];
            let range = segment.first..segment.first + segment.count;
            s.positions.extend(range.clone().map(|i| (step.position + i) as u32));
            s.tokens.extend_from_slice(&step.tokens[range]);
            let end = (step.position + segment.first + segment.count).div_ceil(block_tokens);
            s.tables.extend(step.blocks[..end].iter().map(|b| b.0));
        }
        s.rows = s.tokens.len();
        s.rope.set_positions(&s.positions);
    }

    /// Blocks that hold a sequence up to the end of its segment.
    fn blocks_used(&self, segment: &Segment) -> usize {
        let end = self.plan.sequences[segment.index].position + segment.first + segment.count;
        end.div_ceil(self.kv.layout().block_tokens)
    }

    /// All rows of the pass.
    fn queries<'t>(&self, tables: &'t [u32]) -> Vec<SequenceQueries<'t>> {
        let mut rest = tables;
        let queries = self.segments.iter().map(|segment| {
            let blocks;
            (blocks, rest) = rest.split_at(self.blocks_used(segment));
            SequenceQueries {
                first_row: segment.row,
                tokens: segment.count,
                position: self.plan.sequences[segment.index].position + segment.first,
                blocks,
            }
        });
        queries.collect()
    }

    /// The rows that [`keep_wanted`](Self::keep_wanted) keeps, where it puts them.
    fn wanted_queries<'t>(&self, tables: &'t [u32]) -> Vec<SequenceQueries<'t>> {
        let mut queries = self.queries(tables);
        let mut rows = 0;
        for (query, segment) in queries.iter_mut().zip(self.segments) {
            let (first, count) = wanted_suffix(&self.plan.sequences[segment.index], segment);
            query.position += first;
            (query.first_row, query.tokens) = (rows, count);
            rows += count;
        }
        queries.retain(|query| query.tokens > 0);
        queries
    }

    fn embed(&mut self) {
        let s = &mut *self.scratch;
        let hidden = self.decoder.config.hidden;
        let x = sized(&mut s.x, s.tokens.len() * hidden);
        self.decoder.embedding.look_up(self.pool, &s.tokens, x);
    }

    fn first_norm(&mut self) {
        let (isa, eps) = (self.decoder.isa, self.decoder.config.rms_eps);
        let s = &mut *self.scratch;
        let (rows, hidden) = (s.rows, self.decoder.config.hidden);
        let out = s.normed.resize(rows, hidden);
        let weight = &self.decoder.layers[0].attention_norm;
        ops::rms_norm(self.pool, isa, &s.x[..rows * hidden], weight, eps, out);
    }

    /// Queries, keys and values of all rows, normed and rotated.
    fn project(&mut self, attention: &Attention) {
        let (isa, eps) = (self.decoder.isa, self.decoder.config.rms_eps);
        let s = &mut *self.scratch;
        let rows = s.normed.tokens();
        let q = sized(&mut s.q, rows * attention.q.weight.rows());
        let k = sized(&mut s.k, rows * attention.k.weight.rows());
        let v = sized(&mut s.v, rows * attention.v.weight.rows());
        let parts = [&attention.q, &attention.k, &attention.v];
        let mut outs = [q, k, v];
        project_many(self.pool, parts, &mut s.normed, &mut outs);
        self.profile.lap(StepOp::Qkv);
        let [q, k, _] = outs;
        let config = &self.decoder.config;
        for (x, norm, heads) in
            [(q, &attention.q_norm, config.heads), (k, &attention.k_norm, config.kv_heads)]
        {
            if let Some(weight) = norm {
                ops::rms_norm_in_place(self.pool, isa, x, weight, eps);
            }
            s.rope.apply(self.pool, x, heads, config.head_dim);
        }
        self.profile.lap(StepOp::Rope);
    }

    /// Writes keys and values of all rows into the blocks of their sequences.
    fn store(&mut self, layer: usize, queries: &[SequenceQueries<'_>]) {
        let s = &mut *self.scratch;
        let len = s.rows * self.decoder.config.kv_width();
        let (k, v) = (&s.k[..len], &s.v[..len]);
        let (layout, bytes) = self.kv.parts_mut();
        write_kv(self.pool, self.decoder.isa, layout, bytes, layer, k, v, queries);
    }

    /// Keeps the queries and the residual stream of the wanted rows only: the last layer's other
    /// rows would be computed for nothing. Returns how many are left.
    fn keep_wanted(&mut self) -> usize {
        let (hidden, q_width) = (self.decoder.config.hidden, self.decoder.config.q_width());
        let s = &mut *self.scratch;
        let mut kept = 0;
        for segment in self.segments {
            let (first, count) = wanted_suffix(&self.plan.sequences[segment.index], segment);
            let from = segment.row + first;
            for (buffer, width) in [(&mut s.x, hidden), (&mut s.q, q_width)] {
                buffer.copy_within(from * width..(from + count) * width, kept * width);
            }
            kept += count;
        }
        s.rows = kept;
        kept
    }

    /// `mixed = attention(q)` over the blocks of each sequence
    fn attend(&mut self, layer: usize, window: Option<usize>, queries: &[SequenceQueries<'_>]) {
        let config = &self.decoder.config;
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let params = AttentionParams { layer, heads: config.heads, scale, window };
        let s = &mut *self.scratch;
        let q = &s.q[..s.rows * config.q_width()];
        let out = s.mixed.resize(s.rows, config.q_width());
        let (kv, isa) = (self.kv.view(), self.decoder.isa);
        attend(self.pool, isa, &kv, &params, q, queries, out, &mut s.attention);
    }

    /// `delta = output(mixed)`
    fn attention_output(&mut self, output: &Projection) {
        let s = &mut *self.scratch;
        let delta = sized(&mut s.delta, s.mixed.tokens() * output.weight.rows());
        project_many(self.pool, [output], &mut s.mixed, &mut [delta]);
    }

    /// `x += delta`, `normed = norm(x)`
    fn add_and_norm(&mut self, weight: &[f32]) {
        let config = &self.decoder.config;
        let (isa, eps) = (self.decoder.isa, config.rms_eps);
        let s = &mut *self.scratch;
        let x = &mut s.x[..s.rows * config.hidden];
        let delta = &s.delta[..s.rows * config.hidden];
        let normed = s.normed.resize(s.rows, config.hidden);
        ops::add_rms_norm(self.pool, isa, x, delta, weight, eps, normed);
    }

    /// `delta = feed_forward(normed)`
    fn feed_forward(&mut self, layer: &Layer) {
        let s = &mut *self.scratch;
        let delta = sized(&mut s.delta, s.normed.tokens() * s.normed.cols());
        match &layer.feed_forward {
            FeedForward::Dense(gated) => {
                let buffers = &mut s.feed_forward;
                forward_gated(self.pool, gated, &mut s.normed, buffers, delta, self.profile);
            }
            FeedForward::Mixture(mixture) => {
                let buffers = &mut s.mixture;
                forward_mixture(self.pool, mixture, &mut s.normed, buffers, delta, self.profile);
            }
        }
    }
}

/// `out = down(silu(gate(x)) * up(x))`
pub(super) fn forward_gated(
    pool: &ThreadPool,
    gated: &Gated,
    x: &mut Activations,
    scratch: &mut FeedForwardScratch,
    out: &mut [f32],
    profile: &mut StepProfile,
) {
    let (rows, inner) = (x.tokens(), gated.up.weight.rows());
    let gate = scratch.inner.resize(rows, inner);
    let up = sized(&mut scratch.up, rows * inner);
    project_many(pool, [&gated.gate, &gated.up], x, &mut [&mut *gate, &mut *up]);
    profile.lap(StepOp::GateUp);
    ops::silu_mul(pool, gated.up.weight.isa(), gate, up);
    profile.lap(StepOp::Activation);
    project_many(pool, [&gated.down], &mut scratch.inner, &mut [out]);
    profile.lap(StepOp::Down);
}

/// Several projections of the same rows.
fn project_many<const N: usize>(
    pool: &ThreadPool,
    parts: [&Projection; N],
    x: &mut Activations,
    outs: &mut [&mut [f32]; N],
) {
    matmul_many(pool, &parts.map(|p| &p.weight), x, outs);
    for (part, out) in parts.iter().zip(outs) {
        if let Some(bias) = &part.bias {
            ops::add_bias(pool, part.weight.isa(), out, bias);
        }
    }
}

/// The first `len` values of a buffer that never shrinks.
pub(super) fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
