//! `vine bench --model`: speed of a model on this machine, and how near it comes to what the machine
//! can do. Rows are named as llama-bench names them: `pp512` a prompt, `tg128` generated tokens, `@d`
//! the tokens already in the context, `b8` eight sequences at once.

use super::args::BenchArgs;
use super::model::{self, ModelSpec, Sizing, executor};
use super::progress::LoadBar;
use super::table::Table;
use super::{local, system};
use anyhow::bail;
use cache::BlockId;
use engine::executor::{Executor, StepOp, StepProfile};
use engine::model::DecoderConfig;
use engine::weights::{Format, TensorRole};
use kernels::isa::Isa;
use kernels::measure::{Peaks, measure};
use kernels::pool::ThreadPool;
use protocol::{Instant, SequenceId};
use scheduler::{LogitsWanted, SequenceStep, StepPlan};
use serde::Serialize;
use std::time::Duration;

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    format: String,
    threads: usize,
    isa: String,
    packed_bytes: u64,
    peak_resident_bytes: Option<usize>,
    load_ms: f64,
    memory_gb_per_second: f64,
    f32_gflops: f64,
    int8_gops: Option<f64>,
    bf16_gflops: Option<f64>,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    test: String,
    tokens_per_second: f64,
    min: f64,
    max: f64,
    /// Time of the tighter physical bound (memory or arithmetic) as a share of the time measured.
    bound_share: f64,
    /// Which bound that is.
    bound: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<String>,
}

/// One thing to measure.
#[derive(Clone, Copy, Debug)]
enum Test {
    Prefill { tokens: usize, depth: usize },
    Decode { tokens: usize, depth: usize, batch: usize },
}

struct Bench {
    executor: Executor,
    config: DecoderConfig,
    clock: Box<dyn Fn() -> Instant>,
    peaks: Peaks,
    /// Operations per second that matrix products reach at best.
    matrix_peak: f64,
    repetitions: usize,
    profile: bool,
    /// Tokens of a sequence that hold what a prompt of random tokens left.
    filled: usize,
}

pub fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let tests = tests(args)?;
    let spec = ModelSpec::parse(args.model.as_deref().unwrap_or("demo"))?;
    let open = spec.open()?;
    let config = open.source.config.clone();
    let block_tokens = cache::BLOCK_TOKENS_DEFAULT;
    for test in &tests {
        if test.context() > config.context {
            bail!("{}: this model holds {} tokens", test.name(), config.context);
        }
    }
    let blocks = tests.iter().map(|t| t.sequences() * t.context().div_ceil(block_tokens)).max();
    let format = open.source.tensor(TensorRole::Q(0))?.format;
    let bar = LoadBar::new(&spec.name);
    let clock = local::clock();
    let start = clock();
    let (executor, _) = executor(
        open.source,
        &args.engine,
        Sizing { kv_blocks: blocks, profile: args.profile },
        &mut |done| bar.set(done),
    )?;
    let load_ms = (clock() - start).as_secs_f64() * 1e3;
    bar.clear();

    let threads = args.engine.threads.unwrap_or_else(model::default_threads);
    let isa = args.engine.isa.map_or_else(Isa::detect, model::isa);
    let peaks = measure(&ThreadPool::new(threads), isa, MEASURE_TIME);
    let packed_bytes = executor.decoder().packed_bytes();
    let mut bench = Bench {
        executor,
        config,
        clock: Box::new(clock),
        peaks,
        matrix_peak: match format {
            Format::F32 | Format::F16 | Format::BF16 if args.engine.quant.is_some() => {
                peaks.int8_ops
            }
            Format::F32 | Format::F16 => None,
            Format::BF16 => peaks.bf16_flops,
            _ => peaks.int8_ops,
        }
        .unwrap_or(peaks.f32_flops),
        repetitions: args.repetitions.max(1),
        profile: args.profile,
        filled: 0,
    };
    let bar = LoadBar::counting("tests", tests.len() as u64);
    let mut rows = Vec::new();
    for (index, test) in tests.iter().enumerate() {
        rows.push(bench.row(*test)?);
        bar.set_position(index as u64 + 1);
    }
    bar.clear();
    let report = Report {
        model: spec.name,
        format: args.engine.quant.map_or(format.name().to_owned(), |q| format!("{q:?}")),
        threads,
        isa: isa.to_string(),
        packed_bytes,
        peak_resident_bytes: system::peak_resident_bytes(),
        load_ms,
        memory_gb_per_second: peaks.memory_bytes_per_second / 1e9,
        f32_gflops: peaks.f32_flops / 1e9,
        int8_gops: peaks.int8_ops.map(|ops| ops / 1e9),
        bf16_gflops: peaks.bf16_flops.map(|ops| ops / 1e9),
        rows,
    };
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => report.print(),
    }
    Ok(())
}

/// Prompts at each depth, then decoding at each depth and batch. A length of 0 leaves its tests out.
fn tests(args: &BenchArgs) -> anyhow::Result<Vec<Test>> {
    let mut tests = Vec::new();
    for &depth in &args.depth {
        for &tokens in args.prompt.iter().filter(|&&n| n > 0) {
            tests.push(Test::Prefill { tokens, depth });
        }
        for &tokens in args.generate.iter().filter(|&&n| n > 0) {
            for &batch in &args.batch {
                if batch == 0 || batch > BATCH_MAX {
                    bail!("-b {batch}: give a number from 1 to {BATCH_MAX}");
                }
                tests.push(Test::Decode { tokens, depth, batch });
            }
        }
    }
    if tests.is_empty() {
        bail!("nothing to measure: give -p or -n above 0");
    }
    // Deeper contexts build on shallower ones.
    tests.sort_by_key(|test| match *test {
        Test::Prefill { depth, .. } | Test::Decode { depth, .. } => depth,
    });
    Ok(tests)
}

impl Test {
    fn name(self) -> String {
        let (mut name, depth) = match self {
            Test::Prefill { tokens, depth } => (format!("pp{tokens}"), depth),
            Test::Decode { tokens, depth, batch: 1 } => (format!("tg{tokens}"), depth),
            Test::Decode { tokens, depth, batch } => (format!("tg{tokens} b{batch}"), depth),
        };
        if depth > 0 {
            name.push_str(&format!(" @ d{depth}"));
        }
        name
    }

    fn context(self) -> usize {
        match self {
            Test::Prefill { tokens, depth } | Test::Decode { tokens, depth, .. } => tokens + depth,
        }
    }

    fn sequences(self) -> usize {
        match self {
            Test::Prefill { .. } => 1,
            Test::Decode { batch, .. } => batch,
        }
    }

    fn tokens(self) -> usize {
        match self {
            Test::Prefill { tokens, .. } => tokens,
            Test::Decode { tokens, batch, .. } => tokens * batch,
        }
    }
}

impl Bench {
    fn row(&mut self, test: Test) -> anyhow::Result<Row> {
        self.fill(test)?;
        self.once(test)?;
        self.executor.clear_profile();
        let mut seconds = Vec::new();
        for _ in 0..self.repetitions {
            seconds.push(self.once(test)?);
        }
        let profile = self.profile.then(|| profile_text(self.executor.profile()));
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        let rate = |s: f64| test.tokens() as f64 / s;
        let (memory, arithmetic) = self.bounds(test);
        Ok(Row {
            test: test.name(),
            tokens_per_second: rate(median),
            min: rate(seconds[seconds.len() - 1]),
            max: rate(seconds[0]),
            bound_share: memory.max(arithmetic) / median,
            bound: if memory > arithmetic { "memory" } else { "arithmetic" },
            profile,
        })
    }

    /// Seconds of one run.
    fn once(&mut self, test: Test) -> anyhow::Result<f64> {
        let start = (self.clock)();
        match test {
            Test::Prefill { tokens, depth } => {
                let plan = self.plan(1, depth, tokens, test.context(), LogitsWanted::Last);
                self.executor.step(&plan)?;
            }
            Test::Decode { tokens, depth, batch } => {
                for i in 0..tokens {
                    let plan = self.plan(batch, depth + i, 1, test.context(), LogitsWanted::Last);
                    self.executor.step(&plan)?;
                }
            }
        }
        Ok(((self.clock)() - start).as_secs_f64())
    }

    /// Puts keys and values of real tokens before the depth of the test, in blocks of each sequence's
    /// own: sequences that share no prefix share no cache lines either.
    fn fill(&mut self, test: Test) -> anyhow::Result<()> {
        let depth = match test {
            Test::Prefill { depth, .. } | Test::Decode { depth, .. } => depth,
        };
        let blocks_each = test.context().div_ceil(cache::BLOCK_TOKENS_DEFAULT);
        let filled = depth.div_ceil(cache::BLOCK_TOKENS_DEFAULT);
        while self.filled < depth {
            let tokens = FILL_CHUNK.min(depth - self.filled);
            let plan = self.plan(1, self.filled, tokens, test.context(), LogitsWanted::None);
            self.executor.step(&plan)?;
            self.filled += tokens;
        }
        for sequence in 1..test.sequences() {
            for block in 0..filled {
                let from = BlockId(block as u32);
                let to = BlockId((sequence * blocks_each + block) as u32);
                let payload = self.executor.block_payload(from).unwrap_or_default().to_vec();
                self.executor.write_block(to, &payload)?;
            }
        }
        Ok(())
    }

    fn plan(
        &self,
        sequences: usize,
        position: usize,
        tokens: usize,
        context: usize,
        wanted: LogitsWanted,
    ) -> StepPlan {
        let blocks_each = context.div_ceil(cache::BLOCK_TOKENS_DEFAULT);
        let token = |sequence: usize, i: usize| {
            ((sequence * 7919 + (position + i) * 104_729 + 17) % self.config.vocab) as u32
        };
        let step = |sequence: usize| SequenceStep {
            sequence: SequenceId(sequence as u64),
            tokens: (0..tokens).map(|i| token(sequence, i)).collect(),
            position,
            blocks: (0..blocks_each)
                .map(|b| BlockId((sequence * blocks_each + b) as u32))
                .collect(),
            wanted,
        };
        StepPlan { sequences: (0..sequences).map(step).collect() }
    }

    /// Seconds that memory and arithmetic take at best.
    fn bounds(&self, test: Test) -> (f64, f64) {
        let weights = self.executor.decoder().packed_bytes() as f64;
        let kv = self.executor.token_bytes() as f64;
        let c = &self.config;
        let attention = c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads);
        let ffn = match &c.moe {
            Some(moe) => 3 * c.hidden * moe.intermediate * moe.experts_per_token,
            None => 3 * c.hidden * c.intermediate,
        };
        let per_token = 2.0 * (c.layers * (attention + ffn)) as f64;
        let head = 2.0 * (c.hidden * c.vocab) as f64;
        let scores = |context: f64| 4.0 * (c.layers * c.heads * c.head_dim) as f64 * context;
        let (bytes, matrix_ops, attention_ops) = match test {
            Test::Prefill { tokens, depth } => {
                let (n, d) = (tokens as f64, depth as f64);
                (weights + kv * (d + n), per_token * n + head, scores(d + n / 2.0) * n)
            }
            Test::Decode { tokens, depth, batch } => {
                let (n, b) = (tokens as f64, batch as f64);
                let context = depth as f64 + n / 2.0;
                let ops = (per_token + head) * n * b;
                (n * (weights + b * kv * context), ops, scores(context) * n * b)
            }
        };
        let memory = bytes / self.peaks.memory_bytes_per_second;
        (memory, matrix_ops / self.matrix_peak + attention_ops / self.peaks.f32_flops)
    }
}

/// Share of each operation in the time of the steps.
fn profile_text(profile: &StepProfile) -> String {
    let total = profile.total().as_secs_f64().max(f64::MIN_POSITIVE);
    let mut table = Table::new(&["operation", "ms", "share"]);
    for op in StepOp::ALL {
        let seconds = profile.time(op).as_secs_f64();
        let share = format!("{:.1} %", seconds / total * 100.0);
        table.row(&[op.name().to_owned(), format!("{:.1}", seconds * 1e3), share]);
    }
    table.to_string()
}

impl Report {
    fn print(&self) {
        println!(
            "{} ({}), {} threads, {}: loaded in {:.0} ms, weights {:.0} MB, peak memory {:.0} MB",
            self.model,
            self.format,
            self.threads,
            self.isa,
            self.load_ms,
            self.packed_bytes as f64 / 1e6,
            self.peak_resident_bytes.unwrap_or(0) as f64 / 1e6,
        );
        let int8 = self.int8_gops.map_or(String::new(), |g| format!(", int8 {g:.0} GOP/s"));
        let bf16 = self.bf16_gflops.map_or(String::new(), |g| format!(", bf16 {g:.0} GFLOP/s"));
        println!(
            "this machine now: memory {:.1} GB/s, f32 {:.0} GFLOP/s{int8}{bf16}",
            self.memory_gb_per_second, self.f32_gflops
        );
        let mut table = Table::new(&["test", "tokens/s", "min", "max", "of the bound"]);
        for row in &self.rows {
            table.row(&[
                row.test.clone(),
                format!("{:.1}", row.tokens_per_second),
                format!("{:.1}", row.min),
                format!("{:.1}", row.max),
                format!("{:.0} % {}", row.bound_share * 100.0, row.bound),
            ]);
        }
        print!("{table}");
        for row in &self.rows {
            if let Some(profile) = &row.profile {
                println!("\n{}\n{profile}", row.test);
            }
        }
    }
}

const MEASURE_TIME: Duration = Duration::from_millis(1500);
const FILL_CHUNK: usize = 512;
const BATCH_MAX: usize = 1024;
