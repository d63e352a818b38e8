//! Matrix products against what the machine can do.
//!
//! ```text
//! cargo bench -p grapevine-kernels --bench ladder -- [--test] [--threads N] [--isa NAME]
//!     [--format NAME]... [--tokens N]... [--shape ROWSxCOLS]... [--repeat N] [--best]
//! ```
//!
//! Each line is the median of the repetitions of one product. GB/s counts the packed weights once;
//! GOP/s counts two operations for each weight and token. The shares are those of the memory and
//! arithmetic peaks, measured in the same run with the same threads. The lines "pack" say how fast
//! weights of the file's size are packed. `--test` runs everything
//! once on a small shape; `--best` takes the fastest repetition, for machines that others use too.

use std::hint::black_box;
use std::time::Instant;

use kernels::format::Format;
use kernels::isa::Isa;
use kernels::linear::{Activations, Matrix, matmul};
use kernels::pool::ThreadPool;

/// Qwen2.5-0.5B, then Llama-3.2-1B, as (rows, cols).
const SHAPES: [(usize, usize); 8] = [
    (896, 896),
    (128, 896),
    (4864, 896),
    (896, 4864),
    (151_936, 896),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
];
const TOKENS: [usize; 7] = [1, 2, 4, 8, 16, 32, 512];
const FORMATS: [Format; 7] = [
    Format::Q8_0,
    Format::Q4_0,
    Format::Q4_K,
    Format::Q6_K,
    Format::BF16,
    Format::F16,
    Format::F32,
];
/// Operations of one measurement at least.
const OPERATIONS_PER_SAMPLE: f64 = 4e9;
/// Bytes that are read for one measurement at least: more than the caches hold.
const BYTES_PER_SAMPLE: usize = 96 << 20;

#[derive(Clone)]
struct Options {
    threads: usize,
    isa: Isa,
    formats: Vec<Format>,
    tokens: Vec<usize>,
    shapes: Vec<(usize, usize)>,
    repeat: usize,
    best: bool,
}

fn main() {
    let options = options();
    let pool = ThreadPool::new(options.threads);
    let peaks = Peaks::measure(&pool, &options);
    println!(
        "{} threads, {}: {:.1} GB/s, {:.0} GFLOP/s f32",
        options.threads, options.isa, peaks.bytes, peaks.flops
    );
    println!(
        "{:>7} {:>13} {:>6} {:>10} {:>8} {:>5} {:>8} {:>6}",
        "format", "shape", "tokens", "us", "GB/s", "%", "GOP/s", "%f32"
    );
    for &format in &options.formats {
        for &shape in &options.shapes {
            if !shape.1.is_multiple_of(format.block_len()) {
                continue;
            }
            let matrices = Matrices::new(&options, &pool, format, shape);
            for &tokens in &options.tokens {
                matrices.measure(&options, &pool, tokens, &peaks);
            }
        }
    }
}

fn options() -> Options {
    let mut options = Options {
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        isa: Isa::detect(),
        formats: Vec::new(),
        tokens: Vec::new(),
        shapes: Vec::new(),
        repeat: 7,
        best: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} takes a value"));
        match arg.as_str() {
            "--bench" => {}
            "--test" => {
                (options.repeat, options.tokens) = (1, vec![1, 5]);
                options.shapes = vec![(64, 256)];
            }
            "--best" => options.best = true,
            "--threads" => options.threads = value().parse().expect("a number of threads"),
            "--repeat" => options.repeat = value().parse().expect("a number of repetitions"),
            "--tokens" => options.tokens.push(value().parse().expect("a number of tokens")),
            "--isa" => {
                let name = value();
                options.isa = Isa::available()
                    .find(|isa| isa.to_string() == name)
                    .expect("an instruction set of this CPU");
            }
            "--format" => {
                let name = value();
                let format = Format::ALL.into_iter().find(|f| f.name() == name);
                options.formats.push(format.expect("a format's name"));
            }
            "--shape" => {
                let shape = value();
                let (rows, cols) = shape.split_once('x').expect("ROWSxCOLS");
                let number = |text: &str| text.parse().expect("a number");
                options.shapes.push((number(rows), number(cols)));
            }
            _ => panic!("unknown option {arg}"),
        }
    }
    if options.formats.is_empty() {
        options.formats = FORMATS.into();
    }
    if options.tokens.is_empty() {
        options.tokens = TOKENS.into();
    }
    if options.shapes.is_empty() {
        options.shapes = SHAPES.into();
    }
    options
}

/// Copies of one matrix, enough that a round over all of them does not stay in the caches.
struct Matrices {
    copies: Vec<Matrix>,
    format: Format,
    rows: usize,
    cols: usize,
}

impl Matrices {
    fn new(
        options: &Options,
        pool: &ThreadPool,
        format: Format,
        (rows, cols): (usize, usize),
    ) -> Matrices {
        // Every byte is a scale of about 1e-3 or an innocent code, in all formats.
        let len = format.bytes_for(rows * cols).expect("whole blocks");
        let bytes: Vec<u8> = (0..len).map(|i| [0x15, 0x16, 0x17][i % 3]).collect();
        let pack =
            || Matrix::pack(options.isa, pool, format, rows, cols, &bytes).expect("valid weights");
        let mut first = pack();
        let seconds = time(options, || first = pack());
        println!(
            "{:>7} {:>13} {:>6} {:>10.1} {:>8.2}",
            format.name(),
            format!("{rows}x{cols}"),
            "pack",
            seconds * 1e6,
            len as f64 / seconds / 1e9
        );
        let count = if options.repeat == 1 { 1 } else { BYTES_PER_SAMPLE / first.packed_bytes() };
        let mut copies = vec![first];
        copies.resize_with(count.clamp(1, 64), pack);
        Matrices { copies, format, rows, cols }
    }

    fn measure(&self, options: &Options, pool: &ThreadPool, tokens: usize, peaks: &Peaks) {
        let mut x = Activations::new();
        for (i, v) in x.resize(tokens, self.cols).iter_mut().enumerate() {
            *v = (i % 37) as f32 / 18.0 - 1.0;
        }
        let mut out = vec![0.0; tokens * self.rows];
        let operations = 2.0 * (self.rows * self.cols * tokens) as f64;
        // Arithmetic needs no cold weights: a few copies will do when there are many tokens.
        let budget = (OPERATIONS_PER_SAMPLE / operations).ceil() as usize;
        let copies = &self.copies[..self.copies.len().min(budget.max(1))];
        let mut turn = 0;
        let mut product = || {
            x.values_mut();
            matmul(pool, &copies[turn % copies.len()], &mut x, black_box(&mut out));
            turn += 1;
        };
        // On a shared machine a short call has the best chance to run undisturbed.
        let (calls, repeat) = match options.best {
            true => (1, options.repeat * copies.len()),
            false => (copies.len(), options.repeat),
        };
        let seconds = time(&Options { repeat, ..options.clone() }, || {
            (0..calls).for_each(|_| product());
        }) / calls as f64;
        let bytes = copies[0].packed_bytes() as f64 / seconds / 1e9;
        let operations = operations / seconds / 1e9;
        println!(
            "{:>7} {:>13} {:>6} {:>10.1} {:>8.1} {:>5.0} {:>8.0} {:>6.0}",
            self.format.name(),
            format!("{}x{}", self.rows, self.cols),
            tokens,
            seconds * 1e6,
            bytes,
            bytes / peaks.bytes * 100.0,
            operations,
            operations / peaks.flops * 100.0,
        );
    }
}

/// What the machine can do with these threads, in units of 1e9 per second.
struct Peaks {
    bytes: f64,
    flops: f64,
}

impl Peaks {
    fn measure(pool: &ThreadPool, options: &Options) -> Peaks {
        let repeat = options.repeat;
        let words = vec![1_u64; (if repeat == 1 { 1 << 20 } else { 256 << 20 }) / 8];
        let piece = words.len() / pool.threads();
        let read = time(options, || {
            pool.run(pool.threads(), &|task| {
                let sum = |words: &[u64]| words.iter().fold(0_u64, |sum, w| sum.wrapping_add(*w));
                black_box(sum(&words[task * piece..][..piece]));
            });
        });
        // Products of a matrix that fits into the first cache are the arithmetic peak; a region
        // inside of a task runs on the thread that is there.
        let (rows, cols, tokens, times) = (32, 96, 12, if repeat == 1 { 10 } else { 20_000 });
        let weights =
            Matrix::pack(Isa::detect(), pool, Format::F32, rows, cols, &vec![0; rows * cols * 4])
                .expect("valid weights");
        let flops = time(options, || {
            pool.run(pool.threads(), &|_| {
                let mut x = Activations::new();
                x.resize(tokens, cols).fill(1.0);
                let mut out = vec![0.0; rows * tokens];
                for _ in 0..times {
                    matmul(pool, &weights, &mut x, black_box(&mut out));
                }
            });
        });
        let operations = 2 * rows * cols * tokens * times * pool.threads();
        Peaks {
            bytes: (words.len() * 8) as f64 / read / 1e9,
            flops: operations as f64 / flops / 1e9,
        }
    }
}

/// Seconds of the middle (or fastest) one of the repetitions, after one that warms up.
fn time(options: &Options, mut call: impl FnMut()) -> f64 {
    if options.repeat > 1 {
        call();
    }
    let mut seconds: Vec<f64> = (0..options.repeat)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    if options.best { seconds[0] } else { seconds[seconds.len() / 2] }
}
