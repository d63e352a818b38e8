//! The seam between the forward pass and what computes it.
//!
//! Owns the list of what a device must offer: memory, weights, the operations of a decoder, KV
//! blocks, and a way to wait. The executor's pass is written once, against [`Device`], and compiled
//! for each device. [`Host`], the CPU, is the only one in this crate. Refuses to know what a
//! decoder is made of (`model` does) and in which order it is computed (`executor` does).
//!
//! # What stays on the host
//! Files, tokenizer, templates, sampler, grammar, batcher, block tables, the names of blocks, the
//! tiers below the pool and every transfer. A device sees block ids as numbers below its capacity,
//! and is never told whose they are.
//!
//! # Order and completion
//! A device does what it is told in the order of the calls, and each operation sees the results of
//! those before it. An operation may return before it is done. Calls that put something into memory
//! of the host ([`read`](Device::read), [`logits`](Device::logits), [`route`](Device::route),
//! [`block`](Device::block)) return when it is there. [`record`](Device::record) notes a place in the
//! order, [`wait`](Device::wait) returns when all before it is done. What is borrowed by a call is
//! read before the call returns, or copied.
//!
//! # Errors
//! Operations cannot be refused: shapes are checked before, and wrong ones are a mistake of the
//! caller and panic. What fails later is reported by the next call that gives a `Result`, and by all
//! after it: see [`DeviceError::Lost`]. A step always ends with a [`wait`](Device::wait), so that the
//! step that failed is the one that says so.
//!
//! # Exactness
//! Every operation treats its rows apart: the bits of a row depend on that row, on the weights and, in
//! attention, on the keys and values that it may see; never on the number of rows, on their place in
//! the buffer, on the other sequences, nor on where blocks lie. Each output element is accumulated in
//! one order (docs/adr/0005-one-accumulation-order.md). Two devices need not agree with each other to
//! the bit: [`Device::NUMERICS`] keeps their blocks apart.

mod host;

pub use host::{Host, KvStorage};
pub use kernels::attention::{AttentionParams, KvDtype, KvLayout, SequenceQueries};

use crate::model::{LoadError, Projection, Rope, TensorSource};
use crate::weights::Format;
use cache::BlockId;
use protocol::TokenId;
use std::ops::{Deref, Range};
use std::sync::Arc;
use thiserror::Error;

/// What computes a forward pass. See the [module](self) for order, errors and exactness.
///
/// Sizes are in rows and columns of f32 unless a comment says otherwise. An operation gives the
/// buffers that it writes their new shape; what was in them is gone.
pub trait Device: Sized + Send + 'static {
    /// Values `[rows, cols]` that steps work with. It has the shape that the last operation gave it.
    ///
    /// The device may keep other forms of the values beside them (as eight-bit codes for the products)
    /// until they are written next. Dropping one frees its memory once all that was begun with it is
    /// done.
    type Buffer: Send;
    /// A weight matrix as the device multiplies it. Shared by executors, never changed.
    type Matrix: Send + Sync;
    /// A bias or the weight of a norm.
    type Vector: Send + Sync;
    /// The token embedding, `[vocab, hidden]`.
    type Table: Send + Sync;
    /// Cosines and sines for the rows of the pass at hand.
    type Rope: Send;
    /// Which row of the pass goes to which expert, and its weight there.
    type Routes: Send;
    /// The sequences of a pass and their block tables, as attention and the writing of keys and
    /// values read them. Made once for a pass, used by every layer.
    type Queries<'t>;
    /// Memory for a fixed number of KV blocks, laid out as the device likes.
    type Kv: Send;
    /// The bytes of one block in memory of the host: borrowed where that is where they lie, else a
    /// copy.
    type Payload<'a>: Deref<Target = [u8]>
    where
        Self: 'a;
    /// A place in the order of operations.
    type Event;

    /// Names the arithmetic, as a part of [`NumericalIdentity`](crate::model::NumericalIdentity).
    /// Devices whose keys and values are equal to the bit say the same number; all others, and
    /// versions of one that differ, never do.
    const NUMERICS: u32;

    // Weights. Loaded once, before the first step; several executors may share them.

    /// Packs a matrix of `rows` x `cols`, from `bytes` that are row-major in `format`. How is the
    /// device's own business: panels, other blocks, another place. All formats of [`Format`] come, as
    /// they are in the file; for one that the device does not have it says `Unsupported`, and the model
    /// is not loaded.
    fn matrix(
        &self,
        format: Format,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Self::Matrix, DeviceError>;

    /// Bytes of memory that a packed matrix takes.
    fn matrix_bytes(matrix: &Self::Matrix) -> usize;

    fn vector(&self, values: &[f32]) -> Result<Self::Vector, DeviceError>;

    /// The token embedding of `source`. A device may leave it there and copy the rows that a step
    /// wants.
    fn table(&self, source: &Arc<dyn TensorSource>) -> Result<Self::Table, LoadError>;

    // Memory of a step.

    /// An empty buffer that will never hold more than `rows_max` x `cols_max` values. A device whose
    /// memory is scarce takes it here, so that no step fails for want of it.
    fn buffer(&self, rows_max: usize, cols_max: usize) -> Result<Self::Buffer, DeviceError>;

    /// Rotary tables for at most `rows_max` rows.
    fn rope(&self, rope: &Rope, rows_max: usize) -> Result<Self::Rope, DeviceError>;

    /// Routes of at most `rows_max` rows to `used` of `experts` each.
    fn routes(
        &self,
        rows_max: usize,
        experts: usize,
        used: usize,
    ) -> Result<Self::Routes, DeviceError>;

    /// Makes the sequences of a pass known: their rows ascend and do not overlap, and their blocks
    /// reach to their last position.
    fn queries<'t>(&mut self, sequences: Vec<SequenceQueries<'t>>) -> Self::Queries<'t>;

    /// Copies `rows` of a buffer to `out`, `[rows, cols]`.
    fn read(
        &mut self,
        from: &Self::Buffer,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), DeviceError>;

    // Completion.

    /// The place after everything that was begun so far.
    fn record(&mut self) -> Self::Event;

    /// Returns when everything before `event` is done, or with the failure of any of it.
    fn wait(&self, event: &Self::Event) -> Result<(), DeviceError>;

    /// Waits for everything that was begun.
    fn synchronize(&mut self) -> Result<(), DeviceError> {
        let now = self.record();
        self.wait(&now)
    }

    // Operations on rows.

    /// `out[t] = table[tokens[t]]`. Every token is in the vocabulary.
    fn embed(&mut self, table: &Self::Table, tokens: &[TokenId], out: &mut Self::Buffer);

    /// `out[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps)`.
    fn rms_norm(
        &mut self,
        x: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    );

    /// The same in place, on parts of rows that are as long as `weight`: the norm of each head.
    fn rms_norm_in_place(&mut self, x: &mut Self::Buffer, weight: &Self::Vector, eps: f32);

    /// `x += delta`, then `out = rms_norm(x)`.
    fn add_rms_norm(
        &mut self,
        x: &mut Self::Buffer,
        delta: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    );

    /// `outs[i][t, r] = sum over c of weight_i[r, c] * x[t, c]`, plus `bias_i[r]` if there is one: all
    /// of them read the same inputs. The values of `x` stay; forms kept beside them may come.
    fn project<const N: usize>(
        &mut self,
        parts: [&Projection<Self>; N],
        x: &mut Self::Buffer,
        outs: [&mut Self::Buffer; N],
    );

    /// `gate = silu(gate) * up` with `silu(x) = x / (1 + e^-x)`.
    fn silu_mul(&mut self, gate: &mut Self::Buffer, up: &Self::Buffer);

    /// Row `t` of the buffers that [`rotate`](Self::rotate) gets is at `positions[t]`, until the next
    /// call.
    fn set_positions(&mut self, rope: &mut Self::Rope, positions: &[u32]);

    /// Rotates `x`, `[rows, heads * head_dim]`, in place.
    fn rotate(&mut self, rope: &Self::Rope, x: &mut Self::Buffer, heads: usize, head_dim: usize);

    /// Keeps the rows of `runs`, which ascend, do not overlap and may be empty, one after another from
    /// row 0 on; the others are gone.
    fn keep_rows(&mut self, x: &mut Self::Buffer, runs: &[Range<usize>]);

    /// `out = head * x[t]` for `rows` of `x`, `[rows, vocab]` in memory of the host: only the rows that
    /// somebody wants logits of. A device without room for all of them computes them in parts.
    fn logits(
        &mut self,
        head: &Self::Matrix,
        x: &mut Self::Buffer,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), DeviceError>;

    // A mixture of experts.

    /// Chooses experts for each row of `scores`, `[rows, experts]`: softmax, then the `used` greatest,
    /// of equals the lower expert; their weights as they are, or scaled to sum to one.
    ///
    /// `runs` gets, in ascending order, the experts that have rows: the host must know how many. An
    /// expert's rows are in ascending order.
    fn route(
        &mut self,
        scores: &mut Self::Buffer,
        used: usize,
        normalize: bool,
        routes: &mut Self::Routes,
        runs: &mut Vec<ExpertRun>,
    ) -> Result<(), DeviceError>;

    /// `out` gets the shape of `x`, all zeros.
    fn zeros_like(&mut self, x: &Self::Buffer, out: &mut Self::Buffer);

    /// `out` gets the rows of `x` that go to the expert of `run`.
    fn gather(
        &mut self,
        routes: &Self::Routes,
        run: ExpertRun,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    );

    /// Adds the outputs of one expert, times their weights, to the rows that they came from. Called in
    /// ascending order of experts, which is the order of each row's sum.
    fn scatter_add(
        &mut self,
        routes: &Self::Routes,
        run: ExpertRun,
        from: &Self::Buffer,
        out: &mut Self::Buffer,
    );

    // Keys and values.

    /// Reserves `blocks` blocks, all or none.
    fn kv(&self, layout: &KvLayout, blocks: usize) -> Result<Self::Kv, DeviceError>;

    /// Stores the keys and values of a pass for one layer, rounded to the layout's type, nearest even.
    /// `k` and `v` are `[rows, kv_heads * head_dim]`. No block of it is in the tables of two sequences.
    fn write_kv(
        &mut self,
        kv: &mut Self::Kv,
        layer: usize,
        k: &Self::Buffer,
        v: &Self::Buffer,
        queries: &Self::Queries<'_>,
    );

    /// `out = softmax(scale * q k^T) v` for each row and query head, over the positions up to the
    /// row's own that its window lets it see, its own included. Shapes are `[rows, heads * head_dim]`.
    /// Blocks may be shared between sequences for reading.
    fn attend(
        &mut self,
        kv: &Self::Kv,
        params: &AttentionParams,
        q: &Self::Buffer,
        queries: &Self::Queries<'_>,
        out: &mut Self::Buffer,
    );

    /// A block leaves: its payload in the canonical layout, `[layer][k|v][kv_head][token][head_dim]`,
    /// little-endian, as every operation before this call left it.
    ///
    /// A snapshot either way: no step can begin while a borrowed payload lives, and a copy is complete
    /// when this returns. `block` is below the capacity.
    fn block<'a>(
        &'a self,
        kv: &'a Self::Kv,
        block: BlockId,
    ) -> Result<Self::Payload<'a>, DeviceError>;

    /// A block enters: `pieces`, one after the other, are its payload in the canonical layout. Every
    /// operation after this call sees it, none before it does.
    ///
    /// Called between steps, for a block that no running sequence has in its table. `block` is below
    /// the capacity and the pieces have the bytes of one block together.
    fn write_block<P: AsRef<[u8]>>(
        &mut self,
        kv: &mut Self::Kv,
        block: BlockId,
        pieces: &[P],
    ) -> Result<(), DeviceError>;
}

/// The rows that go to one expert: `first..first + count` of a pass's routes, ordered by expert,
/// then by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertRun {
    pub expert: usize,
    pub first: usize,
    pub count: usize,
}

/// What a device may report.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// Nothing changed; less may fit.
    #[error("the device has no room for {bytes} bytes")]
    Memory { bytes: usize },
    /// It cannot hold or compute this. Nothing changed.
    #[error("{reason}")]
    Unsupported { reason: String },
    /// Something that was begun has failed. What buffers and blocks hold is not known, and every later
    /// call fails as well: a new device is needed, and its blocks are empty.
    #[error("the device failed: {reason}")]
    Lost { reason: String },
}
