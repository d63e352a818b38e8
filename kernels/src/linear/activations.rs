//! The inputs of a step, as floats and as eight-bit integers.

use super::layout::STEP;
use crate::isa::Isa;
use crate::pool::ThreadPool;

/// Inputs `[tokens][cols]` that several matrices read.
///
/// Write them through [`resize`](Self::resize) or [`values_mut`](Self::values_mut); the eight-bit
/// form is made once, by the first product that wants it. Buffers grow and are kept.
#[derive(Debug, Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    values: Vec<f32>,
    blocks: Vec<QuantBlock>,
    quantized: bool,
    tiles: Vec<f32>,
    interleaved: bool,
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
    pub fn resize(&mut self, tokens: usize, cols: usize) -> &mut [f32] {
        (self.tokens, self.cols) = (tokens, cols);
        let len = tokens.checked_mul(cols).expect("inputs fit into memory");
        if self.values.len() < len {
            self.values.resize(len, 0.0);
        }
        self.values_mut()
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Inputs of a token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The inputs, `[tokens][cols]`.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.tokens * self.cols]
    }

    /// The inputs for writing; their eight-bit form is made anew when it is needed next.
    pub fn values_mut(&mut self) -> &mut [f32] {
        (self.quantized, self.interleaved) = (false, false);
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
                    Isa::Avx512 => unsafe { crate::arch::avx512::quantize_row(values, blocks) },
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

    /// Makes the form that products with float weights read, if there are more than a few tokens:
    /// tiles of [`TILE`] tokens with the tokens side by side, `[tile][cols][TILE]`, so that a
    /// tile reads one stream and not twelve that fall into the same set of the cache.
    pub(crate) fn interleave(&mut self, pool: &ThreadPool) {
        if self.interleaved || self.tokens <= DIRECT_TOKENS {
            return;
        }
        let (tokens, cols) = (self.tokens, self.cols);
        let tiles = tokens.div_ceil(TILE);
        if self.tiles.len() < tiles * TILE * cols {
            self.tiles.resize(tiles * TILE * cols, 0.0);
        }
        let values = &self.values;
        let out = &mut self.tiles[..tiles * TILE * cols];
        pool.run_chunks(out, (TILE * cols).max(1), |tile, out| {
            for t in 0..TILE.min(tokens - tile * TILE) {
                let row = &values[(tile * TILE + t) * cols..][..cols];
                for (v, out) in row.iter().zip(out.chunks_exact_mut(TILE)) {
                    out[t] = *v;
                }
            }
        });
        self.interleaved = true;
    }

    /// The tokens `token..` of a tile, as a pointer to the first input of the first of them, the
    /// distance to the next token and the distance to the next column.
    ///
    /// Tiles begin at multiples of [`TILE`] tokens, unless there are [`DIRECT_TOKENS`] or fewer.
    pub(crate) fn tile(&self, token: usize) -> (*const f32, usize, usize) {
        if self.tokens <= DIRECT_TOKENS {
            return (self.values[token * self.cols..].as_ptr(), self.cols, 1);
        }
        debug_assert!(self.interleaved);
        (self.tiles[token / TILE * TILE * self.cols + token % TILE..].as_ptr(), 1, TILE)
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

/// Tokens of a tile of float inputs.
pub(crate) const TILE: usize = 12;

/// Up to so many tokens, float inputs are read where they are.
pub(crate) const DIRECT_TOKENS: usize = 4;

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
