//! The CPU as a device: the kernels on memory of the process.
//!
//! Everything is done when a call returns, buffers are vectors, and a block's payload is borrowed
//! where it lies.

mod embedding;
mod kv;
mod routes;

pub use kv::KvStorage;

use super::{Device, DeviceError, ExpertRun};
use crate::model::{LoadError, NUMERICS_VERSION, Projection, Rope, RopeLayout, TensorSource};
use crate::weights::Format;
use cache::BlockId;
use embedding::Embedding;
use kernels::attention::{
    AttentionParams, AttentionScratch, KvLayout, SequenceQueries, attend, write_kv,
};
use kernels::isa::Isa;
use kernels::linear::{Activations, Matrix, matmul, matmul_many};
use kernels::ops::{self, RopeTable};
use kernels::pool::ThreadPool;
use protocol::TokenId;
use routes::Routes;
use std::ops::Range;
use std::sync::Arc;

/// The CPU: an instruction set, threads, and memory that the kernels keep between calls.
pub struct Host {
    isa: Isa,
    pool: ThreadPool,
    attention: AttentionScratch,
    /// Inputs of the output matrix, where not all rows are wanted.
    head_input: Activations,
}

impl Host {
    /// Starts the threads that compute, the caller's included; 0 for one for each CPU.
    pub fn new(isa: Isa, threads: usize) -> Self {
        Host {
            isa,
            pool: ThreadPool::new(threads_or_all(threads)),
            attention: AttentionScratch::new(),
            head_input: Activations::new(),
        }
    }

    /// Threads that compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    pub(crate) fn pool(&self) -> &ThreadPool {
        &self.pool
    }
}

impl Device for Host {
    type Buffer = Activations;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Table = Embedding;
    type Rope = RopeTable;
    type Routes = Routes;
    type Queries<'t> = Vec<SequenceQueries<'t>>;
    type Kv = KvStorage;
    type Payload<'a> = &'a [u8];
    type Event = ();

    const NUMERICS: u32 = NUMERICS_VERSION;

    fn matrix(
        &self,
        format: Format,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Matrix, DeviceError> {
        Matrix::pack(self.isa, &self.pool, format, rows, cols, bytes)
            .map_err(|e| DeviceError::Unsupported { reason: e.to_string() })
    }

    fn matrix_bytes(matrix: &Matrix) -> usize {
        matrix.packed_bytes()
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>, DeviceError> {
        Ok(values.to_vec())
    }

    fn table(&self, source: &Arc<dyn TensorSource>) -> Result<Embedding, LoadError> {
        Embedding::new(Arc::clone(source))
    }

    /// Grows to the largest step and stays.
    fn buffer(&self, _rows_max: usize, _cols_max: usize) -> Result<Activations, DeviceError> {
        Ok(Activations::new())
    }

    fn rope(&self, rope: &Rope, _rows_max: usize) -> Result<RopeTable, DeviceError> {
        let layout = match rope.layout {
            RopeLayout::Interleaved => ops::RopeLayout::Interleaved,
            RopeLayout::Half => ops::RopeLayout::HalfSplit,
        };
        Ok(RopeTable::new(layout, &rope.inv_freq(), rope.mscale()))
    }

    fn routes(&self, _rows: usize, _experts: usize, _used: usize) -> Result<Routes, DeviceError> {
        Ok(Routes::default())
    }

    fn queries<'t>(&mut self, sequences: Vec<SequenceQueries<'t>>) -> Vec<SequenceQueries<'t>> {
        sequences
    }

    fn read(
        &mut self,
        from: &Activations,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let cols = from.cols();
        out.copy_from_slice(&from.values()[rows.start * cols..rows.end * cols]);
        Ok(())
    }

    fn record(&mut self) {}

    fn wait(&self, (): &()) -> Result<(), DeviceError> {
        Ok(())
    }

    fn embed(&mut self, table: &Embedding, tokens: &[TokenId], out: &mut Activations) {
        let out = out.resize(tokens.len(), table.hidden());
        table.look_up(&self.pool, tokens, out);
    }

    fn rms_norm(&mut self, x: &Activations, weight: &Vec<f32>, eps: f32, out: &mut Activations) {
        let out = out.resize(x.tokens(), x.cols());
        ops::rms_norm(&self.pool, self.isa, x.values(), weight, eps, out);
    }

    fn rms_norm_in_place(&mut self, x: &mut Activations, weight: &Vec<f32>, eps: f32) {
        ops::rms_norm_in_place(&self.pool, self.isa, x.values_mut(), weight, eps);
    }

    fn add_rms_norm(
        &mut self,
        x: &mut Activations,
        delta: &Activations,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Activations,
    ) {
        let out = out.resize(x.tokens(), x.cols());
        let (x, delta) = (x.values_mut(), delta.values());
        ops::add_rms_norm(&self.pool, self.isa, x, delta, weight, eps, out);
    }

    fn project<const N: usize>(
        &mut self,
        parts: [&Projection<Host>; N],
        x: &mut Activations,
        outs: [&mut Activations; N],
    ) {
        let (weights, rows) = (parts.map(|p| &p.weight), x.tokens());
        let mut shapes = weights.iter();
        let mut outs = outs.map(|out| {
            let width = shapes.next().expect("as many parts as outputs").rows();
            out.resize(rows, width)
        });
        matmul_many(&self.pool, &weights, x, &mut outs);
        for (part, out) in parts.iter().zip(outs) {
            if let Some(bias) = &part.bias {
                ops::add_bias(&self.pool, self.isa, out, bias);
            }
        }
    }

    fn silu_mul(&mut self, gate: &mut Activations, up: &Activations) {
        ops::silu_mul(&self.pool, self.isa, gate.values_mut(), up.values());
    }

    fn set_positions(&mut self, rope: &mut RopeTable, positions: &[u32]) {
        rope.set_positions(positions);
    }

    fn rotate(&mut self, rope: &RopeTable, x: &mut Activations, heads: usize, head_dim: usize) {
        rope.apply(&self.pool, x.values_mut(), heads, head_dim);
    }

    fn keep_rows(&mut self, x: &mut Activations, runs: &[Range<usize>]) {
        let (cols, mut kept) = (x.cols(), 0);
        let values = x.values_mut();
        for run in runs {
            values.copy_within(run.start * cols..run.end * cols, kept * cols);
            kept += run.len();
        }
        x.resize(kept, cols);
    }

    fn logits(
        &mut self,
        head: &Matrix,
        x: &mut Activations,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        if rows.len() == x.tokens() {
            matmul(&self.pool, head, x, out);
            return Ok(());
        }
        let cols = x.cols();
        let values = &x.values()[rows.start * cols..rows.end * cols];
        self.head_input.resize(rows.len(), cols).copy_from_slice(values);
        matmul(&self.pool, head, &mut self.head_input, out);
        Ok(())
    }

    fn route(
        &mut self,
        scores: &mut Activations,
        used: usize,
        normalize: bool,
        routes: &mut Routes,
        runs: &mut Vec<ExpertRun>,
    ) -> Result<(), DeviceError> {
        let experts = scores.cols();
        routes.choose(self.isa, scores.values_mut(), experts, used, normalize);
        routes.runs(runs);
        Ok(())
    }

    fn zeros_like(&mut self, x: &Activations, out: &mut Activations) {
        out.resize(x.tokens(), x.cols()).fill(0.0);
    }

    fn gather(&mut self, routes: &Routes, run: ExpertRun, x: &Activations, out: &mut Activations) {
        let cols = x.cols();
        let out = out.resize(run.count, cols).chunks_exact_mut(cols);
        for (route, out) in routes.of(run).iter().zip(out) {
            out.copy_from_slice(&x.values()[route.row as usize * cols..][..cols]);
        }
    }

    fn scatter_add(
        &mut self,
        routes: &Routes,
        run: ExpertRun,
        from: &Activations,
        out: &mut Activations,
    ) {
        let cols = from.cols();
        let out = out.values_mut();
        for (route, values) in routes.of(run).iter().zip(from.values().chunks_exact(cols)) {
            let out = &mut out[route.row as usize * cols..][..cols];
            for (out, value) in out.iter_mut().zip(values) {
                *out += route.weight * value;
            }
        }
    }

    fn kv(&self, layout: &KvLayout, blocks: usize) -> Result<KvStorage, DeviceError> {
        KvStorage::new(*layout, blocks)
    }

    fn write_kv(
        &mut self,
        kv: &mut KvStorage,
        layer: usize,
        k: &Activations,
        v: &Activations,
        queries: &Vec<SequenceQueries<'_>>,
    ) {
        let (layout, bytes) = kv.parts_mut();
        write_kv(&self.pool, self.isa, layout, bytes, layer, k.values(), v.values(), queries);
    }

    fn attend(
        &mut self,
        kv: &KvStorage,
        params: &AttentionParams,
        q: &Activations,
        queries: &Vec<SequenceQueries<'_>>,
        out: &mut Activations,
    ) {
        let out = out.resize(q.tokens(), q.cols());
        let (kv, scratch) = (kv.view(), &mut self.attention);
        attend(&self.pool, self.isa, &kv, params, q.values(), queries, out, scratch);
    }

    fn block<'a>(&'a self, kv: &'a KvStorage, block: BlockId) -> Result<&'a [u8], DeviceError> {
        Ok(kv.block(block))
    }

    fn write_block<P: AsRef<[u8]>>(
        &mut self,
        kv: &mut KvStorage,
        block: BlockId,
        pieces: &[P],
    ) -> Result<(), DeviceError> {
        kv.write_block(block, pieces);
        Ok(())
    }
}

/// `threads`, or for 0 one for each CPU that this process may use.
pub(crate) fn threads_or_all(threads: usize) -> usize {
    match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}
