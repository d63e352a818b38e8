//! A step plan in, logits out.
//!
//! Owns the forward pass of a batch, and the KV blocks that it reads and writes. Refuses policy: which
//! sequences run, which blocks they get and what is sampled is decided elsewhere; a plan that
//! contradicts itself is refused before anything is computed. Refuses arithmetic, too: the
//! [`device`](crate::device) computes.
//!
//! # Exactness
//! The rows of a sequence are the same, bit for bit, whatever else is in the step, however its
//! tokens were cut into steps, whatever the number of threads, and whether the blocks before them
//! were computed for it or for another sequence with the same tokens.

mod batch;
mod error;
mod forward;
mod mixture;
mod output;
mod profile;

pub use crate::device::{KvDtype, KvLayout};
pub use error::{BlockWriteError, ExecutorError, StepError};
pub use output::{OutputRow, RowValues, StepOutput};
pub use profile::{StepOp, StepProfile};

use crate::device::{Device, DeviceError, Host};
use crate::model::{Decoder, DecoderConfig, NumericalIdentity};
use batch::{PassCursor, PlanChecker, PlanLimits, Segment, wanted_rows, wanted_suffix};
use cache::{BLOCK_TOKENS_DEFAULT, BlockId};
use forward::{Pass, Scratch, lap};
use scheduler::{LogitsWanted, StepPlan};
use std::sync::Arc;

/// How an [`Executor`] is made.
#[derive(Clone, Debug)]
pub struct ExecutorOptions {
    /// Number format of stored keys and values.
    pub kv_dtype: KvDtype,
    /// Tokens in a block: 8, 16, 32 or 64.
    pub block_tokens: usize,
    pub kv_capacity: KvCapacity,
    /// Threads of [`Host`] that compute, the caller's included; 0 for one for each CPU. Not looked at
    /// where the device is given.
    pub threads: usize,
    /// Tokens computed at once. A larger step is cut into passes of so many; buffers are as large as
    /// the largest pass.
    pub tokens_per_pass: usize,
    /// Whether [`Executor::profile`] measures.
    pub profile: bool,
}

/// Room for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvCapacity {
    Blocks(usize),
    /// As many whole blocks as fit into so many bytes.
    Bytes(usize),
}

impl Default for ExecutorOptions {
    fn default() -> Self {
        ExecutorOptions {
            kv_dtype: KvDtype::F16,
            block_tokens: BLOCK_TOKENS_DEFAULT,
            kv_capacity: KvCapacity::Bytes(KV_BYTES_DEFAULT),
            threads: 0,
            tokens_per_pass: TOKENS_PER_PASS_DEFAULT,
            profile: false,
        }
    }
}

/// Computes steps of one model on one device.
pub struct Executor<D: Device = Host> {
    decoder: Arc<Decoder<D>>,
    device: D,
    kv: D::Kv,
    layout: KvLayout,
    limits: PlanLimits,
    tokens_per_pass: usize,
    checker: PlanChecker,
    segments: Vec<Segment>,
    rows: Vec<RowSource>,
    scratch: Scratch<D>,
    /// Logits of a few rows, `[rows, vocab]`, where they are handed out one by one.
    logits: Vec<f32>,
    output: StepOutput,
    profile: StepProfile,
}

/// Where a row of a pass's result belongs.
#[derive(Clone, Copy, Debug)]
struct RowSource {
    /// Index into `StepPlan::sequences`.
    index: usize,
    position: usize,
    hidden: bool,
}

impl Executor {
    /// Reserves the KV storage and starts the threads.
    pub fn new(
        decoder: impl Into<Arc<Decoder>>,
        options: &ExecutorOptions,
    ) -> Result<Self, ExecutorError> {
        let decoder = decoder.into();
        let host = Host::new(decoder.head.isa(), options.threads);
        Executor::on(host, decoder, options)
    }

    /// Threads that compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.device.threads()
    }
}

impl<D: Device> Executor<D> {
    /// [`new`](Executor::new) for any device: the one that `decoder` was loaded on.
    pub fn on(
        device: D,
        decoder: impl Into<Arc<Decoder<D>>>,
        options: &ExecutorOptions,
    ) -> Result<Self, ExecutorError> {
        let decoder = decoder.into();
        let config = decoder.config();
        let (layout, blocks) = kv_shape(config, options)?;
        let block_tokens = layout.block_tokens;
        let limits = PlanLimits {
            vocab: config.vocab,
            context_tokens_max: config.context,
            block_tokens,
            blocks,
        };
        let kv = device.kv(&layout, blocks).map_err(|error| match error {
            DeviceError::Memory { .. } => {
                ExecutorError::KvTooLarge { blocks, block_bytes: layout.block_bytes() }
            }
            error => error.into(),
        })?;
        // No pass has more tokens than there is room for.
        let tokens_per_pass = options.tokens_per_pass.clamp(1, blocks.saturating_mul(block_tokens));
        Ok(Executor {
            kv,
            layout,
            limits,
            tokens_per_pass,
            checker: PlanChecker::default(),
            segments: Vec::new(),
            rows: Vec::new(),
            scratch: Scratch::new(&device, &decoder, tokens_per_pass)?,
            logits: Vec::new(),
            output: StepOutput::default(),
            profile: StepProfile::new(options.profile),
            device,
            decoder,
        })
    }

    /// Computes a step. The output stays valid until the next one.
    ///
    /// A step whose rows do not fit [`OUTPUT_BYTES_MAX`] is refused; [`step_each`](Self::step_each)
    /// has no such bound.
    pub fn step(&mut self, plan: &StepPlan) -> Result<&mut StepOutput, StepError> {
        self.checker.check(plan, &self.limits)?;
        let config = self.decoder.config();
        let (vocab, hidden) = (config.vocab, config.hidden);
        let rows: usize = plan.sequences.iter().map(wanted_rows).sum();
        let rows_max = OUTPUT_BYTES_MAX / size_of::<f32>() / vocab.max(hidden);
        if rows > rows_max.max(plan.sequences.len()) {
            return Err(StepError::OutputTooLarge { rows, rows_max });
        }
        self.output.prepare(plan, vocab, hidden);
        self.profile.begin();
        let (mut cursor, mut logits_at, mut hidden_at) = (PassCursor::default(), 0, 0);
        while self.next_pass(plan, &mut cursor)? {
            let mut first = 0;
            for run in self.rows.chunk_by(|a, b| a.hidden == b.hidden) {
                let (from, rows) = (&mut self.scratch.normed, first..first + run.len());
                if run[0].hidden {
                    let out = &mut self.output.hidden[hidden_at..][..run.len() * hidden];
                    self.device.read(from, rows, out)?;
                    hidden_at += run.len() * hidden;
                } else {
                    let out = &mut self.output.logits[logits_at..][..run.len() * vocab];
                    self.device.logits(&self.decoder.head, from, rows, out)?;
                    logits_at += run.len() * vocab;
                }
                first += run.len();
            }
            lap(&mut self.device, &mut self.profile, StepOp::Head);
        }
        self.device.synchronize()?;
        Ok(&mut self.output)
    }

    /// Computes a step and hands its rows out one by one, in order of sequences and positions, so
    /// that the logits of a long text need no memory of their own.
    pub fn step_each(
        &mut self,
        plan: &StepPlan,
        receive: &mut dyn FnMut(OutputRow<'_>),
    ) -> Result<(), StepError> {
        self.checker.check(plan, &self.limits)?;
        let config = self.decoder.config();
        let (vocab, hidden) = (config.vocab, config.hidden);
        let mut row = vec![0.0; hidden];
        let mut cursor = PassCursor::default();
        self.profile.begin();
        while self.next_pass(plan, &mut cursor)? {
            let mut logits = std::mem::take(&mut self.logits);
            for (chunk, sources) in self.rows.chunks(HEAD_ROWS).enumerate() {
                let first = chunk * HEAD_ROWS;
                let from = &mut self.scratch.normed;
                if sources.iter().any(|source| !source.hidden) {
                    let rows = first..first + sources.len();
                    logits.resize((sources.len() * vocab).max(logits.len()), 0.0);
                    let out = &mut logits[..sources.len() * vocab];
                    self.device.logits(&self.decoder.head, from, rows, out)?;
                }
                lap(&mut self.device, &mut self.profile, StepOp::Head);
                for (i, source) in sources.iter().enumerate() {
                    let values = if source.hidden {
                        self.device.read(from, first + i..first + i + 1, &mut row)?;
                        RowValues::Hidden(&mut row)
                    } else {
                        RowValues::Logits(&mut logits[i * vocab..][..vocab])
                    };
                    let sequence = plan.sequences[source.index].sequence;
                    receive(OutputRow { sequence, position: source.position, values });
                }
            }
            self.logits = logits;
        }
        self.device.synchronize()?;
        Ok(())
    }

    /// Computes the next pass of a plan; false when there is none. Its rows are noted in
    /// `self.rows`, their hidden states are in `self.scratch.normed`.
    fn next_pass(&mut self, plan: &StepPlan, cursor: &mut PassCursor) -> Result<bool, DeviceError> {
        cursor.next(plan, self.tokens_per_pass, &mut self.segments);
        if self.segments.is_empty() {
            return Ok(false);
        }
        self.rows.clear();
        for segment in &self.segments {
            let step = &plan.sequences[segment.index];
            let (first, count) = wanted_suffix(step, segment);
            let start = step.position + segment.first + first;
            let (index, hidden) = (segment.index, step.wanted == LogitsWanted::Hidden);
            let rows = (start..start + count).map(|position| RowSource { index, position, hidden });
            self.rows.extend(rows);
        }
        let mut pass = Pass {
            decoder: &self.decoder,
            device: &mut self.device,
            kv: &mut self.kv,
            block_tokens: self.limits.block_tokens,
            scratch: &mut self.scratch,
            profile: &mut self.profile,
            plan,
            segments: &self.segments,
        };
        let rows = pass.run()?;
        debug_assert_eq!(rows, self.rows.len());
        Ok(true)
    }

    pub fn decoder(&self) -> &Arc<Decoder<D>> {
        &self.decoder
    }

    pub fn block_tokens(&self) -> usize {
        self.limits.block_tokens
    }

    /// Blocks of KV storage: valid ids are below.
    pub fn block_capacity(&self) -> usize {
        self.limits.blocks
    }

    /// Bytes of one block's payload.
    pub fn block_bytes(&self) -> usize {
        self.layout.block_bytes()
    }

    /// Bytes of keys and values that one token takes.
    pub fn token_bytes(&self) -> usize {
        self.block_bytes() / self.limits.block_tokens
    }

    /// Tokens that a sequence may have.
    pub fn context_tokens_max(&self) -> usize {
        self.limits.context_tokens_max
    }

    /// The payload of a block in the canonical layout, as the last step left it; `None` for an id
    /// beyond the capacity, and where the device has failed. On [`Host`] the bytes are borrowed, not
    /// copied.
    pub fn block_payload(&self, block: BlockId) -> Option<D::Payload<'_>> {
        let is_known = (block.0 as usize) < self.limits.blocks;
        is_known.then(|| self.device.block(&self.kv, block).ok())?
    }

    /// Puts a payload that another executor of the same [`NumericalIdentity`] computed into a block.
    pub fn write_block(&mut self, block: BlockId, payload: &[u8]) -> Result<(), BlockWriteError> {
        self.write_block_pieces(block, &[payload])
    }

    /// The same with a payload in pieces, as it comes from a socket.
    pub fn write_block_pieces<P: AsRef<[u8]>>(
        &mut self,
        block: BlockId,
        pieces: &[P],
    ) -> Result<(), BlockWriteError> {
        let (capacity, block_bytes) = (self.limits.blocks, self.block_bytes());
        if block.0 as usize >= capacity {
            return Err(BlockWriteError::UnknownBlock { block, capacity });
        }
        let bytes = pieces.iter().map(|piece| piece.as_ref().len()).sum();
        if bytes != block_bytes {
            return Err(BlockWriteError::WrongSize { bytes, block_bytes });
        }
        Ok(self.device.write_block(&mut self.kv, block, pieces)?)
    }

    /// How keys and values lie in a block.
    pub fn kv_layout(&self) -> &KvLayout {
        &self.layout
    }

    /// What keys and values depend on: only executors with equal identities may share blocks.
    pub fn identity(&self) -> NumericalIdentity {
        self.decoder.identity(&self.layout)
    }

    /// Where time went, if `ExecutorOptions::profile` was set.
    pub fn profile(&self) -> &StepProfile {
        &self.profile
    }

    /// Forgets the times measured so far.
    pub fn clear_profile(&mut self) {
        self.profile.clear();
    }
}

/// How blocks look, and how many there are.
fn kv_shape(
    config: &DecoderConfig,
    options: &ExecutorOptions,
) -> Result<(KvLayout, usize), ExecutorError> {
    let block_tokens = options.block_tokens;
    if !BLOCK_TOKENS.contains(&block_tokens) {
        return Err(ExecutorError::BlockTokens { block_tokens });
    }
    let layout = KvLayout {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        block_tokens,
        dtype: options.kv_dtype,
    };
    let blocks = match options.kv_capacity {
        KvCapacity::Blocks(blocks) => blocks,
        KvCapacity::Bytes(bytes) => bytes / layout.block_bytes(),
    };
    if blocks == 0 || u32::try_from(blocks).is_err() {
        return Err(ExecutorError::KvBlocks { blocks, block_bytes: layout.block_bytes() });
    }
    Ok((layout, blocks))
}

/// Bytes of output that [`Executor::step`] keeps; more rows are to be taken by
/// [`Executor::step_each`].
pub const OUTPUT_BYTES_MAX: usize = 1 << 30;
/// Block sizes that the wire and the cache know.
pub const BLOCK_TOKENS: [usize; 4] = [8, 16, 32, 64];
const KV_BYTES_DEFAULT: usize = 1 << 30;
const TOKENS_PER_PASS_DEFAULT: usize = 512;
/// Rows of logits computed at once when they are handed out one by one.
const HEAD_ROWS: usize = 32;
