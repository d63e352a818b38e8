//! A device that shares nothing with the CPU's: one thread of plain f32 over dequantized weights,
//! memory that only copies reach, a queue that runs late, and blocks laid out in its own way.

use crate::memory::{Memory, Region, Words};
use cache::BlockId;
use engine::device::{
    AttentionParams, Device, DeviceError, ExpertRun, KvDtype, KvLayout, SequenceQueries,
};
use engine::model::{LoadError, Projection, Rope, RopeLayout, TensorSource};
use engine::weights::{Format, TensorRole};
use kernels::float::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use kernels::format::dequantize;
use protocol::TokenId;
use std::ops::Range;
use std::sync::Arc;

#[derive(Clone, Default)]
pub struct Far {
    pub memory: Memory,
}

/// Room, and the shape of what is in it.
pub struct Buffer {
    room: Region,
    room_len: usize,
    rows: usize,
    cols: usize,
}

#[derive(Clone, Copy)]
pub struct Matrix {
    at: Region,
    rows: usize,
    cols: usize,
}

pub struct Vector {
    at: Region,
    len: usize,
}

pub struct FarRope {
    inv_freq: Vec<f32>,
    mscale: f32,
    layout: RopeLayout,
    room: Region,
    /// Positions of the pass.
    at: Region,
}

/// For each route its row and its weight.
pub struct Routes(Region);

/// A sequence of a pass, copied.
pub struct Sequence {
    first_row: usize,
    tokens: usize,
    position: usize,
    blocks: Vec<usize>,
}

/// Keys and values as f32 that the block's type can hold, `[kv_head][layer][block][token][v|k][dim]`.
#[derive(Clone, Copy)]
pub struct Kv {
    at: Region,
    layout: KvLayout,
    blocks: usize,
}

impl Buffer {
    fn at(&self) -> Region {
        self.room.part(0, self.rows * self.cols)
    }

    fn shaped(&mut self, rows: usize, cols: usize) -> Region {
        assert!(rows * cols <= self.room_len, "{rows} x {cols} in a buffer of {}", self.room_len);
        (self.rows, self.cols) = (rows, cols);
        self.at()
    }
}

impl Kv {
    fn row(&self, layer: usize, is_key: bool, head: usize, block: usize, token: usize) -> Region {
        let KvLayout { layers, head_dim, block_tokens, .. } = self.layout;
        let plane = (head * layers + layer) * self.blocks + block;
        let row = (plane * block_tokens + token) * 2 + usize::from(is_key);
        self.at.part(row * head_dim, head_dim)
    }

    /// The rows of a block in the order of the canonical layout.
    fn canonical(self, block: BlockId) -> impl Iterator<Item = Region> {
        let KvLayout { layers, kv_heads, block_tokens, .. } = self.layout;
        let block = block.0 as usize;
        (0..layers * 2 * kv_heads * block_tokens).map(move |i| {
            let (plane, token) = (i / block_tokens, i % block_tokens);
            let (pair, head) = (plane / kv_heads, plane % kv_heads);
            self.row(pair / 2, pair.is_multiple_of(2), head, block, token)
        })
    }
}

impl Device for Far {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Vector = Vector;
    type Table = Matrix;
    type Rope = FarRope;
    type Routes = Routes;
    type Queries<'t> = Arc<Vec<Sequence>>;
    type Kv = Kv;
    type Payload<'a> = Vec<u8>;
    type Event = u64;

    const NUMERICS: u32 = u32::MAX;

    fn matrix(
        &self,
        format: Format,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Matrix, DeviceError> {
        let mut values = vec![0.0; rows * cols];
        dequantize(format, bytes, &mut values)
            .map_err(|e| DeviceError::Unsupported { reason: e.to_string() })?;
        let at = self.memory.reserve(values.len());
        self.memory.copy_in(at, values);
        Ok(Matrix { at, rows, cols })
    }

    fn matrix_bytes(matrix: &Matrix) -> usize {
        matrix.rows * matrix.cols * size_of::<f32>()
    }

    fn vector(&self, values: &[f32]) -> Result<Vector, DeviceError> {
        let at = self.memory.reserve(values.len());
        self.memory.copy_in(at, values.to_vec());
        Ok(Vector { at, len: values.len() })
    }

    fn table(&self, source: &Arc<dyn TensorSource>) -> Result<Matrix, LoadError> {
        let tensor = source.tensor(TensorRole::TokenEmbedding)?;
        self.matrix(tensor.format, tensor.rows, tensor.cols, &tensor.bytes)
            .map_err(|e| LoadError::Tensor { tensor: tensor.name, reason: e.to_string() })
    }

    fn buffer(&self, rows_max: usize, cols_max: usize) -> Result<Buffer, DeviceError> {
        let room_len = rows_max * cols_max;
        Ok(Buffer { room: self.memory.reserve(room_len), room_len, rows: 0, cols: 0 })
    }

    fn rope(&self, rope: &Rope, rows_max: usize) -> Result<FarRope, DeviceError> {
        let room = self.memory.reserve(rows_max);
        let (inv_freq, mscale) = (rope.inv_freq(), rope.mscale());
        Ok(FarRope { inv_freq, mscale, layout: rope.layout, room, at: room })
    }

    fn routes(&self, rows_max: usize, _: usize, used: usize) -> Result<Routes, DeviceError> {
        Ok(Routes(self.memory.reserve(rows_max * used * 2)))
    }

    fn queries<'t>(&mut self, sequences: Vec<SequenceQueries<'t>>) -> Arc<Vec<Sequence>> {
        let copy = |s: &SequenceQueries<'_>| Sequence {
            first_row: s.first_row,
            tokens: s.tokens,
            position: s.position,
            blocks: s.blocks.iter().map(|&b| b as usize).collect(),
        };
        Arc::new(sequences.iter().map(copy).collect())
    }

    fn read(
        &mut self,
        from: &Buffer,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let part = from.at().part(rows.start * from.cols, rows.len() * from.cols);
        self.memory.copy_out(|words| out.copy_from_slice(words.get(part)))
    }

    fn record(&mut self) -> u64 {
        self.memory.begun()
    }

    fn wait(&self, event: &u64) -> Result<(), DeviceError> {
        self.memory.wait(*event)
    }

    fn embed(&mut self, table: &Matrix, tokens: &[TokenId], out: &mut Buffer) {
        let (table, tokens) = (*table, tokens.to_vec());
        let to = out.shaped(tokens.len(), table.cols);
        self.memory.begin(move |words| {
            let row = |&t: &TokenId| words.get(table.at.part(t as usize * table.cols, table.cols));
            let rows: Vec<f32> = tokens.iter().flat_map(row).copied().collect();
            words.put(to, &rows);
        });
    }

    fn rms_norm(&mut self, x: &Buffer, weight: &Vector, eps: f32, out: &mut Buffer) {
        let (from, to) = (x.at(), out.shaped(x.rows, x.cols));
        self.begin_norm(from, weight, eps, to);
    }

    fn rms_norm_in_place(&mut self, x: &mut Buffer, weight: &Vector, eps: f32) {
        self.begin_norm(x.at(), weight, eps, x.at());
    }

    fn add_rms_norm(
        &mut self,
        x: &mut Buffer,
        delta: &Buffer,
        weight: &Vector,
        eps: f32,
        out: &mut Buffer,
    ) {
        let (at, delta) = (x.at(), delta.at());
        self.memory.begin(move |words| {
            let sum = zip(words.get(at), words.get(delta), |x, delta| x + delta);
            words.put(at, &sum);
        });
        self.rms_norm(x, weight, eps, out);
    }

    fn project<const N: usize>(
        &mut self,
        parts: [&Projection<Far>; N],
        x: &mut Buffer,
        outs: [&mut Buffer; N],
    ) {
        for (part, out) in parts.iter().zip(outs) {
            let (weight, bias) = (part.weight, part.bias.as_ref().map(|bias| bias.at));
            let (from, to) = (x.at(), out.shaped(x.rows, weight.rows));
            self.memory.begin(move |words| {
                let mut values = product(words, weight, from);
                if let Some(bias) = bias {
                    let bias = words.get(bias);
                    for row in values.chunks_exact_mut(weight.rows) {
                        row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
                    }
                }
                words.put(to, &values);
            });
        }
    }

    fn silu_mul(&mut self, gate: &mut Buffer, up: &Buffer) {
        let (gate, up) = (gate.at(), up.at());
        self.memory.begin(move |words| {
            let silu = |x: f32| x / (1.0 + (-x).exp());
            let values = zip(words.get(gate), words.get(up), |gate, up| silu(gate) * up);
            words.put(gate, &values);
        });
    }

    fn set_positions(&mut self, rope: &mut FarRope, positions: &[u32]) {
        rope.at = rope.room.part(0, positions.len());
        self.memory.copy_in(rope.at, positions.iter().map(|&p| p as f32).collect());
    }

    fn rotate(&mut self, rope: &FarRope, x: &mut Buffer, heads: usize, head_dim: usize) {
        let (at, positions, layout) = (x.at(), rope.at, rope.layout);
        let (inv_freq, mscale) = (rope.inv_freq.clone(), rope.mscale);
        self.memory.begin(move |words| {
            let mut values = words.get(at).to_vec();
            for (i, head) in values.chunks_exact_mut(head_dim).enumerate() {
                let position = words.get(positions)[i / heads];
                for (pair, frequency) in inv_freq.iter().enumerate() {
                    let (a, b) = match layout {
                        RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                        RopeLayout::Half => (pair, pair + inv_freq.len()),
                    };
                    let (sin, cos) = (position * frequency).sin_cos();
                    let (sin, cos) = (sin * mscale, cos * mscale);
                    (head[a], head[b]) =
                        (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
                }
            }
            words.put(at, &values);
        });
    }

    fn keep_rows(&mut self, x: &mut Buffer, runs: &[Range<usize>]) {
        let (from, cols, runs) = (x.at(), x.cols, runs.to_vec());
        let to = x.shaped(runs.iter().map(Range::len).sum(), cols);
        self.memory.begin(move |words| {
            let run = |run: Range<usize>| from.part(run.start * cols, run.len() * cols);
            let rows = runs.into_iter().flat_map(|r| words.get(run(r)).to_vec());
            let rows: Vec<f32> = rows.collect();
            words.put(to, &rows);
        });
    }

    fn logits(
        &mut self,
        head: &Matrix,
        x: &mut Buffer,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let part = x.at().part(rows.start * x.cols, rows.len() * x.cols);
        self.memory.copy_out(|words| out.copy_from_slice(&product(words, *head, part)))
    }

    fn route(
        &mut self,
        scores: &mut Buffer,
        used: usize,
        normalize: bool,
        routes: &mut Routes,
        runs: &mut Vec<ExpertRun>,
    ) -> Result<(), DeviceError> {
        let (at, experts) = (scores.at(), scores.cols);
        let to = routes.0.part(0, scores.rows * used * 2);
        let counts = self.memory.copy_out(|words| {
            let mut chosen = Vec::new();
            for (row, scores) in words.get(at).chunks_exact(experts).enumerate() {
                let weights = softmax(scores);
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
                order.truncate(used);
                let sum: f32 = order.iter().map(|&e| weights[e]).sum();
                let scale = if normalize { 1.0 / sum } else { 1.0 };
                chosen.extend(order.iter().map(|&e| (e, row, weights[e] * scale)));
            }
            chosen.sort_by_key(|&(expert, row, _)| (expert, row));
            let values = chosen.iter().flat_map(|&(_, row, weight)| [row as f32, weight]);
            words.put(to, &values.collect::<Vec<f32>>());
            let count = |e| chosen.iter().filter(|(expert, _, _)| *expert == e).count();
            (0..experts).map(count).collect::<Vec<usize>>()
        })?;
        runs.clear();
        let mut first = 0;
        for (expert, count) in counts.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            runs.push(ExpertRun { expert, first, count });
            first += count;
        }
        Ok(())
    }

    fn zeros_like(&mut self, x: &Buffer, out: &mut Buffer) {
        self.memory.copy_in(out.shaped(x.rows, x.cols), vec![0.0; x.rows * x.cols]);
    }

    fn gather(&mut self, routes: &Routes, run: ExpertRun, x: &Buffer, out: &mut Buffer) {
        let (routes, from, cols) = (routes.of(run), x.at(), x.cols);
        let to = out.shaped(run.count, cols);
        self.memory.begin(move |words| {
            let routes = words.get(routes).chunks_exact(2);
            let rows =
                routes.flat_map(|route| words.get(from.part(route[0] as usize * cols, cols)));
            let rows: Vec<f32> = rows.copied().collect();
            words.put(to, &rows);
        });
    }

    fn scatter_add(&mut self, routes: &Routes, run: ExpertRun, from: &Buffer, out: &mut Buffer) {
        let (routes, from, to, cols) = (routes.of(run), from.at(), out.at(), from.cols);
        self.memory.begin(move |words| {
            for (i, route) in words.get(routes).to_vec().chunks_exact(2).enumerate() {
                let to = to.part(route[0] as usize * cols, cols);
                let values = words.get(from.part(i * cols, cols));
                let sum = zip(words.get(to), values, |sum, value| sum + route[1] * value);
                words.put(to, &sum);
            }
        });
    }

    fn kv(&self, layout: &KvLayout, blocks: usize) -> Result<Kv, DeviceError> {
        let values = layout.block_bytes() / layout.dtype.bytes();
        Ok(Kv { at: self.memory.reserve(blocks * values), layout: *layout, blocks })
    }

    fn write_kv(
        &mut self,
        kv: &mut Kv,
        layer: usize,
        k: &Buffer,
        v: &Buffer,
        queries: &Arc<Vec<Sequence>>,
    ) {
        let (kv, queries) = (*kv, Arc::clone(queries));
        let KvLayout { kv_heads, head_dim, block_tokens, dtype, .. } = kv.layout;
        let parts = [(k.at(), true), (v.at(), false)];
        self.memory.begin(move |words| {
            for (s, t) in queries.iter().flat_map(|s| (0..s.tokens).map(move |t| (s, t))) {
                let position = s.position + t;
                let (block, token) = (s.blocks[position / block_tokens], position % block_tokens);
                for (head, (from, is_key)) in
                    (0..kv_heads).flat_map(|head| parts.map(|part| (head, part)))
                {
                    let row = (s.first_row + t) * kv_heads + head;
                    let row = words.get(from.part(row * head_dim, head_dim));
                    let row: Vec<f32> =
                        row.iter().map(|&x| widen(dtype, &narrow(dtype, x))).collect();
                    words.put(kv.row(layer, is_key, head, block, token), &row);
                }
            }
        });
    }

    fn attend(
        &mut self,
        kv: &Kv,
        params: &AttentionParams,
        q: &Buffer,
        queries: &Arc<Vec<Sequence>>,
        out: &mut Buffer,
    ) {
        let (kv, params, queries) = (*kv, *params, Arc::clone(queries));
        let (from, to) = (q.at(), out.shaped(q.rows, q.cols));
        self.memory.begin(move |words| {
            let head_dim = kv.layout.head_dim;
            let mut mixed = Vec::new();
            for (s, t) in queries.iter().flat_map(|s| (0..s.tokens).map(move |t| (s, t))) {
                for head in 0..params.heads {
                    let row = (s.first_row + t) * params.heads + head;
                    let q = words.get(from.part(row * head_dim, head_dim));
                    mixed.extend(attention(words, &kv, &params, q, s, s.position + t, head));
                }
            }
            words.put(to, &mixed);
        });
    }

    fn block<'a>(&'a self, kv: &'a Kv, block: BlockId) -> Result<Vec<u8>, DeviceError> {
        let dtype = kv.layout.dtype;
        self.memory.copy_out(|words| {
            let values = kv.canonical(block).flat_map(|row| words.get(row));
            values.flat_map(|&value| narrow(dtype, value)).collect()
        })
    }

    fn write_block<P: AsRef<[u8]>>(
        &mut self,
        kv: &mut Kv,
        block: BlockId,
        pieces: &[P],
    ) -> Result<(), DeviceError> {
        let dtype = kv.layout.dtype;
        let payload: Vec<u8> = pieces.iter().flat_map(|piece| piece.as_ref()).copied().collect();
        let rows = payload.chunks_exact(kv.layout.row_bytes());
        for (to, row) in kv.canonical(block).zip(rows) {
            let values = row.chunks_exact(dtype.bytes()).map(|bytes| widen(dtype, bytes));
            self.memory.copy_in(to, values.collect());
        }
        Ok(())
    }
}

impl Far {
    fn begin_norm(&self, from: Region, weight: &Vector, eps: f32, to: Region) {
        let (weight, len) = (weight.at, weight.len);
        self.memory.begin(move |words| {
            let rows = words.get(from).chunks_exact(len).flat_map(|row| {
                let mean = row.iter().map(|x| x * x).sum::<f32>() / len as f32;
                zip(row, words.get(weight), |x, weight| x / (mean + eps).sqrt() * weight)
            });
            let rows: Vec<f32> = rows.collect();
            words.put(to, &rows);
        });
    }
}

impl Routes {
    fn of(&self, run: ExpertRun) -> Region {
        self.0.part(run.first * 2, run.count * 2)
    }
}

/// One query head of one row over the positions that it sees.
fn attention(
    words: &Words,
    kv: &Kv,
    params: &AttentionParams,
    q: &[f32],
    s: &Sequence,
    position: usize,
    head: usize,
) -> Vec<f32> {
    let KvLayout { kv_heads, head_dim, block_tokens, .. } = kv.layout;
    let kv_head = head / (params.heads / kv_heads);
    let row = |is_key: bool, p: usize| {
        let (block, token) = (s.blocks[p / block_tokens], p % block_tokens);
        words.get(kv.row(params.layer, is_key, kv_head, block, token))
    };
    let first = params.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let seen = first..=position;
    let scores: Vec<f32> = seen.clone().map(|p| dot(q, row(true, p)) * params.scale).collect();
    let mut out = vec![0.0; head_dim];
    for (p, weight) in seen.zip(softmax(&scores)) {
        out = zip(&out, row(false, p), |sum, value| sum + weight * value);
    }
    out
}

fn product(words: &Words, matrix: Matrix, x: Region) -> Vec<f32> {
    let weights = words.get(matrix.at);
    let rows = words.get(x).chunks_exact(matrix.cols);
    rows.flat_map(|x| weights.chunks_exact(matrix.cols).map(move |w| dot(w, x))).collect()
}

fn softmax(x: &[f32]) -> Vec<f32> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| (x - max).exp() / sum).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn zip(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect()
}

/// The bytes of a value in a block.
fn narrow(dtype: KvDtype, value: f32) -> Vec<u8> {
    match dtype {
        KvDtype::F16 => f32_to_f16(value).to_le_bytes().to_vec(),
        KvDtype::Bf16 => f32_to_bf16(value).to_le_bytes().to_vec(),
        KvDtype::F32 => value.to_le_bytes().to_vec(),
    }
}

fn widen(dtype: KvDtype, bytes: &[u8]) -> f32 {
    match (dtype, bytes) {
        (KvDtype::F16, &[a, b]) => f16_to_f32(u16::from_le_bytes([a, b])),
        (KvDtype::Bf16, &[a, b]) => bf16_to_f32(u16::from_le_bytes([a, b])),
        (KvDtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        _ => panic!("{} bytes are no {dtype:?}", bytes.len()),
    }
}
