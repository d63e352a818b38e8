//! What [`engine::device::Device`] asks for is enough: a second device, written from its description
//! alone and as unlike the CPU as can be ([`far`]), runs the same forward pass to the same logits, and
//! blocks move between the two.

mod far;
mod memory;
#[allow(dead_code)]
#[path = "../models/mod.rs"]
mod models;

use cache::BlockId;
use engine::device::{Device, DeviceError};
use engine::executor::{
    Executor, ExecutorOptions, KvCapacity, KvDtype, RowValues, StepError, StepOp,
};
use engine::model::{Architecture, Decoder, DecoderConfig, RopeLayout};
use engine::weights::Format;
use engine::weights::testing::{ARCHITECTURES, Random, tiny};
use far::Far;
use kernels::isa::Isa;
use kernels::pool::ThreadPool;
use models::TinyModel;
use protocol::SequenceId;
use scheduler::{LogitsWanted, SequenceStep, StepPlan};
use std::sync::Arc;

#[test]
fn every_architecture_gives_the_same_logits() {
    let mut configs = Vec::from(ARCHITECTURES.map(|a| (a.name(), tiny(a))));
    let mut config = tiny(Architecture::Llama);
    config.rope.layout = RopeLayout::Interleaved;
    (config.qkv_bias, config.o_bias, config.mlp_bias) = (true, true, true);
    configs.push(("llama, interleaved, every bias", config));
    for (name, config) in configs {
        let (mut host, mut far) = both(&config, Format::F32, KvDtype::F32);
        let worst = distance(&mixed_steps(&mut far), &mixed_steps(&mut host));
        assert!(worst <= FLOATS, "{name}: {worst:e}");
        let worst = distance(&one_by_one(&mut far), &one_by_one(&mut host));
        assert!(worst <= FLOATS, "{name}, row by row: {worst:e}");
    }
}

/// The CPU rounds the inputs of bfloat16 weights to bfloat16 and those of quantized ones to eight bits, which
/// the other device does not.
#[test]
fn packing_is_the_device_s_own_business() {
    for format in Format::ALL {
        let (mut host, mut far) = both(&tiny(Architecture::Llama), format, KvDtype::F16);
        let is_rounded = format.is_quantized() || format == Format::BF16;
        let bound = if is_rounded { QUANTIZED } else { HALVES };
        let worst = distance(&mixed_steps(&mut far), &mixed_steps(&mut host));
        assert!(worst <= bound, "{format}: {worst:e}");
    }
}

#[test]
fn blocks_leave_one_device_and_enter_the_other() {
    for architecture in ARCHITECTURES {
        for (dtype, bound) in
            [(KvDtype::F32, FLOATS), (KvDtype::F16, HALVES), (KvDtype::Bf16, HALVES)]
        {
            let what = format!("{architecture} {dtype:?}");
            let config = tiny(architecture);
            let (mut host, mut far) = both(&config, Format::F32, dtype);
            let (want, ours) = (whole(&mut host), whole(&mut far));
            // What each goes on with is what the other has computed.
            let there = go_on(&mut far, &host);
            assert!(distance(&there, &want[PREFIX..]) <= bound, "{what}: host to device");
            let here = go_on(&mut host, &far);
            assert!(distance(&here, &ours[PREFIX..]) <= bound, "{what}: device to host");
        }
    }
}

/// A block comes out as it went in, and only where it went.
#[test]
fn a_block_s_bytes_stay() {
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        let (mut host, mut far) = both(&tiny(Architecture::Qwen3), Format::F32, dtype);
        whole(&mut host);
        for (from, to) in [(0, 7), (1, 0), (2, 3)].map(|(a, b)| (BlockId(a), BlockId(b))) {
            let payload = host.block_payload(from).expect("a block").to_vec();
            let (begin, end) = payload.split_at(payload.len() / 3);
            far.write_block_pieces(to, &[begin, end]).expect("a block of the same layout");
            let back = far.block_payload(to).expect("a block").to_vec();
            assert_eq!(back, payload, "{dtype:?}");
            host.write_block(to, &back).expect("a block of the same layout");
            assert_eq!(host.block_payload(to), Some(payload.as_slice()), "{dtype:?}");
        }
        assert_ne!(far.block_payload(BlockId(7)), far.block_payload(BlockId(0)));
        assert!(far.block_payload(BlockId(BLOCKS as u32)).is_none());
        assert!(far.write_block(BlockId(0), &[0; 3]).is_err());
    }
}

/// Blocks of devices that round differently are never taken for each other's.
#[test]
fn arithmetic_is_a_part_of_the_identity() {
    let (host, far) = both(&tiny(Architecture::Llama), Format::F32, KvDtype::F16);
    assert_eq!(host.kv_layout(), far.kv_layout());
    assert_ne!(host.identity().digest(), far.identity().digest());
}

#[test]
fn a_failure_is_reported_by_its_step_and_stays() {
    let options = options(KvDtype::F32);
    for architecture in [Architecture::Llama, Architecture::Mixtral] {
        let (mut executor, far) = on_far(&tiny(architecture), Format::F32, &options);
        let mut next = |at: usize, wanted| {
            let sequences = vec![step(1, at, 3, &[0, 1], wanted)];
            executor.step(&plan(sequences)).map(|_| ())
        };
        assert_eq!(next(0, LogitsWanted::Last), Ok(()));
        // In the middle of a step that nobody wants anything of.
        far.memory.fail_after(9);
        let lost = DeviceError::Lost { reason: "it was told to".into() };
        assert_eq!(next(3, LogitsWanted::None), Err(StepError::Device(lost.clone())));
        assert_eq!(next(3, LogitsWanted::Last), Err(StepError::Device(lost)));
        assert!(executor.block_payload(BlockId(0)).is_none());
    }
}

/// A step waits once, at its end; with a clock, after each operation, so that time is counted where
/// it is spent.
#[test]
fn steps_and_their_clock_wait() {
    for profile in [false, true] {
        let options = ExecutorOptions { profile, ..options(KvDtype::F32) };
        let (mut executor, far) = on_far(&tiny(Architecture::Llama), Format::F32, &options);
        let sequences = vec![step(1, 0, 4, &[0], LogitsWanted::None)];
        executor.step(&plan(sequences)).expect("a sound plan");
        assert_eq!(far.memory.waiting(), 0);
        assert_eq!(far.memory.waits() == 1, !profile);
        assert_eq!(executor.profile().time(StepOp::Qkv).is_zero(), !profile);
    }
}

/// Steps of two sequences that mix prefill and decode and want everything that can be wanted.
fn mixed_steps<D: Device>(executor: &mut Executor<D>) -> Vec<Vec<f32>> {
    use LogitsWanted::*;
    let (a, b) = (&[9, 4, 0, 7, 2], &[1, 8]);
    let steps = [
        [step(1, 0, 11, a, None), step(2, 0, 9, b, Last)],
        [step(2, 9, 1, b, All), step(1, 11, 9, a, Last)],
        [step(1, 20, 17, a, All), step(2, 10, 4, b, Hidden)],
    ];
    let mut rows = Vec::new();
    for sequences in steps {
        let output = executor.step(&plan(sequences.to_vec())).expect("a sound plan");
        for index in 0..output.len() {
            rows.extend(output.logits(index).chunks(output.vocab()).map(<[f32]>::to_vec));
            rows.extend(output.hidden(index).chunks(output.hidden_size()).map(<[f32]>::to_vec));
        }
    }
    assert_eq!(rows.len(), 1 + 1 + 1 + 17 + 4);
    rows
}

fn one_by_one<D: Device>(executor: &mut Executor<D>) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    let logits = step(3, 0, 7, &[5], LogitsWanted::All);
    let hidden = step(4, 0, 3, &[6], LogitsWanted::Hidden);
    executor
        .step_each(&plan(vec![logits, hidden]), &mut |row| match row.values {
            RowValues::Logits(values) | RowValues::Hidden(values) => rows.push(values.to_vec()),
        })
        .expect("a sound plan");
    assert_eq!(rows.len(), 7 + 3);
    rows
}

/// All logits of the first sequence, in one step, from blocks 0, 1, 2 and so on.
fn whole<D: Device>(executor: &mut Executor<D>) -> Vec<Vec<f32>> {
    run(executor, 0, &[0, 1, 2, 3, 4])
}

/// Takes the blocks of the prefix from an executor that has run [`whole`], puts them elsewhere, and
/// computes the rest.
fn go_on<D: Device, E: Device>(executor: &mut Executor<D>, from: &Executor<E>) -> Vec<Vec<f32>> {
    let table = [11, 6, 10, 8, 9];
    for (block, to) in (0..).zip(&table[..PREFIX / BLOCK_TOKENS]) {
        let payload = from.block_payload(BlockId(block)).expect("a block");
        executor.write_block(BlockId(*to), &payload).expect("a block of the same layout");
    }
    run(executor, PREFIX, &table)
}

fn run<D: Device>(executor: &mut Executor<D>, at: usize, table: &[u32]) -> Vec<Vec<f32>> {
    let sequences = vec![step(1, at, TOKENS - at, table, LogitsWanted::All)];
    let output = executor.step(&plan(sequences)).expect("a sound plan");
    output.logits(0).chunks(output.vocab()).map(<[f32]>::to_vec).collect()
}

/// One model on both devices, in passes of seven tokens.
fn both(config: &DecoderConfig, format: Format, dtype: KvDtype) -> (Executor, Executor<Far>) {
    let model = TinyModel::new(config.clone(), format, SEED).load(Isa::detect());
    let host = Executor::new(model, &options(dtype)).expect("sound options");
    (host, on_far(config, format, &options(dtype)).0)
}

/// A model on the other device, and a handle of the device.
fn on_far(
    config: &DecoderConfig,
    format: Format,
    options: &ExecutorOptions,
) -> (Executor<Far>, Far) {
    let (far, pool) = (Far::default(), ThreadPool::new(1));
    let model = Arc::new(TinyModel::new(config.clone(), format, SEED));
    let decoder = Decoder::load_on(&far, &pool, model, None, &mut |_| {});
    let decoder = decoder.expect("a whole model loads");
    let executor = Executor::on(far.clone(), decoder, options).expect("sound options");
    (executor, far)
}

fn options(dtype: KvDtype) -> ExecutorOptions {
    ExecutorOptions {
        kv_dtype: dtype,
        block_tokens: BLOCK_TOKENS,
        kv_capacity: KvCapacity::Blocks(BLOCKS),
        threads: 2,
        tokens_per_pass: 7,
        profile: false,
    }
}

fn plan(sequences: Vec<SequenceStep>) -> StepPlan {
    StepPlan { sequences }
}

/// `count` tokens from `position` on of the sequence's text.
fn step(
    id: u64,
    position: usize,
    count: usize,
    table: &[u32],
    wanted: LogitsWanted,
) -> SequenceStep {
    let mut random = Random::new(id);
    let tokens: Vec<u32> = (0..position + count).map(|_| random.below(250) as u32).collect();
    SequenceStep {
        sequence: SequenceId(id),
        tokens: tokens[position..].to_vec(),
        position,
        blocks: table.iter().map(|&b| BlockId(b)).collect(),
        wanted,
    }
}

/// The largest difference of two values, relative to the largest value of their row.
fn distance(got: &[Vec<f32>], want: &[Vec<f32>]) -> f32 {
    assert_eq!(got.len(), want.len());
    let mut worst = 0.0;
    for (got, want) in got.iter().zip(want) {
        assert_eq!(got.len(), want.len());
        let largest = want.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
        for (a, b) in got.iter().zip(want) {
            let distance = (a - b).abs() / largest;
            // Not `max`, which would forget a NaN.
            worst = if distance > worst || distance.is_nan() { distance } else { worst };
        }
        assert!(worst.is_finite());
    }
    worst
}

/// Bounds of [`distance`]: between orders of f32 sums; with values of blocks that round to the other
/// neighbour; with inputs of products in eight bits.
const FLOATS: f32 = 1e-5;
const HALVES: f32 = 1e-3;
const QUANTIZED: f32 = 5e-2;

const SEED: u64 = 5;
/// Past the sliding window, not at a block's end.
const TOKENS: usize = 37;
/// Whole blocks.
const PREFIX: usize = 24;
const BLOCK_TOKENS: usize = 8;
const BLOCKS: usize = 12;
