//! The logits of a sequence do not depend, bit for bit, on what else is in the batch, on how its
//! prefill was cut, on threads, on the place of its blocks, nor on who computed its prefix.
//!
//! Each architecture is a test of its own; in it, every weight format meets every KV format.

#[allow(dead_code)]
mod models;

use cache::BlockId;
use engine::executor::{Executor, ExecutorOptions, KvCapacity, KvDtype, RowValues};
use engine::model::{Architecture, Decoder, DecoderConfig, RopeLayout};
use engine::weights::Format;
use engine::weights::testing::{Random, tiny};
use kernels::isa::Isa;
use models::TinyModel;
use protocol::SequenceId;
use scheduler::{LogitsWanted, SequenceStep, StepPlan};
use std::sync::Arc;

#[test]
fn llama() {
    let mut config = tiny(Architecture::Llama);
    config.rope.layout = RopeLayout::Interleaved;
    every_format(&config);
}

#[test]
fn llama_with_every_bias() {
    let mut config = tiny(Architecture::Llama);
    (config.qkv_bias, config.o_bias, config.mlp_bias) = (true, true, true);
    every_format(&config);
}

#[test]
fn mistral() {
    every_format(&tiny(Architecture::Mistral));
}

#[test]
fn qwen2() {
    every_format(&tiny(Architecture::Qwen2));
}

#[test]
fn qwen3() {
    every_format(&tiny(Architecture::Qwen3));
}

#[test]
fn mixtral() {
    every_format(&tiny(Architecture::Mixtral));
}

#[test]
fn qwen3_moe() {
    every_format(&tiny(Architecture::Qwen3Moe));
}

/// The claim holds between instruction sets too, so that unlike nodes can share blocks.
#[test]
fn instruction_sets_agree() {
    for architecture in [Architecture::Llama, Architecture::Qwen3Moe] {
        for format in Format::ALL {
            let config = tiny(architecture);
            let rows: Vec<Rows> = Isa::available()
                .map(|isa| {
                    let decoder = TinyModel::new(config.clone(), format, 1).load(isa);
                    let mut one = executor(&decoder, KvDtype::F16, 1, 64);
                    run(&mut one, &text(SUBJECT, 0), &[SUBJECT], &ascending())
                })
                .collect();
            for other in &rows[1..] {
                assert_same(other, &rows[0], &format!("{architecture} {format}: isa"));
            }
        }
    }
}

/// The comparison above can fail: a wrong prefix shows in every row.
#[test]
fn another_prefix_shows() {
    let decoder = TinyModel::new(tiny(Architecture::Llama), Format::Q8_0, 1).load(Isa::detect());
    let mut executor = executor(&decoder, KvDtype::F16, 1, 512);
    let tokens = text(SUBJECT, 0);
    let want = run(&mut executor, &tokens, &[SUBJECT], &ascending());
    let payload = executor.block_payload(BlockId(1)).expect("a block").to_vec();
    executor.write_block(BlockId(0), &payload).expect("a block of the same layout");
    let start = 2 * BLOCK;
    let subject = step(1, &tokens[start..], start, &ascending(), LogitsWanted::All);
    let output = executor.step(&StepPlan { sequences: vec![subject] }).expect("a sound plan");
    let rows = split(output.logits(0), output.vocab());
    assert!(rows.iter().zip(&want[start..]).all(|(row, want)| row != want));
}

fn every_format(config: &DecoderConfig) {
    for (seed, format) in Format::ALL.into_iter().enumerate() {
        let decoder = TinyModel::new(config.clone(), format, seed as u64).load(Isa::detect());
        for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::F32] {
            check(&decoder, dtype, &format!("{} {format} {dtype:?}", config.architecture));
        }
    }
}

fn check(decoder: &Arc<Decoder>, dtype: KvDtype, what: &str) {
    let tokens = text(SUBJECT, 0);
    let mut one = executor(decoder, dtype, 1, 512);
    let want = run(&mut one, &tokens, &[SUBJECT], &ascending());
    assert!(want.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "{what}: finite");

    let by_token = run(&mut one, &tokens, &[1; SUBJECT], &ascending());
    assert_same(&by_token, &want, &format!("{what}: token by token"));
    let odd = run(&mut one, &tokens, &[7, 1, 13, 2, SUBJECT - 23], &ascending());
    assert_same(&odd, &want, &format!("{what}: cut at odd places"));
    let scattered: Vec<u32> = (0..BLOCKS as u32).rev().step_by(3).collect();
    let permuted = run(&mut one, &tokens, &[9, SUBJECT - 9], &scattered);
    assert_same(&permuted, &want, &format!("{what}: permuted blocks"));
    for threads in [2, 3] {
        let mut several = executor(decoder, dtype, threads, 512);
        let rows = run(&mut several, &tokens, &[SUBJECT - 5, 5], &ascending());
        assert_same(&rows, &want, &format!("{what}: {threads} threads"));
    }
    let mut narrow = executor(decoder, dtype, 2, 5);
    let rows = run(&mut narrow, &tokens, &[SUBJECT], &ascending());
    assert_same(&rows, &want, &format!("{what}: passes of five tokens"));
    assert_same(&batched(decoder, dtype), &want, &format!("{what}: in a batch"));
    assert_same(&prefix_of_another(decoder, dtype), &want[2 * BLOCK..], &format!("{what}: prefix"));
    last_and_hidden(&mut one, &want, what);
}

/// The subject beside a decoding sequence, a long prefill and one that ends early.
fn batched(decoder: &Arc<Decoder>, dtype: KvDtype) -> Rows {
    let mut executor = executor(decoder, dtype, 2, 512);
    let tokens = text(SUBJECT, 0);
    let company = [text(40, 100), text(40, 200), text(40, 300)];
    let table = |index: u32| -> Vec<u32> { (0..10).map(|b| b * 4 + index).collect() };
    let mut rows = Vec::new();
    let cuts: [[usize; 4]; 4] =
        [[3, 20, 1, 17], [17, 1, 30, 1], [1, 1, 1, 1], [SUBJECT - 21, 9, 2, 1]];
    let mut at = [0; 4];
    for cut in cuts {
        let all = [&tokens, &company[0], &company[1], &company[2]];
        let steps = (0..4).rev().map(|i| {
            let wanted = if i % 2 == 0 { LogitsWanted::All } else { LogitsWanted::Hidden };
            step(i as u64, &all[i][at[i]..at[i] + cut[i]], at[i], &table(i as u32), wanted)
        });
        let plan = StepPlan { sequences: steps.collect() };
        let output = executor.step(&plan).expect("a sound plan");
        rows.extend(split(output.logits(3), output.vocab()));
        (0..4).for_each(|i| at[i] += cut[i]);
    }
    rows
}

/// Another sequence computes the first two blocks; they are copied to a second executor, where the
/// subject goes on from them.
fn prefix_of_another(decoder: &Arc<Decoder>, dtype: KvDtype) -> Rows {
    let tokens = text(SUBJECT, 0);
    let mut other_tokens = tokens[..2 * BLOCK].to_vec();
    other_tokens.extend(text(9, 400));
    let mut first = executor(decoder, dtype, 2, 512);
    run(&mut first, &other_tokens, &[11, 2 * BLOCK - 2], &ascending());
    let mut second = executor(decoder, dtype, 1, 512);
    assert_eq!(first.identity(), second.identity());
    for (from, to) in [(0, 8), (1, 3)] {
        let payload = first.block_payload(BlockId(from)).expect("a block").to_vec();
        second.write_block(BlockId(to), &payload).expect("a block of the same layout");
    }
    let table = [8, 3, 0, 5, 1];
    let start = 2 * BLOCK;
    let plan =
        StepPlan { sequences: vec![step(9, &tokens[start..], start, &table, LogitsWanted::All)] };
    let output = second.step(&plan).expect("a sound plan");
    split(output.logits(0), output.vocab())
}

/// `Last` gives the row that `All` gives, rows taken one by one are those of a step, and hidden
/// states do not depend on the cut either.
fn last_and_hidden(executor: &mut Executor, want: &[Vec<u32>], what: &str) {
    let tokens = text(SUBJECT, 0);
    let plan = StepPlan { sequences: vec![step(1, &tokens, 0, &ascending(), LogitsWanted::Last)] };
    let output = executor.step(&plan).expect("a sound plan");
    let rows = split(output.logits(0), output.vocab());
    assert_same(&rows, &want[SUBJECT - 1..], &format!("{what}: last"));
    let mut each = Vec::new();
    let plan = StepPlan { sequences: vec![step(1, &tokens, 0, &ascending(), LogitsWanted::All)] };
    executor
        .step_each(&plan, &mut |row| {
            assert_eq!((row.sequence, row.position), (SequenceId(1), each.len()));
            if let RowValues::Logits(values) = row.values {
                each.push(values.iter().map(|v| v.to_bits()).collect());
            }
        })
        .expect("a sound plan");
    assert_same(&each, want, &format!("{what}: one by one"));
    let mut hidden = |at: usize, tokens: &[u32]| {
        let sequences = vec![step(1, tokens, at, &ascending(), LogitsWanted::Hidden)];
        let output = executor.step(&StepPlan { sequences }).expect("a sound plan");
        split(output.hidden(0), output.hidden_size())
    };
    let whole = hidden(0, &tokens);
    let mut cut = hidden(0, &tokens[..11]);
    cut.extend(hidden(11, &tokens[11..]));
    assert_eq!(whole.len(), SUBJECT);
    assert_same(&cut, &whole, &format!("{what}: hidden states"));
}

/// Bits of logits for each token.
type Rows = Vec<Vec<u32>>;

fn executor(decoder: &Arc<Decoder>, dtype: KvDtype, threads: usize, pass: usize) -> Executor {
    let options = ExecutorOptions {
        kv_dtype: dtype,
        block_tokens: BLOCK,
        kv_capacity: KvCapacity::Blocks(BLOCKS),
        threads,
        tokens_per_pass: pass,
        profile: false,
    };
    Executor::new(Arc::clone(decoder), &options).expect("sound options")
}

/// All logits of `tokens`, computed in steps of the lengths `cuts`.
fn run(executor: &mut Executor, tokens: &[u32], cuts: &[usize], table: &[u32]) -> Rows {
    let mut rows = Vec::new();
    let mut at = 0;
    for &cut in cuts {
        let tokens = &tokens[at..at + cut];
        let plan = StepPlan { sequences: vec![step(1, tokens, at, table, LogitsWanted::All)] };
        let output = executor.step(&plan).expect("a sound plan");
        rows.extend(split(output.logits(0), output.vocab()));
        at += cut;
    }
    assert_eq!(at, tokens.len());
    rows
}

fn step(
    id: u64,
    tokens: &[u32],
    position: usize,
    table: &[u32],
    wanted: LogitsWanted,
) -> SequenceStep {
    SequenceStep {
        sequence: SequenceId(id),
        tokens: tokens.to_vec(),
        position,
        blocks: table.iter().map(|&b| BlockId(b)).collect(),
        wanted,
    }
}

fn split(logits: &[f32], vocab: usize) -> Rows {
    logits.chunks(vocab).map(|row| row.iter().map(|v| v.to_bits()).collect()).collect()
}

fn ascending() -> Vec<u32> {
    (0..6).collect()
}

fn text(len: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.below(250) as u32).collect()
}

fn assert_same(rows: &[Vec<u32>], want: &[Vec<u32>], what: &str) {
    assert_eq!(rows.len(), want.len(), "{what}: rows");
    for (i, (row, want)) in rows.iter().zip(want).enumerate() {
        let differ = row.iter().zip(want).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 0, "{what}: row {i}: {differ} of {} differ", want.len());
    }
}

/// Tokens of the sequence that is looked at: past the sliding window, not at a block's end.
const SUBJECT: usize = 37;
const BLOCK: usize = 8;
const BLOCKS: usize = 48;
