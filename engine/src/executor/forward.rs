//! One pass through the decoder.
//!
//! Rows are the tokens of all segments, one after another. Every operation treats its rows apart and
//! in the same order of arithmetic whatever else is in the pass: that, kept by each kernel, is what
//! makes a sequence's bits independent of its company.

use super::batch::{Segment, wanted_suffix};
use super::mixture::{MixtureScratch, forward_mixture};
use super::profile::{StepOp, StepProfile};
use crate::device::{AttentionParams, Device, DeviceError, SequenceQueries};
use crate::model::{Attention, Decoder, FeedForward, Gated, Layer};
use protocol::TokenId;
use scheduler::StepPlan;
use std::ops::Range;

/// Buffers of a pass, used again by the next.
pub(super) struct Scratch<D: Device> {
    tokens: Vec<TokenId>,
    positions: Vec<u32>,
    /// Block tables of all segments, one after another.
    tables: Vec<u32>,
    /// Rows of the pass that its last layer goes on with.
    wanted: Vec<Range<usize>>,
    rope: D::Rope,
    /// Residual stream, `[rows, hidden]`.
    x: D::Buffer,
    /// What a branch adds to the residual stream, `[rows, hidden]`.
    delta: D::Buffer,
    /// Output of a norm, `[rows, hidden]`.
    pub normed: D::Buffer,
    q: D::Buffer,
    k: D::Buffer,
    v: D::Buffer,
    /// Attention's output, `[rows, heads * head_dim]`.
    mixed: D::Buffer,
    feed_forward: FeedForwardScratch<D>,
    mixture: MixtureScratch<D>,
}

/// Buffers of one gated feed-forward.
pub(super) struct FeedForwardScratch<D: Device> {
    /// `[rows, inner]`
    inner: D::Buffer,
    up: D::Buffer,
}

impl<D: Device> Scratch<D> {
    /// Room for passes of `rows`.
    pub fn new(device: &D, decoder: &Decoder<D>, rows: usize) -> Result<Self, DeviceError> {
        let config = &decoder.config;
        let (hidden, q_width, kv_width) = (config.hidden, config.q_width(), config.kv_width());
        let inner = if config.moe.is_some() { 0 } else { config.intermediate };
        Ok(Scratch {
            tokens: Vec::new(),
            positions: Vec::new(),
            tables: Vec::new(),
            wanted: Vec::new(),
            rope: device.rope(&config.rope, rows)?,
            x: device.buffer(rows, hidden)?,
            delta: device.buffer(rows, hidden)?,
            normed: device.buffer(rows, hidden)?,
            q: device.buffer(rows, q_width)?,
            k: device.buffer(rows, kv_width)?,
            v: device.buffer(rows, kv_width)?,
            mixed: device.buffer(rows, q_width)?,
            feed_forward: FeedForwardScratch::new(device, rows, inner)?,
            mixture: MixtureScratch::new(device, config, rows)?,
        })
    }
}

impl<D: Device> FeedForwardScratch<D> {
    pub fn new(device: &D, rows: usize, inner: usize) -> Result<Self, DeviceError> {
        let (inner, up) = (device.buffer(rows, inner)?, device.buffer(rows, inner)?);
        Ok(FeedForwardScratch { inner, up })
    }
}

/// A pass in the making: what it reads, and what it changes.
pub(super) struct Pass<'a, D: Device> {
    pub decoder: &'a Decoder<D>,
    pub device: &'a mut D,
    pub kv: &'a mut D::Kv,
    pub block_tokens: usize,
    pub scratch: &'a mut Scratch<D>,
    pub profile: &'a mut StepProfile,
    pub plan: &'a StepPlan,
    pub segments: &'a [Segment],
}

impl<D: Device> Pass<'_, D> {
    /// Computes the segments, stores their keys and values, and leaves the final hidden states of
    /// the wanted rows, after the last norm, in `scratch.normed`. Returns their number.
    pub fn run(&mut self) -> Result<usize, DeviceError> {
        self.gather();
        let tables = std::mem::take(&mut self.scratch.tables);
        let rows = self.layers(self.queries(&tables), self.wanted_queries(&tables));
        self.scratch.tables = tables;
        rows
    }

    fn layers<'t>(
        &mut self,
        all: Vec<SequenceQueries<'t>>,
        wanted: Vec<SequenceQueries<'t>>,
    ) -> Result<usize, DeviceError> {
        let decoder = self.decoder;
        let rows_wanted = wanted.iter().map(|query| query.tokens).sum();
        let (all, wanted) = (self.device.queries(all), self.device.queries(wanted));
        self.embed();
        self.lap(StepOp::Embed);
        self.first_norm();
        self.lap(StepOp::Norm);
        for (index, layer) in decoder.layers.iter().enumerate() {
            let is_last = index + 1 == decoder.layers.len();
            self.project(&layer.attention);
            self.store(index, &all);
            self.lap(StepOp::KvWrite);
            if is_last {
                if rows_wanted == 0 {
                    break;
                }
                self.keep_wanted();
            }
            self.attend(index, layer.attention.window, if is_last { &wanted } else { &all });
            self.lap(StepOp::Attention);
            self.attention_output(&layer.attention);
            self.lap(StepOp::AttentionOutput);
            self.add_and_norm(&layer.feed_forward_norm);
            self.lap(StepOp::Norm);
            self.feed_forward(layer)?;
            let next = decoder.layers.get(index + 1).map(|next| &next.attention_norm);
            self.add_and_norm(next.unwrap_or(&decoder.final_norm));
            self.lap(StepOp::Norm);
        }
        Ok(rows_wanted)
    }

    fn gather(&mut self) {
        let block_tokens = self.block_tokens;
        let s = &mut *self.scratch;
        s.tokens.clear();
        s.positions.clear();
        s.tables.clear();
        s.wanted.clear();
        for segment in self.segments {
            let step = &self.plan.sequences[segment.index];
            let range = segment.first..segment.first + segment.count;
            s.positions.extend(range.clone().map(|i| (step.position + i) as u32));
            s.tokens.extend_from_slice(&step.tokens[range]);
            let end = (step.position + segment.first + segment.count).div_ceil(block_tokens);
            s.tables.extend(step.blocks[..end].iter().map(|b| b.0));
            let (first, count) = wanted_suffix(step, segment);
            let first = segment.row + first;
            s.wanted.push(first..first + count);
        }
        self.device.set_positions(&mut s.rope, &s.positions);
    }

    /// Blocks that hold a sequence up to the end of its segment.
    fn blocks_used(&self, segment: &Segment) -> usize {
        let end = self.plan.sequences[segment.index].position + segment.first + segment.count;
        end.div_ceil(self.block_tokens)
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
        self.device.embed(&self.decoder.embedding, &s.tokens, &mut s.x);
    }

    fn first_norm(&mut self) {
        let (eps, s) = (self.decoder.config.rms_eps, &mut *self.scratch);
        let weight = &self.decoder.layers[0].attention_norm;
        self.device.rms_norm(&s.x, weight, eps, &mut s.normed);
    }

    /// Queries, keys and values of all rows, normed and rotated.
    fn project(&mut self, attention: &Attention<D>) {
        let config = &self.decoder.config;
        let s = &mut *self.scratch;
        let parts = [&attention.q, &attention.k, &attention.v];
        self.device.project(parts, &mut s.normed, [&mut s.q, &mut s.k, &mut s.v]);
        lap(self.device, self.profile, StepOp::Qkv);
        for (x, norm, heads) in [
            (&mut s.q, &attention.q_norm, config.heads),
            (&mut s.k, &attention.k_norm, config.kv_heads),
        ] {
            if let Some(weight) = norm {
                self.device.rms_norm_in_place(x, weight, config.rms_eps);
            }
            self.device.rotate(&s.rope, x, heads, config.head_dim);
        }
        lap(self.device, self.profile, StepOp::Rope);
    }

    /// Writes keys and values of all rows into the blocks of their sequences.
    fn store(&mut self, layer: usize, queries: &D::Queries<'_>) {
        let s = &*self.scratch;
        self.device.write_kv(self.kv, layer, &s.k, &s.v, queries);
    }

    /// Keeps the queries and the residual stream of the wanted rows only: the last layer's other
    /// rows would be computed for nothing.
    fn keep_wanted(&mut self) {
        let s = &mut *self.scratch;
        self.device.keep_rows(&mut s.x, &s.wanted);
        self.device.keep_rows(&mut s.q, &s.wanted);
    }

    /// `mixed = attention(q)` over the blocks of each sequence
    fn attend(&mut self, layer: usize, window: Option<usize>, queries: &D::Queries<'_>) {
        let config = &self.decoder.config;
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let params = AttentionParams { layer, heads: config.heads, scale, window };
        let s = &mut *self.scratch;
        self.device.attend(self.kv, &params, &s.q, queries, &mut s.mixed);
    }

    /// `delta = output(mixed)`
    fn attention_output(&mut self, attention: &Attention<D>) {
        let s = &mut *self.scratch;
        self.device.project([&attention.output], &mut s.mixed, [&mut s.delta]);
    }

    /// `x += delta`, `normed = norm(x)`
    fn add_and_norm(&mut self, weight: &D::Vector) {
        let (eps, s) = (self.decoder.config.rms_eps, &mut *self.scratch);
        self.device.add_rms_norm(&mut s.x, &s.delta, weight, eps, &mut s.normed);
    }

    /// `delta = feed_forward(normed)`
    fn feed_forward(&mut self, layer: &Layer<D>) -> Result<(), DeviceError> {
        let (device, s) = (&mut *self.device, &mut *self.scratch);
        let (x, out) = (&mut s.normed, &mut s.delta);
        match &layer.feed_forward {
            FeedForward::Dense(gated) => {
                forward_gated(device, gated, x, &mut s.feed_forward, out, self.profile);
                Ok(())
            }
            FeedForward::Mixture(mixture) => {
                forward_mixture(device, mixture, x, &mut s.mixture, out, self.profile)
            }
        }
    }

    fn lap(&mut self, op: StepOp) {
        lap(self.device, self.profile, op);
    }
}

/// `out = down(silu(gate(x)) * up(x))`
pub(super) fn forward_gated<D: Device>(
    device: &mut D,
    gated: &Gated<D>,
    x: &mut D::Buffer,
    scratch: &mut FeedForwardScratch<D>,
    out: &mut D::Buffer,
    profile: &mut StepProfile,
) {
    let FeedForwardScratch { inner, up } = scratch;
    device.project([&gated.gate, &gated.up], x, [inner, up]);
    lap(device, profile, StepOp::GateUp);
    device.silu_mul(inner, up);
    lap(device, profile, StepOp::Activation);
    device.project([&gated.down], inner, [out]);
    lap(device, profile, StepOp::Down);
}

/// Books the time since the last call to `op`, once the device has done what it was told.
pub(super) fn lap<D: Device>(device: &mut D, profile: &mut StepProfile, op: StepOp) {
    if profile.is_enabled() {
        // A failure is reported at the end of the step.
        let _ = device.synchronize();
        profile.lap(op);
    }
}
