//! Logits, greedy continuation and the time of each operation, of a model file.
//!
//! ```text
//! logits MODEL --tokens 1,2,3 [--greedy N] [--out FILE] [--kv f16|bf16|f32] [--threads N]
//!              [--quant q8_0|q4_0] [--hidden] [--bench PREFILL,DECODE,DEPTH]
//! ```
//! `--out` gets f32 little-endian `[tokens, vocab]` (`[tokens, hidden]` with `--hidden`).

use cache::BlockId;
use engine::executor::{Executor, ExecutorOptions, KvCapacity, KvDtype, RowValues, StepOp};
use engine::model::{Decoder, LoadOptions, Quant};
use engine::weights::ModelSource;
use kernels::isa::Isa;
use protocol::SequenceId;
use scheduler::{LogitsWanted, SequenceStep, StepPlan};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

struct Arguments {
    model: String,
    tokens: Vec<u32>,
    greedy: usize,
    out: Option<String>,
    hidden: bool,
    quant: Option<Quant>,
    bench: Option<Vec<usize>>,
    executor: ExecutorOptions,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = parse()?;
    let started = Instant::now();
    let source = Arc::new(ModelSource::open(Path::new(&arguments.model))?);
    let options = LoadOptions {
        isa: Isa::detect(),
        threads: arguments.executor.threads,
        quant: arguments.quant,
        progress: &mut |_| {},
    };
    let decoder = Decoder::load(source, options)?;
    eprintln!("loaded in {:.2?}, {} bytes packed", started.elapsed(), decoder.packed_bytes());
    let mut executor = Executor::new(decoder, &arguments.executor)?;
    if let Some(bench) = &arguments.bench {
        return measure(&mut executor, bench[0], bench[1], bench[2]);
    }
    write_rows(&mut executor, &arguments)?;
    if arguments.greedy > 0 {
        println!("{}", greedy(&mut executor, &arguments)?);
    }
    Ok(())
}

fn parse() -> Result<Arguments, Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let mut arguments = Arguments {
        model: words.next().ok_or("the first argument is a model")?,
        tokens: vec![1, 2, 3],
        greedy: 0,
        out: None,
        hidden: false,
        quant: None,
        bench: None,
        executor: ExecutorOptions { profile: true, ..ExecutorOptions::default() },
    };
    while let Some(word) = words.next() {
        if word == "--hidden" {
            arguments.hidden = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let numbers = || value.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
        match word.as_str() {
            "--tokens" => {
                arguments.tokens =
                    numbers()?.into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
            }
            "--greedy" => arguments.greedy = value.parse()?,
            "--out" => arguments.out = Some(value),
            "--threads" => arguments.executor.threads = value.parse()?,
            "--pass" => arguments.executor.tokens_per_pass = value.parse()?,
            "--bench" => arguments.bench = Some(numbers()?),
            "--kv" => {
                arguments.executor.kv_dtype = match value.as_str() {
                    "f16" => KvDtype::F16,
                    "bf16" => KvDtype::Bf16,
                    "f32" => KvDtype::F32,
                    _ => return Err("--kv is f16, bf16 or f32".into()),
                };
            }
            "--quant" => {
                arguments.quant = match value.as_str() {
                    "q8_0" => Some(Quant::Q8_0),
                    "q4_0" => Some(Quant::Q4_0),
                    _ => return Err("--quant is q8_0 or q4_0".into()),
                };
            }
            _ => return Err(format!("unknown argument {word}").into()),
        }
    }
    arguments.executor.kv_capacity = KvCapacity::Bytes(1 << 30);
    Ok(arguments)
}

fn plan(executor: &Executor, tokens: &[u32], position: usize, wanted: LogitsWanted) -> StepPlan {
    let blocks = (position + tokens.len()).div_ceil(executor.block_tokens());
    let step = SequenceStep {
        sequence: SequenceId(0),
        tokens: tokens.to_vec(),
        position,
        blocks: (0..blocks as u32).map(BlockId).collect(),
        wanted,
    };
    StepPlan { sequences: vec![step] }
}

fn write_rows(executor: &mut Executor, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let wanted = if arguments.hidden { LogitsWanted::Hidden } else { LogitsWanted::All };
    let plan = plan(executor, &arguments.tokens, 0, wanted);
    let mut bytes = Vec::new();
    executor.step_each(&plan, &mut |row| {
        let (RowValues::Logits(values) | RowValues::Hidden(values)) = row.values;
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    })?;
    if let Some(out) = &arguments.out {
        std::fs::write(out, bytes)?;
    }
    Ok(())
}

fn greedy(executor: &mut Executor, arguments: &Arguments) -> Result<String, Box<dyn Error>> {
    let (mut next, mut position, mut text) = (arguments.tokens.clone(), 0, Vec::new());
    for _ in 0..arguments.greedy {
        let plan = plan(executor, &next, position, LogitsWanted::Last);
        position += next.len();
        let logits = executor.step(&plan)?.logits(0);
        let best = kernels::ops::argmax(Isa::detect(), logits).ok_or("no logits")?;
        next = vec![best as u32];
        text.push(best.to_string());
    }
    Ok(text.join(","))
}

/// Prefill and decode at a depth, five times each; the median, and where the time went.
fn measure(
    executor: &mut Executor,
    prefill: usize,
    decode: usize,
    depth: usize,
) -> Result<(), Box<dyn Error>> {
    let vocab = executor.decoder().config().vocab;
    let text = |from: usize, len: usize| -> Vec<u32> {
        (from..from + len).map(|i| (i * 7919 % vocab) as u32).collect()
    };
    if depth > 0 {
        let plan = plan(executor, &text(0, depth), 0, LogitsWanted::None);
        executor.step(&plan)?;
    }
    for (name, tokens, per_step) in [("prefill", prefill, prefill), ("decode", decode, 1)] {
        let mut rates = Vec::new();
        for repetition in 0..6 {
            if repetition == 1 {
                executor.clear_profile();
            }
            let started = Instant::now();
            for at in (0..tokens).step_by(per_step.max(1)) {
                let tokens = text(depth + at, per_step);
                let plan = plan(executor, &tokens, depth + at, LogitsWanted::Last);
                executor.step(&plan)?;
            }
            rates.push(tokens as f64 / started.elapsed().as_secs_f64());
        }
        rates.remove(0);
        rates.sort_by(f64::total_cmp);
        println!("{name} {tokens} at {depth}: {:.1} tokens/s", rates[rates.len() / 2]);
        let profile = executor.profile();
        for op in StepOp::ALL {
            let share = profile.time(op).as_secs_f64() / profile.total().as_secs_f64();
            let per_step = profile.time(op) / profile.steps().max(1) as u32;
            println!("  {:<17} {:>5.1} %  {per_step:.1?} a step", op.name(), 100.0 * share);
        }
    }
    Ok(())
}
