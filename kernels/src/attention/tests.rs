use super::*;

fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 22) as f32 - 2.0
        })
        .collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// A sequence with its queries, keys and values, and the blocks it lives in.
struct Case {
    layout: KvLayout,
    heads: usize,
    window: Option<usize>,
    len: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    blocks: Vec<u32>,
}

const LAYERS: usize = 2;
const LAYER: usize = 1;
const STORED: usize = if cfg!(miri) { 12 } else { 120 };

impl Case {
    fn new(
        (heads, kv_heads, head_dim): (usize, usize, usize),
        (block_tokens, dtype): (usize, KvDtype),
        window: Option<usize>,
        len: usize,
        seed: u32,
    ) -> Self {
        let layout = KvLayout { layers: LAYERS, kv_heads, head_dim, block_tokens, dtype };
        let stored = STORED as u32;
        Case {
            layout,
            heads,
            window,
            len,
            q: numbers(len * heads * head_dim, seed),
            k: numbers(len * kv_heads * head_dim, seed + 1),
            v: numbers(len * kv_heads * head_dim, seed + 2),
            // Scattered, and different for each seed.
            blocks: (0..len.div_ceil(block_tokens) as u32)
                .map(|b| (b * 37 + seed % 2 * 48) % stored)
                .collect(),
        }
    }

    fn params(&self) -> AttentionParams {
        let scale = 1.0 / (self.layout.head_dim as f32).sqrt();
        AttentionParams { layer: LAYER, heads: self.heads, scale, window: self.window }
    }

    /// Storage full of NaN: what is not written must never be seen.
    fn storage(&self) -> Vec<u8> {
        vec![0xff; STORED * self.layout.block_bytes()]
    }

    /// The whole sequence, cut into chunks of the given lengths (the last is repeated).
    fn run(&self, pool: &ThreadPool, isa: Isa, chunks: &[usize]) -> Vec<f32> {
        let mut storage = self.storage();
        let mut scratch = AttentionScratch::new();
        let mut out = vec![f32::NAN; self.q.len()];
        let (row, kv_row) = (self.q.len() / self.len, self.k.len() / self.len);
        let mut position = 0;
        for step in 0.. {
            if position == self.len {
                break;
            }
            let tokens = chunks[step.min(chunks.len() - 1)].min(self.len - position);
            let sequences =
                [SequenceQueries { first_row: 0, tokens, position, blocks: &self.blocks }];
            let at = |len: usize| position * len..(position + tokens) * len;
            let (k, v) = (&self.k[at(kv_row)], &self.v[at(kv_row)]);
            write_kv(pool, isa, &self.layout, &mut storage, LAYER, k, v, &sequences);
            let view = KvView { layout: self.layout, storage: &storage };
            let (q, out) = (&self.q[at(row)], &mut out[at(row)]);
            attend(pool, isa, &view, &self.params(), q, &sequences, out, &mut scratch);
            position += tokens;
        }
        out
    }

    fn stored(&self, x: f32) -> f64 {
        f64::from(match self.layout.dtype {
            KvDtype::F16 => crate::float::f16_to_f32(crate::float::f32_to_f16(x)),
            KvDtype::Bf16 => crate::float::bf16_to_f32(crate::float::f32_to_bf16(x)),
            KvDtype::F32 => x,
        })
    }

    /// Attention as it is defined, in f64.
    fn exact(&self) -> Vec<f64> {
        let (d, kv_heads) = (self.layout.head_dim, self.layout.kv_heads);
        let scale = f64::from(self.params().scale);
        let k: Vec<f64> = self.k.iter().map(|&x| self.stored(x)).collect();
        let v: Vec<f64> = self.v.iter().map(|&x| self.stored(x)).collect();
        let mut out = Vec::new();
        for p in 0..self.len {
            let first = self.window.map_or(0, |w| (p + 1).saturating_sub(w));
            for h in 0..self.heads {
                let q = &self.q[(p * self.heads + h) * d..][..d];
                let row = |s: usize| (s * kv_heads + h / (self.heads / kv_heads)) * d;
                let scores: Vec<f64> = (first..=p)
                    .map(|s| {
                        let k = &k[row(s)..][..d];
                        scale * q.iter().zip(k).map(|(&q, k)| f64::from(q) * k).sum::<f64>()
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let e: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = e.iter().sum();
                for i in 0..d {
                    let weighed = e.iter().zip(first..).map(|(e, s)| e * v[row(s) + i]);
                    out.push(weighed.sum::<f64>() / total);
                }
            }
        }
        out
    }
}

const WHOLE: &[usize] = &[usize::MAX];

/// Heads, KV heads, head_dim; block_tokens, dtype; window; length.
fn table() -> Vec<Case> {
    use KvDtype::{Bf16, F16, F32};
    let case = |(i, &(shape, kv, window, len))| Case::new(shape, kv, window, len, 10 * i as u32);
    if cfg!(miri) {
        // Miri needs about a second for a row. The last is longer than a tile of keys.
        let rows = [
            ((1, 1, 16), (16, F32), None, 1),
            ((2, 1, 6), (8, F16), None, 3),
            ((1, 1, 4), (8, Bf16), Some(3), 9),
            ((1, 1, 2), (8, F32), None, 66),
        ];
        return rows.iter().enumerate().map(case).collect();
    }
    let rows = [
        ((1, 1, 16), (16, F32), None, 1),
        ((1, 1, 2), (8, F32), None, 70),
        ((2, 1, 6), (8, F16), None, 65),
        ((14, 2, 64), (16, F16), None, 600),
        ((32, 8, 64), (16, F16), None, 130),
        ((4, 4, 32), (16, Bf16), None, 300),
        ((8, 4, 96), (32, F32), None, 129),
        ((6, 2, 80), (64, F16), None, 150),
        ((8, 1, 128), (64, Bf16), None, 270),
        ((9, 1, 40), (16, F32), None, 64),
        ((2, 2, 256), (16, F16), None, 90),
        ((4, 2, 64), (16, F16), Some(1), 80),
        ((4, 2, 64), (16, F32), Some(7), 200),
        ((14, 2, 64), (8, F16), Some(64), 400),
        ((4, 4, 32), (32, Bf16), Some(100), 520),
        ((5, 1, 48), (16, F16), Some(300), 700),
    ];
    rows.iter().enumerate().map(case).collect()
}

#[test]
fn outputs_agree_with_f64() {
    let pool = ThreadPool::new(2);
    for (i, case) in table().iter().enumerate() {
        let want = case.exact();
        for isa in Isa::available() {
            let got = case.run(&pool, isa, WHOLE);
            for (j, (&g, &w)) in got.iter().zip(&want).enumerate() {
                assert!((f64::from(g) - w).abs() < 5e-6, "case {i} {isa} [{j}]: {g} for {w}");
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_isa_chunks_or_threads() {
    let pools = [1, 2, 5].map(ThreadPool::new);
    for (i, case) in table().iter().enumerate().take(if cfg!(miri) { 3 } else { usize::MAX }) {
        let want = bits(&case.run(&pools[0], Isa::detect(), WHOLE));
        for isa in Isa::available() {
            assert_eq!(bits(&case.run(&pools[0], isa, WHOLE)), want, "case {i} {isa}");
        }
        let cuts: [&[usize]; 5] = [&[7], &[64], &[1], &[100, 3, 1, 1, 33], &[63, 2, 300]];
        for chunks in cuts.into_iter().take(if cfg!(miri) { 1 } else { 5 }) {
            for pool in &pools[if cfg!(miri) { 1..2 } else { 0..3 }] {
                let got = bits(&case.run(pool, Isa::detect(), chunks));
                assert!(got == want, "case {i}, chunks {chunks:?}, {} threads", pool.threads());
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let shapes = [((4, 4, 32), Some(70)), ((14, 2, 64), None), ((8, 2, 40), None)];
    let shapes = if cfg!(miri) { [((1, 1, 8), Some(7)); 3] } else { shapes };
    for (shape, window) in shapes.into_iter().take(if cfg!(miri) { 1 } else { 3 }) {
        // Position and number of tokens of each sequence in the step: decoding, a chunk, a prefill.
        let parts = [(599, 1), (130, 1), (300, 50), (0, 90), (255, 2), (64, 1)];
        let parts =
            if cfg!(miri) { [(8, 1), (2, 1), (1, 2), (0, 3), (3, 1), (4, 1)] } else { parts };
        let case = |&(position, tokens): &(usize, usize)| {
            let len = position + tokens;
            Case::new(shape, (16, KvDtype::F16), window, len, (position + 1) as u32)
        };
        let mut cases: Vec<Case> = parts.iter().map(case).collect();
        // Blocks of one storage, from its end to its beginning.
        let mut next = 0;
        for case in &mut cases {
            for block in &mut case.blocks {
                *block = STORED as u32 - 1 - next;
                next += 1;
            }
        }
        let layout = cases[0].layout;
        let mut storage = vec![0xff; STORED * layout.block_bytes()];
        let pool = ThreadPool::new(3);
        let isa = Isa::detect();
        let (mut sequences, mut q, mut want) = (Vec::new(), Vec::new(), Vec::new());
        let row = shape.0 * shape.2;
        for (case, &(position, tokens)) in cases.iter().zip(&parts) {
            let blocks = &case.blocks;
            let all = SequenceQueries { first_row: 0, tokens: case.len, position: 0, blocks };
            write_kv(&pool, isa, &layout, &mut storage, LAYER, &case.k, &case.v, &[all]);
            // A row that belongs to nobody lies between any two sequences.
            let first_row = q.len() / row;
            sequences.push(SequenceQueries { first_row, tokens, position, blocks });
            q.extend_from_slice(&case.q[position * row..]);
            q.extend(vec![f32::NAN; row]);
            let alone = case.run(&ThreadPool::new(1), isa, WHOLE);
            want.extend_from_slice(&alone[position * row..]);
            want.extend(vec![123.0; row]);
        }
        let view = KvView { layout, storage: &storage };
        let mut scratch = AttentionScratch::new();
        for _ in 0..if cfg!(miri) { 1 } else { 3 } {
            let mut out = vec![123.0; q.len()];
            let params = cases[0].params();
            attend(&pool, isa, &view, &params, &q, &sequences, &mut out, &mut scratch);
            assert!(bits(&out) == bits(&want), "{shape:?}");
        }
    }
}

#[test]
fn values_of_a_later_token_do_not_reach_an_earlier_row() {
    let (head_dim, len, cut) = if cfg!(miri) { (8, 5, 3) } else { (32, 40, 30) };
    let mut case = Case::new((3, 1, head_dim), (16, KvDtype::F32), None, len, 5);
    let pool = ThreadPool::new(1);
    let row = 3 * head_dim;
    let want = case.run(&pool, Isa::detect(), WHOLE);
    case.v[cut * head_dim..].fill(f32::INFINITY);
    case.k[cut * head_dim..].fill(f32::NAN);
    for isa in Isa::available() {
        let got = case.run(&pool, isa, WHOLE);
        assert_eq!(bits(&got[..cut * row]), bits(&want[..cut * row]));
        assert!(got[cut * row..].iter().all(|x| !x.is_finite()));
    }
}

#[test]
fn blocks_have_the_canonical_layout() {
    let (layers, kv_heads, head_dim, block_tokens) = (3, 2, 18, 8);
    let pool = ThreadPool::new(2);
    for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::F32] {
        let layout = KvLayout { layers, kv_heads, head_dim, block_tokens, dtype };
        assert_eq!(layout.block_bytes(), layers * 2 * kv_heads * 8 * head_dim * dtype.bytes());
        let k: Vec<f32> = (0..5 * kv_heads * head_dim).map(|i| i as f32).collect();
        let v: Vec<f32> = k.iter().map(|x| -x).collect();
        for isa in Isa::available() {
            let mut storage = vec![0xaa; 3 * layout.block_bytes()];
            // Positions 6 to 10: two in block 2, three in block 0.
            let blocks = [2, 0];
            let sequences =
                [SequenceQueries { first_row: 0, tokens: 5, position: 6, blocks: &blocks }];
            write_kv(&pool, isa, &layout, &mut storage, 1, &k, &v, &sequences);
            let mut want = vec![0xaa; storage.len()];
            for (t, (block, slot)) in [(2, 6), (2, 7), (0, 0), (0, 1), (0, 2)].iter().enumerate() {
                for (part, from) in [&k, &v].into_iter().enumerate() {
                    for head in 0..kv_heads {
                        for d in 0..head_dim {
                            let x = from[(t * kv_heads + head) * head_dim + d];
                            let plane =
                                (block * layers + 1) * 2 * kv_heads + part * kv_heads + head;
                            let at = (plane * block_tokens + slot) * head_dim + d;
                            let place = &mut want[at * dtype.bytes()..][..dtype.bytes()];
                            match dtype {
                                KvDtype::F16 => place
                                    .copy_from_slice(&crate::float::f32_to_f16(x).to_ne_bytes()),
                                KvDtype::Bf16 => place
                                    .copy_from_slice(&crate::float::f32_to_bf16(x).to_ne_bytes()),
                                KvDtype::F32 => place.copy_from_slice(&x.to_ne_bytes()),
                            }
                        }
                    }
                }
            }
            assert!(storage == want, "{dtype:?} {isa}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let layout =
        KvLayout { layers: 1, kv_heads: 2, head_dim: 4, block_tokens: 8, dtype: KvDtype::F32 };
    let storage = vec![0; 2 * layout.block_bytes()];
    let params = AttentionParams { layer: 0, heads: 4, scale: 1.0, window: None };
    let row = |first_row, tokens, position, blocks| SequenceQueries {
        first_row,
        tokens,
        position,
        blocks,
    };
    let table: &[(AttentionParams, &[SequenceQueries<'_>], &str)] = &[
        (params, &[row(0, 1, 8, &[0])], "needs 2 blocks"),
        (params, &[row(0, 1, 0, &[2])], "outside of the 2 stored"),
        (params, &[row(1, 2, 0, &[0])], "end at 3 of 2"),
        (params, &[row(1, 1, 0, &[0]), row(0, 1, 0, &[1])], "out of order"),
        (params, &[row(0, 2, 0, &[0]), row(1, 1, 0, &[1])], "overlap"),
        (AttentionParams { layer: 1, ..params }, &[], "layer 1 of 1"),
        (AttentionParams { heads: 3, ..params }, &[], "do not share"),
        (AttentionParams { heads: 8, ..params }, &[], ""),
        (AttentionParams { window: Some(0), ..params }, &[], "sees nothing"),
    ];
    let pool = ThreadPool::new(1);
    for (params, sequences, message) in table {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let view = KvView { layout, storage: &storage };
            let (q, mut out) = ([0.0; 32], [0.0; 32]);
            let mut scratch = AttentionScratch::new();
            attend(&pool, Isa::Scalar, &view, params, &q, sequences, &mut out, &mut scratch);
        }));
        match outcome {
            Ok(()) => assert!(message.is_empty(), "accepted: {message}"),
            Err(payload) => {
                let text = payload.downcast_ref::<String>().cloned();
                let text = text.or(payload.downcast_ref::<&str>().map(|s| s.to_string()));
                let text = text.expect("panics carry text");
                assert!(!message.is_empty() && text.contains(message), "{text}, not {message}");
            }
        }
    }
}
