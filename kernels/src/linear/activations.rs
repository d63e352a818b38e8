//! The inputs of a step, as floats and as eight-bit integers.

use super::layout::STEP;
use super::tiles::{DIRECT_TOKENS, Tile, Tiles};
use crate::float::{bf16_to_f32, f32_to_bf16};
use crate::isa::Isa;
use crate::pool::ThreadPool;

/// Inputs `[tokens][cols]` that several matrices read.
///
/// Write them through [`resize`](Self::resize) or [`values_mut`](Self::values_mut); each other form
/// is made once, by the first product that wants it. Buffers grow and are kept.
#[derive(Debug, Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    values: Vec<f32>,
    blocks: Vec<QuantBlock>,
    quantized: bool,
    plain: Tiles<f32>,
    rounded: Tiles<f32>,
    pairs: Tiles<u32>,
}

/// 32 inputs of a token as integers: `value = scale * code`. One cache line.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct QuantBlock {
    pub codes: [i8; STEP],
    pub scale: f32,
    /// Sum of the codes.
    pub sum: f32,
    /// Sums of the first and last 16 codes.
    pub sums: [f32; 2],
    /// -128 times the sums above: what a weight code that is 128 too large adds.
    pub offset: i32,
    pub offsets: [i32; 2],
    pub pad: u32,
}

impl QuantBlock {
    /// A block without its codes, and what its inputs are multiplied with for them; nothing if they stay
    /// zero. `largest` holds the bits of the largest magnitude: as integers, magnitudes are in the same
    /// order, with the NaNs above infinity. A block with an infinity or a NaN gets a NaN as its scale,
    /// so that the error shows in every output instead of hiding.
    #[inline]
    pub fn begin(largest: u32) -> (QuantBlock, Option<f32>) {
        let mut block = QuantBlock::default();
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            block.scale = f32::NAN;
            return (block, None);
        }
        if largest < SMALLEST {
            return (block, None);
        }
        block.scale = largest / 127.0;
        (block, Some(127.0 / largest))
    }

    /// Keeps the sums of the first and last 16 codes in all forms that kernels want.
    #[inline]
    pub fn set_sums(&mut self, sums: [i32; 2]) {
        self.sums = sums.map(|sum| sum as f32);
        self.sum = (sums[0] + sums[1]) as f32;
        self.offsets = sums.map(|sum| -128 * sum);
        self.offset = -128 * (sums[0] + sums[1]);
    }
}

impl Activations {
    /// Without tokens.
    pub fn new() -> Activations {
        Activations::default()
    }

    /// Sets the shape and gives the values to be written, `[tokens][cols]`, with what was there.
    #[inline]
    pub fn resize(&mut self, tokens: usize, cols: usize) -> &mut [f32] {
        (self.tokens, self.cols) = (tokens, cols);
        let len = tokens.checked_mul(cols).expect("inputs fit into memory");
        if self.values.len() < len {
            self.values.resize(len, 0.0);
        }
        self.values_mut()
    }

    /// Tokens.
    #[inline]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Inputs of a token.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The inputs, `[tokens][cols]`.
    #[inline]
    pub fn values(&self) -> &[f32] {
        &self.values[..self.tokens * self.cols]
    }

    /// The inputs for writing; their other forms are made anew when they are needed next.
    #[inline]
    pub fn values_mut(&mut self) -> &mut [f32] {
        self.quantized = false;
        self.plain.clear();
        self.rounded.clear();
        self.pairs.clear();
        &mut self.values[..self.tokens * self.cols]
    }

    /// Makes the eight-bit form now, if the values changed since it was made.
    ///
    /// # Panics
    /// If the columns are not a multiple of 32.
    pub fn quantize(&mut self, pool: &ThreadPool, isa: Isa) {
        if self.quantized {
            return;
        }
        assert!(self.cols.is_multiple_of(STEP), "quantized products have whole blocks of inputs");
        isa.assert_available();
        let stride = stride(self.cols);
        let len = self.tokens * stride;
        if self.blocks.len() < len {
            self.blocks.resize(len, QuantBlock::default());
        }
        let (values, cols, start) = (&self.values, self.cols, Start(self.blocks.as_mut_ptr()));
        let run = (VALUES_PER_TASK / cols.max(1)).max(1);
        pool.run(self.tokens.div_ceil(run), &|task| {
            for token in task * run..self.tokens.min((task + 1) * run) {
                let values = &values[token * cols..][..cols];
                // SAFETY: each token belongs to one task, and `blocks` holds `stride` of them
                // for each token.
                let blocks = unsafe { start.row(token * stride, cols / STEP) };
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the CPU was asserted to have the instruction set.
                    Isa::Avx512 | Isa::Avx512Bf16 => unsafe {
                        crate::arch::avx512::quantize_row(values, blocks)
                    },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: as above.
                    Isa::Avx2 => unsafe { crate::arch::avx2::quantize_row(values, blocks) },
                    #[cfg(target_arch = "aarch64")]
                    // SAFETY: the CPU was asserted to have the instruction set.
                    Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => unsafe {
                        crate::arch::neon::quantize_row(values, blocks)
                    },
                    _ => quantize_row(values, blocks),
                }
            }
        });
        self.quantized = true;
    }

    /// Makes the form that products with weights of binary32 or binary16 read, if there are more than
    /// a few tokens.
    pub(crate) fn interleave(&mut self, pool: &ThreadPool) {
        if self.tokens > DIRECT_TOKENS {
            let values = &self.values[..self.tokens * self.cols];
            self.plain
                .make(pool, values, self.cols, self.cols, |from, to| to.copy_from_slice(from));
        }
    }

    /// Makes the form that products with bfloat16 weights read: the same, rounded.
    pub(crate) fn round(&mut self, pool: &ThreadPool) {
        let values = &self.values[..self.tokens * self.cols];
        self.rounded.make(pool, values, self.cols, self.cols, |from, to| {
            from.iter().zip(to).for_each(|(from, to)| *to = rounded(*from));
        });
    }

    /// Makes the form of [`Isa::Avx512Bf16`] for bfloat16 weights: the rounded inputs of two columns,
    /// the first of them in the upper half.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn pair(&mut self, pool: &ThreadPool) {
        Isa::Avx512Bf16.assert_available();
        let values = &self.values[..self.tokens * self.cols];
        self.pairs.make(pool, values, self.cols, self.cols.div_ceil(2), |from, to| {
            // SAFETY: the CPU was asserted to have the instruction set.
            unsafe { crate::arch::avx512::pair_row(from, to) }
        });
    }

    /// The inputs of the tokens `token..` as products with weights of binary32 or binary16 read them.
    pub(crate) fn plain(&self, token: usize) -> Tile<f32> {
        if self.tokens <= DIRECT_TOKENS {
            let first = self.values[token * self.cols..].as_ptr();
            return Tile { first, next_token: self.cols, next_unit: 1 };
        }
        self.plain.tile(token)
    }

    /// The same for weights of bfloat16.
    pub(crate) fn rounded(&self, token: usize) -> Tile<f32> {
        self.rounded.tile(token)
    }

    /// The same for weights of bfloat16 in pairs.
    pub(crate) fn pairs(&self, token: usize) -> Tile<u32> {
        self.pairs.tile(token)
    }

    /// The blocks of one token.
    pub(crate) fn blocks(&self, token: usize) -> &[QuantBlock] {
        debug_assert!(self.quantized);
        &self.blocks[token * stride(self.cols)..][..self.cols / STEP]
    }
}

/// Blocks from one token to the next: odd, so that the tokens of a tile do not all fall into the
/// same set of the cache.
fn stride(cols: usize) -> usize {
    (cols / STEP) | 1
}

/// An input of bfloat16 weights: the nearest bfloat16, ties to even. What is too small for a normal one
/// is zero, since the instructions for pairs take it for that.
#[inline]
pub(crate) fn rounded(value: f32) -> f32 {
    let rounded = bf16_to_f32(f32_to_bf16(value));
    if value.is_subnormal() { 0.0_f32.copysign(value) } else { rounded }
}

fn quantize_row(values: &[f32], blocks: &mut [QuantBlock]) {
    for (values, block) in values.as_chunks::<STEP>().0.iter().zip(blocks) {
        *block = quantize_block(values);
    }
}

/// Nearest even of `127 * value / largest magnitude`.
fn quantize_block(values: &[f32; STEP]) -> QuantBlock {
    let largest = values.iter().fold(0, |max, v| (v.to_bits() & 0x7fff_ffff).max(max));
    let (mut block, inverse) = QuantBlock::begin(largest);
    let Some(inverse) = inverse else { return block };
    let mut sums = [0; 2];
    for (i, (v, code)) in values.iter().zip(&mut block.codes).enumerate() {
        *code = (v * inverse).round_ties_even() as i8;
        sums[i / 16] += i32::from(*code);
    }
    block.set_sums(sums);
    block
}

/// The start of the blocks that tasks write disjoint parts of.
struct Start(*mut QuantBlock);

// SAFETY: the pointer is only used to make slices that do not overlap (see `quantize`).
unsafe impl Sync for Start {}

impl Start {
    /// # Safety
    /// The range lies inside of the buffer, and nobody else uses it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, first: usize, len: usize) -> &mut [QuantBlock] {
        // SAFETY: promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), len) }
    }
}

/// Blocks below this magnitude are zero: their inverse would overflow.
const SMALLEST: f32 = 1e-30;

/// Values that a task quantizes: enough to be worth handing out.
const VALUES_PER_TASK: usize = 8192;
