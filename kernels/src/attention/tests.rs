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
const STORED: usize = 96;

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
                .map(|b| (b * 35 + seed % 2 * 48) % stored)
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
    let case = |(i, &(shape, kv, window, len))| Case::new(shape, kv, window, len, 10 * i as u32);
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
    for (i, case) in table().iter().enumerate() {
        let want = bits(&case.run(&pools[0], Isa::detect(), WHOLE));
        for isa in Isa::available() {
            assert_eq!(bits(&case.run(&pools[0], isa, WHOLE)), want, "case {i} {isa}");
        }
        for chunks in [&[1][..], &[7], &[64], &[100, 3, 1, 1, 33], &[63, 2, 300]] {
            for pool in &pools {
                let got = bits(&case.run(pool, Isa::detect(), chunks));
                assert!(got == want, "case {i}, chunks {chunks:?}, {} threads", pool.threads());
            }
        }
    }
}
