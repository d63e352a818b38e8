//! Attention and thread pool timings: `cargo bench -p grapevine-kernels --bench attention`.
//!
//! Shapes are those of Qwen2.5-0.5B and Llama-3.2-1B with f16 keys and values. One step goes through all
//! layers, as in a model, so that caches are as cold as they are there. `--test` runs each case once on
//! short contexts; `--threads N` (all cores if absent), `--isa scalar|avx2|avx512`, `--dtype
//! f16|bf16|f32`, `--case 1x512@2048` for that one alone. Prints the median and the least time of a step.

use std::time::Instant;

use kernels::attention::{
    AttentionParams, AttentionScratch, KvDtype, KvLayout, KvView, SequenceQueries, attend, write_kv,
};
use kernels::isa::Isa;
use kernels::pool::ThreadPool;

struct Shape {
    name: &'static str,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "qwen2.5-0.5b", layers: 24, heads: 14, kv_heads: 2, head_dim: 64 },
    Shape { name: "llama-3.2-1b", layers: 16, heads: 32, kv_heads: 8, head_dim: 64 },
];

/// Streams, tokens of each, positions before them.
const CASES: [(usize, usize, usize); 8] = [
    (1, 1, 512),
    (1, 1, 2048),
    (1, 1, 8192),
    (8, 1, 256),
    (8, 1, 2048),
    (1, 512, 0),
    (1, 512, 2048),
    (1, 512, 8192),
];

const CACHE_LINE: usize = 64;

struct Setup {
    pool: ThreadPool,
    isa: Isa,
    dtype: KvDtype,
    test: bool,
    /// The only case to run.
    case: Option<(usize, usize, usize)>,
}

fn main() {
    let setup = parse();
    println!("{} threads, {}, {:?}", setup.pool.threads(), setup.isa, setup.dtype);
    regions(&setup);
    for shape in &SHAPES {
        for case in CASES {
            if setup.case.is_none_or(|only| only == case) {
                attention(&setup, shape, case);
            }
        }
    }
}

fn parse() -> Setup {
    let mut threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut setup = Setup {
        pool: ThreadPool::new(1),
        isa: Isa::detect(),
        dtype: KvDtype::F16,
        test: false,
        case: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().expect("the option needs a value");
        match arg.as_str() {
            "--test" => setup.test = true,
            "--case" => {
                let name = value();
                let named = CASES.into_iter().find(|(s, t, d)| name == format!("{s}x{t}@{d}"));
                setup.case = Some(named.expect("a case of this bench, such as 1x512@2048"));
            }
            "--threads" => threads = value().parse().expect("a number of threads"),
            "--isa" => {
                let name = value();
                let named = Isa::available().find(|isa| isa.to_string() == name);
                setup.isa = named.expect("an isa of this cpu");
            }
            "--dtype" => {
                setup.dtype = match value().as_str() {
                    "f16" => KvDtype::F16,
                    "bf16" => KvDtype::Bf16,
                    "f32" => KvDtype::F32,
                    other => panic!("unknown dtype {other}"),
                }
            }
            // Cargo passes this to every bench.
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    setup.pool = ThreadPool::new(threads);
    setup
}

/// Seconds that `step` takes: median and least.
fn time(setup: &Setup, mut step: impl FnMut()) -> (f64, f64) {
    let mut once = || {
        let start = Instant::now();
        step();
        start.elapsed().as_secs_f64()
    };
    let first = once();
    let repeats = if setup.test { 1 } else { ((1.0 / first) as usize).clamp(5, 50) };
    let mut seconds: Vec<f64> = (0..repeats).map(|_| once()).collect();
    seconds.sort_by(f64::total_cmp);
    (seconds[seconds.len() / 2], seconds[0])
}

fn regions(setup: &Setup) {
    let count = if setup.test { 10 } else { 10_000 };
    let (median, least) = time(setup, || {
        for _ in 0..count {
            setup.pool.run(16, &|i| {
                std::hint::black_box(i);
            });
        }
    });
    let us = 1e6 / count as f64;
    println!("empty region of 16 tasks: {:.2} us, least {:.2} us", median * us, least * us);
}

fn attention(setup: &Setup, shape: &Shape, (streams, tokens, depth): (usize, usize, usize)) {
    let depth = if setup.test { depth.min(64) } else { depth };
    let tokens = if setup.test { tokens.min(32) } else { tokens };
    let &Shape { name, layers, heads, kv_heads, head_dim } = shape;
    let layout = KvLayout { layers, kv_heads, head_dim, block_tokens: 16, dtype: setup.dtype };
    let blocks_each = (depth + tokens).div_ceil(layout.block_tokens);
    // As in the engine's pool: at a cache line, in huge pages.
    let len = streams * blocks_each * layout.block_bytes();
    let mut memory = vec![0u8; len + CACHE_LINE];
    let start = memory.as_ptr().align_offset(CACHE_LINE);
    let storage = &mut memory[start..][..len];
    kernels::pages::prefer_huge_pages(storage);
    fill(storage, setup.dtype);
    // Blocks of the streams interleave, as they do when streams grow together.
    let tables: Vec<Vec<u32>> = (0..streams)
        .map(|s| (0..blocks_each).map(|b| (b * streams + s) as u32).collect())
        .collect();
    let sequences: Vec<SequenceQueries<'_>> = tables
        .iter()
        .enumerate()
        .map(|(s, blocks)| SequenceQueries {
            first_row: s * tokens,
            tokens,
            position: depth,
            blocks,
        })
        .collect();

    let rows = streams * tokens;
    let q: Vec<f32> = (0..rows * heads * head_dim).map(|i| (i % 37) as f32 / 18.0 - 1.0).collect();
    let kv: Vec<f32> =
        (0..rows * kv_heads * head_dim).map(|i| (i % 29) as f32 / 14.0 - 1.0).collect();
    let mut out = vec![0.0; q.len()];
    let mut scratch = AttentionScratch::new();
    let scale = 1.0 / (head_dim as f32).sqrt();

    let (write, _) = time(setup, || {
        for layer in 0..layers {
            let (pool, isa) = (&setup.pool, setup.isa);
            write_kv(pool, isa, &layout, storage, layer, &kv, &kv, &sequences);
        }
    });
    let view = KvView { layout, storage };
    let (median, least) = time(setup, || {
        for layer in 0..layers {
            let params = AttentionParams { layer, heads, scale, window: None };
            attend(&setup.pool, setup.isa, &view, &params, &q, &sequences, &mut out, &mut scratch);
        }
    });
    std::hint::black_box(&out);

    let seen = streams * (tokens * depth + tokens * (tokens + 1) / 2);
    let flop = 4.0 * (seen * heads * head_dim * layers) as f64;
    let bytes = (streams * (depth + tokens) * 2 * kv_heads * layers * layout.row_bytes()) as f64;
    println!(
        "{name} {streams} x {tokens:>3} at {depth:>4}: {:>8.3} ms, least {:>8.3} ms, \
         {:>5.1} GB/s, {:>6.1} GFLOP/s, write {:>6.3} ms",
        median * 1e3,
        least * 1e3,
        bytes / median / 1e9,
        flop / median / 1e9,
        write * 1e3,
    );
}

/// Small finite numbers of either sign.
fn fill(storage: &mut [u8], dtype: KvDtype) {
    let mut state = 1u32;
    for element in storage.chunks_exact_mut(dtype.bytes()) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let value = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
        match dtype {
            KvDtype::F16 => {
                element.copy_from_slice(&kernels::float::f32_to_f16(value).to_le_bytes());
            }
            KvDtype::Bf16 => {
                element.copy_from_slice(&kernels::float::f32_to_bf16(value).to_le_bytes());
            }
            KvDtype::F32 => element.copy_from_slice(&value.to_le_bytes()),
        }
    }
}
